//! What is compared, each set up as its own documentation advises for speed, with the same cipher and the same checks:
//! TLS 1.3, AES-128-GCM, X25519, ECDSA P-256 certificates on both sides, both verified.

mod haproxy;
mod pki;
mod stunnel;
mod us;

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
pub const NAMES: [&str; 4] = ["direct", "us", "haproxy", "stunnel"];

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
    /// Opencluster.
    Us,
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
            "us" => Self::Us,
            "haproxy" => Self::Haproxy,
            "stunnel" => Self::Stunnel,
            _ => return None,
        })
    }

    /// Its name in reports and options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Us => "us",
            Self::Haproxy => "haproxy",
            Self::Stunnel => "stunnel",
        }
    }

    /// Where its client side listens: beside the server's ports, and a range for each contender.
    fn local_port(self, service: Service) -> u16 {
        service.port()
            + match self {
                // Reached at the server's own address and port.
                Self::Direct | Self::Us => 0,
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
    /// The run's name, which its rig has too.
    pub name: &'a str,
    /// The hosts.
    pub topology: &'a Topology,
    /// Certificates.
    pub pki: &'a Pki,
    /// For configurations and logs.
    pub folder: &'a Path,
    /// How many files each of its processes may open.
    pub open_files: u64,
}

/// The processes of a contender.
#[derive(Debug, Default)]
pub struct Processes {
    /// Those whose CPU time is its cost.
    pub cpu: Vec<u32>,
    /// Those whose memory is its cost.
    pub memory: Vec<u32>,
}

/// A contender that is up.
#[derive(Debug)]
pub struct Contender {
    kind: Kind,
    /// The namespace of its clients; for us, the rig.
    place: String,
    programs: Vec<(Child, PathBuf)>,
}

impl Contender {
    /// Starts it and waits until a round trip passes through every service.
    pub async fn start(kind: Kind, site: &Site<'_>) -> Result<Self, BenchError> {
        let place = if kind == Kind::Us { site.name.to_owned() } else { site.topology.client() };
        let mut contender = Self { kind, place, programs: Vec::new() };
        match contender.start_programs(site).await {
            Ok(()) => Ok(contender),
            Err(error) => {
                if let Err(second) = contender.stop().await {
                    eprintln!("{}: {second}", kind.name());
                }
                Err(error)
            }
        }
    }

    async fn start_programs(&mut self, site: &Site<'_>) -> Result<(), BenchError> {
        let programs = match self.kind {
            Kind::Direct => Vec::new(),
            Kind::Us => {
                us::up(site.name, site.folder).await?;
                let mut server = us::exec(site.name, "b", process::own_program()?)?;
                server.args(server_args());
                vec![(site.folder.join("us-server.log"), server)]
            }
            Kind::Haproxy => haproxy::pair(site)?,
            Kind::Stunnel => stunnel::pair(site)?,
        };
        for (log, command) in programs {
            let child = process::logged(command, &log)?;
            self.programs.push((child, log));
        }
        self.wait_until_ready().await
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where a client reaches `service` through it.
    pub fn target(&self, service: Service) -> SocketAddr {
        match self.kind {
            Kind::Direct => SocketAddr::new(topology::SERVER, service.port()),
            Kind::Us => SocketAddr::new(us::SERVER, service.port()),
            kind => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), kind.local_port(service)),
        }
    }

    /// A command that runs this program's `load` where its clients are.
    pub fn client(&self, args: &[String]) -> Result<Command, BenchError> {
        let own = process::own_program()?;
        let mut command = match self.kind {
            Kind::Us => us::exec(&self.place, "a", own)?,
            _ => process::in_namespace(&self.place, own)?,
        };
        command.arg("load").args(args);
        Ok(command)
    }

    /// The processes whose CPU time and memory are its cost; none for direct.
    pub fn processes(&self) -> Result<Processes, BenchError> {
        if self.kind == Kind::Us {
            return us::processes(&self.place);
        }
        let all: Vec<u32> = self.programs.iter().filter_map(|(child, _)| child.id()).collect();
        Ok(Processes { cpu: all.clone(), memory: all })
    }

    /// Stops it and waits until its processes are gone.
    pub async fn stop(mut self) -> Result<(), BenchError> {
        for (child, log) in &mut self.programs {
            child.kill().await.map_err(BenchError::file("stopping the program of", &*log))?;
        }
        if self.kind == Kind::Us { us::down(&self.place).await } else { Ok(()) }
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

/// Removes what outlives its process: the rig of a run of this name, whether it ended or was killed.
pub async fn clean(name: &str) -> Result<(), BenchError> {
    match us::rig() {
        Ok(_) => us::down(name).await,
        // Where no rig can be made, none can be left.
        Err(_) => Ok(()),
    }
}

/// The arguments of `serve`.
pub fn server_args() -> Vec<String> {
    let listen = |service: Service| format!("0.0.0.0:{}", service.port());
    ["serve", "--echo", &listen(Service::Echo), "--sink", &listen(Service::Sink), "--source", &listen(Service::Source)]
        .iter()
        .map(ToString::to_string)
        .collect()
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
        Kind::Us => Some(concat!("opencluster ", env!("CARGO_PKG_VERSION")).into()),
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
        let mut ports: std::collections::HashSet<u16> = Service::ALL.map(Service::port).into();
        for name in NAMES {
            let kind = Kind::from_name(name).unwrap();
            assert_eq!(kind.name(), name);
            let listens = !matches!(kind, Kind::Direct | Kind::Us);
            for service in Service::ALL.into_iter().filter(|_| listens) {
                assert!(ports.insert(kind.local_port(service)) && ports.insert(kind.wire_port(service)));
            }
        }
        assert!(Kind::from_name("nginx").is_none());
        // Below the ephemeral ports of the namespaces, which must never take a listener's place.
        assert!(ports.iter().all(|&p| p < 16_000));
    }
}
