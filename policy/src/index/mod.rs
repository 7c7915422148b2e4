//! Policies compiled for deciding: the cost of a decision does not grow with the number of policies.
//!
//! A policy names its destination by service and its sources by up to six properties. Compiling turns both into numbers:
//!
//! - Every destination (workload, port, protocol) gets a *scope*: the set of policies that are about it. Destinations with
//!   the same set, such as the replicas of a service, share one.
//! - Every source is one of four keys, times addresses. `workload` and `identity` name one identity; `service` names groups of
//!   identities; `namespace` names itself; and a source of addresses only is anyone. Combinations of them are resolved while
//!   compiling (an identity is of a namespace or it is not). `node` and `cidr` are ranges of addresses.
//!
//! A decision then is at most four look-ups in hash maps (anyone, identity, group, namespace) in a scope, and where a rule
//! also asks for addresses, a longest-prefix match over the prefix lengths that occur there. Nothing is allocated.
//!
//! The hash function is `foldhash` (seeded at random). It is fast but not a cryptographic one; that is safe here because
//! everything that the maps *hold* was written by operators. Identities in certificates are looked up, never inserted: whoever
//! chooses one can make a look-up miss, but not make a bucket long.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::resource::{Key, Protocol};
use crate::snapshot::Snapshot;
use crate::spiffe::{SpiffeId, Subject, TrustDomain};
use identities::Identities;
use table::{Source, Table, Verdict};
use topology::Topology;

mod arena;
mod compile;
mod explain;
mod identities;
mod table;
mod topology;

type FastMap<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// "None of those that are numbered."
const NONE: u32 = u32::MAX;

/// A compiled snapshot: immutable, shared by all workers.
#[derive(Debug)]
pub struct Index {
    /// For `explain`, which reads policies as they were written.
    snapshot: Snapshot,
    identities: Identities,
    /// Those that policies name as sources.
    namespaces: FastMap<String, u32>,
    /// By workload, port and protocol: those that are not in [`Identity`](identities::Identity).
    scopes: FastMap<Destination, u32>,
    enforced: Table,
    dry_run: Table,
    /// By [`RuleId`], in the order of the policies' keys.
    rules: Vec<Rule>,
    topology: Topology,
}

/// A destination: the workload's number, the port and the protocol.
type Destination = (u32, u16, Protocol);

/// One source of one policy.
#[derive(Clone, Debug)]
struct Rule {
    policy: Arc<Key>,
    from: usize,
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
    /// Allowed by this rule (the first of those that do).
    Allow(RuleId),
    /// Denied by this deny rule (the first of those that do).
    Deny(RuleId),
    /// No rule allows it.
    DefaultDeny,
}

impl Decision {
    /// Whether the flow may pass.
    pub fn allowed(self) -> bool {
        matches!(self, Self::Allow(_))
    }

    /// The rule that decided.
    pub fn rule(self) -> Option<RuleId> {
        match self {
            Self::Allow(rule) | Self::Deny(rule) => Some(rule),
            Self::DefaultDeny => None,
        }
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
    pub fn compile(domain: &TrustDomain, snapshot: &Snapshot) -> Self {
        compile::compile(domain, snapshot)
    }

    /// The snapshot's version.
    pub fn version(&self) -> u64 {
        self.snapshot.version
    }

    /// The snapshot that it was compiled from.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The verdict.
    ///
    /// Sources are workloads of our own trust domain. Any other identity (of a foreign trust domain, or of a node or a
    /// controller) matches only rules that name it by `identity`.
    pub fn decide(&self, flow: &Flow<'_>) -> Decision {
        self.verdict(&self.enforced, flow).decision()
    }

    /// The verdict that dry-run policies would give if they counted, where it would let pass what does not, or stop what
    /// does.
    pub fn decide_dry_run(&self, flow: &Flow<'_>) -> Option<Decision> {
        let dry_run = self.verdict(&self.dry_run, flow);
        if dry_run == Verdict::NONE {
            return None;
        }
        let enforced = self.verdict(&self.enforced, flow);
        let both = enforced.and(dry_run).decision();
        (both.allowed() != enforced.decision().allowed()).then_some(both)
    }

    /// The verdict and why (slow).
    pub fn explain(&self, flow: &Flow<'_>) -> Explanation {
        explain::explain(self, flow)
    }

    /// Why nothing can be reached at this service and port, if that is so: there is no such service, or it lacks the port.
    pub fn explain_missing(&self, namespace: &str, service: &str, port: u16) -> Option<Explanation> {
        explain::missing(self, namespace, service, port)
    }

    /// The policy and the position in its `from` of a rule.
    pub fn rule(&self, rule: RuleId) -> Option<(&Key, usize)> {
        self.rules.get(rule.0 as usize).map(|rule| (&*rule.policy, rule.from))
    }

    /// Where a connection to this address goes; `None`: to nothing that we know.
    ///
    /// A connection to any address of a node that runs a backing workload, on a service's port, is a connection to that
    /// service.
    pub fn route(&self, target: SocketAddr, protocol: Protocol) -> Option<&Route> {
        self.topology.route(target, protocol)
    }

    /// The workloads that may run on a node (SPIFFE IDs), in their order.
    pub fn workloads_on<'a>(&'a self, node: &str) -> Box<dyn Iterator<Item = &'a Arc<SpiffeId>> + 'a> {
        Box::new(self.topology.workloads_on(node).iter())
    }

    /// Whether `node` may hold the identity `id`: that of a workload that may run on it. (Its own identity is not one that
    /// it may ask for in the name of a workload.)
    pub fn node_may_hold(&self, node: &str, id: &SpiffeId) -> bool {
        self.topology.workloads_on(node).binary_search_by(|held| (**held).cmp(id)).is_ok()
    }

    /// The node that has this address.
    pub fn node_of(&self, address: IpAddr) -> Option<&str> {
        self.topology.node_of(address)
    }

    /// The workloads that back a service's port: destination identities, for `explain`.
    pub fn backends(&self, namespace: &str, service: &str, port: u16) -> Vec<Arc<SpiffeId>> {
        explain::backends(self, namespace, service, port)
    }

    fn verdict(&self, table: &Table, flow: &Flow<'_>) -> Verdict {
        let Some(scope) = self.scope(flow) else { return Verdict::NONE };
        match self.source(flow.source) {
            Some(source) => table.verdict(scope, source, flow.source_address),
            None => Verdict::NONE,
        }
    }

    /// The set of policies that are about the destination; `None`: no policy is.
    fn scope(&self, flow: &Flow<'_>) -> Option<u32> {
        let destination = self.identities.get(flow.destination)?;
        if destination.scope != NONE && (destination.port, destination.protocol) == (flow.port, flow.protocol) {
            return Some(destination.scope);
        }
        self.scopes.get(&(destination.number, flow.port, flow.protocol)).copied()
    }

    /// What rules can match a source by; `None`: by nothing.
    fn source(&self, id: &SpiffeId) -> Option<Source> {
        if let Some(identity) = self.identities.get(id) {
            return Some(identity.source());
        }
        let Subject::Workload { namespace, .. } = id.subject() else { return None };
        let namespace = self.namespaces.get(namespace).copied().unwrap_or(NONE);
        id.is_of(self.identities.domain()).then_some(Source { identity: NONE, group: NONE, namespace, member: true })
    }
}
