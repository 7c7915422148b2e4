//! What a host is known by: its boot, its hardware, its hypervisor.
//!
//! Measured anew for each heartbeat. A copy that was started elsewhere, a disk in another machine and a host that was moved
//! live to a hypervisor that looks different are found by it; a perfect copy is not (that is what nonces and clocks are for).

use std::io;
use std::path::{Path, PathBuf};

use opencluster_identity::digest::Sha256Digest;
use opencluster_policy::lease::Host;

/// What the firmware says of the machine. The last two are readable for root only.
const FIRMWARE: [&str; 5] = ["sys_vendor", "product_name", "bios_vendor", "product_uuid", "product_serial"];

/// What is looked at. The network interfaces are those that were there at the start: one that is added is no other host.
#[derive(Debug)]
pub(crate) struct HostIdentity {
    files: Vec<PathBuf>,
}

/// What it is known by now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Measured {
    /// As in /proc/sys/kernel/random/boot_id.
    pub(crate) boot_id: String,
    /// Over everything else.
    pub(crate) machine: [u8; 32],
}

impl Measured {
    /// The state machine's form.
    pub(crate) fn host(&self) -> Host {
        Host { boot: *Sha256Digest::of(self.boot_id.as_bytes()).as_bytes(), machine: self.machine }
    }
}

impl HostIdentity {
    /// Of this host.
    pub(crate) fn new() -> Self {
        Self::of(Path::new("/sys/class"))
    }

    fn of(class: &Path) -> Self {
        let mut files: Vec<_> = FIRMWARE.iter().map(|name| class.join("dmi/id").join(name)).collect();
        files.extend(hardware_addresses(&class.join("net")));
        Self { files }
    }

    /// Reads everything again.
    pub(crate) fn measure(&self) -> io::Result<Measured> {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Measured { boot_id: boot_id.trim().to_owned(), machine: self.machine() })
    }

    fn machine(&self) -> [u8; 32] {
        // What is not there is a property as well: machines without firmware tables have none tomorrow either.
        let value = |file| std::fs::read_to_string(file).unwrap_or_else(|error| format!("({})", error.kind()));
        let known: Vec<_> = std::iter::once(processor())
            .chain(self.files.iter().map(|file| format!("{}={}", file.display(), value(file).trim())))
            .collect();
        *Sha256Digest::of(known.join("\n").as_bytes()).as_bytes()
    }
}

/// The address files of what is hardware (or a hypervisor's), and not one of the kernel's own inventions.
fn hardware_addresses(interfaces: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(interfaces) else { return Vec::new() };
    let mut files: Vec<_> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|interface| interface.join("device").exists())
        .map(|interface| interface.join("address"))
        .collect();
    files.sort();
    files
}

/// Asked of the processor itself: what the kernel remembers of it is moved along with a guest.
#[cfg(target_arch = "x86_64")]
fn processor() -> String {
    use std::arch::x86_64::__cpuid;
    const HYPERVISOR: u32 = 1 << 31;
    let features = __cpuid(1);
    // Family, model and stepping: the other registers differ from core to core.
    let kind = features.eax;
    // Without a hypervisor its leaf says anything.
    let signature = (features.ecx & HYPERVISOR != 0).then(|| __cpuid(0x4000_0000));
    let vendor = __cpuid(0);
    let brand = [0x8000_0002, 0x8000_0003, 0x8000_0004].map(__cpuid);
    format!("{kind:x} {signature:?} {vendor:?} {brand:?}")
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> String {
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r13_a_host_stays_what_it_is() {
        let host = HostIdentity::new();
        let first = host.measure().expect("measured");
        assert_eq!(first.boot_id.len(), 36);
        // On whichever core it runs.
        let again: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(|| host.measure().expect("measured"))).collect();
            threads.into_iter().map(|thread| thread.join().expect("joined")).collect()
        });
        assert!(again.iter().all(|measured| *measured == first));
    }

    #[test]
    fn r13_another_serial_number_or_hardware_address_is_another_machine() {
        let directory = tempfile::tempdir().expect("a directory");
        let class = directory.path();
        std::fs::create_dir_all(class.join("dmi/id")).expect("created");
        std::fs::create_dir_all(class.join("net/eth0/device")).expect("created");
        std::fs::create_dir_all(class.join("net/veth1")).expect("created");
        let write = |file: &str, text: &str| std::fs::write(class.join(file), text).expect("written");
        write("dmi/id/product_uuid", "11111111-2222-3333-4444-555555555555\n");
        write("net/eth0/address", "52:54:00:00:00:01\n");
        write("net/veth1/address", "52:54:00:00:00:02\n");
        let host = HostIdentity::of(class);
        let first = host.machine();
        write("net/veth1/address", "52:54:00:00:00:03\n");
        std::fs::create_dir_all(class.join("net/eth1/device")).expect("created");
        assert_eq!(host.machine(), first, "an interface of the kernel's own, and a new one, are no other machine");
        write("net/eth0/address", "52:54:00:00:00:09\n");
        assert_ne!(host.machine(), first);
        write("net/eth0/address", "52:54:00:00:00:01\n");
        assert_eq!(host.machine(), first);
        write("dmi/id/product_uuid", "99999999-2222-3333-4444-555555555555\n");
        assert_ne!(host.machine(), first);
    }
}
