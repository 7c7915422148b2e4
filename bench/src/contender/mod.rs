//! What is compared, each set up as its own documentation advises for speed, with the same cipher and the same checks:
//! TLS 1.3, AES-128-GCM, X25519, ECDSA P-256 certificates on both sides, both verified.

mod haproxy;
mod pki;
mod stunnel;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

pub use self::pki::Pki;
use crate::error::BenchError;
use crate::process;
use crate::topology::{self, Topology};

/// How long a contender may take to carry its first round trip.
const READY: Duration = Duration::from_secs(15);

/// The names that `--contenders` takes.
pub const NAMES: [&str; 3] = ["direct", "haproxy", "stunnel"];

/// What the server listens for; each has a port, and a contender has one way in for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Echo.
    Echo,
    /// Sink of bulk bytes.
    Sink,
    /// Source of bulk bytes.
    Source,
}

impl Service {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Echo, Self::Sink, Self::Source];

    /// The server's port.
    pub fn port(self) -> u16 {
        match self {
            Self::Echo => 9000,
            Self::Sink => 9001,
            Self::Source => 9002,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::Sink => "sink",
            Self::Source => "source",
        }
    }
}

/// The kinds of contender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The client connects to the server: no proxy, no encryption. What the machine can do at all.
    Direct,
    /// A pair of haproxy in TCP mode with mutual TLS between them.
    Haproxy,
    /// A pair of stunnel with mutual TLS between them.
    Stunnel,
}

impl Kind {
    /// From its name in reports and options.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "direct" => Self::Direct,
            "haproxy" => Self::Haproxy,
            "stunnel" => Self::Stunnel,
            _ => return None,
        })
    }

    /// Its name in reports and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Haproxy => "haproxy",
            Self::Stunnel => "stunnel",
        }
    }

    /// Where its client side listens: beside the server's ports, and a range for each contender.
    fn local_port(self, service: Service) -> u16 {
        service.port()
            + match self {
                Self::Direct => 0,
                Self::Haproxy => 100,
                Self::Stunnel => 200,
            }
    }

    /// Where its server side listens on the wire.
    fn wire_port(self, service: Service) -> u16 {
        self.local_port(service) + 6000
    }
}

/// Where things are that every contender needs.
#[derive(Debug)]
pub struct Site<'a> {
    /// The hosts.
    pub topology: &'a Topology,
    /// Certificates.
    pub pki: &'a Pki,
    /// For configurations and logs.
    pub folder: &'a Path,
    /// How many files each of its processes may open.
    pub open_files: u64,
}

/// A contender that is up.
#[derive(Debug)]
pub struct Contender {
    kind: Kind,
    client_host: String,
    programs: Vec<(Child, PathBuf)>,
}

impl Contender {
    /// Starts it and waits until a round trip passes through every service.
    pub async fn start(kind: Kind, site: &Site<'_>) -> Result<Self, BenchError> {
        let mut contender = Self { kind, client_host: site.topology.client(), programs: Vec::new() };
        let sides = match kind {
            Kind::Direct => Vec::new(),
            Kind::Haproxy => haproxy::pair(site)?,
            Kind::Stunnel => stunnel::pair(site)?,
        };
        for (log, command) in sides {
            let child = process::logged(command, &log)?;
            contender.programs.push((child, log));
        }
        contender.wait_until_ready().await?;
        Ok(contender)
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where a client reaches `service` through it.
    pub fn target(&self, service: Service) -> SocketAddr {
        match self.kind {
            Kind::Direct => SocketAddr::new(topology::SERVER, service.port()),
            kind => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), kind.local_port(service)),
        }
    }

    /// A command that runs this program's `load` where its clients are.
    pub fn client(&self, args: &[String]) -> Result<Command, BenchError> {
        let mut command = process::in_namespace(&self.client_host, process::own_program()?)?;
        command.arg("load").args(args);
        Ok(command)
    }

    /// The processes whose CPU time and memory are its cost.
    pub fn processes(&self) -> Vec<u32> {
        self.programs.iter().filter_map(|(child, _)| child.id()).collect()
    }

    /// Stops it and waits until its processes are gone.
    pub async fn stop(mut self) -> Result<(), BenchError> {
        for (child, log) in &mut self.programs {
            child.kill().await.map_err(BenchError::file("stopping the program of", &*log))?;
        }
        Ok(())
    }

    async fn wait_until_ready(&mut self) -> Result<(), BenchError> {
        let deadline = Instant::now() + READY;
        for service in Service::ALL {
            let to = self.target(service).to_string();
            let pattern = match service {
                Service::Echo => "rr",
                Service::Sink => "stream",
                Service::Source => "stream-down",
            };
            let args = [pattern, "--to", &to, "--connections", "1", "--seconds", "0.01", "--warmup", "0"];
            let args: Vec<String> = args.iter().map(ToString::to_string).collect();
            loop {
                let Err(error) = process::finished(self.client(&args)?, READY).await else { break };
                if let Some(reason) = self.dead()? {
                    return Err(BenchError::Contender { contender: self.kind.name(), reason });
                }
                if Instant::now() >= deadline {
                    let reason = format!("not ready within {} s: {error}", READY.as_secs());
                    return Err(BenchError::Contender { contender: self.kind.name(), reason });
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    /// Why it is dead, if one of its programs has ended.
    fn dead(&mut self) -> Result<Option<String>, BenchError> {
        for (child, log) in &mut self.programs {
            let ended = child.try_wait().map_err(BenchError::file("looking after the program of", &*log))?;
            if let Some(status) = ended {
                let printed = std::fs::read(&*log).map_err(BenchError::file("reading", &*log))?;
                return Ok(Some(format!("ended with {status}: {}", process::tail(&printed))));
            }
        }
        Ok(None)
    }
}

/// The versions of the contenders' programs, as far as they say.
pub fn versions(names: &[String]) -> std::collections::BTreeMap<String, String> {
    let ask = |program: &str, flag: &str| {
        let output = std::process::Command::new(program).arg(flag).output().ok()?;
        // stunnel answers on standard error, behind a line about how it was started.
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        text.lines().find(|l| l.chars().any(|c| c.is_ascii_digit())).map(str::to_owned)
    };
    let version = |name: &str| match Kind::from_name(name)? {
        Kind::Direct => Some("plain TCP from client to server".into()),
        Kind::Haproxy => ask("haproxy", "-v"),
        Kind::Stunnel => ask("stunnel4", "-version"),
    };
    names.iter().filter_map(|name| Some((name.clone(), version(name)?))).collect()
}

fn write(path: &Path, text: &str) -> Result<(), BenchError> {
    std::fs::write(path, text).map_err(BenchError::file("writing", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways_and_ports_never_meet() {
        let mut ports = std::collections::HashSet::new();
        for name in NAMES {
            let kind = Kind::from_name(name).unwrap();
            assert_eq!(kind.name(), name);
            for service in Service::ALL {
                assert!(ports.insert(kind.local_port(service)));
                assert!(kind == Kind::Direct || ports.insert(kind.wire_port(service)));
            }
        }
        assert!(Kind::from_name("nginx").is_none());
        // Below the ephemeral ports of the namespaces, which must never take a listener's place.
        assert!(ports.iter().all(|&p| p < 16_000));
    }
}
