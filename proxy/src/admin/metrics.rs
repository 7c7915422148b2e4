//! Counters in OpenMetrics. What a flow touches is resolved once for each pair of identities, not looked up.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use opencluster_identity::SpiffeId;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::worker::busy_poll::Counts;
use crate::worker::registry::Side;

/// The reason of a flow that ended in order.
pub const FINISHED: &str = "finished";

/// Labels of what is counted for each pair.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PairLabels {
    direction: &'static str,
    source: String,
    destination: String,
}

/// Labels of what is counted by reason.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    direction: &'static str,
    reason: &'static str,
}

/// Labels of what each worker holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WorkerLabels {
    worker: u64,
}

/// Counters of one pair of identities, resolved.
#[derive(Clone, Debug)]
pub struct PairCounters {
    /// Flows that were accepted.
    pub flows: Counter,
    /// Bytes from the application into tunnels.
    pub sent: Counter,
    /// Bytes from tunnels to the application.
    pub received: Counter,
}

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    flows: Family<PairLabels, Counter>,
    sent: Family<PairLabels, Counter>,
    received: Family<PairLabels, Counter>,
    refused: Family<ReasonLabels, Counter>,
    ended: Family<ReasonLabels, Counter>,
    /// The usual end, resolved: outbound, inbound.
    finished: [Counter; 2],
    /// TLS handshakes that succeeded.
    pub handshakes: Counter,
    /// TLS handshakes that failed.
    pub handshake_failures: Counter,
    /// Tunnels that were leased a second time or more.
    pub tunnels_reused: Counter,
    /// Flows that became bulk and got a tunnel of their own.
    pub promotions: Counter,
    /// Flows that were moved to a fresh tunnel because the pooled one had been closed.
    pub stale_retries: Counter,
    /// `accept` failed because of descriptors or memory.
    pub accept_failures: Counter,
    /// Moments in which bulk flows rested for small ones.
    pub bulk_rests: Counter,
    busy_poll_hits: Counter,
    busy_poll_misses: Counter,
    open_flows: Family<WorkerLabels, Gauge>,
    open_tunnels: Family<WorkerLabels, Gauge>,
    idle_tunnels: Family<WorkerLabels, Gauge>,
    buffer_bytes: Family<WorkerLabels, Gauge>,
    tasks: Family<WorkerLabels, Gauge>,
    log_dropped: Arc<AtomicU64>,
    log_dropped_gauge: Gauge,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("opencluster_proxy");
        let metrics = Self {
            flows: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            refused: Family::default(),
            ended: Family::default(),
            finished: [Counter::default(), Counter::default()],
            handshakes: Counter::default(),
            handshake_failures: Counter::default(),
            tunnels_reused: Counter::default(),
            promotions: Counter::default(),
            stale_retries: Counter::default(),
            accept_failures: Counter::default(),
            bulk_rests: Counter::default(),
            busy_poll_hits: Counter::default(),
            busy_poll_misses: Counter::default(),
            open_flows: Family::default(),
            open_tunnels: Family::default(),
            idle_tunnels: Family::default(),
            buffer_bytes: Family::default(),
            tasks: Family::default(),
            log_dropped: Arc::default(),
            log_dropped_gauge: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register("flows", "Flows that were accepted", metrics.flows.clone());
        registry.register("sent_bytes", "Bytes from applications into tunnels", metrics.sent.clone());
        registry.register("received_bytes", "Bytes from tunnels to applications", metrics.received.clone());
        registry.register("flows_refused", "Flows that were refused, by reason", metrics.refused.clone());
        registry.register("flows_ended", "Flows that ended, by reason", metrics.ended.clone());
        registry.register("tls_handshakes", "TLS handshakes that succeeded", metrics.handshakes.clone());
        registry.register("tls_handshake_failures", "TLS handshakes that failed", metrics.handshake_failures.clone());
        registry.register("tunnels_reused", "Leases of a tunnel that was warm", metrics.tunnels_reused.clone());
        registry.register("promotions", "Bulk flows that got a tunnel of their own", metrics.promotions.clone());
        registry.register("stale_retries", "Flows moved off a tunnel that was closed", metrics.stale_retries.clone());
        registry.register("accept_failures", "Connections that could not be accepted", metrics.accept_failures.clone());
        registry.register("bulk_rests", "Moments in which bulk rested for small flows", metrics.bulk_rests.clone());
        registry.register("busy_poll_hits", "Something came while a worker polled", metrics.busy_poll_hits.clone());
        registry.register("busy_poll_misses", "Nothing came while a worker polled", metrics.busy_poll_misses.clone());
        registry.register("open_flows", "Flows that are open", metrics.open_flows.clone());
        registry.register("open_tunnels", "Inbound tunnels that are open", metrics.open_tunnels.clone());
        registry.register("idle_tunnels", "Idle tunnels in pools", metrics.idle_tunnels.clone());
        registry.register("buffer_bytes", "Memory that flows hold in buffers", metrics.buffer_bytes.clone());
        registry.register("tasks", "Tasks that a worker runs", metrics.tasks.clone());
        registry.register("log_dropped", "Access log entries that were dropped", metrics.log_dropped_gauge.clone());
        let finished = [Side::Outbound, Side::Inbound]
            .map(|side| metrics.ended.get_or_create_owned(&ReasonLabels { direction: side.name(), reason: FINISHED }));
        Self { registry, finished, ..metrics }
    }
}

