//! The node's state, and what every event does to it.

use std::time::Duration;

use opencluster_api::control::{self, ControllerMessage, NodeMessage, controller_message, node_message};
use opencluster_api::local::{self, to_proxy};
use opencluster_identity::bundle::TrustBundle;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::svid::{Svid, SvidStore};
use opencluster_identity::trust::Trust;
use opencluster_identity::{CertificateDer, SpiffeId, UnixTime};
use opencluster_policy::lease::{NodeAction, NodeEvent, NodeLease, Reason};
use tokio::time::Instant;

use super::captures::Captures;
use super::life::Life;
use super::requests::{Origin, Requests};
use super::resources::Resources;
use crate::clock;
use crate::config::Config;
use crate::firewall::policy::{Posture, Serving};
use crate::firewall::{self, Firewall};
use crate::heartbeat::finding::Reporting;
use crate::heartbeat::generation::Watching;
use crate::heartbeat::host::{HostIdentity, Measured};
use crate::heartbeat::message::{self, Report};
use crate::heartbeat::{Controller, Session, SessionEvent};
use crate::supervise::Supervisor;

/// How long to wait before what failed is tried again.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// The daemon's state.
pub(super) struct Core {
    pub(super) config: Config,
    pub(super) host: HostIdentity,
    pub(super) watching: Watching,
    /// What the host is known by, as of the last new heartbeat.
    pub(super) measured: Measured,
    pub(super) id: SpiffeId,
    pub(super) lease: NodeLease,
    /// How long a lease is.
    pub(super) lease_span: Duration,
    pub(super) svids: SvidStore,
    pub(super) trust: Trust,
    pub(super) firewall: Firewall,
    /// The posture without what the configuration adds.
    pub(super) base: Serving,
    pub(super) session: Option<Session>,
    pub(super) controller: Option<Controller>,
    pub(super) resources: Resources,
    pub(super) captures: Captures,
    pub(super) requests: Requests,
    pub(super) supervisor: Supervisor,
    pub(super) proxy: Option<local::Status>,
    pub(super) bundle: control::TrustBundle,
    pub(super) revocations: Option<control::RevocationSet>,
    /// The heartbeat that waits for its grant, to be sent again byte for byte.
    pub(super) outstanding: Option<control::Heartbeat>,
    pub(super) acknowledged: (u64, u64),
    pub(super) firewall_applied: bool,
    pub(super) firewall_retry: Option<Instant>,
    pub(super) firewall_repairs: u64,
    /// Events that no controller could take yet. Old ones give way.
    pub(super) unsent: std::collections::VecDeque<control::NodeEvent>,
    pub(super) rotate_at: Instant,
    pub(super) kill_proxy_at: Option<Instant>,
    /// What the controller must hear of when this node severs itself.
    pub(super) finding: Option<Reason>,
    /// On its way.
    pub(super) reporting: Option<Reporting>,
    pub(super) life: Life,
    pub(super) severed: Option<Reason>,
}

impl Core {
    /// When [`Core::tick`] is due at the latest.
    pub(super) fn due(&self) -> Instant {
        let now = Instant::now();
        if self.severed.is_some() {
            let due = [self.kill_proxy_at, self.firewall_retry].into_iter().flatten().min();
            return due.unwrap_or(now + Duration::from_hours(1));
        }
        let lease = now + Duration::from_nanos(self.lease.next_tick().saturating_sub(clock::boottime()));
        [self.supervisor.restart_at(), self.firewall_retry, Some(self.rotate_at), self.life_due()]
            .into_iter()
            .flatten()
            .fold(lease, Ord::min)
    }

    /// Does what time has made due.
    pub(super) async fn tick(&mut self) {
        let now = Instant::now();
        if self.kill_proxy_at.is_some_and(|at| at <= now) {
            self.kill_proxy_at = None;
            self.kill_proxy();
        }
        if self.severed.is_some() {
            if self.firewall_retry.is_some_and(|at| at <= now) {
                self.close().await;
            }
            return;
        }
        self.measure().await;
        self.step(NodeEvent::Tick(clock::now())).await;
        if self.severed.is_some() {
            return;
        }
        self.live().await;
        if self.severed.is_some() {
            return;
        }
        if self.firewall_retry.is_some_and(|at| at <= now) {
            self.apply_firewall().await;
        }
        if self.supervisor.restart_at().is_some_and(|at| at <= now) {
            self.start_proxy();
        }
        if self.rotate_at <= now {
            self.rotate();
        }
    }

