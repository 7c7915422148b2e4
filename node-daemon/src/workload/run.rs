//! `opencluster-node run`: asks the daemon to let this process into a workload, gives up what leads around the proxy, and
//! becomes the command.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use super::protocol::{self, Answer, MAX_ANSWER, ProtocolError, Request};
use super::sandbox::{self, SandboxError};

/// The daemon answers an admission within 15 s, one way or the other.
const LIMIT: Duration = Duration::from_secs(20);

/// What the user passes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The daemon's socket.
    #[arg(long, default_value = "/run/opencluster/node.sock")]
    pub(crate) socket: PathBuf,
    /// The workload's namespace.
    #[arg(long, default_value = "default")]
    pub(crate) namespace: String,
    /// The workload's name; it must belong on this node.
    #[arg(long)]
    pub(crate) workload: String,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<OsString>,
}

/// Why the command was not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error("cannot ask the node daemon at {}: {source}. Is it running, and is this root?", socket.display())]
    Daemon { socket: PathBuf, source: ProtocolError },
    #[error("{0}")]
    Refused(String),
    #[error("the node daemon gave an answer to another question")]
    Answer,
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("no command to run")]
    NoCommand,
    #[error("cannot run {}: {source}", command.display())]
    Exec { command: PathBuf, source: io::Error },
}

impl RunError {
    /// As shells and container runtimes have it: 127 not found, 126 not executable, 125 anything before.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            Self::Exec { .. } => 126,
            _ => 125,
        }
    }
}

/// Becomes the command. Returns only if that failed.
pub(crate) fn run(arguments: &Arguments) -> Result<std::convert::Infallible, RunError> {
    let request = Request::Admit { namespace: arguments.namespace.clone(), workload: arguments.workload.clone() };
    match ask(&arguments.socket, &request)? {
        Answer::Admitted => {}
        Answer::Refused { reason } => return Err(RunError::Refused(reason)),
        Answer::Status { .. } => return Err(RunError::Answer),
    }
    let run_dir = arguments.socket.parent().unwrap_or(Path::new("/"));
    sandbox::enter(run_dir)?;

    // Not execvp: this gives the command back the default action of SIGPIPE, which Rust's runtime took from us.
    let (command, rest) = arguments.command.split_first().ok_or(RunError::NoCommand)?;
    let source = process::Command::new(command).args(rest).exec();
    Err(RunError::Exec { command: PathBuf::from(command), source })
}

/// One question, one answer.
pub(crate) fn ask(socket: &Path, request: &Request) -> Result<Answer, RunError> {
    converse(socket, request).map_err(|source| RunError::Daemon { socket: socket.to_owned(), source })
}

fn converse(socket: &Path, request: &Request) -> Result<Answer, ProtocolError> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(&protocol::encode(request)?)?;
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    loop {
        if let Some(answer) = protocol::decode(&bytes, MAX_ANSWER)? {
            return Ok(answer);
        }
        match stream.read(&mut part) {
            Ok(0) => return Err(ProtocolError::CutOff),
            Ok(length) => bytes.extend_from_slice(&part[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}
