//! The load generator: one process is the server (echo, sink, source), one is the client.
//!
//! Both are a single thread around epoll. On direct loopback it drives several times what any contender carries, which
//! every report shows in its `direct` column: the generator is not what is measured.

mod connect;
mod crr;
mod first;
mod hold;
mod poll;
mod rr;
mod serve;
mod stream;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use self::hold::hold;
pub use self::serve::{Listeners, serve};
use crate::error::BenchError;
use crate::histogram::Latencies;

/// How long a single answer may take before the run is given up.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The largest request: it always fits an empty socket buffer, so that one write sends it.
pub const MAX_SIZE: usize = 4096;

/// What the client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Round trips, each connection sending its next request when the answer is there.
    RoundTrip,
    /// Round trips that leave at fixed times, so many a second over all connections.
    Fixed(u32),
    /// Connect, one round trip, close.
    Crr,
    /// The same, one connection at a time, begun at fixed times, so many a second.
    First(u32),
    /// Bytes from the client to a sink, as fast as they go.
    Stream,
    /// Bytes from a source to the client.
    StreamDown,
}

/// One client run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What to do.
    pub pattern: Pattern,
    /// Where the server is.
    pub to: SocketAddr,
    /// How many connections, or clients for crr.
    pub connections: usize,
    /// How long to measure.
    pub length: Duration,
    /// How long to run before it counts.
    pub warmup: Duration,
    /// Bytes of a request and of its answer.
    pub size: usize,
}

/// What a client run measured. It travels as JSON from the client process to the runner.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Round trips, transactions or opened connections that completed within the measured time.
    pub operations: u64,
    /// Application bytes carried in one direction over the *whole* run, warm-up included: the base of CPU figures.
    pub bytes: u64,
    /// Completed operations of the whole run, warm-up included.
    pub operations_total: u64,
    /// The measured time in seconds.
    pub seconds: f64,
    /// Operations that failed.
    pub errors: u64,
    /// What the first failure said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_error: Option<String>,
    /// Latencies as (nanoseconds, count).
    pub buckets: Vec<(u64, u64)>,
    /// Fixed rate only: how late the generator itself sent, 99th percentile in µs. It is part of the latencies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_lag_p99_us: Option<f64>,
}

impl Outcome {
    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.seconds
    }

    /// Notes a failed operation.
    fn failed(&mut self, what: impl FnOnce() -> String) {
        self.errors += 1;
        if self.first_error.is_none() {
            self.first_error = Some(what());
        }
    }
}

/// Runs the client side of `plan`.
pub fn run(plan: &Plan) -> Result<Outcome, BenchError> {
    match plan.pattern {
        Pattern::RoundTrip => rr::closed(plan),
        Pattern::Fixed(rate) => rr::fixed(plan, rate),
        Pattern::Crr => crr::run(plan),
        Pattern::First(rate) => first::run(plan, rate),
        Pattern::Stream => stream::up(plan),
        Pattern::StreamDown => stream::down(plan),
    }
}

/// The window in which operations count, and what was counted.
struct Window {
    opens: Instant,
    closes: Instant,
    latencies: Latencies,
    outcome: Outcome,
}

impl Window {
    fn start(plan: &Plan) -> Result<Self, BenchError> {
        let opens = Instant::now() + plan.warmup;
        Ok(Self { opens, closes: opens + plan.length, latencies: Latencies::new()?, outcome: Outcome::default() })
    }

    /// An operation of `bytes` that began (or should have begun) at `began` is complete.
    fn completed(&mut self, began: Instant, now: Instant, bytes: usize) {
        self.outcome.operations_total += 1;
        self.outcome.bytes += bytes as u64;
        if now >= self.opens && now <= self.closes {
            self.outcome.operations += 1;
            self.latencies.record(now.saturating_duration_since(began));
        }
    }

    fn finish(mut self) -> Outcome {
        self.outcome.seconds = (self.closes - self.opens).as_secs_f64();
        self.outcome.buckets = self.latencies.buckets();
        self.outcome
    }
}

/// Requests that differ from one to the next and between connections: an answer that was lost, doubled or crossed over
/// from another connection is noticed.
#[derive(Debug)]
struct Payload {
    bytes: Vec<u8>,
    counter: u64,
}

impl Payload {
    fn new(connection: usize, size: usize) -> Self {
        Self { bytes: vec![0x5a; size], counter: (connection as u64) << 40 }
    }

    fn next(&mut self) -> &[u8] {
        self.counter += 1;
        let stamp = self.counter.to_le_bytes();
        let n = self.bytes.len().min(stamp.len());
        self.bytes[..n].copy_from_slice(&stamp[..n]);
        &self.bytes
    }

    /// Whether `answer`, received at `offset`, is the echo of the request last sent.
    fn echoes(&self, offset: usize, answer: &[u8]) -> bool {
        self.bytes.get(offset..offset + answer.len()) == Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crossed_or_doubled_answer_is_not_an_echo() {
        let mut a = Payload::new(0, 64);
        let mut b = Payload::new(1, 64);
        let first = a.next().to_vec();
        assert!(a.echoes(0, &first) && a.echoes(10, &first[10..20]));
        assert!(!a.echoes(60, &first[..10]), "longer than the request");
        assert!(!a.echoes(0, b.next()), "another connection's answer");
        a.next();
        assert!(!a.echoes(0, &first), "the answer to an earlier request");
    }

    #[test]
    fn only_what_completes_in_the_window_counts_but_all_of_it_costs() {
        let plan = Plan {
            pattern: Pattern::RoundTrip,
            to: "127.0.0.1:1".parse().unwrap(),
            connections: 1,
            length: Duration::from_secs(1),
            warmup: Duration::from_secs(1),
            size: 64,
        };
        let mut w = Window::start(&plan).unwrap();
        let ms = Duration::from_millis;
        let start = w.opens.checked_sub(ms(1000)).unwrap();
        for at in [999, 1001, 1999, 2001] {
            w.completed(start + ms(at - 5), start + ms(at), 64);
        }
        let o = w.finish();
        assert_eq!((o.operations, o.operations_total, o.bytes), (2, 4, 256));
        assert!((o.rate() - 2.0).abs() < 1e-9);
    }
}
