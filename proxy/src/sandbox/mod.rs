//! What this process may do to the machine: as little as its work allows. The node daemon starts it without privileges;
//! here that is checked, and then narrowed further. What is reported is what was applied.
//!
//! | measure | mandatory | what it takes away |
//! |---|---|---|
//! | not root, no capability | yes | everything that needs privilege |
//! | `no_new_privs` | yes | gaining any by executing something |
//! | not dumpable | yes | core files, ptrace and `/proc/PID/mem` by the same user |
//! | seccomp, for each kind of thread | yes | every system call that is not listed with its reason |
//! | landlock | as far as the kernel has it | all files, binding TCP ports, signals and abstract sockets of others |

pub mod seccomp;

use std::collections::BTreeSet;
use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::CapabilitySet;

pub use self::seccomp::SeccompError;

/// Why the process refuses to serve.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// It has a capability.
    #[error("the proxy was started with capabilities ({0:?}): it must be started without any")]
    Capabilities(CapabilitySet),
    /// It runs as root.
    #[error("the proxy was started as root: it must be started as an unprivileged user")]
    Root,
    /// The kernel refused.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The kernel accepted a measure, and does not have it in force.
    #[error("{0} is not in force although the kernel accepted it")]
    NotInForce(&'static str),
    /// Landlock is there, and refused.
    #[error("landlock: {0}")]
    Landlock(#[from] RulesetError),
    /// Seccomp.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// The measures that are in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied(BTreeSet<String>);

impl Applied {
    /// Notes one.
    pub fn add(&mut self, name: impl Into<String>) {
        self.0.insert(name.into());
    }

    /// Notes those of another thread.
    pub fn merge(&mut self, other: &Self) {
        self.0.extend(other.0.iter().cloned());
    }

    /// For Status.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().cloned().collect()
    }
}

/// For the whole process, while its first thread is the only one.
pub fn confine_process() -> Result<Applied, SandboxError> {
    let mut applied = Applied::default();
    if rustix::process::geteuid().is_root() || rustix::process::getuid().is_root() {
        return Err(SandboxError::Root);
    }
    applied.add("unprivileged_user");
    let sets = rustix::thread::capabilities(None).map_err(kernel("reading capabilities"))?;
    let any = sets.effective | sets.permitted | sets.inheritable;
    if !any.is_empty() {
        return Err(SandboxError::Capabilities(any));
    }
    applied.add("no_capabilities");

    rustix::thread::set_no_new_privs(true).map_err(kernel("no_new_privs"))?;
    if !rustix::thread::no_new_privs().map_err(kernel("no_new_privs"))? {
        return Err(SandboxError::NotInForce("no_new_privs"));
    }
    applied.add("no_new_privs");
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(kernel("dumpable"))?;
    if rustix::process::dumpable_behavior().map_err(kernel("dumpable"))? != DumpableBehavior::NotDumpable {
        return Err(SandboxError::NotInForce("not dumpable"));
    }
    applied.add("not_dumpable");

    raise_descriptor_limit()?;
    // The clock of leases must work; and rustix finds the vDSO for it with calls that no thread may make later.
    if crate::shared::boottime() == 0 {
        return Err(SandboxError::NotInForce("CLOCK_BOOTTIME"));
    }
    if let Some(abi) = landlock()? {
        applied.add(format!("landlock:{abi}"));
    } else {
        tracing::warn!("this kernel has no landlock: going on without");
    }
    Ok(applied)
}

/// For the access log's thread.
pub fn confine_log() -> Result<Applied, SandboxError> {
    confine(seccomp::Thread::Log, "seccomp:log")
}

/// For a worker thread.
pub fn confine_worker() -> Result<Applied, SandboxError> {
    confine(seccomp::Thread::Worker, "seccomp:worker")
}

/// For the control thread, when all others run.
pub fn confine_control() -> Result<Applied, SandboxError> {
    confine(seccomp::Thread::Control, "seccomp:control")
}

fn confine(thread: seccomp::Thread, name: &str) -> Result<Applied, SandboxError> {
    seccomp::apply(thread)?;
    let mut applied = Applied::default();
    applied.add(name);
    Ok(applied)
}

fn kernel(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> SandboxError {
    move |error| SandboxError::Kernel { what, source: error.into() }
}

/// Each flow takes a descriptor or two: use all that the hard limit gives.
fn raise_descriptor_limit() -> Result<(), SandboxError> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return Ok(());
    }
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(Resource::Nofile, raised).map_err(kernel("raising the limit of file descriptors"))
}

/// No file at all (what is needed is open), no TCP port bound (listeners are passed), nothing done to other processes.
/// Where flows connect to is not restricted: services come and go while the process lives, and a ruleset only shrinks.
/// `None`: the kernel has no landlock.
fn landlock() -> Result<Option<i32>, SandboxError> {
    let abi = ABI::V6;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Ok(None);
    }
    match status.landlock {
        LandlockStatus::Available { effective_abi, kernel_abi } => Ok(Some(kernel_abi.unwrap_or(effective_abi as i32))),
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => Ok(None),
    }
}
