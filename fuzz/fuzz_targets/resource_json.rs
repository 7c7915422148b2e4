//! Canonical resources, as nodes receive them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use opencluster_policy::resource::Resource;

fuzz_target!(|bytes: &[u8]| {
    match Resource::from_json(bytes) {
        Ok(resource) => {
            let json = resource.to_json().to_string();
            assert_eq!(Resource::from_json(json.as_bytes()).as_ref(), Ok(&resource));
        }
        Err(faults) => assert!(!faults.to_string().is_empty()),
    }
});