    /// Feeds the state machine and does what it says.
    async fn step(&mut self, event: NodeEvent) {
        for action in self.lease.step(event) {
            match action {
                NodeAction::Send(heartbeat) => self.send_heartbeat(&heartbeat),
                NodeAction::Renew { deadline } => self.renew(deadline).await,
                NodeAction::Report(reason) => self.finding = Some(reason),
                NodeAction::Sever(reason) => self.sever(reason).await,
            }
        }
    }

    /// What the host is known by may have changed since the last heartbeat; the controller judges.
    async fn measure(&mut self) {
        let measured = self.host.measure().unwrap_or_else(|error| {
            // What was not measured is not claimed: the controller ends a node that does not know its own boot.
            tracing::error!(%error, "the boot ID cannot be read");
            Measured { boot_id: format!("unknown: {error}"), ..self.measured.clone() }
        });
        self.step(NodeEvent::Measured(measured.host())).await;
        self.measured = measured;
    }

    /// This machine goes on from a snapshot: it is a copy, or was restored or moved.
    pub(super) async fn generation_changed(&mut self, why: &str) {
        tracing::error!(why, "the hypervisor changed this machine's generation");
        self.step(NodeEvent::Found(Reason::GenerationChanged)).await;
    }

    fn send_heartbeat(&mut self, heartbeat: &opencluster_policy::lease::Heartbeat) {
        let again = self.outstanding.take().filter(|outstanding| outstanding.sequence == heartbeat.sequence);
        let wire = again.unwrap_or_else(|| message::heartbeat(heartbeat, self.report_health()));
        self.outstanding = Some(wire.clone());
        self.send(node_message::Message::Heartbeat(wire));
    }

    fn report_health(&self) -> Report {
        let (config_version, revocation_version) = self.applied_versions();
        let proxy = self.proxy.as_ref();
        Report {
            host: self.measured.clone(),
            config_version,
            revocation_version,
            health: control::NodeHealth {
                firewall_applied: self.firewall_applied,
                proxy_ready: proxy.is_some_and(|proxy| proxy.ready),
                firewall_repairs: self.firewall_repairs,
                proxy_restarts: self.supervisor.restarts(),
                flows: proxy.map_or(0, |proxy| proxy.flows),
                workloads_ready: proxy.map(|proxy| proxy.identities_ready.clone()).unwrap_or_default(),
                generation_watched: self.watching.is_on(),
            },
        }
    }

    /// Kernel first: it is what counts. The proxy learns only of a lease that the kernel has.
    async fn renew(&mut self, deadline: u64) {
        match self.firewall.renew(deadline).await {
            Ok(()) => {
                self.tell_proxy(to_proxy::Message::Lease(local::Lease { deadline_boottime_ns: deadline }), vec![]);
            }
            Err(error) => {
                tracing::error!(%error, "the lease could not be renewed in the kernel: it closes when the old one ends");
                self.report("lease.failed", &error.to_string());
            }
        }
    }

    pub(super) async fn session_event(&mut self, event: SessionEvent) {
        if let SessionEvent::Told(told) = event {
            self.told(told).await;
            return;
        }
        if self.severed.is_some() {
            return;
        }
        match event {
            SessionEvent::Connected(controller) => {
                tracing::info!(address = %controller.address, "controller: connected");
                self.controller = Some(controller);
                self.step(NodeEvent::Connected(clock::now())).await;
                let open: Vec<_> = self.requests.open().cloned().collect();
                for request in open {
                    self.send(node_message::Message::CertificateRequest(request));
                }
                self.acknowledged = (0, 0);
                self.acknowledge();
                for event in std::mem::take(&mut self.unsent) {
                    self.send_event(event);
                }
            }
            SessionEvent::Lost(why) => {
                tracing::warn!(why, "controller: no session");
                self.controller = None;
            }
            SessionEvent::Message(message) => self.controller_message(*message).await,
            SessionEvent::Told(_) => {}
        }
    }

