//! cgroup v2 directories: what the packet filter recognises processes by.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What can go wrong with cgroups.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error(
        "no cgroup2 file system is mounted (looked in /proc/self/mounts): mount one, for example at /sys/fs/cgroup"
    )]
    NotMounted,
    #[error("cannot read /proc/self/mounts: {0}")]
    Mounts(io::Error),
    #[error("cgroup {}: cannot {what}: {source}", path.display())]
    Directory { path: PathBuf, what: &'static str, source: io::Error },
}

/// What the packet filter compares: the ID of a cgroup and how deep it lies below the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cgroup {
    /// The inode of its directory.
    pub(crate) id: u64,
    /// 1 for children of the root.
    pub(crate) level: u32,
}

/// The node's part of the cgroup2 hierarchy.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    mount: PathBuf,
    base: PathBuf,
}

impl Tree {
    /// `base` is relative to the cgroup2 mount.
    pub(crate) fn new(base: &Path) -> Result<Self, CgroupError> {
        Ok(Self { mount: mount_point()?, base: base.to_owned() })
    }

    /// The daemon's own.
    pub(crate) fn daemon(&self) -> PathBuf {
        self.path("daemon")
    }

    /// The proxy's.
    pub(crate) fn proxy(&self) -> PathBuf {
        self.path("proxy")
    }

    /// A workload's. Its processes may make cgroups of their own below it.
    pub(crate) fn workload(&self, namespace: &str, name: &str) -> PathBuf {
        self.path("workloads").join(format!("{namespace}.{name}"))
    }

    fn path(&self, leaf: &str) -> PathBuf {
        self.mount.join(&self.base).join(leaf)
    }

    /// Makes sure that the directory is there, and identifies it.
    pub(crate) fn create(&self, path: &Path) -> Result<Cgroup, CgroupError> {
        let failed = |what| move |source| CgroupError::Directory { path: path.to_owned(), what, source };
        fs::create_dir_all(path).map_err(failed("create it"))?;
        let id = fs::metadata(path).map_err(failed("identify it"))?.ino();
        let level = path.strip_prefix(&self.mount).map_or(0, |relative| relative.components().count()) as u32;
        Ok(Cgroup { id, level })
    }
}

/// Moves a process (all its threads) into a cgroup. Sockets that it has made before stay where they were made.
pub(crate) fn enter(cgroup: &Path, process: u32) -> Result<(), CgroupError> {
    fs::write(cgroup.join("cgroup.procs"), process.to_string()).map_err(|source| CgroupError::Directory {
        path: cgroup.to_owned(),
        what: "move a process into it",
        source,
    })
}

/// Kills every process in a cgroup and below it.
pub(crate) fn kill_all(cgroup: &Path) -> Result<(), CgroupError> {
    match fs::write(cgroup.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| CgroupError::Directory {
            path: cgroup.to_owned(),
            what: "kill its processes",
            source,
        }),
    }
}

/// Removes a cgroup without processes and children; one that is in use stays, and `false` is returned.
pub(crate) fn remove(cgroup: &Path) -> Result<bool, CgroupError> {
    match fs::remove_dir(cgroup) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
        Err(source) => Err(CgroupError::Directory { path: cgroup.to_owned(), what: "remove it", source }),
    }
}

/// Where cgroup2 is mounted.
pub(crate) fn mount_point() -> Result<PathBuf, CgroupError> {
    let mut mounts = String::new();
    fs::File::open("/proc/self/mounts")
        .and_then(|mut file| file.read_to_string(&mut mounts))
        .map_err(CgroupError::Mounts)?;
    find_mount(&mounts).ok_or(CgroupError::NotMounted)
}

fn find_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        // The kernel writes a space in a path as \040.
        (kind == "cgroup2").then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_hierarchy_is_found_among_others() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\
                      cgroup2 /sys/fs/cgroup/a\\040b cgroup2 rw 0 0\n";
        assert_eq!(find_mount(mounts), Some(PathBuf::from("/sys/fs/cgroup/a b")));
        assert_eq!(find_mount("proc /proc proc rw 0 0\n"), None);
    }
}
