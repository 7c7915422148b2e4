//! The node daemon's configuration file.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(fault) = opencluster_node::outside::configuration(text) {
        assert!(fault.contains("node.yaml"), "a fault that does not say where: {fault}");
    }
});
