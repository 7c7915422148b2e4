//! The rig's cgroups: every process of a rig lives in one of them, so all can be found and killed without a list of
//! numbers, also after a crash.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::poll;

/// What can go wrong with cgroups.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup2 mount at all.
    #[error("no cgroup2 file system is mounted (looked in /proc/self/mounts): mount one at /sys/fs/cgroup")]
    NotMounted,
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
    /// Processes survived their killing (in uninterruptible sleep, for example).
    #[error("processes in {path} do not die: {processes}")]
    Survivors {
        /// Where.
        path: PathBuf,
        /// Who.
        processes: String,
    },
}

/// How often the way to a cgroup is made anew when others remove parts of it.
const ATTEMPTS: u32 = 100;

/// How long killed processes may take to go away.
const DEATH: Duration = Duration::from_secs(10);

/// The cgroup2 mount: /sys/fs/cgroup, or /sys/fs/cgroup/unified where version 1 is mounted beside it.
#[derive(Clone, Debug)]
pub struct Cgroups {
    mount: PathBuf,
}

impl Cgroups {
    /// Finds the mount.
    pub fn find() -> Result<Self, CgroupError> {
        let mounts =
            fs::read_to_string("/proc/self/mounts").map_err(io_error("read", Path::new("/proc/self/mounts")))?;
        mount_point(&mounts).map(|mount| Self { mount }).ok_or(CgroupError::NotMounted)
    }

    /// The directory of a cgroup.
    pub fn path(&self, cgroup: &str) -> PathBuf {
        self.mount.join(cgroup)
    }

    /// Makes a cgroup and those above it.
    pub fn create(&self, cgroup: &str) -> Result<(), CgroupError> {
        let path = self.path(cgroup);
        // Another rig that ends takes the common parent along when it is empty: between its making and that of what is to
        // be in it, for instance.
        let mut result = fs::create_dir_all(&path);
        for _ in 0..ATTEMPTS {
            match &result {
                Err(error) if error.kind() == ErrorKind::NotFound => result = fs::create_dir_all(&path),
                _ => break,
            }
        }
        result.map_err(io_error("create", &path))
    }

    /// Moves this process (and so what it starts) into a cgroup.
    pub fn join(&self, cgroup: &str) -> Result<(), CgroupError> {
        let path = self.path(cgroup).join("cgroup.procs");
        fs::write(&path, "0").map_err(io_error("write to", &path))
    }

    /// The names of the cgroups directly below; none when there is no such cgroup.
    pub fn children(&self, cgroup: &str) -> Result<Vec<String>, CgroupError> {
        let path = self.path(cgroup);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("list", &path)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("list", &path))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether the cgroup is there.
    pub fn exists(&self, cgroup: &str) -> bool {
        self.path(cgroup).is_dir()
    }

    /// The numbers of the processes in a cgroup and below.
    pub fn processes(&self, cgroup: &str) -> Result<Vec<i32>, CgroupError> {
        let mut found = self.own_processes(cgroup)?;
        for child in self.children(cgroup)? {
            found.extend(self.processes(&format!("{cgroup}/{child}"))?);
        }
        Ok(found)
    }

    /// Kills everything in a cgroup and below, and removes it. Nothing happens when it is not there.
    pub fn destroy(&self, cgroup: &str) -> Result<(), CgroupError> {
        if !self.exists(cgroup) {
            return Ok(());
        }
        let kill = self.path(cgroup).join("cgroup.kill");
        fs::write(&kill, "1").map_err(io_error("write to", &kill))?;
        let mut outcome = Ok(());
        let dead = poll::until_true(DEATH, || match self.processes(cgroup) {
            Ok(processes) => processes.is_empty(),
            Err(error) => {
                outcome = Err(error);
                true
            }
        });
        outcome?;
        if !dead {
            let processes = self.processes(cgroup)?;
            let processes = processes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            return Err(CgroupError::Survivors { path: self.path(cgroup), processes });
        }
        self.remove(cgroup)
    }

    /// Removes an empty cgroup when it is there; one that is still in use stays.
    pub fn remove_if_empty(&self, cgroup: &str) -> Result<(), CgroupError> {
        let path = self.path(cgroup);
        match fs::remove_dir(&path) {
            Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ResourceBusy) => {
                Err(io_error("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }

    fn own_processes(&self, cgroup: &str) -> Result<Vec<i32>, CgroupError> {
        let path = self.path(cgroup).join("cgroup.procs");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ENODEV)) => Ok(Vec::new()),
            Err(error) => Err(io_error("read", &path)(error)),
        }
    }

    fn remove(&self, cgroup: &str) -> Result<(), CgroupError> {
        for child in self.children(cgroup)? {
            self.remove(&format!("{cgroup}/{child}"))?;
        }
        let path = self.path(cgroup);
        // A process that is just being reaped still holds its cgroup for a moment.
        let mut failure = None;
        let gone = poll::until_true(DEATH, || match fs::remove_dir(&path) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::NotFound => true,
            Err(error) => {
                failure = Some(error);
                false
            }
        });
        match failure {
            Some(error) if !gone => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }
}

fn mount_point(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        // Spaces in mount points are written as \040: such a mount is not one that we can mean.
        (kind == "cgroup2" && !point.contains('\\')).then(|| PathBuf::from(point))
    })
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_are_understood() {
        let hybrid = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_point(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        let pure = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";
        assert_eq!(mount_point(pure), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(mount_point("proc /proc proc rw 0 0\n"), None);
    }
}
