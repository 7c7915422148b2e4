//! `oct/1`: the protocol that carries flows between two proxies (docs/protocol-oct.md), without I/O and without a clock.
//!
//! [`frame`] reads and writes frames, [`exchange`] knows which frame may follow which. Both are pure, so that tests and
//! fuzzers drive them byte by byte.

pub mod exchange;
pub mod frame;

/// The ALPN protocol name. A peer that does not offer it is not one of ours.
pub const ALPN: &[u8] = b"oct/1";
