//! What the packet filter enforces, as plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use crate::cgroup::Cgroup;

/// The first port of the capture listeners (on the loopback addresses).
pub(crate) const FIRST_CAPTURE_PORT: u16 = 15100;

/// The last: a node takes up to 300 workloads.
pub(crate) const LAST_CAPTURE_PORT: u16 = 15399;

/// What may pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Posture {
    /// Nothing but loopback among local processes. The state before enrolment's configuration is known, and after
    /// severance for good.
    Closed,
    /// What [`Serving`] names.
    Serving(Serving),
}

/// What a node in service needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Serving {
    /// The daemon's own cgroup: may reach the controllers, lease or not (it has to earn the lease).
    pub(crate) daemon: Cgroup,
    /// The proxy's cgroup: may reach other nodes and local applications while the lease lasts.
    pub(crate) proxy: Cgroup,
    /// The only destinations of the daemon.
    pub(crate) controllers: BTreeSet<SocketAddr>,
    /// Where other nodes' proxies connect to; `None` until the node's own resource is known.
    pub(crate) tunnel_port: Option<u16>,
    /// Each workload's TCP connections are redirected to its capture port.
    pub(crate) captures: BTreeMap<String, Capture>,
}

/// The capture of one workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capture {
    /// Where its processes live.
    pub(crate) cgroup: Cgroup,
    /// Where the proxy listens for its connections.
    pub(crate) port: u16,
}
