//! TLS 1.3 for tunnels: the handshake by rustls ([`handshake`]), the records of an established session in place in the
//! buffers that the kernel fills and empties ([`record`]), sealed and opened by the faster of two libraries ([`aead`]). Why:
//! docs/decisions/0013-own-record-layer.md.

pub mod aead;
pub mod handshake;
pub mod record;
