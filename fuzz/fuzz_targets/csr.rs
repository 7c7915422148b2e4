//! A certificate signing request from a node: parsed and its signature verified.
#![no_main]

use libfuzzer_sys::fuzz_target;
use opencluster_identity::csr::VerifiedCsr;

fuzz_target!(|der: &[u8]| {
    if let Ok(csr) = VerifiedCsr::parse(der) {
        assert!(csr.id().as_str().starts_with("spiffe://"));
    }
});
