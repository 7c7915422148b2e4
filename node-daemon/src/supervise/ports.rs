//! Keeps the kernel from handing out the capture ports as the local ports of other connections: a listener could then not be
//! made on them, and its workload would have no network.

use std::fs;
use std::io;
use std::ops::RangeInclusive;

/// Per network namespace, both address families.
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
const EPHEMERAL: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Why the capture ports are not ours.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortsError {
    #[error("capture ports: cannot read {path}: {source}")]
    Read { path: &'static str, source: io::Error },
    #[error(
        "capture ports: {start}-{end} lie within {EPHEMERAL}, and cannot be reserved: {source}. Do one of: \
         sysctl -w net.ipv4.ip_local_reserved_ports={start}-{end}; sysctl -w net.ipv4.ip_local_port_range='32768 60999'"
    )]
    Taken { start: u16, end: u16, source: io::Error },
}

/// Reserves `ports`, beside what is reserved already. Where that is not allowed, it is enough that the kernel does not choose
/// among them.
pub(crate) fn reserve(ports: &RangeInclusive<u16>) -> Result<(), PortsError> {
    let reserved = read(RESERVED)?;
    if contains(&reserved, ports) {
        return Ok(());
    }
    let (start, end) = (*ports.start(), *ports.end());
    let wanted = [reserved.trim(), &format!("{start}-{end}")].join(",");
    match fs::write(RESERVED, wanted.trim_start_matches(',')) {
        Ok(()) => Ok(()),
        Err(source) if overlaps(&read(EPHEMERAL)?, ports) => Err(PortsError::Taken { start, end, source }),
        Err(error) => {
            tracing::info!(%error, "the capture ports could not be reserved; the kernel does not choose among them anyway");
            Ok(())
        }
    }
}

fn read(path: &'static str) -> Result<String, PortsError> {
    fs::read_to_string(path).map_err(|source| PortsError::Read { path, source })
}

/// The kernel writes ranges in order, adjacent ones as one.
fn contains(reserved: &str, ports: &RangeInclusive<u16>) -> bool {
    reserved.trim().split(',').any(|part| {
        let (start, end) = part.split_once('-').unwrap_or((part, part));
        let range = start.parse::<u16>().and_then(|start| Ok(start..=end.parse::<u16>()?));
        range.is_ok_and(|range| range.contains(ports.start()) && range.contains(ports.end()))
    })
}

/// A range that cannot be read may be any.
fn overlaps(ephemeral: &str, ports: &RangeInclusive<u16>) -> bool {
    let mut bounds = ephemeral.split_whitespace().map(str::parse::<u16>);
    match (bounds.next(), bounds.next()) {
        (Some(Ok(first)), Some(Ok(last))) => first <= *ports.end() && *ports.start() <= last,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const PORTS: RangeInclusive<u16> = 15100..=15399;

    #[test]
    fn ranges_are_compared() {
        assert!(contains("8080,15000-15443,20000\n", &PORTS));
        assert!(!contains("\n", &PORTS) && !contains("15100-15200,15300-15399", &PORTS) && !contains("x-y", &PORTS));
        assert!(overlaps("1024\t65535\n", &PORTS) && overlaps("15399 16000", &PORTS) && overlaps("", &PORTS));
        assert!(!overlaps("32768\t60999\n", &PORTS) && !overlaps("1024 15099", &PORTS));
    }

    #[test]
    fn r30_no_other_connection_gets_a_capture_port() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run the tests as root");
        assert!(std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip").success());
        fs::write(EPHEMERAL, "15100 15460").expect("a range around the capture ports");
        let chosen = || -> Vec<u16> {
            let listeners: Vec<_> = (0..40).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
            listeners.iter().map(|listener| listener.local_addr().expect("address").port()).collect()
        };
        assert!(chosen().iter().any(|port| PORTS.contains(port)), "the positive control: the kernel chooses them");
        fs::write(RESERVED, "8080").expect("somebody else's");
        reserve(&PORTS).expect("reserve");
        assert_eq!(read(RESERVED).expect("reserved"), "8080,15100-15399\n");
        assert!(!chosen().iter().any(|port| PORTS.contains(port)));
        reserve(&PORTS).expect("again");
    }
}
