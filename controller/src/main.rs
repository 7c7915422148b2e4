//! The controller: CA, enrolment, leases, policy API, audit.

fn main() {}
