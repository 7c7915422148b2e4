//! `exec-proxy`: the last steps between the daemon and its proxy, in a process of their own that then becomes the proxy.
//!
//! The daemon starts itself anew with this subcommand, so that nothing has to be done between fork and exec in a process
//! with threads. Everything that is given up here is given up before the proxy's first instruction.

use std::ffi::{CString, NulError};
use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use caps::CapSet;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};

use crate::cgroup::{self, CgroupError};

/// Where the proxy finds its control socket.
pub(super) const CONTROL_FD: RawFd = 3;

/// Connections that the proxy may hold, and then some.
const MAX_FILES: u64 = 1 << 20;

/// What the daemon passes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The cgroup directory to enter.
    #[arg(long)]
    pub(crate) cgroup: PathBuf,
    /// The user and group ID to run as.
    #[arg(long)]
    pub(crate) user: u32,
    /// The daemon's process: if it is gone already, so are we.
    #[arg(long)]
    pub(crate) parent: i32,
    /// The proxy's program.
    #[arg(long)]
    pub(crate) program: PathBuf,
}

/// Why the proxy was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot {what}: {source}")]
    Step { what: &'static str, source: Errno },
    #[error("cannot drop capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    #[error("capabilities are left after dropping them: {0:?}")]
    CapabilitiesLeft(caps::CapsHashSet),
    #[error("cannot list open files: {0}")]
    Files(io::Error),
    #[error("the control socket came to be descriptor {0} instead of {CONTROL_FD}")]
    Descriptor(RawFd),
    #[error("the daemon is gone already")]
    Orphan,
    #[error("a path contains a zero byte: {0}")]
    Path(#[from] NulError),
    #[error("cannot run {}: {source}", program.display())]
    Program { program: PathBuf, source: Errno },
}

/// Becomes the proxy. Returns only if that failed.
pub(crate) fn run(arguments: &Arguments) -> Result<std::convert::Infallible, ExecError> {
    let step = |what| move |source| ExecError::Step { what, source };

    cgroup::enter(&arguments.cgroup, std::process::id())?;
    only_control_socket()?;
    raise_file_limit().map_err(step("raise the limit of open files"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("forbid core dumps"))?;
    nix::unistd::chdir("/").map_err(step("change to /"))?;

    // Nothing that is executed from now on can ever have a capability. Needs CAP_SETPCAP, hence before the rest.
    for capability in caps::runtime::procfs_all_supported(None)? {
        caps::drop(None, CapSet::Bounding, capability)?;
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    let (user, group) = (Uid::from_raw(arguments.user), Gid::from_raw(arguments.user));
    nix::unistd::setgroups(&[]).map_err(step("drop supplementary groups"))?;
    nix::unistd::setresgid(group, group, group).map_err(step("change the group"))?;
    nix::unistd::setresuid(user, user, user).map_err(step("change the user"))?;
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable, CapSet::Ambient, CapSet::Bounding] {
        let left = caps::read(None, set)?;
        if !left.is_empty() {
            return Err(ExecError::CapabilitiesLeft(left));
        }
    }
    nix::sys::prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;

    // A change of user resets this, so it comes last. A daemon that dies takes its proxy with it.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("tie its life to the daemon's"))?;
    if nix::unistd::getppid().as_raw() != arguments.parent {
        return Err(ExecError::Orphan);
    }

    let program = CString::new(arguments.program.as_os_str().as_bytes())?;
    let argv = [program.clone(), c"--control-fd".to_owned(), CString::new(CONTROL_FD.to_string())?];
    let environment: Vec<CString> = ["RUST_LOG", "RUST_BACKTRACE"]
        .into_iter()
        .filter_map(|name| std::env::var(name).ok().map(|value| CString::new(format!("{name}={value}"))))
        .collect::<Result<_, _>>()?;
    nix::unistd::execve(&program, &argv, &environment)
        .map_err(|source| ExecError::Program { program: arguments.program.clone(), source })
}

/// As far as we may: without CAP_SYS_RESOURCE the hard limit stays what it is.
fn raise_file_limit() -> Result<(), Errno> {
    match setrlimit(Resource::RLIMIT_NOFILE, MAX_FILES, MAX_FILES) {
        Err(Errno::EPERM) => {
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
        }
        result => result,
    }
}

/// The control socket comes as standard input. Afterwards it is [`CONTROL_FD`], input is empty, and nothing else is open
/// but output and error.
fn only_control_socket() -> Result<(), ExecError> {
    let step = |what| move |source| ExecError::Step { what, source };
    let open_files: Vec<RawFd> = fs::read_dir("/proc/self/fd")
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<Vec<_>>>())
        .map_err(ExecError::Files)?
        .iter()
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect();
    for descriptor in open_files.into_iter().filter(|descriptor| *descriptor > 2) {
        match nix::unistd::close(descriptor) {
            // The descriptor that listed the directory is closed already.
            Ok(()) | Err(Errno::EBADF) => {}
            Err(source) => return Err(ExecError::Step { what: "close an inherited file", source }),
        }
    }
    let stdin = io::stdin();
    let control = fcntl(&stdin, FcntlArg::F_DUPFD(CONTROL_FD)).map_err(step("keep the control socket"))?;
    if control != CONTROL_FD {
        return Err(ExecError::Descriptor(control));
    }
    let null = open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(step("open /dev/null"))?;
    nix::unistd::dup2_stdin(&null).map_err(step("empty standard input"))?;
    Ok(())
}
