//! What is told of a flow when it has ended, or is asked for while it lives.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use opencluster_policy::index::Decision;
use serde::Serialize;

use super::registry::Flow;
use crate::access_log::Entry;
use crate::admin::metrics::FINISHED;
use crate::authz;
use crate::capture::CaptureError;
use crate::relay::Ending;
use crate::shared::Shared;
use crate::tunnel::oct::frame::{Refusal, RefusalCode};

/// How a flow went.
#[derive(Debug)]
pub struct Verdict {
    /// `allowed`, `denied` or `failed`.
    pub kind: &'static str,
    /// For metrics.
    pub name: &'static str,
    /// For people.
    pub reason: String,
}

impl Verdict {
    /// From the end of a flow that was carried.
    pub fn ended(ending: &Ending) -> Self {
        let (kind, name, reason) = match ending {
            Ending::Finished => ("allowed", FINISHED, FINISHED.to_owned()),
            Ending::AppReset(error) => ("allowed", "app_reset", format!("reset by the application: {error}")),
            Ending::PeerReset => ("allowed", "peer_reset", "reset by the other side".to_owned()),
            Ending::Refused(refusal) => return Self::refused_there(refusal),
            Ending::Cut(cut) => ("denied", cut.name(), format!("cut: {cut}")),
            Ending::Broken(error) => ("failed", "tunnel_broken", error.to_string()),
            Ending::Stale { .. } => ("failed", "stale", "the tunnel was closed before it took the flow".to_owned()),
        };
        Self { kind, name, reason }
    }

    /// Refused on this side, before there was a tunnel.
    pub fn refused(error: &CaptureError) -> Self {
        let kind = if matches!(error, CaptureError::Tunnel(_)) { "failed" } else { "denied" };
        Self { kind, name: error.name(), reason: error.to_string() }
    }

    /// Refused by this node as the destination.
    pub fn refused_here(refusal: &Refusal) -> Self {
        Self { kind: of_code(refusal.code), name: refusal.code.name(), reason: refusal.to_string() }
    }

    /// Refused by the destination's node.
    pub fn refused_there(refusal: &Refusal) -> Self {
        let reason = format!("refused by the destination: {refusal}");
        Self { kind: of_code(refusal.code), name: refusal.code.name(), reason }
    }
}

fn of_code(code: RefusalCode) -> &'static str {
    match code {
        RefusalCode::ConnectRefused | RefusalCode::Unreachable | RefusalCode::ConnectTimeout => "failed",
        _ => "denied",
    }
}

/// The access log's line.
pub fn entry(shared: &Shared, flow: &Flow, verdict: &Verdict) -> Entry {
    let tunnel = flow.tunnel.borrow();
    let index = shared.index();
    let policy = match (flow.decision.get(), index.as_ref()) {
        (Some(decision), Some(index)) => authz::rule_name(index, decision),
        _ => None,
    };
    Entry {
        time: SystemTime::now(),
        direction: flow.side.name(),
        flow: flow.id,
        trace: flow.trace,
        source: Arc::clone(&flow.source),
        destination: flow.destination.get().cloned(),
        peer: flow.peer,
        target: flow.target,
        bytes_sent: flow.sent(),
        bytes_received: flow.received(),
        duration_us: flow.started.elapsed().as_micros() as u64,
        tls: tunnel.as_ref().map(|_| "TLSv1.3"),
        suite: tunnel.as_ref().map(|tunnel| tunnel.suite),
        group: tunnel.as_ref().map(|tunnel| tunnel.group),
        verdict: verdict.kind,
        policy,
        reason: verdict.reason.clone(),
        dry_run: flow.dry_run.get().map(|decision| if decision.allowed() { "allow" } else { "deny" }),
    }
}

/// A live flow, for `/flows`.
#[derive(Clone, Debug, Serialize)]
pub struct Live {
    direction: &'static str,
    flow: String,
    trace: String,
    source: String,
    destination: Option<String>,
    peer: SocketAddr,
    target: SocketAddr,
    bytes_sent: u64,
    bytes_received: u64,
    age_ms: u64,
    accepted: bool,
    allowed: Option<bool>,
    tunnel: Option<SocketAddr>,
}

impl Live {
    /// A picture of it.
    pub fn of(flow: &Flow) -> Self {
        Self {
            direction: flow.side.name(),
            flow: format!("{:016x}", flow.id),
            trace: format!("{:032x}", flow.trace),
            source: flow.source.to_string(),
            destination: flow.destination.get().map(ToString::to_string),
            peer: flow.peer,
            target: flow.target,
            bytes_sent: flow.sent(),
            bytes_received: flow.received(),
            age_ms: flow.started.elapsed().as_millis() as u64,
            accepted: flow.is_accepted(),
            allowed: flow.decision.get().map(Decision::allowed),
            tunnel: flow.tunnel.borrow().as_ref().map(|tunnel| tunnel.address),
        }
    }
}
