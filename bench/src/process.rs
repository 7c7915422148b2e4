//! Programs in namespaces: starting them so that they cannot outlive the run, and what they cost.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal};
use tokio::process::{Child, Command};

use crate::error::BenchError;

/// Open files: 10,000 flows take two in each proxy, and there is room for more.
const OPEN_FILES: u64 = 200_000;

/// How long a program may take to end when asked to.
const POLITENESS: Duration = Duration::from_secs(2);

/// Clock ticks a second in /proc/PID/stat: fixed at 100 in the interface of every architecture that Linux still has.
const TICKS: f64 = 100.0;

/// A command that runs `program` in the network namespace `net`, by way of this program's own `enter`.
///
/// The process that results *is* `program` (same PID), dies with this one, and may open many files.
pub fn in_namespace(net: &str, program: impl AsRef<std::ffi::OsStr>) -> Result<Command, BenchError> {
    let own = own_program()?;
    let mut command = Command::new(own);
    command.args(["enter", "--net", net, "--parent", &std::process::id().to_string(), "--"]).arg(program);
    command.kill_on_drop(true).stdin(Stdio::null());
    Ok(command)
}

/// The path of this program.
pub fn own_program() -> Result<std::path::PathBuf, BenchError> {
    std::env::current_exe().map_err(BenchError::file("finding this program by", "/proc/self/exe"))
}

/// The body of `enter`: never returns but for an error.
pub fn enter(net: &str, parent: u32, command: &[std::ffi::OsString]) -> BenchError {
    match prepare(net, parent) {
        Ok(()) => {}
        Err(e) => return e,
    }
    let Some((program, args)) = command.split_first() else {
        return BenchError::Peer("enter: no command".into());
    };
    let source = std::process::Command::new(program).args(args).exec();
    BenchError::Start { program: program.display().to_string(), hint: "is its package installed?", source }
}

fn prepare(net: &str, parent: u32) -> Result<(), BenchError> {
    let failed =
        |what: &'static str| move |e: rustix::io::Errno| BenchError::Socket { what: what.into(), source: e.into() };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("asking for a death signal"))?;
    // The parent may have died before the signal was asked for.
    if rustix::process::getppid().map(|p| p.as_raw_nonzero().get().cast_unsigned()) != Some(parent) {
        return Err(BenchError::Interrupted);
    }
    join(net)
}

/// Raises this process's limit of open files, which every program of the run inherits, and returns what it is now.
///
/// Where the machine does not allow as many as are wanted (no CAP_SYS_RESOURCE), it is what the machine allows.
pub fn raise_open_files() -> Result<u64, BenchError> {
    let failed = |e: rustix::io::Errno| BenchError::socket("raising the limit of open files")(e.into());
    let most = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(OPEN_FILES);
    let set = |limit| {
        let maximum = Some(most.max(limit));
        rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum }).map(|()| limit)
    };
    match set(OPEN_FILES) {
        Err(rustix::io::Errno::PERM) => set(most).map_err(failed),
        other => other.map_err(failed),
    }
}

/// How many flows every contender can hold with `open_files`: two sockets for each, and some files for itself.
///
/// The strictest is stunnel, which accepts 125 connections for each 256 files and resets the rest.
pub fn flows_within(open_files: u64) -> usize {
    (open_files.saturating_mul(48) / 100) as usize
}

/// Moves the calling thread into the named network namespace.
pub fn join(net: &str) -> Result<(), BenchError> {
    let path = Path::new("/run/netns").join(net);
    let file = fs::File::open(&path).map_err(BenchError::file("opening the network namespace", &path))?;
    rustix::thread::move_into_link_name_space(
        std::os::fd::AsFd::as_fd(&file),
        Some(rustix::thread::LinkNameSpaceType::Network),
    )
    .map_err(|e| BenchError::file("entering the network namespace", &path)(e.into()))
}

/// Runs `command` to its end and returns its output; any failure carries what it printed.
pub async fn finished(mut command: Command, limit: Duration) -> Result<Output, BenchError> {
    let line = describe(&command);
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawned(&mut command)?;
    let output = tokio::time::timeout(limit, child.wait_with_output())
        .await
        .map_err(|_| BenchError::Timeout { command: line.clone(), seconds: limit.as_secs() })?
        .map_err(BenchError::file("waiting for", &line))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(BenchError::Command { command: line, status: output.status.to_string(), stderr: tail(&output.stderr) })
}

