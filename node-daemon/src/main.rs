//! The node daemon: enrolment, heartbeats, packet filter, supervision of the proxy, workloads.

fn main() {}
