//! The access log: one JSON line for each flow, written by a thread of its own. The data path never waits for it: what
//! does not fit in the queue is counted and dropped.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use serde::Serialize;

/// Batches that may wait for the writer.
const QUEUE: usize = 64;
/// Entries that a worker collects before it passes them on (it also does so several times a second).
pub const BATCH: usize = 128;

/// One finished or refused flow.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// When it ended, RFC 3339.
    #[serde(serialize_with = "rfc3339")]
    pub time: std::time::SystemTime,
    /// `outbound` or `inbound`.
    pub direction: &'static str,
    /// The same in both proxies' logs.
    #[serde(serialize_with = "hex64")]
    pub flow: u64,
    /// The same along the whole path.
    #[serde(serialize_with = "hex128")]
    pub trace: u128,
    /// The source's identity.
    #[serde(serialize_with = "text")]
    pub source: Arc<opencluster_identity::SpiffeId>,
    /// The destination's identity, if it was found.
    #[serde(serialize_with = "optional_text", skip_serializing_if = "Option::is_none")]
    pub destination: Option<Arc<opencluster_identity::SpiffeId>>,
    /// Where the connection came from.
    pub peer: std::net::SocketAddr,
    /// Where it wanted to go.
    pub target: std::net::SocketAddr,
    /// From the application into the tunnel.
    pub bytes_sent: u64,
    /// From the tunnel to the application.
    pub bytes_received: u64,
    /// From arrival to end.
    pub duration_us: u64,
    /// `TLSv1.3`, if there was a tunnel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<&'static str>,
    /// The TLS suite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suite: Option<&'static str>,
    /// The key exchange group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<&'static str>,
    /// `allowed`, `denied`, `failed`.
    pub verdict: &'static str,
    /// The policy that decided, or what ended the flow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// How it ended: `finished`, or the reason of a refusal, reset or cut.
    pub reason: String,
    /// What dry-run policies would have decided, where that differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<&'static str>,
}

fn rfc3339<S: serde::Serializer>(time: &std::time::SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let days = (since.as_secs() / 86_400) as i64;
    let (year, month, day) = civil_date(days);
    let second = since.as_secs() % 86_400;
    serializer.collect_str(&format_args!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_micros()
    ))
}

/// Days since 1970 to a date of the Gregorian calendar: shift the year to begin in March, so that leap days come last.
fn civil_date(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

// serde hands the field by reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn hex64<S: serde::Serializer>(id: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{id:016x}"))
}

fn hex128<S: serde::Serializer>(id: &u128, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{id:032x}"))
}

fn text<S: serde::Serializer>(id: &Arc<opencluster_identity::SpiffeId>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(id.as_str())
}

#[allow(clippy::ref_option)]
fn optional_text<S: serde::Serializer>(
    id: &Option<Arc<opencluster_identity::SpiffeId>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match id {
        Some(id) => serializer.serialize_str(id.as_str()),
        None => serializer.serialize_none(),
    }
}

/// The sending side.
#[derive(Clone, Debug)]
pub struct AccessLog {
    queue: SyncSender<Vec<Entry>>,
    dropped: Arc<AtomicU64>,
}

/// The writing side: give it to a thread.
#[derive(Debug)]
pub struct Writer {
    queue: Receiver<Vec<Entry>>,
}

/// A queue between workers and writer.
pub fn channel() -> (AccessLog, Writer) {
    let (sender, receiver) = sync_channel(QUEUE);
    (AccessLog { queue: sender, dropped: Arc::default() }, Writer { queue: receiver })
}

impl AccessLog {
    /// Passes a batch on, or counts it as dropped.
    pub fn submit(&self, batch: Vec<Entry>) {
        if let Err(TrySendError::Full(batch) | TrySendError::Disconnected(batch)) = self.queue.try_send(batch) {
            self.dropped.fetch_add(batch.len() as u64, Ordering::Relaxed);
        }
    }

    /// Entries that were lost.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Writer {
    /// Writes until all senders are gone. An output that cannot be written ends it: from then on entries are dropped,
    /// and counted.
    pub fn run(self, mut output: impl Write) -> io::Result<()> {
        let mut lines = Vec::with_capacity(64 * 1024);
        while let Ok(batch) = self.queue.recv() {
            lines.clear();
            for entry in &batch {
                serde_json::to_writer(&mut lines, entry)?;
                lines.push(b'\n');
            }
            output.write_all(&lines)?;
        }
        output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(19_782), (2024, 2, 29));
        assert_eq!(civil_date(19_783), (2024, 3, 1));
        assert_eq!(civil_date(20_820), (2027, 1, 2));
        assert_eq!(civil_date(-1), (1969, 12, 31));
    }
}
