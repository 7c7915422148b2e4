//! The node daemon: enrolment, heartbeats, packet filter, supervision of the proxy, workloads.
//!
//! | module | what it owns |
//! |---|---|
//! | [`command`] | the command line |
//! | `daemon` | the state of the node and what every event does to it |
//! | `firewall` | what the kernel lets pass |
//! | `enrol` | from a one-time token to the node's identity |
//! | `heartbeat` | the session with the controller |
//! | `supervise` | the proxy's process and the sockets that it gets |
//! | `workload` | letting processes into workloads |
//! | [`outside`] | every parser of bytes from outside, for those who test them |
//!
//! A library only so that the fuzz targets reach the parsers: the program is its one user.

#![deny(unsafe_code)]

mod cgroup;
mod clock;
pub mod command;
mod config;
mod congestion;
mod daemon;
mod enrol;
mod firewall;
mod flows;
mod heartbeat;
pub mod outside;
mod safety;
mod status;
mod supervise;
mod transport;
mod workload;
