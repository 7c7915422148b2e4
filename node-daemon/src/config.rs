//! The daemon's configuration file: strict, so that a typing error does not quietly become a default.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use opencluster_api::local::{BUSY_POLL_US, MAX_BUSY_POLL_US};
use opencluster_identity::{SpiffeId, TrustDomain};
use serde::Deserialize;

use crate::congestion::CongestionControl;

/// A configuration above this is not read.
const MAX_BYTES: u64 = 64 * 1024;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the configuration {} is longer than {MAX_BYTES} bytes", .0.display())]
    TooLong(PathBuf),
    #[error("{}: {source}", path.display())]
    Syntax { path: PathBuf, source: serde_norway::Error },
    #[error("{}: {field}: {fault}", path.display())]
    Value { path: PathBuf, field: &'static str, fault: String },
}

/// What the file says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// This node's name, as in its Node resource and its token.
    pub(crate) node: String,
    /// If given, enrolment into any other trust domain is refused.
    #[serde(default)]
    pub(crate) trust_domain: Option<String>,
    /// `address:port` of each controller replica.
    pub(crate) controllers: Vec<String>,
    /// The one-time enrolment token; the file is deleted once it was read.
    pub(crate) token_file: PathBuf,
    /// The proxy's program.
    #[serde(default = "default_proxy")]
    pub(crate) proxy: PathBuf,
    /// The user and group ID that the proxy runs as.
    #[serde(default = "default_proxy_user")]
    pub(crate) proxy_user: u32,
    /// For sockets: `node.sock` and `proxy.sock`.
    #[serde(default = "default_run_dir")]
    pub(crate) run_dir: PathBuf,
    /// Below the cgroup2 mount.
    #[serde(default = "default_cgroup")]
    pub(crate) cgroup: PathBuf,
    /// The network interfaces to guard; all but loopback if absent.
    #[serde(default)]
    pub(crate) interfaces: Option<Vec<String>>,
    /// The proxy's threads; half as many as cores if absent.
    #[serde(default)]
    pub(crate) workers: Option<u32>,
    /// What connections on this host begin with: `auto` (as the host is set up, unless that is BBR), `system` (as it is
    /// set up) or an algorithm's name.
    #[serde(default)]
    pub(crate) congestion_control: CongestionControl,
    /// How long the proxy's threads poll behind a single message before they sleep, in microseconds; 0: never (decision
    /// 0024).
    #[serde(default = "default_busy_poll_us")]
    pub(crate) busy_poll_us: u32,
    /// How flows are carried.
    #[serde(default)]
    pub(crate) tunnels: Tunnels,
    /// Leave to run on a host itself, together with `machine_id`.
    #[serde(default)]
    pub(crate) secure_mode: bool,
    /// `/etc/machine-id` of the host that may be cut off.
    #[serde(default)]
    pub(crate) machine_id: Option<String>,
    /// Where the proxy's access log goes: a file, or `stderr`.
    #[serde(default = "default_access_log")]
    pub(crate) access_log: PathBuf,
    /// The daemon's own log.
    #[serde(default)]
    pub(crate) log: Log,
}

/// How the proxy carries flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Tunnels {
    /// Small flows share tunnels; bulk gets one of its own.
    #[default]
    Shared,
    /// Each flow has a tunnel of its own from the beginning: more connections, but none that several flows depend on.
    Leased,
}

/// The daemon's own log, on stderr.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Log {
    /// One JSON object a line instead of text.
    #[serde(default)]
    pub(crate) json: bool,
}

fn default_proxy() -> PathBuf {
    "/usr/lib/opencluster/opencluster-proxy".into()
}

fn default_busy_poll_us() -> u32 {
    BUSY_POLL_US
}

fn default_proxy_user() -> u32 {
    65533
}

fn default_run_dir() -> PathBuf {
    "/run/opencluster".into()
}

fn default_cgroup() -> PathBuf {
    "opencluster".into()
}

fn default_access_log() -> PathBuf {
    "stderr".into()
}

