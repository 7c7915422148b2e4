//! The data path: captures connections and carries them over mutual TLS.

fn main() {}
