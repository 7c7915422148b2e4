//! One host of a rig: a holder process that keeps its mount namespace alive, and the way in for everybody else.

use std::convert::Infallible;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{self, dup2_stderr, dup2_stdin, dup2_stdout};

use crate::cgroup::{CgroupError, Cgroups};
use crate::netns;
use crate::process::{ProcessError, ProcessId};

/// What can go wrong with a host.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: String,
        /// Why not.
        source: nix::Error,
    },
    /// The holder did not come up.
    #[error("the holder of {netns} did not come up: {message}")]
    Holder {
        /// Whose.
        netns: String,
        /// What it said.
        message: String,
    },
    /// A cgroup could not be joined.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The holder is gone.
    #[error("the host is not up: {0} (opencluster-rig status shows more)")]
    Process(#[from] ProcessError),
}

/// Kernel settings of every host, below /proc/sys/net. Connection-rate tests would otherwise exhaust the ports and then
/// measure the kernel's search for one; addresses must be usable at once; nothing may be learnt from the network.
const SETTINGS: [(&str, &str); 12] = [
    ("ipv4/ip_local_port_range", "16000 65535"),
    ("ipv4/tcp_tw_reuse", "1"),
    ("ipv4/tcp_max_tw_buckets", "4096"),
    ("ipv4/tcp_max_syn_backlog", "16384"),
    ("core/somaxconn", "16384"),
    ("ipv4/ping_group_range", "0 2147483647"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/all/accept_redirects", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
];

/// How to make a holder.
#[derive(Clone, Debug)]
pub struct Holder<'a> {
    /// The rig's own program.
    pub rig: &'a Path,
    /// The host's network namespace.
    pub netns: &'a str,
    /// The holder's cgroup.
    pub cgroup: &'a str,
    /// Bound over /etc/hosts, so that hosts know each other's names.
    pub hosts: &'a Path,
}

impl Holder<'_> {
    /// Starts it and waits until its namespaces are ready.
    pub fn start(&self) -> Result<ProcessId, HostError> {
        let failed = |message: String| HostError::Holder { netns: self.netns.to_owned(), message };
        let mut child = Command::new(self.rig)
            .arg("hold")
            .args(["--netns", self.netns, "--cgroup", self.cgroup, "--hosts"])
            .arg(self.hosts)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        // The holder closes both once it is ready; one that fails has said why.
        let mut said = String::new();
        if let Some(mut stdout) = child.stdout.take() {
            stdout.read_to_string(&mut said).map_err(|error| failed(error.to_string()))?;
        }
        if let Some(mut stderr) = child.stderr.take() {
            stderr.read_to_string(&mut said).map_err(|error| failed(error.to_string()))?;
        }
        if said == READY { Ok(ProcessId::of(child.id().cast_signed())?) } else { Err(failed(said.trim().to_owned())) }
    }
}

const READY: &str = "ready\n";

/// The holder itself: joins the cgroup, makes the mount namespace, says so on stdout and stays until it is killed.
pub fn hold(netns: &str, cgroup: &str, hosts: &Path) -> Result<Infallible, HostError> {
    Cgroups::find()?.join(cgroup)?;
    unistd::setsid().map_err(system("begin a session"))?;
    let network = open(&netns::path(netns))?;
    setns(&network, CloneFlags::CLONE_NEWNET).map_err(system("enter the network namespace"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(system("make a mount namespace"))?;
    mount_own_file_systems(hosts)?;
    for (name, value) in SETTINGS {
        write_setting(name, value)?;
    }
    io::stdout().write_all(READY.as_bytes()).map_err(io_error("write to", Path::new("stdout")))?;
    io::stdout().flush().map_err(io_error("write to", Path::new("stdout")))?;
    let null =
        File::options().read(true).write(true).open("/dev/null").map_err(io_error("open", Path::new("/dev/null")))?;
    dup2_stdin(&null).and_then(|()| dup2_stdout(&null)).and_then(|()| dup2_stderr(&null)).map_err(system("detach"))?;
    loop {
        unistd::pause();
    }
}

/// The host's own /run (sockets and PID files of its programs) and /etc/hosts; nothing of it is seen outside.
fn mount_own_file_systems(hosts: &Path) -> Result<(), HostError> {
    const NONE: Option<&str> = None;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).map_err(system("make all mounts private"))?;
    let hosts_file = Some(hosts);
    mount(hosts_file, "/etc/hosts", NONE, MsFlags::MS_BIND, NONE).map_err(system("bind /etc/hosts"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, Some("mode=755,size=64m")).map_err(system("mount /run"))
}

/// Writes one kernel setting of this network namespace. A kernel without it is no reason to stop.
fn write_setting(name: &str, value: &str) -> Result<(), HostError> {
    let path = Path::new("/proc/sys/net").join(name);
    match fs::write(&path, value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.map_err(io_error("write to", &path)),
    }
}

/// Enters a host's namespaces, keeping the working directory. The calling program must have one thread only: the kernel
/// refuses to move one of several to another mount namespace.
pub fn enter(netns: &str, holder: ProcessId) -> Result<(), HostError> {
    let here = env::current_dir().map_err(io_error("read", Path::new(".")))?;
    if !holder.is_alive() {
        return Err(ProcessError::Gone(holder.pid).into());
    }
    let network = open(&netns::path(netns))?;
    let mounts = open(Path::new(&format!("/proc/{}/ns/mnt", holder.pid)))?;
    // Looked at again: the number may have changed hands before its namespace was opened.
    if !holder.is_alive() {
        return Err(ProcessError::Gone(holder.pid).into());
    }
    setns(&network, CloneFlags::CLONE_NEWNET).map_err(system("enter the network namespace"))?;
    setns(&mounts, CloneFlags::CLONE_NEWNS).map_err(system("enter the mount namespace"))?;
    env::set_current_dir(&here).or_else(|_| env::set_current_dir("/")).map_err(io_error("change to", &here))
}

/// Replaces this program by another one, found by PATH. Returns only when that fails.
pub fn replace_by(program: &OsStr, arguments: &[OsString]) -> HostError {
    // Not execvp: std gives the new program back the default action of SIGPIPE, which it took from this one.
    let source = Command::new(program).args(arguments).exec();
    HostError::Io { action: "run", path: program.into(), source }
}

fn open(path: &Path) -> Result<File, HostError> {
    File::open(path).map_err(io_error("open", path))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HostError {
    let path = path.to_owned();
    move |source| HostError::Io { action, path, source }
}

fn system(action: &str) -> impl FnOnce(nix::Error) -> HostError {
    let action = action.to_owned();
    move |source| HostError::System { action, source }
}
