//! Resources, validation, compiled decisions and the lease state machine.
//!
//! Pure: no I/O, no clock, no threads, no `unsafe`. Everything here is a function of its arguments, so that the
//! controller, the node daemon, the proxy and the tests decide alike.

#![forbid(unsafe_code)]

pub mod index;
pub mod lease;
pub mod lifetime;
pub mod resource;
pub mod snapshot;
pub mod spiffe;
