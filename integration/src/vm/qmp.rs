//! QEMU's machine protocol: one JSON document a line over a Unix socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::error::{VmError, io_error};
use crate::poll;

/// Longer than anything takes that works: a snapshot is written to disk before the answer comes.
const PATIENCE: Duration = Duration::from_mins(2);

/// A session with a QEMU.
#[derive(Debug)]
pub struct Monitor {
    reader: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects to a QEMU that may just be starting.
    pub(super) fn connect(socket: &Path) -> Result<Self, VmError> {
        let stream = connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(io_error("set up", socket))?;
        let mut monitor = Self { reader: BufReader::new(stream) };
        monitor.line()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Runs a command: what it returned.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, VmError> {
        let request = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.reader
            .get_mut()
            .write_all(request.as_bytes())
            .map_err(|error| VmError::Monitor(format!("{command}: {error}")))?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(VmError::Refused { command: command.to_owned(), message: error.to_string() });
            }
            if let Some(returned) = answer.get_mut("return") {
                return Ok(returned.take());
            }
            // Everything else is an event, which nobody waits for: states are asked for.
        }
    }

    /// Runs a command of the monitor that is made for people. It reports a failure in what it prints.
    pub fn human(&mut self, command: &str) -> Result<(), VmError> {
        let printed = self.execute("human-monitor-command", &json!({"command-line": command}))?;
        match printed.as_str() {
            Some("") | None => Ok(()),
            Some(message) => Err(VmError::Refused { command: command.to_owned(), message: message.trim().to_owned() }),
        }
    }

    /// Starts a migration, and waits until the guest's state is at its destination. Returns for how long the guest stood still,
    /// as QEMU says.
    pub fn migrate(&mut self, to: &str) -> Result<Duration, VmError> {
        self.execute("migrate", &json!({"uri": to}))?;
        let mut state = String::new();
        let mut stood = Duration::ZERO;
        let ended = poll::until(PATIENCE, || match self.execute("query-migrate", &json!({})) {
            Ok(answer) => {
                stood = Duration::from_millis(answer["downtime"].as_u64().unwrap_or_default());
                answer["status"].as_str().unwrap_or_default().clone_into(&mut state);
                matches!(state.as_str(), "completed" | "failed" | "cancelled").then_some(Ok(()))
            }
            Err(error) => Some(Err(error)),
        });
        ended.transpose()?;
        if state == "completed" { Ok(stood) } else { Err(VmError::Migration(state)) }
    }

    fn line(&mut self) -> Result<Value, VmError> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Err(VmError::Monitor("QEMU ended".to_owned())),
            Ok(_) => serde_json::from_str(&line).map_err(|error| VmError::Monitor(format!("{error}: {line}"))),
            Err(error) => Err(VmError::Monitor(error.to_string())),
        }
    }
}

/// Connects to a socket that QEMU may just be making.
pub(super) fn connect(socket: &Path) -> Result<UnixStream, VmError> {
    let mut failure = None;
    let stream = poll::until(Duration::from_secs(20), || match UnixStream::connect(socket) {
        Ok(stream) => Some(stream),
        Err(error) => {
            failure = Some(error);
            None
        }
    });
    stream.ok_or_else(|| {
        let source = failure.unwrap_or_else(|| std::io::ErrorKind::TimedOut.into());
        VmError::Io { action: "connect to", path: socket.to_owned(), source }
    })
}
