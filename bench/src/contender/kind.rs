//! The kinds of contender: names, ports, versions.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use super::{External, Service, us, wireguard};
use crate::error::BenchError;
use crate::topology;

/// The names that `--contenders` takes without further ado.
pub const NAMES: [&str; 7] = ["direct", "us", "haproxy", "stunnel", "nginx", "wireguard", "plain"];

/// A kind of contender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// The client connects to the server: no proxy, no encryption. What the machine can do at all.
    Direct,
    /// Opencluster.
    Us,
    /// A pair of haproxy in TCP mode with mutual TLS between them.
    Haproxy,
    /// A pair of stunnel with mutual TLS between them.
    Stunnel,
    /// A pair of nginx with its stream module and mutual TLS between them.
    Nginx,
    /// A WireGuard tunnel between the hosts, run by wireguard-go.
    Wireguard,
    /// A pair of haproxy in TCP mode without encryption: what two hops cost at all.
    Plain,
    /// Anything else, as a file describes it.
    External(Arc<External>),
}

impl Kind {
    /// From its name in reports and options.
    pub fn from_name(name: &str, externals: &[Arc<External>]) -> Result<Self, BenchError> {
        Ok(match name {
            "direct" => Self::Direct,
            "us" => Self::Us,
            "haproxy" => Self::Haproxy,
            "stunnel" => Self::Stunnel,
            "nginx" => Self::Nginx,
            "wireguard" => Self::Wireguard,
            "plain" => Self::Plain,
            _ => return Self::described(name, externals),
        })
    }

    fn described(name: &str, externals: &[Arc<External>]) -> Result<Self, BenchError> {
        let found = externals.iter().find(|e| e.name == name).map(|e| Self::External(Arc::clone(e)));
        found.ok_or_else(|| {
            let known: Vec<&str> = NAMES.into_iter().chain(externals.iter().map(|e| e.name.as_str())).collect();
            BenchError::Usage(format!("there is no contender {name:?}; there are {}", known.join(", ")))
        })
    }

    /// Its name in reports and options.
    pub fn name(&self) -> &str {
        match self {
            Self::Direct => "direct",
            Self::Us => "us",
            Self::Haproxy => "haproxy",
            Self::Stunnel => "stunnel",
            Self::Nginx => "nginx",
            Self::Wireguard => "wireguard",
            Self::Plain => "plain",
            Self::External(external) => &external.name,
        }
    }

    /// An error of this contender.
    pub(super) fn failed(&self, reason: String) -> BenchError {
        BenchError::Contender { contender: self.name().to_owned(), reason }
    }

    /// Where a client reaches `service` through it.
    pub(super) fn target(&self, service: Service) -> SocketAddr {
        match self {
            Self::Direct => SocketAddr::new(topology::SERVER, service.port()),
            Self::Us => SocketAddr::new(us::SERVER, service.port()),
            Self::Wireguard => SocketAddr::new(wireguard::SERVER, service.port()),
            Self::External(external) => external.target(service),
            Self::Haproxy | Self::Stunnel | Self::Nginx | Self::Plain => {
                SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), self.local_port(service))
            }
        }
    }

    /// Where its client side listens: beside the server's ports, and a range for each contender.
    pub(super) fn local_port(&self, service: Service) -> u16 {
        service.port()
            + match self {
                // Reached at an address of the server, at the server's own port.
                Self::Direct | Self::Us | Self::Wireguard | Self::External(_) => 0,
                Self::Haproxy => 100,
                Self::Stunnel => 200,
                Self::Nginx => 300,
                Self::Plain => 400,
            }
    }

    /// Where its server side listens on the wire.
    pub(super) fn wire_port(&self, service: Service) -> u16 {
        self.local_port(service) + 6000
    }

    fn version(&self) -> Option<String> {
        let ask = |program: &str, flag: &str| {
            let output = std::process::Command::new(program).arg(flag).output().ok()?;
            // Some answer on standard error, stunnel behind a line about how it was started.
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            text.lines().find(|l| l.chars().any(|c| c.is_ascii_digit())).map(str::to_owned)
        };
        match self {
            Self::Direct => Some("plain TCP from client to server".into()),
            Self::Us => Some(concat!("opencluster ", env!("CARGO_PKG_VERSION")).into()),
            Self::Haproxy | Self::Plain => ask("haproxy", "-v"),
            Self::Stunnel => ask("stunnel4", "-version"),
            Self::Nginx => ask("nginx", "-v"),
            Self::Wireguard => ask("wireguard-go", "--version"),
            Self::External(external) => external.version.clone(),
        }
    }
}

/// The versions of the contenders' programs, as far as they say.
pub fn versions(names: &[String], externals: &[Arc<External>]) -> BTreeMap<String, String> {
    names.iter().filter_map(|name| Some((name.clone(), Kind::from_name(name, externals).ok()?.version()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways_and_ports_never_meet() {
        let mut ports: std::collections::HashSet<u16> = Service::ALL.map(Service::port).into();
        for name in NAMES {
            let kind = Kind::from_name(name, &[]).unwrap();
            assert_eq!(kind.name(), name);
            let listens = matches!(kind, Kind::Haproxy | Kind::Stunnel | Kind::Nginx | Kind::Plain);
            for service in Service::ALL.into_iter().filter(|_| listens) {
                assert!(ports.insert(kind.local_port(service)) && ports.insert(kind.wire_port(service)));
            }
        }
        let error = Kind::from_name("envoy", &[]).unwrap_err().to_string();
        assert!(error.contains("haproxy"), "{error}");
        // Below the ephemeral ports of the namespaces, which must never take a listener's place.
        assert!(ports.iter().all(|&p| p < 16_000));
    }
}