impl Config {
    /// Reads and checks the file.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        if fs::metadata(path).map_err(read)?.len() > MAX_BYTES {
            return Err(ConfigError::TooLong(path.to_owned()));
        }
        Self::parse(path, &fs::read_to_string(path).map_err(read)?)
    }

    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self =
            serde_norway::from_str(text).map_err(|source| ConfigError::Syntax { path: path.to_owned(), source })?;
        config.check().map_err(|(field, fault)| ConfigError::Value { path: path.to_owned(), field, fault })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        // The name has to fit into a SPIFFE ID; the trust domain that is tried with does not matter.
        let domain = match &self.trust_domain {
            Some(domain) => TrustDomain::parse(domain).map_err(|error| ("trust_domain", error.to_string()))?,
            None => TrustDomain::parse("example.org").map_err(|error| ("trust_domain", error.to_string()))?,
        };
        SpiffeId::node(&domain, &self.node).map_err(|error| ("node", error.to_string()))?;
        if self.controllers.is_empty() {
            return Err(("controllers", "name at least one controller as address:port".to_owned()));
        }
        self.controller_addresses().map_err(|fault| ("controllers", fault))?;
        if self.proxy_user == 0 {
            return Err(("proxy_user", "the proxy must not run as root: choose an unused user ID".to_owned()));
        }
        let inside = self.cgroup.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !inside || self.cgroup.as_os_str().is_empty() {
            return Err(("cgroup", "must be a relative path such as opencluster, without '..'".to_owned()));
        }
        for (field, path) in [("run_dir", &self.run_dir), ("proxy", &self.proxy), ("token_file", &self.token_file)] {
            if !path.is_absolute() {
                return Err((field, format!("{} is not an absolute path", path.display())));
            }
        }
        if self.workers.is_some_and(|workers| !(1..=64).contains(&workers)) {
            return Err(("workers", "must be between 1 and 64".to_owned()));
        }
        if self.busy_poll_us > MAX_BUSY_POLL_US {
            return Err(("busy_poll_us", format!("must be between 0 (never) and {MAX_BUSY_POLL_US}")));
        }
        self.congestion_control.check().map_err(|fault| ("congestion_control", fault))?;
        if self.secure_mode && self.machine_id.is_none() {
            return Err(("machine_id", "secure_mode needs the ID of this machine (cat /etc/machine-id)".to_owned()));
        }
        Ok(())
    }

    /// Controllers are named by address: a name would need DNS, which has no way out of this host.
    pub(crate) fn controller_addresses(&self) -> Result<Vec<SocketAddr>, String> {
        self.controllers
            .iter()
            .map(|text| {
                text.parse::<SocketAddr>().map_err(|_| {
                    if is_name_and_port(text) {
                        format!("{text:?} is a name: give an IP address and port (there is no DNS on a locked host)")
                    } else {
                        format!("{text:?} is not address:port, for example 10.0.0.2:7443 or [fd00::2]:7443")
                    }
                })
            })
            .collect()
    }

    /// The proxy's threads. Half of the cores, if nothing else is said: the others are the applications', and flows that
    /// meet in fewer threads share more (decision 0021).
    pub(crate) fn workers(&self) -> u32 {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.unwrap_or_else(|| (cores() / 2).clamp(1, 64) as u32)
    }
}

/// Told by its form: reading a file asks no name server.
fn is_name_and_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(name, port)| {
        port.parse::<u16>().is_ok()
            && name.contains(|character: char| character.is_ascii_alphabetic())
            && !name.contains(':')
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "node: a\ncontrollers: ['10.88.0.2:7443', '[fd88::2]:7443']\ntoken_file: /run/token\n";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("node.yaml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_filled_in() {
        let config = parse(GOOD).expect("good");
        assert_eq!(config.proxy_user, 65533);
        assert_eq!(config.controller_addresses().expect("addresses").len(), 2);
        assert!(!config.secure_mode);
    }

    #[test]
    fn faults_name_their_place() {
        for (text, expected) in [
            (format!("{GOOD}protxy: /x\n"), "unknown field `protxy`"),
            ("node: a\n".to_owned(), "missing field"),
            (GOOD.replace("node: a", "node: A/B"), "node.yaml: node:"),
            (GOOD.replace("10.88.0.2:7443", "10.88.0.2"), "is not address:port"),
            (GOOD.replace("10.88.0.2:7443", "10.88.0.256:7443"), "is not address:port"),
            (GOOD.replace("10.88.0.2:7443", "ctl.example.org:7443"), "ctl.example.org:7443\" is a name"),
            (format!("{GOOD}proxy_user: 0\n"), "must not run as root"),
            (format!("{GOOD}cgroup: ../x\n"), "cgroup: must be a relative path"),
            (format!("{GOOD}secure_mode: true\n"), "machine_id: secure_mode needs"),
            (format!("{GOOD}workers: 0\n"), "workers: must be between"),
            (format!("{GOOD}busy_poll_us: 1001\n"), "busy_poll_us: must be between 0"),
            (format!("{GOOD}congestion_control: ../x\n"), "congestion_control: \"../x\" is neither"),
            (format!("{GOOD}run_dir: run\n"), "run_dir: run is not an absolute path"),
        ] {
            let error = parse(&text).expect_err(&text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_ends_without_a_panic(text in "\\PC{0,200}") {
            drop(parse(&text));
        }
    }
}
