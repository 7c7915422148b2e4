//! Processes by number *and* start time, so that a number which the kernel gave to somebody else is never signalled.

use std::fs;
use std::io;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// What can go wrong with a process of the rig.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It is gone, or its number now belongs to another process.
    #[error("process {0} is gone")]
    Gone(i32),
    /// The kernel refused the signal.
    #[error("cannot send {signal} to process {pid}: {source}")]
    Signal {
        /// Whom.
        pid: i32,
        /// What.
        signal: Signal,
        /// Why not.
        source: nix::Error,
    },
    /// /proc is not as it should be.
    #[error("cannot read /proc/{pid}/stat: {source}")]
    Stat {
        /// Whose.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
}

/// One process for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub fn of(pid: i32) -> Result<Self, ProcessError> {
        match read_stat(pid) {
            Ok(Some(stat)) => Ok(Self { pid, started: stat.started }),
            Ok(None) => Err(ProcessError::Gone(pid)),
            Err(source) => Err(ProcessError::Stat { pid, source }),
        }
    }

    /// It is still there and not a zombie.
    pub fn is_alive(self) -> bool {
        matches!(read_stat(self.pid), Ok(Some(stat)) if stat.started == self.started && !stat.dead)
    }

    /// Sends it a signal.
    pub fn signal(self, signal: Signal) -> Result<(), ProcessError> {
        if !self.is_alive() {
            return Err(ProcessError::Gone(self.pid));
        }
        kill(Pid::from_raw(self.pid), signal).map_err(|source| ProcessError::Signal { pid: self.pid, signal, source })
    }
}

struct Stat {
    started: u64,
    dead: bool,
}

fn read_stat(pid: i32) -> io::Result<Option<Stat>> {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(text) => Ok(parse_stat(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // ESRCH: it went away between opening and reading.
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// proc(5): the name (field 2) may hold anything, spaces and parentheses too; the fields after it are counted from the
/// last parenthesis. Field 3 is the state, field 22 the start time.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    Some(Stat { dead: matches!(state, "Z" | "X"), started: fields.nth(18)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = "7 (a) b) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        let stat = parse_stat(text).expect("parsed");
        assert!(stat.dead);
        assert_eq!(stat.started, 4242);
    }

    #[test]
    fn a_reused_number_is_not_the_same_process() {
        let itself = ProcessId::of(std::process::id().cast_signed()).expect("own stat");
        assert!(itself.is_alive());
        assert!(!ProcessId { started: itself.started + 1, ..itself }.is_alive());
    }
}