/// Starts `command` with everything that it prints going to `log`.
pub fn logged(mut command: Command, log: &Path) -> Result<Child, BenchError> {
    let file = fs::File::create(log).map_err(BenchError::file("creating", log))?;
    let errors = file.try_clone().map_err(BenchError::file("sharing", log))?;
    command.stdin(Stdio::null()).stdout(file).stderr(errors);
    spawned(&mut command)
}

/// Asks a program to end, and ends it if it does not.
pub async fn end(child: &mut Child, log: &Path) -> Result<(), BenchError> {
    let failed = |e| BenchError::file("stopping the program of", log)(e);
    let Some(pid) = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) else {
        // It has ended and was waited for.
        return Ok(());
    };
    // It may end at this very moment: what counts is whether it is gone in the end.
    if rustix::process::kill_process(pid, Signal::TERM).is_ok()
        && let Ok(ended) = tokio::time::timeout(POLITENESS, child.wait()).await
    {
        return ended.map(|_| ()).map_err(failed);
    }
    child.kill().await.map_err(failed)
}

/// Starts `command` with its streams as they were set.
pub fn spawned(command: &mut Command) -> Result<Child, BenchError> {
    let program = command.as_std().get_program().display().to_string();
    command.spawn().map_err(|source| BenchError::Start { program, hint: "is its package installed?", source })
}

fn describe(command: &Command) -> String {
    let std = command.as_std();
    std::iter::once(std.get_program()).chain(std.get_args()).map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The end of what a program printed.
pub fn tail(printed: &[u8]) -> String {
    let text = String::from_utf8_lossy(printed);
    let lines: Vec<&str> = text.trim().lines().collect();
    lines[lines.len().saturating_sub(8)..].join("; ")
}

/// The processes and everything that they started and that is still running.
pub fn with_descendants(roots: &[u32]) -> Result<Vec<u32>, BenchError> {
    if roots.is_empty() {
        return Ok(Vec::new());
    }
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").map_err(BenchError::file("listing", "/proc"))? {
        let path = entry.map_err(BenchError::file("listing", "/proc"))?.path();
        let Some(pid) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<u32>().ok()) else { continue };
        // A process that ended since the listing is no descendant any more.
        let Ok(stat) = fs::read_to_string(path.join("stat")) else { continue };
        if let Some(parent) = parent_of(&stat) {
            parents.push((pid, parent));
        }
    }
    let mut all = roots.to_vec();
    let mut next = 0;
    while let Some(&parent) = all.get(next) {
        next += 1;
        all.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(pid, _)| *pid));
    }
    Ok(all)
}

/// ppid: field 4.
fn parent_of(stat: &str) -> Option<u32> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// CPU seconds (user and system) that the processes have used so far, ended threads included.
///
/// Work that the kernel does for them in soft interrupts is charged to whoever runs at that moment, as everywhere.
pub fn cpu_seconds(pids: &[u32]) -> Result<f64, BenchError> {
    let mut ticks = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).map_err(BenchError::file("reading", &path))?;
        ticks += ticks_of(&stat).ok_or_else(|| BenchError::file("understanding", &path)(malformed()))?;
    }
    Ok(ticks as f64 / TICKS)
}

/// CPU time in nanoseconds that the threads of the processes have used so far, as their scheduler counts it.
///
/// Finer than [`cpu_seconds`], for processes that do next to nothing; without the threads that have ended.
pub fn cpu_nanoseconds(pids: &[u32]) -> Result<u64, BenchError> {
    let mut sum = 0;
    for pid in pids {
        let folder = format!("/proc/{pid}/task");
        for entry in fs::read_dir(&folder).map_err(BenchError::file("listing", &folder))? {
            let path = entry.map_err(BenchError::file("listing", &folder))?.path().join("schedstat");
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                // The thread has ended since the listing.
                Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(NO_PROCESS) => continue,
                Err(e) => return Err(BenchError::file("reading", path)(e)),
            };
            let first = text.split_ascii_whitespace().next().and_then(|n| n.parse::<u64>().ok());
            sum += first.ok_or_else(|| BenchError::file("understanding", &path)(malformed()))?;
        }
    }
    Ok(sum)
}

