//! Where the daemon may run: it is made to cut a host off, so it must not do that to the wrong one.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use crate::config::Config;

/// Why this is not the place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SafetyError {
    #[error(
        "refusing to run here: this would cut this machine's network off. Run inside a network and mount namespace of \
         their own (opencluster-rig does), in a VM with opencluster.vm=1 on its kernel command line, or set \
         secure_mode: true and machine_id: {machine_id} in the configuration of the host that is to be locked"
    )]
    ThisMachine { machine_id: String },
    #[error(
        "refusing to run here: the configuration is for machine {configured}, but /etc/machine-id says {actual}. \
         Was a configuration copied from another host?"
    )]
    OtherMachine { configured: String, actual: String },
    #[error("cannot tell where this is running: {path}: {source}")]
    Unknown { path: &'static str, source: io::Error },
}

/// What the decision rests on.
#[derive(Debug)]
struct Place {
    own_network: bool,
    own_mounts: bool,
    kernel_command_line: String,
    machine_id: String,
}

/// Returns only where the daemon may take over the network.
pub(crate) fn check(config: &Config) -> Result<(), SafetyError> {
    decide(&observe()?, config.secure_mode, config.machine_id.as_deref())
}

fn observe() -> Result<Place, SafetyError> {
    let read = |path| fs::read_to_string(path).map_err(|source| SafetyError::Unknown { path, source });
    Ok(Place {
        own_network: !same_network()?,
        own_mounts: !same_mounts()?,
        kernel_command_line: read("/proc/cmdline")?,
        // A host without one cannot be named in a configuration, and so is never the right one.
        machine_id: read("/etc/machine-id").map(|id| id.trim().to_owned()).unwrap_or_default(),
    })
}

/// Whether this process and PID 1 share the network namespace. /proc/1/ns would tell, but only to who may trace PID 1;
/// files of /proc/PID/net have an inode of their own in each namespace.
fn same_network() -> Result<bool, SafetyError> {
    let inode = |path: &'static str| {
        fs::metadata(path).map(|file| file.ino()).map_err(|source| SafetyError::Unknown { path, source })
    };
    Ok(inode("/proc/self/net/dev")? == inode("/proc/1/net/dev")?)
}

/// Whether this process and PID 1 share the mount namespace: a mount's ID belongs to one namespace.
fn same_mounts() -> Result<bool, SafetyError> {
    let mounts = |path: &'static str| {
        fs::read_to_string(path).map(|text| mount_ids(&text)).map_err(|source| SafetyError::Unknown { path, source })
    };
    Ok(!mounts("/proc/self/mountinfo")?.is_disjoint(&mounts("/proc/1/mountinfo")?))
}

fn mount_ids(mountinfo: &str) -> BTreeSet<String> {
    mountinfo.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

fn decide(place: &Place, secure_mode: bool, machine_id: Option<&str>) -> Result<(), SafetyError> {
    if place.own_network && place.own_mounts {
        return Ok(());
    }
    if place.kernel_command_line.split_whitespace().any(|word| word == "opencluster.vm=1") {
        return Ok(());
    }
    match machine_id {
        Some(configured) if secure_mode && configured == place.machine_id && !configured.is_empty() => Ok(()),
        Some(configured) if secure_mode => {
            Err(SafetyError::OtherMachine { configured: configured.to_owned(), actual: place.machine_id.clone() })
        }
        _ => Err(SafetyError::ThisMachine { machine_id: place.machine_id.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn developers_machine() -> Place {
        Place {
            own_network: false,
            own_mounts: false,
            kernel_command_line: "root=/dev/vda quiet".to_owned(),
            machine_id: "abc".to_owned(),
        }
    }

    #[test]
    fn a_developers_machine_is_refused() {
        assert!(matches!(decide(&developers_machine(), false, None), Err(SafetyError::ThisMachine { .. })));
        assert!(matches!(decide(&developers_machine(), false, Some("abc")), Err(SafetyError::ThisMachine { .. })));
        assert!(matches!(decide(&developers_machine(), true, None), Err(SafetyError::ThisMachine { .. })));
    }

    #[test]
    fn one_namespace_of_its_own_is_not_enough() {
        let place = Place { own_network: true, ..developers_machine() };
        assert!(decide(&place, false, None).is_err());
        let place = Place { own_mounts: true, ..developers_machine() };
        assert!(decide(&place, false, None).is_err());
    }

    #[test]
    fn a_rig_a_vm_and_the_named_machine_are_accepted() {
        let rig = Place { own_network: true, own_mounts: true, ..developers_machine() };
        decide(&rig, false, None).expect("rig");
        let vm = Place { kernel_command_line: "quiet opencluster.vm=1".to_owned(), ..developers_machine() };
        decide(&vm, false, None).expect("vm");
        decide(&developers_machine(), true, Some("abc")).expect("named machine");
    }

    #[test]
    fn a_copied_configuration_and_a_nameless_machine_are_refused() {
        assert!(matches!(decide(&developers_machine(), true, Some("xyz")), Err(SafetyError::OtherMachine { .. })));
        let nameless = Place { machine_id: String::new(), ..developers_machine() };
        assert!(decide(&nameless, true, Some("")).is_err());
        let lookalike = Place { kernel_command_line: "opencluster.vm=10".to_owned(), ..developers_machine() };
        assert!(decide(&lookalike, false, None).is_err());
    }

    #[test]
    fn namespaces_of_ones_own_are_seen() {
        assert!(same_network().expect("network") && same_mounts().expect("mounts"), "tests run beside PID 1");
        let script = "stat -L -c %i /proc/self/net/dev; cut -d' ' -f1 /proc/self/mountinfo";
        let output = std::process::Command::new("unshare").args(["-n", "-m", "sh", "-c", script]).output();
        let output = String::from_utf8(output.expect("unshare").stdout).expect("text");
        let (inode, mounts) = output.split_once('\n').expect("lines");
        assert_ne!(inode, fs::metadata("/proc/1/net/dev").expect("PID 1").ino().to_string());
        assert!(mount_ids(mounts).is_disjoint(&mount_ids(&fs::read_to_string("/proc/1/mountinfo").expect("PID 1"))));
    }
}
