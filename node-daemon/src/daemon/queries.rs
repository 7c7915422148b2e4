//! What is asked over `node.sock`.

use std::collections::BTreeMap;
use std::sync::Arc;

use opencluster_identity::svid::Svid;
use opencluster_identity::{SpiffeId, UnixTime};
use opencluster_policy::lease::NodeState;

use super::core::Core;
use super::resources::Workload;
use crate::cgroup;
use crate::clock;
use crate::config::Config;
use crate::status::{ProxyStatus, Status, WorkloadStatus};
use crate::workload::server::{Admission, Query};

/// There is no state yet, but questions.
pub(super) fn answer_before_enrolment(query: Query, config: &Config) {
    // Who asked may have gone away.
    match query {
        Query::Admit { answer, .. } => {
            drop(answer.send(Admission::NotYet("this node has not enrolled yet: see the daemon's log".to_owned())));
        }
        Query::Status(answer) => {
            let status = Status {
                node: config.node.clone(),
                state: "enrolling".to_owned(),
                reason: Some("no controller has granted it yet: see the daemon's log".to_owned()),
                firewall_applied: true,
                ..Status::default()
            };
            drop(answer.send(Box::new(status)));
        }
    }
}

impl Core {
    pub(super) fn query(&mut self, query: Query) {
        // Who asked may have gone away.
        match query {
            Query::Admit { namespace, workload, process, answer } => {
                drop(answer.send(self.admit(&Workload { namespace, name: workload }, process)));
            }
            Query::Status(answer) => drop(answer.send(Box::new(self.status()))),
        }
    }

    fn admit(&self, workload: &Workload, process: u32) -> Admission {
        if let Some(reason) = &self.severed {
            return Admission::Refused(format!("this node is severed: {reason}"));
        }
        if self.life.cordoned {
            return Admission::Refused("this node's life is nearly over: it takes nothing new".to_owned());
        }
        let names = self.names();
        match names.get(workload) {
            None if self.resources.version().is_none() => {
                Admission::NotYet("this node has no configuration yet".to_owned())
            }
            None => {
                let existing: Vec<String> = names.keys().map(ToString::to_string).collect();
                let existing = if existing.is_empty() { "none".to_owned() } else { existing.join(", ") };
                Admission::Refused(format!(
                    "no workload {workload} belongs on node {}: there are {existing}. Apply a Workload resource whose \
                     spec.nodes names this node",
                    self.config.node
                ))
            }
            Some(false) => {
                let waiting = self.proxy.as_ref().map_or("the proxy to start", |proxy| proxy.waiting_for.as_str());
                Admission::NotYet(format!(
                    "the proxy does not hold the identity of {workload} yet (waiting for {waiting})"
                ))
            }
            Some(true) if !self.firewall_applied => Admission::NotYet("the packet filter is not in force".to_owned()),
            Some(true) => {
                let cgroup = self.captures.path(workload);
                match cgroup::enter(&cgroup, process) {
                    Ok(()) => Admission::Admitted,
                    Err(error) => Admission::Refused(error.to_string()),
                }
            }
        }
    }

    fn status(&self) -> Status {
        let (state, reason) = match (&self.severed, self.lease.state()) {
            (Some(reason), _) | (None, NodeState::Severed(reason)) => ("severed", Some(reason.to_string())),
            (None, NodeState::Enrolling) => ("enrolling", Some("waiting for the first lease".to_owned())),
            (None, NodeState::Active { .. }) if self.life.cordoned => {
                ("active", Some("its life is nearly over: it takes nothing new".to_owned()))
            }
            (None, NodeState::Active { .. }) => ("active", None),
        };
        let deadline = match self.lease.state() {
            NodeState::Active { deadline } if self.severed.is_none() => *deadline,
            _ => 0,
        };
        let expires = self.svid().map(|svid| svid.not_after().as_secs().saturating_sub(UnixTime::now().as_secs()));
        Status {
            node: self.config.node.clone(),
            spiffe_id: Some(self.id.to_string()),
            state: state.to_owned(),
            reason,
            lease_remaining_ms: deadline.saturating_sub(clock::boottime()) / 1_000_000,
            controller: self.controller.as_ref().map(|controller| controller.address.to_string()),
            firewall_applied: self.firewall_applied,
            firewall_repairs: self.firewall_repairs,
            generation_watched: self.watching.is_on(),
            config_version: self.resources.version(),
            revocation_version: self.revocations.as_ref().map(|set| set.version),
            certificate_expires_in_s: expires,
            proxy: self.proxy_status(),
            workloads: self
                .captures
                .assigned()
                .iter()
                .map(|(workload, capture)| WorkloadStatus {
                    namespace: workload.namespace.clone(),
                    name: workload.name.clone(),
                    capture_port: capture.port,
                    identity_ready: self.identity_ready(workload),
                })
                .collect(),
        }
    }

    fn proxy_status(&self) -> ProxyStatus {
        let told = self.proxy.clone().unwrap_or_default();
        ProxyStatus {
            running: self.supervisor.is_running(),
            ready: told.ready,
            waiting_for: (!told.waiting_for.is_empty()).then_some(told.waiting_for),
            restarts: self.supervisor.restarts(),
            flows: told.flows,
            config_version: told.config_version,
            sandbox: told.sandbox,
        }
    }

    fn identity_ready(&self, workload: &Workload) -> bool {
        let id = SpiffeId::workload(self.trust.domain(), &workload.namespace, &workload.name);
        id.is_ok_and(|id| {
            self.proxy.as_ref().is_some_and(|proxy| proxy.identities_ready.iter().any(|ready| ready == id.as_str()))
        })
    }

    /// Every workload of this node, and whether it can run now.
    fn names(&self) -> BTreeMap<Workload, bool> {
        self.captures.assigned().keys().map(|workload| (workload.clone(), self.identity_ready(workload))).collect()
    }

    /// The node's certificate.
    fn svid(&self) -> Option<Arc<Svid>> {
        self.svids.get(&self.id)
    }
}