/// ESRCH.
const NO_PROCESS: i32 = rustix::io::Errno::SRCH.raw_os_error();

/// utime + stime: fields 14 and 15, counted behind the command name, which may hold blanks and brackets itself.
fn ticks_of(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Memory of a set of processes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Proportional set size: pages that processes share are divided between them.
    pub pss: u64,
    /// Resident set size.
    pub rss: u64,
}

/// The memory of the processes together.
pub fn memory(pids: &[u32]) -> Result<Memory, BenchError> {
    let mut sum = Memory::default();
    for pid in pids {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).map_err(BenchError::file("reading", &path))?;
        let field = |name| kib_field(&text, name).ok_or_else(|| BenchError::file("understanding", &path)(malformed()));
        sum.pss += field("Pss:")?;
        sum.rss += field("Rss:")?;
    }
    Ok(sum)
}

/// Kernel memory of the machine that grows with sockets, threads and page tables, in bytes.
///
/// It cannot be told apart by process, so it is only meaningful as a difference on a quiet machine.
pub fn kernel_memory() -> Result<u64, BenchError> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).map_err(BenchError::file("reading", path))?;
    ["Slab:", "KernelStack:", "PageTables:"]
        .iter()
        .map(|name| kib_field(&text, name).ok_or_else(|| BenchError::file("understanding", path)(malformed())))
        .sum()
}

fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|l| l.starts_with(name))?;
    line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not the format that Linux documents")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_of_a_process_with_a_nasty_name() {
        let stat = "12 (a) b (c) S 1 12 12 0 -1 4194560 100 0 0 0 30 12 0 0 20 0 1 0 5 1000 10";
        assert_eq!(ticks_of(stat), Some(42));
        assert_eq!(parent_of(stat), Some(1));
        assert_eq!(ticks_of("12 (a S 1"), None);
        assert_eq!(ticks_of("12 (a) S 1 2"), None);
    }

    #[test]
    fn memory_fields() {
        let text = "560c-7ffd ---p 00000000 00:00 0 [rollup]\nRss:    9120 kB\nPss:    4000 kB\nPss_Dirty: 1 kB\n";
        assert_eq!(kib_field(text, "Pss:"), Some(4_096_000));
        assert_eq!(kib_field(text, "Swap:"), None);
    }

    #[test]
    fn flows_that_fit_the_limit_of_open_files() {
        assert_eq!(flows_within(20_000), 9_600);
        assert!(flows_within(20_000) < 20_000 * 125 / 256);
    }

    #[test]
    fn this_process_uses_cpu_and_memory() {
        let own = [std::process::id()];
        let before = cpu_seconds(&own).unwrap();
        let start = std::time::Instant::now();
        // On a busy machine it takes longer to get as much.
        while cpu_seconds(&own).unwrap() - before < 0.02 {
            assert!(start.elapsed() < Duration::from_secs(30), "all the time busy, but no CPU time is counted");
        }
        assert!(cpu_nanoseconds(&own).unwrap() > 10_000_000);
        assert!(memory(&own).unwrap().rss > 100_000);
        assert!(cpu_seconds(&[u32::MAX]).is_err(), "a process that is gone is an error, not zero");
    }

    #[test]
    fn children_of_children_are_found() {
        // The shell does not replace itself by the sleep, which it has to outlive.
        let mut shell = std::process::Command::new("sh").args(["-c", "sh -c 'sleep 30; :'; :"]).spawn().unwrap();
        let start = std::time::Instant::now();
        let found = loop {
            let found = with_descendants(&[shell.id()]).unwrap();
            if found.len() >= 3 || start.elapsed() > Duration::from_secs(10) {
                break found;
            }
            std::thread::park_timeout(Duration::from_millis(10));
        };
        for pid in found.iter().rev() {
            let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
            // A shell whose sleep has gone ends by itself.
            if let Err(error) = rustix::process::kill_process(pid, Signal::KILL) {
                assert_eq!(error, rustix::io::Errno::SRCH);
            }
        }
        shell.wait().unwrap();
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(with_descendants(&[]).unwrap().is_empty());
    }

    proptest::proptest! {
        #[test]
        fn any_stat_line_is_read_or_refused(text in "\\PC{0,80}") {
            ticks_of(&text);
            parent_of(&text);
            kib_field(&text, "Pss:");
        }
    }
}
