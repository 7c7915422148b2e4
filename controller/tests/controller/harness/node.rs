//! A node as tests play it.

use opencluster_api::control::controller_message::Message as Down;
use opencluster_api::control::node_message::Message as Up;
use opencluster_api::control::{self, CertificateRequest, ControllerMessage, EnrolResponse, NodeMessage};
use opencluster_controller::lease::clocks;
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::svid::{Svid, SvidStore};
use opencluster_identity::{CertificateDer, SpiffeId};
use opencluster_policy::lease::{Clocks, Grant, Host, NodeAction, NodeEvent, NodeLease, Timing};
use tokio::sync::mpsc;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::{PATIENCE, node_id, report};

/// What a node holds.
pub(crate) struct TestNode {
    pub(crate) id: SpiffeId,
    pub(crate) svids: SvidStore,
    pub(crate) lease: NodeLease,
    pub(crate) spki: Sha256Digest,
}

impl TestNode {
    pub(super) fn new(name: &str, key: PrivateKey, response: EnrolResponse) -> Self {
        let id = node_id(name);
        let spki = key.spki_sha256();
        let svids = SvidStore::new();
        svids.install(svid(&id, response.chain_der, key));
        let timing =
            Timing::new(u64::from(response.lease_ms) * 1_000_000, u64::from(response.heartbeat_ms) * 1_000_000);
        let nonce = response.nonce.as_slice().try_into().expect("16 bytes");
        Self { id, svids, lease: NodeLease::enrolled(nonce, timing, Host::default(), clocks()), spki }
    }

    /// The heartbeat that is due, or again the one that was not answered.
    pub(crate) fn heartbeat(&mut self) -> control::Heartbeat {
        let actions = self.lease.step(NodeEvent::Connected(clocks()));
        let sent = actions.into_iter().find_map(|action| match action {
            NodeAction::Send(heartbeat) => Some(heartbeat),
            _ => None,
        });
        let heartbeat = sent.expect("a heartbeat to send");
        control::Heartbeat {
            sequence: heartbeat.sequence,
            nonce: heartbeat.nonce.to_vec(),
            monotonic_raw_ns: heartbeat.clocks.monotonic_raw,
            boottime_ns: heartbeat.clocks.boottime,
            realtime_ns: heartbeat.clocks.realtime,
            granted_monotonic_raw_ns: heartbeat.granted,
            boot_id: "b0071d".into(),
            ..control::Heartbeat::default()
        }
    }

    pub(crate) fn granted(&mut self, grant: &control::Grant) -> Vec<NodeAction> {
        let grant = Grant {
            sequence: grant.sequence,
            sent: Clocks {
                monotonic_raw: grant.monotonic_raw_ns,
                boottime: grant.boottime_ns,
                realtime: grant.realtime_ns,
            },
            nonce: grant.nonce.as_slice().try_into().expect("16 bytes"),
            lease: u64::from(grant.lease_ms) * 1_000_000,
            confirm: grant.confirm,
        };
        self.lease.step(NodeEvent::Grant(grant, clocks()))
    }

    /// One heartbeat and its grant.
    pub(crate) async fn beat(&mut self, session: &mut Session) -> control::Grant {
        session.send(Up::Heartbeat(self.heartbeat())).await;
        let grant = session.grant().await;
        self.granted(&grant);
        grant
    }
}

pub(crate) fn svid(id: &SpiffeId, chain: Vec<Vec<u8>>, key: PrivateKey) -> Svid {
    Svid::new(id, chain.into_iter().map(CertificateDer::from).collect(), key).expect("an SVID of ours")
}

/// A node's session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) up: mpsc::Sender<NodeMessage>,
    pub(crate) down: Streaming<ControllerMessage>,
    pub(super) channel: Channel,
}

impl Session {
    /// Says on the session's connection what the node found out about itself: the controller's answer.
    pub(crate) async fn report(&self, finding: control::Finding) -> Result<String, Status> {
        report(self.channel.clone(), finding).await
    }

    pub(crate) async fn send(&self, message: Up) {
        self.up.send(NodeMessage { message: Some(message) }).await.expect("the session is open");
    }

    /// The next message; an error when the session ends.
    pub(crate) async fn next(&mut self) -> Result<Down, Status> {
        let message = tokio::time::timeout(PATIENCE, self.down.message()).await.expect("in time")?;
        Ok(message.ok_or_else(|| Status::ok("closed"))?.message.expect("of a known kind"))
    }

    /// The next message that `wanted` takes.
    pub(crate) async fn until<T>(&mut self, wanted: impl Fn(Down) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.next().await.expect("the session goes on")) {
                return found;
            }
        }
    }

    pub(crate) async fn grant(&mut self) -> control::Grant {
        self.until(|message| if let Down::Grant(grant) = message { Some(grant) } else { None }).await
    }

    /// What ends the session.
    pub(crate) async fn end(&mut self) -> Result<String, Status> {
        loop {
            if let Down::Sever(sever) = self.next().await? {
                return Ok(sever.reason);
            }
        }
    }

    /// Asks for a certificate.
    pub(crate) async fn certify(&mut self, id: &SpiffeId, key: &PrivateKey) -> Result<Vec<Vec<u8>>, String> {
        let csr_der = key.csr_der(id).expect("csr");
        self.send(Up::CertificateRequest(CertificateRequest { request_id: 7, spiffe_id: id.to_string(), csr_der }))
            .await;
        let certificate = self.until(|message| if let Down::Certificate(it) = message { Some(it) } else { None }).await;
        assert_eq!(certificate.request_id, 7);
        if certificate.refusal.is_empty() { Ok(certificate.chain_der) } else { Err(certificate.refusal) }
    }
}