    async fn controller_message(&mut self, message: ControllerMessage) {
        match message.message {
            Some(controller_message::Message::Grant(grant)) => {
                if let Some(grant) = message::grant(&grant) {
                    self.step(NodeEvent::Grant(grant, clock::now())).await;
                } else {
                    tracing::warn!("controller: a grant that cannot be read was ignored");
                }
            }
            Some(controller_message::Message::Config(update)) => self.update(update).await,
            Some(controller_message::Message::Certificate(certificate)) => self.certificate(certificate),
            Some(controller_message::Message::Revocations(set)) => self.revoke(set),
            Some(controller_message::Message::Sever(verdict)) => {
                self.step(NodeEvent::Sever(Reason::Revoked(verdict.reason))).await;
            }
            Some(controller_message::Message::TrustBundle(bundle)) => self.trust_bundle(bundle),
            None => {
                tracing::warn!("controller: a message of an unknown kind was ignored (is it newer than this node?)");
            }
        }
    }

    async fn update(&mut self, update: control::ConfigUpdate) {
        let endpoint = self.resources.endpoint().map(|(addresses, port)| (addresses.to_vec(), port));
        if let Err(error) = self.resources.update(&update) {
            tracing::error!(%error, version = update.version, "the configuration was refused; the old one stays in force");
            self.report("config.refused", &error.to_string());
            if let (Some(session), super::resources::UpdateError::OtherBase { .. }) = (&self.session, &error) {
                session.renew();
            }
            return;
        }
        tracing::info!(version = update.version, "configuration");
        let moved = endpoint != self.resources.endpoint().map(|(addresses, port)| (addresses.to_vec(), port));
        let changes = self.captures.fit(&self.resources.workloads());
        for error in &changes.failed {
            tracing::error!(%error, "a workload has no network");
            self.report("workload.failed", &error.to_string());
        }
        // Rules first: a new workload's connections are refused until its listeners are there, not sent past them.
        if moved || !changes.added.is_empty() || !changes.removed.is_empty() || !self.firewall_applied {
            self.apply_firewall().await;
        }
        if moved {
            // Listeners and setup are those of a new process.
            self.kill_proxy();
            if !self.supervisor.is_running() {
                self.start_proxy();
            }
            return;
        }
        self.tell_proxy(to_proxy::Message::Config(update), vec![]);
        self.tell_proxy(self.identities(), vec![]);
        for workload in &changes.added {
            self.announce_capture(workload);
        }
        self.acknowledge();
    }

    async fn apply_firewall(&mut self) {
        let serving = Serving {
            tunnel_port: self.resources.endpoint().map(|(_, port)| port),
            captures: self
                .captures
                .assigned()
                .iter()
                .map(|(workload, capture)| (workload.to_string(), *capture))
                .collect(),
            ..self.base.clone()
        };
        match self.firewall.apply(Posture::Serving(serving)).await {
            Ok(()) => {
                self.firewall_applied = true;
                self.firewall_retry = None;
            }
            Err(error) => {
                tracing::error!(%error, "the packet filter could not be changed; the old rules stay in force");
                self.firewall_applied = false;
                self.firewall_retry = Some(Instant::now() + RETRY);
                self.report("firewall.failed", &error.to_string());
            }
        }
    }

    fn certificate(&mut self, mut certificate: control::Certificate) {
        match self.requests.answered(&certificate) {
            Some(Origin::Proxy { generation, request_id }) if generation == self.supervisor.generation() => {
                certificate.request_id = request_id;
                self.tell_proxy(to_proxy::Message::Certificate(certificate), vec![]);
            }
            Some(Origin::Node(key)) => self.rotated(certificate, key),
            Some(Origin::Proxy { .. }) | None => tracing::debug!("a certificate that nobody waits for"),
        }
    }

    /// Asks for the node's next certificate; the current one stays in use until it is there.
    fn rotate(&mut self) {
        self.rotate_at = Instant::now() + Duration::from_secs(30);
        if self.requests.node_has_asked() {
            return;
        }
        let request = PrivateKey::generate().and_then(|key| Ok((key.csr_der(&self.id)?, key)));
        match request {
            Ok((csr_der, key)) => {
                let request = control::CertificateRequest { request_id: 0, spiffe_id: self.id.to_string(), csr_der };
                if let Some(request) = self.requests.add(request, Origin::Node(key)) {
                    self.send(node_message::Message::CertificateRequest(request));
                }
            }
            Err(error) => tracing::error!(%error, "the node's next key could not be made; trying again"),
        }
    }

