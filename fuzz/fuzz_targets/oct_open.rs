//! The header of a flow: what is accepted must encode to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use opencluster_proxy::tunnel::oct::frame::{HEADER, Open};

fuzz_target!(|payload: &[u8]| {
    if let Ok(open) = Open::parse(payload) {
        let mut frame = Vec::new();
        open.encode(None, &mut frame);
        assert_eq!(&frame[HEADER..], payload);
    }
});
