//! Bytes from outside, and what reads them: netlink answers, the configuration, the enrolment token, requests on the
//! daemon's socket. The fuzz targets come in here; each function hands the bytes to the very parser that the daemon uses.

use std::path::Path;

use crate::config::Config;
use crate::enrol::token::Token;
use crate::firewall::netlink;
use crate::flows;
use crate::workload::protocol::{self, MAX_REQUEST, Request};

/// A datagram from nf_tables: as answers to a batch, as part of a dump, and as notifications. How many messages were in it,
/// if all of them could be read.
pub fn nf_tables(datagram: &[u8]) -> Option<usize> {
    netlink::read_all(datagram).ok()
}

/// A datagram from the kernel's socket diagnosis. How many connections were in it.
pub fn socket_diagnosis(datagram: &[u8]) -> usize {
    flows::read_all(datagram)
}

/// A configuration file's text; else what is wrong with it.
pub fn configuration(text: &str) -> Result<(), String> {
    Config::parse(Path::new("node.yaml"), text).map(|_| ()).map_err(|error| error.to_string())
}

/// An enrolment token: the name of its node.
pub fn token(text: &str) -> Option<String> {
    Token::parse(text).ok().map(|token| token.node)
}

/// A request on the daemon's socket, which must be written as it was read.
pub fn request(bytes: &[u8]) -> Option<Vec<u8>> {
    let request: Request = protocol::decode(bytes, MAX_REQUEST).ok()??;
    protocol::encode(&request).ok()
}
