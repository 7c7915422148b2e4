//! The rig: whole clusters in network namespaces; tests by requirement ID; the demo.

fn main() {}
