//! R31: mutual TLS with identities that the controller issues, proven through the public interface: real handshakes, real
//! certificates, and the same forged.

mod authority;
mod common;
mod handshakes;
mod hostile;
mod refusals;
mod secrecy;