impl Metrics {
    /// The counters of a pair. Looked up once for each pool or tunnel.
    pub fn pair(&self, side: Side, source: &SpiffeId, destination: &SpiffeId) -> PairCounters {
        let labels =
            PairLabels { direction: side.name(), source: source.to_string(), destination: destination.to_string() };
        PairCounters {
            flows: self.flows.get_or_create_owned(&labels),
            sent: self.sent.get_or_create_owned(&labels),
            received: self.received.get_or_create_owned(&labels),
        }
    }

    /// Counts a flow that was refused.
    pub fn refused(&self, side: Side, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabels { direction: side.name(), reason }).inc();
    }

    /// Counts the end of a flow.
    pub fn ended(&self, side: Side, reason: &'static str) {
        if reason == FINISHED {
            self.finished[side as usize].inc();
        } else {
            self.ended.get_or_create(&ReasonLabels { direction: side.name(), reason }).inc();
        }
    }

    /// Notes how many log entries were lost.
    pub fn set_log_dropped(&self, count: u64) {
        self.log_dropped.store(count, Ordering::Relaxed);
    }

    /// Notes what worker `number` holds.
    pub fn note_worker(&self, number: usize, flows: usize, tunnels: usize, buffers: usize, tasks: usize) {
        let labels = WorkerLabels { worker: number as u64 };
        self.open_flows.get_or_create(&labels).set(flows as i64);
        self.open_tunnels.get_or_create(&labels).set(tunnels as i64);
        self.buffer_bytes.get_or_create(&labels).set(buffers as i64);
        self.tasks.get_or_create(&labels).set(tasks as i64);
    }

    /// Counts what polling has brought.
    pub fn polled(&self, counts: Counts) {
        self.busy_poll_hits.inc_by(counts.hits);
        self.busy_poll_misses.inc_by(counts.misses);
    }

    /// Notes how many idle tunnels worker `number` keeps.
    pub fn note_idle(&self, number: usize, tunnels: usize) {
        self.idle_tunnels.get_or_create(&WorkerLabels { worker: number as u64 }).set(tunnels as i64);
    }

    /// Flows that are open on any of the workers, as of their last tick.
    pub fn flow_total(&self, workers: usize) -> u64 {
        (0..workers as u64)
            .map(|worker| self.open_flows.get_or_create(&WorkerLabels { worker }).get())
            .sum::<i64>()
            .unsigned_abs()
    }

    /// All of it as OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        self.log_dropped_gauge.set(self.log_dropped.load(Ordering::Relaxed) as i64);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
