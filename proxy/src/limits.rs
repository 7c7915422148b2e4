//! Everything that a peer or a workload can make this proxy hold or wait for, in one place.

use std::time::Duration;

use crate::worker::busy_poll;

/// Limits and timeouts. Counts are for each worker unless said otherwise.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Small flows share a tunnel, and have one of their own once they carry bulk; otherwise each has its own from the
    /// beginning.
    pub sharing: bool,
    /// Flows at once.
    pub flows: usize,
    /// Inbound tunnels at once.
    pub tunnels: usize,
    /// Inbound tunnels at once from one identity.
    pub tunnels_per_peer: usize,
    /// Inbound TLS handshakes at once: bounds the memory that strangers can claim (32 KiB each).
    pub inbound_handshakes: usize,
    /// Inbound TLS handshakes at once from one address (IPv6: one /64): a stranger who only connects must not take them all.
    pub inbound_handshakes_per_address: usize,
    /// Outbound TLS handshakes at once to one destination.
    pub outbound_handshakes: usize,
    /// Flows that may wait for a tunnel to one destination.
    pub waiting: usize,
    /// Idle tunnels kept for one pair of identities.
    pub idle_tunnels: usize,
    /// Idle tunnels that an active pair should have ready.
    pub warm_tunnels: usize,
    /// TCP connect and TLS handshake of a tunnel, each.
    pub handshake_timeout: Duration,
    /// From the first byte of an OPEN frame to its last.
    pub open_timeout: Duration,
    /// Connecting to the destination application.
    pub connect_timeout: Duration,
    /// An idle tunnel is closed by the side that opened it after this long, by the other side after twice as long.
    pub idle_timeout: Duration,
    /// How long a worker polls behind a single message; zero: it never does.
    pub busy_poll: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sharing: true,
            flows: 65_536,
            tunnels: 65_536,
            tunnels_per_peer: 32_768,
            inbound_handshakes: 256,
            inbound_handshakes_per_address: 128,
            outbound_handshakes: 16,
            waiting: 8_192,
            idle_tunnels: 1_024,
            warm_tunnels: 1,
            handshake_timeout: Duration::from_secs(5),
            open_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_mins(1),
            busy_poll: busy_poll::WINDOW,
        }
    }
}
