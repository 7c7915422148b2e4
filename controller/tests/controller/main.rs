//! The controller as a whole: real servers on loopback, real TLS, nodes that speak the protocol.

mod api;
mod ends;
mod enrolment;
mod finding;
mod harness;
mod limits;
mod program;
mod registry;
mod revocation;
mod session;
mod store;
mod watch;
