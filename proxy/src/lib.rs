//! The data path: captures connections of workloads and carries them over mutual TLS to the proxy of the destination.
//!
//! - [`capture`] takes redirected connections and finds where they wanted to go;
//! - [`tunnel`] is the protocol between proxies, its TLS, the pool of warm tunnels, and the receiving side;
//! - [`relay`] moves bytes between an application and a tunnel;
//! - [`authz`] decides, [`control`] obeys the node daemon, [`worker`] runs it all on one thread for each core;
//! - [`sandbox`] takes away from the process what it does not need, [`admin`] and [`access_log`] tell what it does.

#![deny(unsafe_code)]

pub mod access_log;
pub mod admin;
pub mod authz;
pub mod capture;
pub mod control;
pub mod limits;
pub mod relay;
pub mod sandbox;
pub mod shared;
pub mod tunnel;
pub mod worker;

#[cfg(test)]
mod tests;
