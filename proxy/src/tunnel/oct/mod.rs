//! `oct/1`: the protocol that carries flows between two proxies (docs/protocol-oct.md), without I/O and without a clock.
//!
//! [`frame`] reads and writes frames, [`exchange`] knows which frame may follow which. Both are pure, so that tests and
//! fuzzers drive them byte by byte.

pub mod exchange;
pub mod frame;

/// The ALPN protocol name of a tunnel that is leased to one flow at a time.
pub const ALPN: &[u8] = b"oct/1";

/// The ALPN protocol name of a tunnel that many flows share. A peer that offers neither is not one of ours.
pub const SHARED_ALPN: &[u8] = b"oct-shared/1";
