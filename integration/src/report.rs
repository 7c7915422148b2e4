//! What `opencluster-probe` prints: one JSON document a line, for tests and the demo to read.

use serde::{Deserialize, Serialize};

/// One line of the probe's output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A server listens.
    Listening {
        /// Where.
        address: String,
    },
    /// `flows`: all that could be opened are open.
    Opened {
        /// How many.
        count: usize,
        /// How many could not.
        failed: usize,
        /// The first failure.
        error: Option<String>,
        /// How long it took.
        milliseconds: u64,
    },
    /// `flows`: every open flow has been asked for an echo.
    Round {
        /// How many answered rightly.
        echoed: usize,
        /// How many did not; they are closed and not asked again.
        failed: usize,
        /// The first failure.
        error: Option<String>,
        /// How long it took.
        milliseconds: u64,
    },
    /// `pulse`: the first echo on a connection came back.
    Up {
        /// Since the connection was asked for.
        milliseconds: u64,
    },
    /// `pulse`: the connection died, or could not be made.
    Down {
        /// How it showed: `reset`, `closed`, `silent`, `refused`, …
        how: String,
        /// Time since the last echo (or since the beginning).
        since_last_echo_ms: u64,
        /// Echoes on this connection.
        echoes: u64,
    },
    /// `pulse`: asked for by a line on standard input.
    Echoes {
        /// All that came back so far, on every connection.
        count: u64,
    },
    /// `churn`: all flows have ended.
    Churned {
        /// How many there were.
        count: u64,
        /// Flows that did not go as they should.
        failed: u64,
        /// The first of those.
        error: Option<String>,
        /// How long it took.
        milliseconds: u64,
    },
    /// `mix`: all flows have ended.
    Mixed {
        /// Flows that were echoed to their end, byte by byte.
        whole: u64,
        /// Flows that this side reset on purpose.
        reset: u64,
        /// Bytes that came back and were compared.
        bytes: u64,
        /// Flows that broke, or brought back something else.
        failed: u64,
        /// The first of those.
        error: Option<String>,
    },
    /// `transfer`: everything went through.
    Transferred {
        /// Bytes sent before the half-close.
        sent: u64,
        /// What the receiver hashed equals what was sent.
        upload_ok: bool,
        /// Bytes received after it.
        received: u64,
        /// What was received equals what should have been.
        download_ok: bool,
        /// How long it took.
        milliseconds: u64,
    },
    /// `send`: the attempts were made.
    Attempted {
        /// How many got past the kernel's interface.
        sent: usize,
        /// `tcp`: a connection came about.
        connected: bool,
        /// What came back, as text.
        answer: String,
        /// The last failure.
        error: Option<String>,
    },
    /// `attack`: every connection has ended, or the patience with them.
    Attacked {
        /// Connections that came about.
        connected: usize,
        /// Those that the other side ended.
        ended_by_peer: usize,
        /// How long the longest of them lasted.
        longest_ms: u64,
        /// Bytes that came back on all of them.
        received: u64,
    },
    /// `tunnel`, `impostor`: the other side took this one for who it claims to be, and sent something.
    Answered {
        /// The first frame's type: 1 OPEN, 2 ACCEPT, 3 REFUSE.
        frame: u8,
        /// What came, as text.
        text: String,
    },
    /// `tunnel`, `impostor`: it did not.
    Refused {
        /// How it showed.
        why: String,
    },
    /// `enrol`: all attempts with the same token have been answered.
    Enrolled {
        /// How many were granted.
        granted: usize,
        /// How many were refused.
        refused: usize,
        /// How the first of those was put.
        why: Option<String>,
    },
    /// `scan`: what is in the memory of a process.
    Scanned {
        /// Which.
        pid: u32,
        /// Bytes that were looked at.
        bytes: u64,
        /// P-256 private keys: SHA-256 of the SubjectPublicKeyInfo that belongs to each.
        keys: Vec<String>,
        /// Expanded AES-128 keys: traffic keys of sessions (AES-128-GCM is what both sides prefer).
        aes128: usize,
        /// Expanded AES-256 keys: the crypto library's random number generators have one each, for each thread.
        aes256: usize,
    },
    /// `rogue`: the node has its certificates, and goes on sending heartbeats.
    Ready {
        /// Where they are.
        directory: String,
    },
}
