//! SPIFFE IDs, as they stand in certificates and policies.

#![no_main]

use libfuzzer_sys::fuzz_target;
use opencluster_policy::spiffe::{SpiffeId, TrustDomain};

fuzz_target!(|text: &str| {
    let Ok(id) = SpiffeId::parse(text) else { return };
    assert_eq!(id.as_str(), text);
    assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
    assert!(TrustDomain::parse(id.trust_domain()).is_ok());
    assert!(id.server_name().is_none_or(|name| name.len() <= 253));
});
