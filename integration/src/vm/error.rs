//! What can go wrong with guests.

use std::io;
use std::path::{Path, PathBuf};

use crate::binaries::BinariesError;
use crate::cgroup::CgroupError;
use crate::layout::LayoutError;
use crate::netns::NetnsError;
use crate::operator::OperatorError;
use crate::process::ProcessError;
use crate::rig::RigError;
use crate::state::StateError;

/// What can go wrong with guests.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Kernel and busybox were not fetched.
    #[error("the guests' kernel is not in {0}: fetch it with scripts/guest-packages TARGET (make vm-test does)")]
    NoPackages(PathBuf),
    /// The kernel lacks a module.
    #[error("the guest kernel has no module {0}")]
    NoModule(String),
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
    /// A program could not be started.
    #[error("cannot run {program}: {source} (scripts/debian-packages.sh vm installs it)")]
    Start {
        /// Which.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed: {message}")]
    Failed {
        /// Which.
        program: String,
        /// What it said.
        message: String,
    },
    /// QEMU's monitor refused a command.
    #[error("QEMU refused {command}: {message}")]
    Refused {
        /// Which.
        command: String,
        /// What it said.
        message: String,
    },
    /// QEMU's monitor said something that is no JSON.
    #[error("QEMU's monitor: {0}")]
    Monitor(String),
    /// A migration did not come to its end.
    #[error("the migration did not succeed: its state is {0}")]
    Migration(String),
    /// The guest did not do something in time.
    #[error("guest {guest}: {what}\n--- last lines of its console ---\n{console}")]
    NotReady {
        /// Which.
        guest: String,
        /// What is missing.
        what: String,
        /// The end of its console's log.
        console: String,
    },
    /// A command in the guest failed.
    #[error("guest {guest}: `{command}` ended with {code}: {output}")]
    Command {
        /// Which guest.
        guest: String,
        /// Which command.
        command: String,
        /// Its exit code.
        code: i32,
        /// What it said.
        output: String,
    },
    /// What `nft` printed is not a counter.
    #[error("nft printed no counter: {0}")]
    Counter(String),
    /// A program of ours is not built.
    #[error(transparent)]
    Binaries(#[from] BinariesError),
    /// Cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Names.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Links.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The API.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// QEMU's process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The rig.
    #[error(transparent)]
    Rig(#[from] RigError),
    /// The rig's files.
    #[error(transparent)]
    State(#[from] StateError),
}

pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VmError {
    let path = path.to_owned();
    move |source| VmError::Io { action, path, source }
}
