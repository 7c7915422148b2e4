//! The controller's configuration file.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use opencluster_controller::config::Config;

fuzz_target!(|text: &str| {
    match Config::parse(text, Path::new("controller.yaml")) {
        // What was accepted names a controller.
        Ok(config) => assert!(config.identity().is_ok()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
