//! What the kernel says to the node daemon: nf_tables' answers, dumps and notifications, and lists of connections.

#![no_main]

use libfuzzer_sys::fuzz_target;
use opencluster_node::outside;

/// A netlink header.
const HEADER: usize = 16;

fuzz_target!(|datagram: &[u8]| {
    if let Some(messages) = outside::nf_tables(datagram) {
        assert!(messages <= datagram.len().div_ceil(HEADER));
    }
    // It is read once for each address family.
    assert!(outside::socket_diagnosis(datagram) <= 2 * (datagram.len() / HEADER));
});
