//! Policies compiled for deciding: the cost of a decision does not grow with the number of policies.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::resource::{Key, Protocol};
use crate::snapshot::Snapshot;
use crate::spiffe::{SpiffeId, TrustDomain};

/// A compiled snapshot: immutable, shared by all workers.
#[derive(Debug)]
pub struct Index {
    version: u64,
}

/// A flow to decide about, as the destination sees it.
#[derive(Clone, Copy, Debug)]
pub struct Flow<'a> {
    /// The source's verified identity.
    pub source: &'a SpiffeId,
    /// The address that its tunnel comes from (the source node's).
    pub source_address: IpAddr,
    /// The destination workload's identity.
    pub destination: &'a SpiffeId,
    /// The port that the flow goes to.
    pub port: u16,
    /// tcp or udp.
    pub protocol: Protocol,
}

/// The verdict, and what decided. Small and `Copy`: no allocation on the hot path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Allowed by this rule.
    Allow(RuleId),
    /// Denied by this deny rule.
    Deny(RuleId),
    /// No rule allows it.
    DefaultDeny,
}

impl Decision {
    /// Whether the flow may pass.
    pub fn allowed(self) -> bool {
        matches!(self, Self::Allow(_))
    }
}

/// A rule in one [`Index`] (meaningless in another).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(pub u32);

/// Where a connection to an address goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The destination workload.
    pub workload: Arc<SpiffeId>,
    /// The node that runs it, where its proxy listens.
    pub tunnel: SocketAddr,
    /// Where the application listens (what the client connected to).
    pub target: SocketAddr,
    /// The service, for logs.
    pub service: Arc<Key>,
}

/// Why a flow is allowed or denied, for people and for the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The verdict.
    pub decision: Decision,
    /// The policy and the position of its source that decided.
    pub rule: Option<(Key, usize)>,
    /// One sentence each: what decided, or the nearest rule and what it lacked; what dry-run policies would do.
    pub reasons: Vec<String>,
}

impl Index {
    /// Compiles a snapshot that passed [`Snapshot::check`]. References that cannot be resolved match nothing.
    pub fn compile(_domain: &TrustDomain, _snapshot: &Snapshot) -> Self {
        todo!()
    }
    /// The snapshot's version.
    pub fn version(&self) -> u64 {
        self.version
    }
    /// The verdict.
    pub fn decide(&self, _flow: &Flow<'_>) -> Decision {
        todo!()
    }
    /// The verdict that dry-run policies would give if they counted, where it differs.
    pub fn decide_dry_run(&self, _flow: &Flow<'_>) -> Option<Decision> {
        todo!()
    }
    /// The verdict and why (slow).
    pub fn explain(&self, _flow: &Flow<'_>) -> Explanation {
        todo!()
    }
    /// The policy and the position in its `from` of a rule.
    pub fn rule(&self, _rule: RuleId) -> Option<(&Key, usize)> {
        todo!()
    }
    /// Where a connection to this address goes; `None`: to nothing that we know.
    pub fn route(&self, _target: SocketAddr, _protocol: Protocol) -> Option<&Route> {
        todo!()
    }
    /// The workloads that may run on a node (SPIFFE IDs).
    pub fn workloads_on<'a>(&'a self, _node: &str) -> Box<dyn Iterator<Item = &'a Arc<SpiffeId>> + 'a> {
        todo!()
    }
    /// Whether `node` may hold the identity `id`.
    pub fn node_may_hold(&self, _node: &str, _id: &SpiffeId) -> bool {
        todo!()
    }
    /// The node that has this address.
    pub fn node_of(&self, _address: IpAddr) -> Option<&str> {
        todo!()
    }
    /// The workloads that back a service's port: destination identities, for `explain`.
    pub fn backends(&self, _namespace: &str, _service: &str, _port: u16) -> Vec<Arc<SpiffeId>> {
        todo!()
    }
}
