//! The congestion control that connections on this host begin with.
//!
//! Two of the three parts of a flow's way (application to proxy, proxy to application) are loopback connections. BBR paces
//! every connection by timers, those too, and so halves what a host can carry (decision 0019). The setting counts for
//! applications as they are, since nearly none chooses for itself; a route's `congctl` overrides it for the wire.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

/// The default of this network namespace.
const SETTING: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// What comes in the place of BBR, the first that the kernel allows: outside of the first network namespace it allows
/// only what is in `tcp_allowed_congestion_control`.
const UNPACED: [&str; 2] = ["cubic", "reno"];

/// The kernel's limit, without the byte that ends the name.
const LONGEST_NAME: usize = 15;

/// Why the setting that the configuration names is not in force.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CongestionError {
    #[error(
        "congestion_control: {name} cannot be set ({source}): `sysctl net.ipv4.tcp_available_congestion_control` lists \
         what this kernel has"
    )]
    Set { name: String, source: io::Error },
}

/// What the configuration wants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub(crate) enum CongestionControl {
    /// As the host is set up, unless that is BBR.
    #[default]
    Auto,
    /// As the host is set up.
    System,
    /// This one.
    Named(String),
}

impl From<String> for CongestionControl {
    fn from(text: String) -> Self {
        match text.as_str() {
            "auto" => Self::Auto,
            "system" => Self::System,
            _ => Self::Named(text),
        }
    }
}

impl CongestionControl {
    /// Whether it could be a name at all.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Named(name)
                if name.is_empty()
                    || name.len() > LONGEST_NAME
                    || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') =>
            {
                Err(format!("{name:?} is neither auto, system nor the name of an algorithm such as cubic"))
            }
            _ => Ok(()),
        }
    }

    /// Puts it in force for connections that begin from now on.
    pub(crate) fn apply(&self) -> Result<(), CongestionError> {
        self.apply_to(Path::new(SETTING))
    }

    fn apply_to(&self, setting: &Path) -> Result<(), CongestionError> {
        match self {
            Self::System => {}
            Self::Named(name) => {
                fs::write(setting, name).map_err(|source| CongestionError::Set { name: name.clone(), source })?;
                tracing::info!(name, "congestion control");
            }
            Self::Auto => replace_bbr(setting),
        }
        Ok(())
    }
}

/// Without it everything works, only slower: a warning is enough.
fn replace_bbr(setting: &Path) {
    let current = match fs::read_to_string(setting) {
        Ok(current) => current.trim().to_owned(),
        Err(error) => return tracing::warn!(%error, "congestion control: cannot read the host's setting"),
    };
    if !current.starts_with("bbr") {
        return;
    }
    for name in UNPACED {
        match fs::write(setting, name) {
            Ok(()) => return tracing::info!(name, instead_of = current, "congestion control"),
            Err(error) => tracing::debug!(name, %error, "congestion control: not allowed here"),
        }
    }
    tracing::warn!(current, "congestion control: nothing but BBR is allowed; bulk transfers will be slow");
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn current() -> String {
        fs::read_to_string(SETTING).expect("setting").trim().to_owned()
    }

    /// In a network namespace of the test's own thread; `None` where the kernel has no BBR to begin with.
    fn after(choice: &CongestionControl) -> Option<String> {
        unshare(CloneFlags::CLONE_NEWNET).expect("network namespace: run as root");
        fs::write(SETTING, "bbr").ok()?;
        choice.apply().expect("apply");
        Some(current())
    }

    #[test]
    fn r09_bbr_gives_way_to_what_does_not_pace_loopback() {
        if let Some(found) = after(&CongestionControl::Auto) {
            assert!(UNPACED.contains(&found.as_str()), "{found}");
        }
    }

    #[test]
    fn the_hosts_own_choice_stays_if_it_is_asked_for() {
        if let Some(found) = after(&CongestionControl::System) {
            assert_eq!(found, "bbr");
        }
    }

    #[test]
    fn a_named_one_is_set_or_refused_by_name() {
        unshare(CloneFlags::CLONE_NEWNET).expect("network namespace: run as root");
        CongestionControl::Named("reno".to_owned()).apply().expect("every kernel has it");
        assert_eq!(current(), "reno");
        CongestionControl::Auto.apply().expect("apply");
        assert_eq!(current(), "reno", "what does not pace stays");
        let refused = CongestionControl::Named("nosuch".to_owned()).apply().expect_err("no kernel has it");
        assert!(refused.to_string().contains("nosuch cannot be set"), "{refused}");
        assert_eq!(current(), "reno");
    }

    #[test]
    fn where_nothing_can_be_set_the_daemon_goes_on() {
        let gone = Path::new("/nonexistent/tcp_congestion_control");
        CongestionControl::Auto.apply_to(gone).expect("a warning only");
        CongestionControl::System.apply_to(gone).expect("nothing to do");
    }

    #[test]
    fn names_are_checked() {
        for good in ["auto", "system", "cubic", "dctcp", "bbr2"] {
            CongestionControl::from(good.to_owned()).check().expect(good);
        }
        for bad in ["", "../../x", "a name", "longer_than_15_characters"] {
            CongestionControl::from(bad.to_owned()).check().expect_err(bad);
        }
    }
}
