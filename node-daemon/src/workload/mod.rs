//! Workloads: processes in a cgroup of their own, with nothing in their hands that leads around the proxy.

pub(crate) mod protocol;
pub(crate) mod run;
mod sandbox;
mod seccomp;
pub(crate) mod server;
