//! What operators apply: YAML and JSON documents.

#![no_main]

use libfuzzer_sys::fuzz_target;
use opencluster_policy::resource::Resource;

fuzz_target!(|text: &str| {
    match Resource::parse_documents(text) {
        // What was accepted is written and read back as the same.
        Ok(resources) => {
            let yaml: Vec<String> = resources.iter().map(Resource::to_yaml).collect();
            assert_eq!(Resource::parse_documents(&yaml.join("---\n")).as_ref(), Ok(&resources));
        }
        Err(faults) => assert!(!faults.to_string().is_empty()),
    }
});
