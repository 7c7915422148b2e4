//! An enrolment token, as a node reads it from its file.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Some(node) = opencluster_node::outside::token(text) {
        assert!(text.contains(&format!("oct1.{node}.")));
    }
});
