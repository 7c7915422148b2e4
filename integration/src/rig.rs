//! A rig that is up: where everything of it is, and how to start programs on its hosts.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::binaries::{Binaries, BinariesError};
use crate::layout::{self, CONTROLLER, DEFAULT_RIG, LayoutError, Role};
use crate::operator::Operator;
use crate::process::{ProcessError, ProcessId};
use crate::state::{Record, StateDir, StateError};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// A program is not built.
    #[error(transparent)]
    Binaries(#[from] BinariesError),
    /// No such host, or a name that cannot be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// A process is gone.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A program could not be started.
    #[error("cannot start {program} on {host}: {source}")]
    Start {
        /// Which.
        program: String,
        /// Where.
        host: String,
        /// Why not.
        source: io::Error,
    },
    /// Only nodes have workloads.
    #[error("{0:?} is not a node: nothing runs there as a workload (use --host to run a command on the bare host)")]
    NotANode(String),
}

/// A rig that is up, or that is just being put together.
#[derive(Clone, Debug)]
pub struct Rig {
    /// The programs.
    pub binaries: Binaries,
    /// The files.
    pub state: StateDir,
    /// Who is where.
    pub record: Record,
}

impl Rig {
    /// The rig of that name, as its record says.
    pub fn load(name: &str) -> Result<Self, RigError> {
        layout::check_rig_name(name)?;
        let binaries = Binaries::locate()?;
        let state = StateDir::of(binaries.target(), name);
        let record = state.load()?;
        Ok(Self { binaries, state, record })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.record.layout.rig
    }

    /// What has to be added to commands to mean this rig; nothing for the default one.
    pub fn option(&self) -> String {
        if self.name() == DEFAULT_RIG { String::new() } else { format!(" --name {}", self.name()) }
    }

    /// An operator of its cluster.
    pub fn operator(&self) -> Operator {
        Operator::new(self.binaries.clone(), self.state.clone())
    }

    /// A command that runs inside a host's namespaces, outside of every workload: on a node it has no network but
    /// loopback. Give it the program and its arguments.
    pub fn on_host(&self, host: &str) -> Result<Command, RigError> {
        self.enter(host, "host", &[])
    }

    /// A command that runs on a node in the cgroup of its proxy, with all rights: the packet filter takes its connections for
    /// the proxy's. It is no part of the proxy, and ends neither with it nor with the daemon. Give it the program and its
    /// arguments.
    pub fn as_proxy(&self, node: &str) -> Result<Command, RigError> {
        self.enter(self.node(node)?, "proxy", &[])
    }

    fn node<'a>(&self, name: &'a str) -> Result<&'a str, RigError> {
        if self.record.layout.host(name)?.role == Role::Node {
            Ok(name)
        } else {
            Err(RigError::NotANode(name.to_owned()))
        }
    }

    fn enter(&self, host: &str, cgroup: &str, options: &[&str]) -> Result<Command, RigError> {
        let holder = self.holder(host)?;
        let mut command = Command::new(self.binaries.path("opencluster-rig")?);
        command.arg("enter").args(["--netns", &self.record.layout.host(host)?.netns]);
        command.args(["--holder", &format!("{}:{}", holder.pid, holder.started)]);
        command.args(["--cgroup", &self.cgroup(host, cgroup)]).args(options).arg("--");
        Ok(command)
    }

    /// A command that runs on a node as a workload, captured like any other. Give it the program and its arguments.
    pub fn as_workload(&self, node: &str, namespace: &str, workload: &str) -> Result<Command, RigError> {
        let mut command = self.on_host(self.node(node)?)?;
        command.arg(self.binaries.path("opencluster-node")?);
        command.args(["run", "--namespace", namespace, "--workload", workload, "--"]);
        Ok(command)
    }

    /// The process that keeps a host's namespaces.
    pub fn holder(&self, host: &str) -> Result<ProcessId, RigError> {
        self.record.layout.host(host)?;
        Ok(*self.record.holders.get(host).ok_or(ProcessError::Gone(0))?)
    }

    /// The daemon of a host.
    pub fn daemon(&self, host: &str) -> Result<ProcessId, RigError> {
        self.record.layout.host(host)?;
        Ok(*self.record.daemons.get(host).ok_or(ProcessError::Gone(0))?)
    }

    /// Starts a host's daemon, its output going to the host's log, and remembers it.
    pub fn start_daemon(&mut self, host: &str) -> Result<ProcessId, RigError> {
        let program = if host == CONTROLLER { "opencluster-controller" } else { "opencluster-node" };
        let failed = |source| RigError::Start { program: program.to_owned(), host: host.to_owned(), source };
        let path = self.state.log(host);
        let log = File::options().create(true).append(true).open(&path).map_err(failed)?;
        // Its own session: what is typed at the terminal that started the rig is not for the daemons.
        let mut command = self.enter(host, "host", &["--detach"])?;
        command.arg(self.binaries.path(program)?).arg("serve").arg("--config").arg(self.config(host)?);
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        command.env_clear().envs(std::env::vars_os().filter(|(name, _)| is_for_daemons(name)));
        let child = command.spawn().map_err(failed)?;
        let process = ProcessId::of(child.id().cast_signed())?;
        self.record.daemons.insert(host.to_owned(), process);
        self.state.save(&self.record)?;
        Ok(process)
    }

    /// Puts an enrolment token where a node's daemon looks for it: the path.
    pub fn give_token(&self, node: &str, token: &str) -> Result<PathBuf, RigError> {
        let path = self.state.host(node)?.join("token");
        StateDir::write(&path, token)?;
        Ok(path)
    }

    /// The daemon's configuration file.
    pub fn config(&self, host: &str) -> Result<PathBuf, RigError> {
        Ok(self.state.host(host)?.join("config.yaml"))
    }

    /// A cgroup of a host, relative to the cgroup2 mount.
    pub fn cgroup(&self, host: &str, part: &str) -> String {
        format!("{}/{part}", layout::cgroup(self.name(), host))
    }

    /// The last lines of a host's log.
    pub fn log_tail(&self, host: &str, lines: usize) -> String {
        match fs::read_to_string(self.state.log(host)) {
            Ok(text) => {
                let all: Vec<_> = text.lines().collect();
                all[all.len().saturating_sub(lines)..].join("\n")
            }
            Err(error) => format!("(no log: {error})"),
        }
    }
}

fn is_for_daemons(name: &OsStr) -> bool {
    ["PATH", "HOME", "LANG", "RUST_LOG", "RUST_BACKTRACE"].iter().any(|wanted| name == *wanted)
}
