//! A shell in the guest, on a port of its own: it works whatever the guest's packet filter does.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::error::{VmError, io_error};
use super::qmp;

/// Ends what a command printed; its exit code follows.
const MARK: &str = "@@exit ";

/// What a command printed, and its exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Standard output and standard error.
    pub output: String,
    /// Zero for success.
    pub code: i32,
}

/// The shell.
#[derive(Debug)]
pub(super) struct Shell {
    stream: UnixStream,
    /// Arrived and not used yet.
    pending: String,
}

impl Shell {
    /// Connects to the port of a QEMU that may just be starting.
    pub(super) fn connect(socket: &Path) -> Result<Self, VmError> {
        let stream = qmp::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_millis(50))).map_err(io_error("set up", socket))?;
        Ok(Self { stream, pending: String::new() })
    }

    /// Waits for the mark that the guest prints once it has started; `None`: not within `limit`.
    pub(super) fn wait(&mut self, limit: Duration) -> Option<Done> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(done) = take(&mut self.pending) {
                return Some(done);
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.pending.push_str(&String::from_utf8_lossy(&buffer[..count])),
                Err(_) if Instant::now() < deadline => {}
                Err(_) => return None,
            }
        }
    }

    /// Runs a command line; `None`: no answer within `limit`.
    pub(super) fn run(&mut self, command: &str, limit: Duration) -> Result<Option<Done>, VmError> {
        self.pending.clear();
        let line = format!("{{ {command}\n}} 2>&1 </dev/null; echo \"{MARK}$?\"\n");
        self.stream.write_all(line.as_bytes()).map_err(io_error("write to", Path::new("the guest's shell")))?;
        Ok(self.wait(limit))
    }
}

/// Takes what belongs to one command off the front, once its mark has arrived.
fn take(pending: &mut String) -> Option<Done> {
    let at = pending.find(MARK)?;
    let (code, rest) = pending[at + MARK.len()..].split_once('\n')?;
    let done = Done { output: pending[..at].replace('\r', ""), code: code.trim().parse().unwrap_or(-1) };
    *pending = rest.to_owned();
    Some(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_that_arrives_in_pieces_is_waited_for() {
        let mut pending = "hello\r\n@@exit 1".to_owned();
        assert_eq!(take(&mut pending), None);
        pending.push_str("27\r\nnext");
        assert_eq!(take(&mut pending), Some(Done { output: "hello\n".to_owned(), code: 127 }));
        assert_eq!(pending, "next");
    }
}
