//! What a workload's process gives up before it becomes the workload, root or not.
//!
//! The packet filter knows workloads by their cgroup, so the one thing that must not happen is that a process changes
//! its cgroup; and packets must not be made past the hooks that look at it.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability};
use landlock::{
    AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError,
};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::seccomp::{self, SeccompError};

/// What databases and web servers need when they are started as root: files of their own user, that user, low ports,
/// signals to their children, limits. Everything else goes; among it NET_RAW (packets of any form), NET_ADMIN (marks,
/// rules), SYS_ADMIN (mounts, namespaces), SYS_PTRACE (other processes' memory), SYS_MODULE, SYS_RAWIO, BPF, PERFMON,
/// DAC_READ_SEARCH (files by handle, around mounts), MKNOD (devices), SETPCAP (capabilities).
const KEPT: [Capability; 12] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_KILL,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SYS_CHROOT,
    Capability::CAP_IPC_LOCK,
    Capability::CAP_SYS_NICE,
    Capability::CAP_SYS_RESOURCE,
];

/// Why a process cannot become a workload.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    #[error("sandbox: cannot {what}: {source}")]
    Step { what: String, source: Errno },
    #[error("sandbox: cannot read /proc/self/mounts: {0}")]
    Mounts(io::Error),
    #[error("sandbox: cannot drop capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
    #[error("sandbox: cannot shut other processes' files (a kernel with Landlock, 5.19 or later, is needed): {0}")]
    Landlock(#[from] RulesetError),
    #[error("sandbox: cannot open /: {0}")]
    Root(#[from] PathFdError),
    #[error("sandbox: {0}")]
    Seccomp(#[from] SeccompError),
}

/// Gives up. `run_dir` is where the daemon's sockets are.
pub(super) fn enter(run_dir: &Path) -> Result<(), SandboxError> {
    shut_cgroups_and_sockets(run_dir)?;
    drop_capabilities()?;
    nix::sys::prctl::set_no_new_privs()
        .map_err(|source| SandboxError::Step { what: "set no_new_privs".to_owned(), source })?;
    leave_other_processes_alone()?;
    seccomp::apply()?;
    Ok(())
}

/// In a Landlock domain: whoever is in one has no access to processes outside of it, whatever their user. Without it,
/// /proc/PID/root of a host's process with no more capabilities than ours leads to a mount namespace where the cgroups can
/// be written to. Nothing else is restricted: moving files between directories, which every domain is denied, is allowed
/// again everywhere.
fn leave_other_processes_alone() -> Result<(), SandboxError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Refer)?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/")?, AccessFs::Refer))?
        .restrict_self()?;
    Ok(())
}

/// In a mount namespace of its own: every cgroup file system read-only, and the daemon's sockets out of sight. Without
/// SYS_ADMIN nobody in it can undo that.
fn shut_cgroups_and_sockets(run_dir: &Path) -> Result<(), SandboxError> {
    let step = |what: String| move |source| SandboxError::Step { what, source };
    unshare(CloneFlags::CLONE_NEWNS).map_err(step("make a mount namespace (is this root?)".to_owned()))?;
    // Mounts of the host still appear here; none of ours appear there.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(step("separate the mount namespace".to_owned()))?;
    for path in cgroup_mounts(&fs::read_to_string("/proc/self/mounts").map_err(SandboxError::Mounts)?) {
        let flags = MsFlags::MS_REMOUNT
            | MsFlags::MS_BIND
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV
            | MsFlags::MS_NOEXEC;
        mount(None::<&str>, &path, None::<&str>, flags, None::<&str>)
            .map_err(step(format!("make {} read-only", path.display())))?;
    }
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("hidden"), run_dir, Some("tmpfs"), flags, Some("size=4k,mode=0555"))
        .map_err(step(format!("hide {}", run_dir.display())))
}

fn cgroup_mounts(mounts: &str) -> Vec<PathBuf> {
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(path.replace("\\040", " ")))
        })
        .collect()
}

fn drop_capabilities() -> Result<(), SandboxError> {
    let kept: HashSet<Capability> = KEPT.into();
    // The bounding set first: it needs SETPCAP, and it is what limits a root process after exec.
    for capability in caps::runtime::procfs_all_supported(None)? {
        if !kept.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    let permitted: HashSet<Capability> = caps::read(None, CapSet::Permitted)?.intersection(&kept).copied().collect();
    caps::set(None, CapSet::Effective, &permitted)?;
    caps::set(None, CapSet::Permitted, &permitted)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cgroup_mount_is_found() {
        let mounts = "proc /proc proc rw 0 0\ncgroup /c/cpu cgroup rw 0 0\ncgroup2 /c/u\\0402 cgroup2 rw 0 0\n";
        assert_eq!(cgroup_mounts(mounts), [PathBuf::from("/c/cpu"), PathBuf::from("/c/u 2")]);
    }
}
