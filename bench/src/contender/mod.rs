//! What is compared, each set up as its own documentation advises for speed, with the same cipher and the same checks:
//! TLS 1.3, AES-128-GCM, X25519, ECDSA P-256 certificates on both sides, both verified.

mod external;
mod haproxy;
mod kind;
mod nginx;
mod pki;
mod stunnel;
mod us;
mod wireguard;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

pub use self::external::External;
pub use self::kind::{Kind, NAMES, versions};
pub use self::pki::Pki;
use crate::error::BenchError;
use crate::process;
use crate::topology::Topology;

/// How long a contender may take to carry its first round trip.
const READY: Duration = Duration::from_secs(15);

/// What the server listens for; each has a port, and a contender has one way in for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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

/// A program of a contender, to be started.
struct Launch {
    log: PathBuf,
    command: Command,
    /// Whether what it uses is the contender's cost. The server of the load is not.
    counts: bool,
}

impl Launch {
    fn counted(log: PathBuf, command: Command) -> Self {
        Self { log, command, counts: true }
    }
}

/// A program of a contender that is running.
#[derive(Debug)]
struct Running {
    child: Child,
    log: PathBuf,
    counts: bool,
}

/// A contender that is up.
#[derive(Debug)]
pub struct Contender {
    kind: Kind,
    /// The namespace of its clients; for us, the rig.
    place: String,
    programs: Vec<Running>,
    /// Hosts of its own, when its set-up must not touch the others'.
    hosts: Option<Topology>,
}

impl Contender {
    /// Starts it and waits until a round trip passes through every service.
    pub async fn start(kind: Kind, site: &Site<'_>) -> Result<Self, BenchError> {
        let place = if kind == Kind::Us { site.name.to_owned() } else { site.topology.client() };
        let mut contender = Self { kind, place, programs: Vec::new(), hosts: None };
        match contender.start_programs(site).await {
            Ok(()) => Ok(contender),
            Err(error) => {
                let name = contender.kind.name().to_owned();
                if let Err(second) = contender.stop().await {
                    eprintln!("{name}: {second}");
                }
                Err(error)
            }
        }
    }

    async fn start_programs(&mut self, site: &Site<'_>) -> Result<(), BenchError> {
        let programs = match self.kind.clone() {
            Kind::Direct => Vec::new(),
            Kind::Us => {
                us::up(site.name, site.folder).await?;
                let mut command = us::exec(site.name, "b", process::own_program()?)?;
                command.args(server_args());
                vec![Launch { log: site.folder.join("us-server.log"), command, counts: false }]
            }
            kind @ (Kind::Haproxy | Kind::Plain) => haproxy::pair(&kind, site)?,
            Kind::Stunnel => stunnel::pair(site)?,
            Kind::Nginx => nginx::pair(site)?,
            Kind::Wireguard => wireguard::pair(site)?,
            Kind::External(external) => {
                let hosts = self.hosts.insert(site.topology.beside(&external.name).await?);
                self.place = hosts.client();
                external.prepare(hosts).await?;
                external.programs(hosts, site.folder)?
            }
        };
        for Launch { log, command, counts } in programs {
            let child = process::logged(command, &log)?;
            self.programs.push(Running { child, log, counts });
        }
        if self.kind == Kind::Wireguard {
            wireguard::connect(site).await?;
        }
        self.wait_until_ready().await
    }

    /// Its kind.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Where a client reaches `service` through it.
    pub fn target(&self, service: Service) -> SocketAddr {
        self.kind.target(service)
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
        let roots: Vec<u32> = self.programs.iter().filter(|p| p.counts).filter_map(|p| p.child.id()).collect();
        let all = process::with_descendants(&roots)?;
        Ok(Processes { cpu: all.clone(), memory: all })
    }

    /// Stops it and waits until its processes are gone.
    pub async fn stop(mut self) -> Result<(), BenchError> {
        for program in &mut self.programs {
            process::end(&mut program.child, &program.log).await?;
        }
        if let Some(hosts) = &self.hosts {
            hosts.remove().await?;
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
                    return Err(self.kind.failed(reason));
                }
                if Instant::now() >= deadline {
                    let reason = format!("not ready within {} s: {error}", READY.as_secs());
                    return Err(self.kind.failed(reason));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    /// Why it is dead, if one of its programs has ended.
    fn dead(&mut self) -> Result<Option<String>, BenchError> {
        for Running { child, log, .. } in &mut self.programs {
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

fn write(path: &Path, text: &str) -> Result<(), BenchError> {
    std::fs::write(path, text).map_err(BenchError::file("writing", path))
}
