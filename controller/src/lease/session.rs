//! One node's session: what goes down, in an order that never leaves the node with a lease but without what it must
//! enforce, and what comes up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use opencluster_api::control::controller_message::Message as Down;
use opencluster_api::control::node_message::Message as Up;
use opencluster_api::control::{
    self, Certificate, CertificateRequest, ConfigUpdate, ControllerMessage, Document, DocumentKey, NodeMessage, Sever,
};
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::{SpiffeId, UnixTime};
use opencluster_policy::lease::Nonce;
use opencluster_policy::resource::{Key, Resource};
use opencluster_policy::snapshot::Snapshot;
use serde_json::json;
use tokio::sync::{mpsc, oneshot, watch};
use tonic::{Status, Streaming};

use super::clocks;
use super::ends::Ended;
use super::registry::{Outcome, Refused, SessionEnd, SessionId};
use super::service::ControlService;
use crate::grpc::HangUp;
use crate::listen::shutting_down;
use crate::state::record::{EnrolmentRecord, IssuedRecord, Standing};
use crate::state::revocation::RevocationList;
use crate::state::{Configuration, StateError};
use crate::store::Table;

/// Security events a second that a node gets into the audit trail, and how many at once.
const EVENTS_PER_SECOND: u32 = 5;
const EVENT_BURST: u32 = 50;

/// What a session may have waiting for the store before no more is read from it.
const WAITING: usize = 32;

/// The longest text of an event that is kept.
const EVENT_TEXT: usize = 1024;

