//! The controller as a whole: real servers on loopback, real TLS, nodes that speak the protocol.

mod api;
mod enrolment;
mod harness;
mod limits;
mod program;
mod revocation;
mod session;
mod store;
mod watch;
