//! Packet captures on a host's link, taken at the switch: what really left the host, and what reached it.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::binaries::BinariesError;
use crate::poll;
use crate::process::{ProcessError, ProcessId};
use crate::rig::Rig;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The rig's program is not built.
    #[error(transparent)]
    Binaries(#[from] BinariesError),
    /// tcpdump did not start listening.
    #[error("tcpdump did not start: {0} (Debian package tcpdump)")]
    NotListening(String),
    /// tcpdump went away on its own, or does not end.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// tcpdump did not end.
    #[error("tcpdump does not end")]
    Endless,
    /// The file cannot be read, or the program not run.
    #[error("capture: {0}")]
    Io(#[from] io::Error),
}

/// A running capture. Dropped, it ends.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    process: ProcessId,
    file: PathBuf,
}

impl Capture {
    /// Starts capturing at the switch's end of a host's link; returns once packets are being taken.
    pub fn start(rig: &Rig, host: &str, file: &Path) -> Result<Self, CaptureError> {
        let mut child = std::process::Command::new(rig.binaries.path("opencluster-rig")?)
            .args(["capture", "--name", rig.name(), host, "--out"])
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut said = String::new();
        if let Some(stderr) = child.stderr.take() {
            for line in BufReader::new(stderr).lines() {
                let line = line?;
                if line.contains("listening on") {
                    let process = ProcessId::of(child.id().cast_signed())?;
                    return Ok(Self { child, process, file: file.to_owned() });
                }
                said.push_str(&line);
            }
        }
        child.wait()?;
        Err(CaptureError::NotListening(said))
    }

    /// Ends it: everything that was captured, as the file holds it.
    pub fn stop(mut self) -> Result<Captured, CaptureError> {
        self.process.signal(Signal::SIGTERM)?;
        let ended = poll::until(Duration::from_secs(10), || self.child.try_wait().transpose());
        ended.ok_or(CaptureError::Endless)??;
        Ok(Captured { bytes: fs::read(&self.file)? })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Already waited for, or about to be killed for good: neither can be refused for a child of ours.
        if let Ok(None) = self.child.try_wait() {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// A finished capture.
#[derive(Clone, Debug)]
pub struct Captured {
    bytes: Vec<u8>,
}

impl Captured {
    /// How often a marker occurs in what was captured.
    pub fn count(&self, marker: &[u8]) -> usize {
        if marker.is_empty() {
            return 0;
        }
        let mut count = 0;
        let mut rest = self.bytes.as_slice();
        while let Some(at) = find(rest, marker) {
            count += 1;
            rest = &rest[at + marker.len()..];
        }
        count
    }

    /// The size of the file, headers included.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is not even a header.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The packets, from the Ethernet header on.
    pub fn packets(&self) -> Vec<&[u8]> {
        const FILE_HEADER: usize = 24;
        const PACKET_HEADER: usize = 16;
        let mut packets = Vec::new();
        let mut rest = self.bytes.get(FILE_HEADER..).unwrap_or_default();
        while let Some(header) = rest.first_chunk::<PACKET_HEADER>() {
            let [_, _, _, _, _, _, _, _, a, b, c, d, ..] = *header;
            let length = u32::from_ne_bytes([a, b, c, d]) as usize;
            let Some(packet) = rest.get(PACKET_HEADER..PACKET_HEADER + length) else { break };
            packets.push(packet);
            rest = &rest[PACKET_HEADER + length..];
        }
        packets
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(at) = haystack.get(from..)?.iter().position(|byte| *byte == first) {
        if haystack[from + at..].starts_with(needle) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_counted_also_when_a_false_start_comes_first() {
        let captured = Captured { bytes: b"mamarker marker".to_vec() };
        assert_eq!(captured.count(b"marker"), 2);
        assert_eq!(captured.count(b"absent"), 0);
    }

    #[test]
    fn packets_are_cut_where_their_headers_say() {
        let mut bytes = vec![0; 24];
        for packet in [b"one".as_slice(), b"three"] {
            bytes.extend([0; 8]);
            bytes.extend((packet.len() as u32).to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(packet);
        }
        assert_eq!(Captured { bytes: bytes.clone() }.packets(), [b"one".as_slice(), b"three"]);
        bytes.pop();
        assert_eq!(Captured { bytes }.packets(), [b"one".as_slice()], "a packet cut off at the end is left out");
    }
}
