//! The proxy's part of the node's state: its requests, its end, its next start.

use std::time::Duration;

use opencluster_api::control;
use opencluster_api::control::node_message;
use opencluster_api::local::{self, to_proxy};
use opencluster_policy::lease::NodeState;
use tokio::time::Instant;

use super::core::Core;
use super::requests::Origin;
use super::resources::Workload;
use crate::config::Tunnels;
use crate::supervise::ProxyEvent;
use crate::supervise::listeners::{self, Announced};

/// How long flows may take to finish when the daemon is asked to end. With what follows it stays below the unit's
/// TimeoutStopSec.
const DRAIN: Duration = Duration::from_secs(5);

/// What the proxy gets on top of it to reset those that have not finished.
const CUT: Duration = Duration::from_millis(500);

impl Core {
    pub(super) fn proxy_event(&mut self, event: ProxyEvent) {
        match event {
            ProxyEvent::Request(generation, request) => self.proxy_request(generation, request),
            ProxyEvent::Status(generation, status) if generation == self.supervisor.generation() => {
                self.proxy = Some(status);
                self.acknowledge();
            }
            ProxyEvent::Status(..) => {}
            ProxyEvent::Exited(generation, how) => {
                if self.severed.is_some() {
                    self.proxy = None;
                    self.supervisor.retire();
                    return;
                }
                if self.life.cordoned && generation == self.supervisor.generation() {
                    self.drained();
                    return;
                }
                if !self.supervisor.exited(generation) {
                    return;
                }
                self.proxy = None;
                self.requests.forget_proxy();
                tracing::error!(how, "the proxy ended; nothing passes until it is back");
                self.report("proxy.exited", &how);
                self.acknowledge();
            }
        }
    }

    fn proxy_request(&mut self, generation: u64, request: control::CertificateRequest) {
        if generation != self.supervisor.generation() || self.severed.is_some() {
            return;
        }
        let request_id = request.request_id;
        let ours = self.resources.identities().iter().any(|id| id.as_str() == request.spiffe_id);
        let refusal = if ours {
            match self.requests.add(request, Origin::Proxy { generation, request_id }) {
                Some(request) => {
                    self.send(node_message::Message::CertificateRequest(request));
                    return;
                }
                None => "too many requests are open".to_owned(),
            }
        } else {
            format!("{} does not belong on this node", request.spiffe_id)
        };
        tracing::warn!(refusal, "proxy: certificate request");
        let answer = control::Certificate { request_id, chain_der: Vec::new(), refusal };
        self.tell_proxy(to_proxy::Message::Certificate(answer), vec![]);
    }

    /// Starts a proxy and brings it to the current state. Without the node's own resource there is nothing to start.
    pub(super) fn start_proxy(&mut self) {
        if self.life.cordoned {
            return;
        }
        let Some((addresses, tunnel_port)) = self.resources.endpoint() else { return };
        let addresses = addresses.to_vec();
        self.captures.proxy_replaced();
        if let Err(error) = self.supervisor.start() {
            tracing::error!(%error, "the proxy could not be started; trying again");
            self.report("proxy.failed", &error.to_string());
            return;
        }
        let workers = self.config.workers();
        self.tell_proxy(
            to_proxy::Message::Setup(local::Setup {
                trust_domain: self.trust.domain().to_string(),
                node: self.config.node.clone(),
                addresses: addresses.iter().map(ToString::to_string).collect(),
                tunnel_port: u32::from(tunnel_port),
                workers,
                leased_tunnels_only: self.config.tunnels == Tunnels::Leased,
                busy_poll_us: self.config.busy_poll_us,
            }),
            vec![],
        );
        self.tell_proxy(to_proxy::Message::TrustBundle(self.bundle.clone()), vec![]);
        if let Some(set) = self.revocations.clone() {
            self.tell_proxy(to_proxy::Message::Revocations(set), vec![]);
        }
        if let Some(snapshot) = self.resources.snapshot() {
            self.tell_proxy(to_proxy::Message::Config(snapshot), vec![]);
        }
        self.tell_proxy(self.identities(), vec![]);
        if let NodeState::Active { deadline } = *self.lease.state() {
            self.tell_proxy(to_proxy::Message::Lease(local::Lease { deadline_boottime_ns: deadline }), vec![]);
        }
        match listeners::admin(&self.config.run_dir.join("proxy.sock")) {
            Ok(announced) => self.announce(announced),
            Err(error) => self.listen_failed(&error),
        }
        match listeners::tunnels(&addresses, tunnel_port, workers) {
            Ok(all) => all.into_iter().for_each(|announced| self.announce(announced)),
            Err(error) => self.listen_failed(&error),
        }
        let workloads: Vec<Workload> = self.captures.assigned().keys().cloned().collect();
        for workload in &workloads {
            self.announce_capture(workload);
        }
    }

    pub(super) fn announce_capture(&mut self, workload: &Workload) {
        let Some(port) = self.captures.assigned().get(workload).map(|capture| capture.port) else { return };
        if !self.supervisor.is_running() {
            return;
        }
        match listeners::capture(&workload.namespace, &workload.name, port, self.config.workers()) {
            Ok(announced) => self.announce(announced),
            Err(error) => self.listen_failed(&error),
        }
    }

    fn announce(&mut self, (listener, descriptors): Announced) {
        self.tell_proxy(to_proxy::Message::Listener(listener), descriptors);
    }

    fn listen_failed(&mut self, error: &listeners::ListenError) {
        tracing::error!(%error, "a listener of the proxy could not be made");
        self.report("proxy.listener", &error.to_string());
    }

    pub(super) fn identities(&self) -> to_proxy::Message {
        let spiffe_ids = self.resources.identities().iter().map(ToString::to_string).collect();
        to_proxy::Message::Identities(local::Identities { spiffe_ids })
    }

    pub(super) fn tell_proxy(&mut self, message: to_proxy::Message, descriptors: Vec<std::os::fd::OwnedFd>) {
        if let Err(error) = self.supervisor.send(message, descriptors) {
            tracing::error!(%error, "the proxy could not be killed");
            self.report("proxy.unkillable", &error.to_string());
        }
    }

    /// Lets the proxy's flows finish; new ones are refused. By when that is over.
    pub(super) fn drain_proxy(&mut self) -> Instant {
        tracing::info!(limit = ?DRAIN, "stopping: the proxy drains");
        let deadline_ms = DRAIN.as_millis() as u32;
        self.tell_proxy(to_proxy::Message::Drain(local::Drain { deadline_ms }), vec![]);
        Instant::now() + DRAIN + CUT
    }

    pub(super) fn kill_proxy(&mut self) {
        if let Err(error) = self.supervisor.kill() {
            tracing::error!(%error, "the proxy could not be killed");
            self.report("proxy.unkillable", &error.to_string());
        }
    }
}