/// One session, run by its own task.
pub(super) struct Session {
    pub(super) service: ControlService,
    pub(super) node: String,
    pub(super) id: SessionId,
    pub(super) enrolment: String,
    pub(super) key: Sha256Digest,
    /// When the certificate that opened it ends.
    pub(super) not_after: UnixTime,
    pub(super) down: mpsc::Sender<Result<ControllerMessage, Status>>,
    pub(super) hang_up: HangUp,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Over {
    #[error("the node closed it")]
    Closed,
    #[error("the node's stream failed: {0}")]
    Stream(Status),
    #[error("the node does not read what it is sent")]
    Slow,
    #[error("{0}")]
    Refused(String),
    #[error("the certificate that opened it has ended")]
    CertificateEnded,
    #[error("the node opened another one")]
    Replaced,
    #[error("severed: {0}")]
    Severed(String),
    #[error("the controller is shutting down")]
    ShuttingDown,
    #[error(transparent)]
    State(#[from] StateError),
}

impl Session {
    /// Serves the session to its end.
    pub(super) async fn run(self, up: Streaming<NodeMessage>, ended: oneshot::Receiver<SessionEnd>) {
        let Self { node, id, .. } = &self;
        tracing::info!(event = "session.opened", node, enrolment = self.enrolment, "a node opened its session");
        let over = match self.serve(up, ended).await {
            Ok(never) => match never {},
            Err(over) => over,
        };
        tracing::info!(event = "session.closed", node, reason = %over, "a node's session ended");
        let farewell = match &over {
            Over::Severed(reason) => Some(Ok(message(Down::Sever(Sever { reason: reason.clone() })))),
            Over::Closed | Over::Stream(_) | Over::Slow => None,
            Over::Refused(reason) => Some(Err(Status::invalid_argument(reason.clone()))),
            Over::CertificateEnded => Some(Err(Status::unauthenticated(over.to_string()))),
            Over::Replaced => Some(Err(Status::aborted(over.to_string()))),
            Over::ShuttingDown => Some(Err(Status::unavailable(over.to_string()))),
            Over::State(_) => Some(Err(Status::internal("see the controller's log"))),
        };
        let taken = match farewell {
            Some(farewell) => self.down.send_timeout(farewell, Duration::from_secs(1)).await.is_ok(),
            None => false,
        };
        // A connection whose other session replaced this one goes on; one that nobody reads, or that is out, does not.
        if !taken || matches!(over, Over::Severed(_)) {
            self.hang_up.now();
        }
        self.service.registry.close_session(node, *id);
    }

    async fn serve(
        &self,
        mut up: Streaming<NodeMessage>,
        mut ended: oneshot::Receiver<SessionEnd>,
    ) -> Result<std::convert::Infallible, Over> {
        let state = &self.service.state;
        let mut revocations = state.watch_revocations();
        let mut configuration = state.watch_configuration();
        let mut shutdown = self.service.shutdown.clone();
        let mut events = EventAllowance::new();
        // Heartbeats do not wait for what waits for the store.
        let mut waiting = FuturesUnordered::new();

        // The order matters: the node has all that it must enforce before the first grant can reach it.
        self.send_bundle().await?;
        self.send_revocations(&mut revocations).await?;
        let mut sent = self.send_configuration(&mut configuration, None).await?;

        let life = self.not_after.as_secs().saturating_sub(UnixTime::now().as_secs());
        let certificate_ends = tokio::time::sleep(Duration::from_secs(life));
        tokio::pin!(certificate_ends);
        loop {
            tokio::select! {
                biased;
                end = &mut ended => return Err(match end {
                    Ok(SessionEnd::Severed(reason)) => Over::Severed(reason),
                    Ok(SessionEnd::Replaced) | Err(_) => Over::Replaced,
                }),
                () = shutting_down(&mut shutdown) => return Err(Over::ShuttingDown),
                changed = revocations.changed() => {
                    changed.map_err(|_| Over::ShuttingDown)?;
                    self.send_revocations(&mut revocations).await?;
                }
                changed = configuration.changed() => {
                    changed.map_err(|_| Over::ShuttingDown)?;
                    sent = self.send_configuration(&mut configuration, Some(&sent)).await?;
                }
                () = &mut certificate_ends => return Err(Over::CertificateEnded),
                Some(done) = waiting.next(), if !waiting.is_empty() => done?,
                received = up.message(), if waiting.len() < WAITING => match received {
                    Ok(Some(NodeMessage { message: Some(received) })) => {
                        waiting.extend(self.received(received, &mut events).await?);
                    }
                    Ok(Some(NodeMessage { message: None })) => {
                        return Err(Over::Refused("a message of a kind that this controller does not know".into()));
                    }
                    Ok(None) => return Err(Over::Closed),
                    Err(status) => return Err(Over::Stream(status)),
                },
            }
        }
    }

    /// A node that does not take a message within a lease would not renew its lease either: it is cut off.
    async fn send(&self, down: Down) -> Result<(), Over> {
        let patience = Duration::from_millis(u64::from(self.service.registry.timing().lease_ms()));
        self.down.send_timeout(Ok(message(down)), patience).await.map_err(|error| match error {
            mpsc::error::SendTimeoutError::Timeout(_) => Over::Slow,
            mpsc::error::SendTimeoutError::Closed(_) => Over::Closed,
        })
    }

    async fn send_bundle(&self) -> Result<(), Over> {
        let roots_der = self.service.authority.bundle().roots().iter().map(|root| root.to_vec()).collect();
        self.send(Down::TrustBundle(control::TrustBundle { version: 1, roots_der })).await
    }

    async fn send_revocations(&self, revocations: &mut watch::Receiver<Arc<RevocationList>>) -> Result<(), Over> {
        let list = Arc::clone(&revocations.borrow_and_update());
        self.send(Down::Revocations(list.to_message())).await
    }

    /// Every node gets every resource for now: each needs the policies of all destinations that it may call, and the
    /// whole is small. A change that follows on another while the first is being sent is sent as one.
    async fn send_configuration(
        &self,
        configuration: &mut watch::Receiver<Arc<Configuration>>,
        sent: Option<&Snapshot>,
    ) -> Result<Snapshot, Over> {
        let current = Arc::clone(&configuration.borrow_and_update());
        self.send(Down::Config(update(sent, &current.snapshot))).await?;
        Ok(current.snapshot.clone())
    }

    /// What must be answered at once is; the rest is what comes back.
    async fn received(
        &self,
        received: Up,
        events: &mut EventAllowance,
    ) -> Result<Option<BoxFuture<'_, Result<(), Over>>>, Over> {
        let registry = &self.service.registry;
        match received {
            Up::Heartbeat(heartbeat) => {
                self.answer(registry.heartbeat(&self.node, self.id, &heartbeat, clocks(), nonce()?)).await?;
            }
            Up::Acknowledgement(applied) => {
                self.answer(registry.acknowledged(&self.node, self.id, applied, clocks(), nonce()?)).await?;
            }
            Up::CertificateRequest(request) => {
                let answer = async {
                    let certificate = self.certify(request).await?;
                    self.send(Down::Certificate(certificate)).await
                };
                return Ok(Some(answer.boxed()));
            }
            Up::Event(event) => return Ok(self.event(&event, events).map(FutureExt::boxed)),
        }
        Ok(None)
    }

    async fn answer(&self, outcome: Result<Outcome, Refused>) -> Result<(), Over> {
        match outcome.map_err(|refused| Over::Refused(refused.to_string()))? {
            Outcome::Grant(grant) => {
                self.send(Down::Grant(control::Grant {
                    sequence: grant.sequence,
                    nonce: grant.nonce.to_vec(),
                    lease_ms: (grant.lease / 1_000_000) as u32,
                    confirm: grant.confirm,
                    monotonic_raw_ns: grant.sent.monotonic_raw,
                    boottime_ns: grant.sent.boottime,
                    realtime_ns: grant.sent.realtime,
                }))
                .await
            }
            // That nobody gets a grant is said once for all.
            Outcome::Nothing | Outcome::HeldUp => Ok(()),
            Outcome::Withheld => {
                tracing::warn!(
                    event = "lease.withheld",
                    node = self.node,
                    "a node has not applied the revocations in time: no grant before it has"
                );
                Ok(())
            }
            Outcome::Sever(ended) => {
                severed(&ended);
                Err(Over::Severed(ended.reason.to_string()))
            }
        }
    }

    /// Signs, or says why not. Only what the node did wrong is said to it.
    async fn certify(&self, request: CertificateRequest) -> Result<Certificate, Over> {
        let request_id = request.request_id;
        match self.issue(request).await? {
            Ok(chain_der) => Ok(Certificate { request_id, chain_der, refusal: String::new() }),
            Err(refusal) => {
                tracing::warn!(event = "svid.refused", node = self.node, refusal, "a certificate was refused");
                Ok(Certificate { request_id, chain_der: Vec::new(), refusal })
            }
        }
    }

    async fn issue(&self, request: CertificateRequest) -> Result<Result<Vec<Vec<u8>>, String>, Over> {
        let service = &self.service;
        let id = match SpiffeId::parse(&request.spiffe_id) {
            Ok(id) => id,
            Err(error) => return Ok(Err(format!("spiffe_id: {error}"))),
        };
        let own = SpiffeId::node(service.state.domain(), &self.node).is_ok_and(|own| own == id);
        if !own && !service.state.configuration().index.node_may_hold(&self.node, &id) {
            return Ok(Err(format!("{id} may not run on node {}: no Workload of that name lists it", self.node)));
        }
        if let Some(revocation) = service.state.revocations().identity_revoked(&id) {
            return Ok(Err(format!("{id} is revoked: {}", revocation.reason)));
        }
        let issued = match service.authority.issue(&request.csr_der, &id, service.svid_ttl, UnixTime::now()) {
            Ok(issued) => issued,
            Err(error) => return Ok(Err(format!("csr_der: {error}"))),
        };
        let revocations = service.state.revocations();
        if let Some(found) = revocations.key_revoked(id.as_str(), &issued.spki_sha256.to_string()) {
            return Ok(Err(format!("this key of {id} is revoked: {}: make a new one", found.reason)));
        }
        if own && issued.spki_sha256 == self.key {
            return Ok(Err("a rotation needs a new key".into()));
        }
        let record = IssuedRecord {
            node: self.node.clone(),
            spiffe_id: id.to_string(),
            key: issued.spki_sha256.to_string(),
            not_after: issued.not_after.as_secs() as i64,
        };
        let enrolment = self.enrolment.clone();
        // The record is committed before the certificate leaves: there is no certificate that a revocation would miss.
        let recorded = service.state.run(move |state| state.record_issued(&enrolment, &record)).await?;
        if !recorded {
            return Ok(Err("the node's enrolment has ended".into()));
        }
        if own {
            service
                .registry
                .next_key(&self.node, self.id, issued.spki_sha256)
                .map_err(|refused| Over::Refused(refused.to_string()))?;
        }
        tracing::info!(
            event = "svid.issued",
            node = self.node,
            id = %issued.id,
            key = %issued.spki_sha256,
            serial = issued.serial,
            not_after = issued.not_after.as_secs(),
            "issued a certificate"
        );
        Ok(Ok(issued.chain.iter().map(|certificate| certificate.to_vec()).collect()))
    }

    fn event(
        &self,
        event: &control::NodeEvent,
        events: &mut EventAllowance,
    ) -> Option<impl Future<Output = Result<(), Over>> + Send + use<>> {
        let (kind, detail, realtime_ns) = (cut(&event.kind), cut(&event.detail), event.realtime_ns);
        tracing::warn!(event = "node.event", node = self.node, kind, detail, "a node reports");
        if !events.take() {
            return None;
        }
        let node = self.node.clone();
        let skipped = std::mem::take(&mut events.skipped);
        let state = Arc::clone(&self.service.state);
        Some(async move {
            let audited = state.run(move |state| {
                let mut writer = state.write()?;
                let mut after = json!({"kind": kind, "detail": detail, "realtime_ns": realtime_ns});
                if skipped > 0 {
                    after["skipped"] = skipped.into();
                }
                writer.audit(&format!("node/{node}"), "node.event", format!("Node {node}"), None, Some(after));
                writer.commit()
            });
            audited.await.map(drop).map_err(Over::State)
        })
    }
}

/// Says so.
pub(super) fn severed(ended: &Ended) {
    let Ended { node, reason, .. } = ended;
    tracing::error!(event = "node.severed", node, %reason, "a node is out: its identities will be revoked");
}

impl crate::state::State {
    /// Records that a certificate was issued in a session of this enrolment; `false`: the enrolment is over.
    fn record_issued(&self, enrolment: &str, issued: &IssuedRecord) -> Result<bool, StateError> {
        let mut writer = self.write()?;
        let current = self.get::<EnrolmentRecord>(Table::Enrolments, &issued.node)?;
        if !current.is_some_and(|(record, _)| record.id == enrolment && record.standing == Standing::Active) {
            return Ok(false);
        }
        writer.put(Table::Issued, format!("{}/{}", issued.node, issued.key), issued)?;
        writer.commit()?;
        Ok(true)
    }
}

/// Fresh random bytes for a grant.
fn nonce() -> Result<Nonce, Over> {
    let mut fresh = [0; 16];
    aws_lc_rs::rand::fill(&mut fresh)
        .map_err(|_| Over::Refused("the controller has no random bytes for a nonce".into()))?;
    Ok(fresh)
}

/// What a node that has `sent` needs to have `current`; `None`: a snapshot.
fn update(sent: Option<&Snapshot>, current: &Snapshot) -> ConfigUpdate {
    let Some(sent) = sent.filter(|sent| sent.version > 0) else {
        let upserts = current.resources.values().map(|resource| document(resource)).collect();
        return ConfigUpdate { version: current.version, base_version: 0, upserts, deletes: Vec::new() };
    };
    let difference = sent.difference(current);
    ConfigUpdate {
        version: current.version,
        base_version: sent.version,
        upserts: difference.upserts.iter().map(|resource| document(resource)).collect(),
        deletes: difference.deletes.into_iter().map(document_key).collect(),
    }
}

fn document(resource: &Resource) -> Document {
    Document { key: Some(document_key(resource.key())), json: resource.to_json().to_string().into_bytes() }
}

fn document_key(key: Key) -> DocumentKey {
    DocumentKey { kind: key.kind.name().to_owned(), namespace: key.namespace, name: key.name }
}

fn message(message: Down) -> ControllerMessage {
    ControllerMessage { message: Some(message) }
}

/// At most [`EVENT_TEXT`] bytes of it.
pub(super) fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(EVENT_TEXT)].to_owned()
}

/// A node that reports without end does not fill the audit trail.
struct EventAllowance {
    left: u32,
    since: Instant,
    skipped: u64,
}

impl EventAllowance {
    fn new() -> Self {
        Self { left: EVENT_BURST, since: Instant::now(), skipped: 0 }
    }

    fn take(&mut self) -> bool {
        let seconds = self.since.elapsed().as_secs();
        if seconds > 0 {
            let refill = EVENTS_PER_SECOND.saturating_mul(u32::try_from(seconds).unwrap_or(u32::MAX));
            self.left = self.left.saturating_add(refill).min(EVENT_BURST);
            self.since = Instant::now();
        }
        if self.left == 0 {
            self.skipped += 1;
            return false;
        }
        self.left -= 1;
        true
    }
}
