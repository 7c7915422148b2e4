//! Decisions: may this flow pass, and may it go on.

use std::net::IpAddr;

use opencluster_identity::SpiffeId;
use opencluster_policy::index::{Decision, Index};
use opencluster_policy::resource::Protocol;

use crate::shared::{NotReady, Shared};
use crate::worker::registry::{Cut, Flow, Side};

/// A verdict, and what dry-run policies would have said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What counts.
    pub decision: Decision,
    /// What would count without dry run, where that differs.
    pub dry_run: Option<Decision>,
}

/// Decides about a TCP flow.
pub fn decide(index: &Index, source: &SpiffeId, source_address: IpAddr, destination: &SpiffeId, port: u16) -> Verdict {
    let flow = opencluster_policy::index::Flow { source, source_address, destination, port, protocol: Protocol::Tcp };
    Verdict { decision: index.decide(&flow), dry_run: index.decide_dry_run(&flow) }
}

/// The policy that decided, as `namespace/name`.
pub fn rule_name(index: &Index, decision: Decision) -> Option<String> {
    let (Decision::Allow(rule) | Decision::Deny(rule)) = decision else { return None };
    index.rule(rule).map(|(policy, _)| format!("{}/{}", policy.namespace, policy.name))
}

/// One sentence that says why a flow may not pass.
pub fn denial(index: &Index, decision: Decision, source: &SpiffeId, destination: &SpiffeId, port: u16) -> String {
    match rule_name(index, decision) {
        Some(rule) => format!("policy {rule} denies {source} to {destination} port {port}"),
        None => format!("no policy allows {source} to {destination} port {port}"),
    }
}

/// Judges a live flow by what is in force now. Flows that are not decided yet will be, with the same inputs.
pub fn recheck(shared: &Shared, flow: &Flow) -> Result<(), Cut> {
    match shared.alive() {
        Ok(()) => {}
        Err(NotReady::Severed) => return Err(Cut::Severed),
        Err(NotReady::LeaseExpired) => return Err(Cut::LeaseExpired),
        Err(other) => return Err(Cut::Policy(other.to_string())),
    }
    if let Some(tunnel) = &*flow.tunnel.borrow() {
        if let Some(reason) = tunnel.revoked(&shared.trust) {
            return Err(Cut::Identity(reason));
        }
        if !shared.holds(&tunnel.local.id) {
            return Err(Cut::Identity(format!("{} is not held by this node any more", tunnel.local.id)));
        }
    }
    let (Some(destination), Some(address)) = (flow.destination.get(), flow.source_address.get()) else {
        return Ok(());
    };
    let index = shared.index();
    let Some(index) = index.as_ref() else { return Err(Cut::Policy(NotReady::Configuration.to_string())) };
    let route = index.route(flow.target, Protocol::Tcp);
    if route.is_none_or(|route| route.workload != *destination) {
        return Err(Cut::Policy(format!("{} is no address of {destination} any more", flow.target)));
    }
    let verdict = decide(index, &flow.source, address, destination, flow.target.port());
    if flow.side == Side::Inbound || flow.decision.get().is_some() {
        flow.decision.set(Some(verdict.decision));
    }
    if verdict.decision.allowed() {
        return Ok(());
    }
    Err(Cut::Policy(denial(index, verdict.decision, &flow.source, destination, flow.target.port())))
}
