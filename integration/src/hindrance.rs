//! What holds a daemon up, or ends it: a disk that hangs, memory that is short.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;

use crate::harness::{Cluster, PATIENCE};
use crate::poll;
use crate::process::ProcessId;

/// A log that can hang like a disk: a pipe that somebody reads, or not.
#[derive(Debug)]
pub struct Disk {
    reads: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    reader: Option<thread::JoinHandle<()>>,
    pipe: PathBuf,
}

impl Disk {
    /// In the place of a log file.
    pub fn new(pipe: &Path) -> anyhow::Result<Self> {
        fs::remove_file(pipe)?;
        nix::unistd::mkfifo(pipe, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR)?;
        let mut file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(pipe)?;
        let (reads, ended) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        let (reading, over) = (Arc::clone(&reads), Arc::clone(&ended));
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while !over.load(Ordering::Relaxed) {
                if !reading.load(Ordering::Relaxed) || file.read(&mut buffer).is_err() {
                    thread::park_timeout(Duration::from_millis(2));
                }
            }
        });
        Ok(Self { reads, ended, reader: Some(reader), pipe: pipe.to_owned() })
    }

    /// From now on, whoever writes waits for ever.
    pub fn hang(&self) -> anyhow::Result<()> {
        self.reads.store(false, Ordering::Relaxed);
        thread::park_timeout(Duration::from_millis(20));
        let mut file = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&self.pipe)?;
        for size in [4096, 1] {
            loop {
                match file.write(&vec![b'\n'; size]) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            drop(reader.join());
        }
        // What keeps the logs of tests shall not wait for a pipe.
        drop(fs::remove_file(&self.pipe));
    }
}

/// Whether a thread of the process waits in `write`.
pub fn is_writing(process: ProcessId) -> bool {
    let write = format!("{} ", libc::SYS_write);
    let threads = fs::read_dir(format!("/proc/{}/task", process.pid)).into_iter().flatten().flatten();
    threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("syscall")).ok())
        .any(|call| call.starts_with(&write))
}

/// A limit on what a process may allocate from now on.
#[derive(Debug)]
pub enum MemoryLimit {
    /// A cgroup of its own in the memory controller of version 1: beside the cgroup that the packet filter knows it by.
    Beside(PathBuf),
    /// Its own cgroup, where there is only version 2.
    Own(PathBuf),
}

impl MemoryLimit {
    /// Sets it on the daemon of `a`.
    pub fn on(cluster: &Cluster, process: ProcessId, bytes: u64) -> anyhow::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let version1 = mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields.get(2) == Some(&"cgroup") && fields.get(3)?.split(',').any(|option| option == "memory"))
                .then(|| PathBuf::from(fields[1]))
        });
        if let Some(mount) = version1 {
            let cgroup = mount.join(format!("opencluster-rig-{}", cluster.rig.name()));
            fs::create_dir_all(&cgroup)?;
            fs::write(cgroup.join("memory.limit_in_bytes"), bytes.to_string())?;
            fs::write(cgroup.join("cgroup.procs"), process.pid.to_string())?;
            return Ok(Self::Beside(cgroup));
        }
        let cgroups = crate::cgroup::Cgroups::find()?;
        let path = cluster.rig.cgroup("a", "daemon");
        let mut above = cgroups.path("");
        for part in Path::new(&path) {
            fs::write(above.join("cgroup.subtree_control"), "+memory")?;
            above.push(part);
        }
        fs::write(above.join("memory.max"), bytes.to_string())?;
        Ok(Self::Own(above))
    }

    /// Processes that the kernel killed for it.
    pub fn kills(&self) -> anyhow::Result<u64> {
        let text = match self {
            Self::Beside(cgroup) => fs::read_to_string(cgroup.join("memory.oom_control"))?,
            Self::Own(cgroup) => fs::read_to_string(cgroup.join("memory.events"))?,
        };
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).context("no count of kills")?;
        Ok(count.trim().parse()?)
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        if let Self::Beside(cgroup) = self
            && !poll::until_true(PATIENCE, || fs::remove_dir(&*cgroup).is_ok())
        {
            eprintln!("{} could not be removed", cgroup.display());
        }
    }
}
