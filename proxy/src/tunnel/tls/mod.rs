//! TLS 1.3 for tunnels: the handshake by rustls ([`handshake`]), the records of an established session in place in the
//! buffers that the kernel fills and empties ([`record`]). Why: docs/decisions/0013-own-record-layer.md.

pub mod handshake;
pub mod record;
