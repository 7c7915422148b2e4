//! What a process says on the node daemon's socket.

#![no_main]

use libfuzzer_sys::fuzz_target;
use opencluster_node::outside::request;

fuzz_target!(|bytes: &[u8]| {
    if let Some(line) = request(bytes) {
        assert_eq!(request(&line), Some(line), "what was accepted is written and read back as the same");
    }
});
