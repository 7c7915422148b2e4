//! What can go wrong in a benchmark run, in the words of the person who has to repair it.

use std::path::PathBuf;

/// A failure of the load generator, of a contender or of the run itself.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A file could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was tried, as a verb: "reading", "writing".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A program could not be started at all.
    #[error("cannot start {program}: {source} ({hint})")]
    Start {
        /// The program.
        program: String,
        /// What to do about it.
        hint: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A program ran and failed.
    #[error("{command} failed ({status}): {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// What it said.
        stderr: String,
    },
    /// A program did not finish in time and was killed.
    #[error("{command} did not finish within {seconds} s")]
    Timeout {
        /// The command line.
        command: String,
        /// The time that it had.
        seconds: u64,
    },
    /// A socket operation of the load generator failed.
    #[error("{what}: {source}")]
    Socket {
        /// What was being done, with the address.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A peer did not answer as an echo, sink or source must.
    #[error("{0}")]
    Peer(String),
    /// The command line asks for what there is not.
    #[error("{0}")]
    Usage(String),
    /// A contender did not come up, or died.
    #[error("contender {contender}: {reason}")]
    Contender {
        /// Its name.
        contender: String,
        /// What happened, with what it printed.
        reason: String,
    },
    /// The certificates for the contenders could not be made.
    #[error("making certificates for the contenders: {0}")]
    Certificates(#[from] rcgen::Error),
    /// A document could not be written or understood as JSON.
    #[error("{what}: {source}")]
    Json {
        /// Which document.
        what: String,
        /// What serde_json says.
        source: serde_json::Error,
    },
    /// The histogram refused a value or a bound.
    #[error("histogram: {0}")]
    Histogram(String),
    /// SIGINT or SIGTERM.
    #[error("interrupted; the namespaces and programs of the run were removed")]
    Interrupted,
}

impl BenchError {
    /// A closure for `map_err` on file operations.
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    /// A closure for `map_err` on socket operations.
    pub(crate) fn socket(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Socket { what, source }
    }
}