    fn rotated(&mut self, certificate: control::Certificate, key: PrivateKey) {
        if certificate.chain_der.is_empty() {
            tracing::error!(refusal = certificate.refusal, "the node's next certificate was refused; asking again");
            return;
        }
        let chain = certificate.chain_der.into_iter().map(CertificateDer::from).collect();
        match Svid::new(&self.id, chain, key) {
            Ok(svid) => {
                tracing::info!("the node has its next certificate");
                self.rotate_at = Instant::now() + svid.rotate_in(UnixTime::now());
                self.svids.install(svid);
                if let Some(session) = &self.session {
                    session.renew();
                }
            }
            Err(error) => tracing::error!(%error, "the node's next certificate does not fit; asking again"),
        }
    }

    fn revoke(&mut self, set: control::RevocationSet) {
        let (parsed, faults) = message::revocations(&set);
        for fault in faults {
            tracing::error!(fault, "a revocation that cannot be read");
            self.report("revocation.unreadable", &fault);
        }
        self.trust.replace_revocations(parsed);
        self.revocations = Some(set.clone());
        self.tell_proxy(to_proxy::Message::Revocations(set), vec![]);
        self.acknowledge();
    }

    fn trust_bundle(&mut self, bundle: control::TrustBundle) {
        let replaced = TrustBundle::from_der(bundle.roots_der.iter().cloned().map(CertificateDer::from))
            .and_then(|parsed| self.trust.replace_bundle(parsed));
        match replaced {
            Ok(()) => {
                self.bundle = bundle.clone();
                self.tell_proxy(to_proxy::Message::TrustBundle(bundle), vec![]);
            }
            Err(error) => {
                tracing::error!(%error, "a trust bundle was refused; the old one stays in force");
                self.report("bundle.refused", &error.to_string());
            }
        }
    }

    pub(super) async fn firewall_event(&mut self, event: firewall::Event) {
        match event {
            firewall::Event::Changed { by } => self.report("firewall.changed", &format!("by {by}")),
            firewall::Event::Repaired { what } => {
                self.firewall_repairs += 1;
                self.report("firewall.repaired", &what);
            }
            firewall::Event::Failed { why } => {
                self.firewall_applied = false;
                self.report("firewall.failed", &why);
                // What is in force is not known any more: the proxy at least can be stopped.
                self.sever(Reason::Revoked(format!("the packet filter cannot be kept in force: {why}"))).await;
            }
        }
    }

    /// What is in force. A proxy that does not run carries nothing, and begins with what the daemon has.
    pub(super) fn applied_versions(&self) -> (u64, u64) {
        let own = (
            self.resources.version().unwrap_or(0),
            self.revocations.as_ref().map_or(0, |revocations| revocations.version),
        );
        match &self.proxy {
            Some(proxy) => (own.0.min(proxy.config_version), own.1.min(proxy.revocation_version)),
            None if self.supervisor.is_running() => (0, 0),
            None => own,
        }
    }

    pub(super) fn acknowledge(&mut self) {
        let applied = self.applied_versions();
        if applied == self.acknowledged || applied == (0, 0) {
            return;
        }
        self.acknowledged = applied;
        let (config_version, revocation_version) = applied;
        self.send(node_message::Message::Acknowledgement(control::Acknowledgement {
            config_version,
            revocation_version,
        }));
    }

    /// Something that the security team wants to know.
    pub(super) fn report(&mut self, kind: &str, detail: &str) {
        const MAX_UNSENT: usize = 256;
        let event =
            control::NodeEvent { kind: kind.to_owned(), detail: detail.to_owned(), realtime_ns: clock::realtime() };
        if self.unsent.len() >= MAX_UNSENT {
            self.unsent.pop_front();
        }
        self.send_event(event);
    }

    fn send_event(&mut self, event: control::NodeEvent) {
        if self.controller.is_some() {
            self.send(node_message::Message::Event(event));
        } else {
            self.unsent.push_back(event);
        }
    }

    /// To the controller, if there is one. Heartbeats and requests are sent again by their owners when there is not.
    pub(super) fn send(&mut self, message: node_message::Message) {
        let Some(controller) = &self.controller else { return };
        if let Err(error) = controller.sender.try_send(NodeMessage { message: Some(message) }) {
            tracing::warn!(address = %controller.address, %error, "controller: cannot send");
            self.controller = None;
            if let Some(session) = &self.session {
                session.renew();
            }
        }
    }
}
