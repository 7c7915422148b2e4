//! The nodes that are enrolled, their leases, and what they said last.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use opencluster_api::control::{self, NodeHealth};
use opencluster_identity::digest::Sha256Digest;
use opencluster_policy::lease::{
    Clocks, Grant, Heartbeat, Host, Nanos, Nonce, PeerAction, PeerEvent, PeerLease, PeerState, Reason, Timing,
};
use tokio::sync::{oneshot, watch};

const MS: u64 = 1_000_000;

/// The cluster's timing, as configured.
#[derive(Clone, Copy, Debug)]
pub struct ClusterTiming {
    lease_ms: u32,
    heartbeat_ms: u32,
}

impl ClusterTiming {
    /// In milliseconds.
    pub fn new(lease_ms: u32, heartbeat_ms: u32) -> Self {
        Self { lease_ms, heartbeat_ms }
    }
    /// How long a grant lasts.
    pub fn lease_ms(self) -> u32 {
        self.lease_ms
    }
    /// How often heartbeats are sent.
    pub fn heartbeat_ms(self) -> u32 {
        self.heartbeat_ms
    }
    fn timing(self) -> Timing {
        Timing::new(u64::from(self.lease_ms) * MS, u64::from(self.heartbeat_ms) * MS)
    }
}

/// Why a session is told to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEnd {
    /// The node opened another one.
    Replaced,
    /// The node is out, for this reason.
    Severed(String),
}

/// A session that is not opened, or a message that is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Never enrolled, or not since the controller started.
    #[error("the node is not enrolled: enrol it with a new token")]
    NotEnrolled,
    /// Another enrolment or a rotation has made the key invalid.
    #[error("this key is not the one that is enrolled")]
    OtherKey,
    /// Out.
    #[error("the node is {0}: enrol it with a new token")]
    Ended(String),
    /// A newer session is there.
    #[error("the node opened another session")]
    Replaced,
    /// Not what the protocol says.
    #[error("malformed heartbeat: {0}")]
    Malformed(&'static str),
}

/// A node's session in the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId(u64);

/// What came of something that a node said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answer with this.
    Grant(Grant),
    /// Nothing to answer.
    Nothing,
    /// Nothing to answer to a heartbeat: the node gets no grant before it has applied the revocations that it was sent.
    Withheld,
    /// The node is out.
    Sever(Ended),
}

/// An enrolment that comes into force.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// Names it.
    pub id: String,
    /// The key that the node's sessions must use.
    pub key: Sha256Digest,
    /// Where it was made.
    pub host: Host,
    /// For the first heartbeat.
    pub nonce: Nonce,
    /// The version of the revocations that the node must apply.
    pub revocations: u64,
}

/// An enrolment that the state machine ended: the state must be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The node.
    pub node: String,
    /// The enrolment.
    pub enrolment: String,
    /// Why.
    pub reason: Reason,
}

/// How a node stands, for the API.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// Its lease.
    pub state: PeerState,
    /// Since its last heartbeat.
    pub heartbeat_age_ms: Option<u64>,
    /// How many heartbeats were granted.
    pub heartbeats: u64,
    /// Of the lease.
    pub lease_left_ms: u64,
    /// What it applied.
    pub config_version: u64,
    /// What it applied.
    pub revocation_version: u64,
    /// What it said of itself.
    pub health: NodeHealth,
    /// A session is open.
    pub connected: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Registry {
    timing: ClusterTiming,
    peers: Mutex<Peers>,
    /// Counts acknowledgements and ends of sessions, for those who wait for them.
    progress: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Peers {
    by_name: BTreeMap<String, Peer>,
    sessions: u64,
    /// Ended here, but the state could not be told yet.
    unrecorded: Vec<Ended>,
}

#[derive(Debug)]
struct Peer {
    enrolment: String,
    /// The key that its sessions must use.
    key: Sha256Digest,
    /// The key of the certificate that it got since: the first session with it makes it the only one.
    next_key: Option<Sha256Digest>,
    lease: PeerLease,
    session: Option<(SessionId, oneshot::Sender<SessionEnd>)>,
    last_heartbeat: Option<Nanos>,
    config_version: u64,
    revocation_version: u64,
    health: NodeHealth,
}

impl Registry {
    /// Nobody is enrolled.
    pub fn new(timing: ClusterTiming) -> Self {
        Self { timing, peers: Mutex::new(Peers::default()), progress: watch::Sender::new(0) }
    }

    /// The timing.
    pub fn timing(&self) -> ClusterTiming {
        self.timing
    }

    /// Each operation leaves it whole; the state machine is pure. A panic elsewhere has not harmed it.
    fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node enrolled: whatever was before is over.
    pub fn enrolled(&self, node: &str, enrolment: Enrolment, now: Clocks) {
        let Enrolment { id, key, host, nonce, revocations } = enrolment;
        let mut lease = PeerLease::enrolled(nonce, self.timing.timing(), host, now);
        lease.step(PeerEvent::Announced { version: revocations, now });
        let peer = Peer {
            enrolment: id,
            key,
            next_key: None,
            lease,
            session: None,
            last_heartbeat: None,
            config_version: 0,
            revocation_version: 0,
            health: NodeHealth::default(),
        };
        if let Some(before) = self.peers().by_name.insert(node.to_owned(), peer) {
            end_session(before.session, SessionEnd::Severed("the node enrolled again".into()));
        }
        self.note_progress();
    }

    /// Opens a session for the holder of `key`; one before is ended.
    pub fn open_session(
        &self,
        node: &str,
        key: &Sha256Digest,
    ) -> Result<(SessionId, String, oneshot::Receiver<SessionEnd>), Refused> {
        let mut peers = self.peers();
        peers.sessions += 1;
        let id = SessionId(peers.sessions);
        let peer = peers.by_name.get_mut(node).ok_or(Refused::NotEnrolled)?;
        peer.check_in_force()?;
        if peer.next_key.as_ref() == Some(key) {
            peer.key = *key;
            peer.next_key = None;
        } else if peer.key != *key {
            return Err(Refused::OtherKey);
        }
        let (sender, receiver) = oneshot::channel();
        end_session(peer.session.replace((id, sender)), SessionEnd::Replaced);
        Ok((id, peer.enrolment.clone(), receiver))
    }

    /// A session is over.
    pub fn close_session(&self, node: &str, session: SessionId) {
        if let Some(peer) = self.peers().by_name.get_mut(node)
            && peer.session.as_ref().is_some_and(|(id, _)| *id == session)
        {
            peer.session = None;
        }
        self.note_progress();
    }

    /// The node's next certificate is for this key.
    pub fn next_key(&self, node: &str, session: SessionId, key: Sha256Digest) -> Result<(), Refused> {
        let mut peers = self.peers();
        peers.of_session(node, session)?.next_key = Some(key);
        Ok(())
    }

    /// A heartbeat arrived.
    pub fn heartbeat(
        &self,
        node: &str,
        session: SessionId,
        message: &control::Heartbeat,
        now: Clocks,
        fresh: Nonce,
    ) -> Result<Outcome, Refused> {
        let heartbeat = heartbeat(message)?;
        let mut peers = self.peers();
        let peer = peers.of_session(node, session)?;
        let version = message.revocation_version;
        let mut actions = peer.lease.step(PeerEvent::Acknowledged { version, now, fresh });
        // It may just have been granted, as one that had waited: then this is its repetition.
        actions.extend(peer.lease.step(PeerEvent::Heartbeat { heartbeat, now, fresh }));
        let outcome = match peer.outcome(node, actions, now) {
            Outcome::Nothing => Outcome::Withheld,
            outcome => outcome,
        };
        peer.config_version = message.config_version;
        peer.revocation_version = message.revocation_version;
        if let Some(health) = &message.health {
            peer.health = health.clone();
        }
        drop(peers);
        self.note_progress();
        Ok(outcome)
    }

    /// What a node has applied. A heartbeat may have waited for this: then it is granted.
    pub fn acknowledged(
        &self,
        node: &str,
        session: SessionId,
        applied: control::Acknowledgement,
        now: Clocks,
        fresh: Nonce,
    ) -> Result<Outcome, Refused> {
        let mut peers = self.peers();
        let peer = peers.of_session(node, session)?;
        let version = applied.revocation_version;
        let actions = peer.lease.step(PeerEvent::Acknowledged { version, now, fresh });
        let outcome = peer.outcome(node, actions, now);
        peer.config_version = applied.config_version;
        peer.revocation_version = version;
        drop(peers);
        self.note_progress();
        Ok(outcome)
    }

    /// A node found out itself that it must not go on.
    pub fn found(&self, node: &str, session: SessionId, reason: Reason, now: Clocks) -> Result<Outcome, Refused> {
        let mut peers = self.peers();
        let peer = peers.of_session(node, session)?;
        let actions = peer.lease.step(PeerEvent::Found(reason));
        let outcome = peer.outcome(node, actions, now);
        drop(peers);
        self.note_progress();
        Ok(outcome)
    }

    /// There is a new version of the revocations. Who does not apply it in time gets no grants until it does.
    pub fn announced(&self, version: u64, now: Clocks) {
        for peer in self.peers().by_name.values_mut() {
            peer.lease.step(PeerEvent::Announced { version, now });
        }
    }

    /// The state could not be told of this end: [`Registry::tick`] gives it again.
    pub fn not_recorded(&self, ended: Ended) {
        self.peers().unrecorded.push(ended);
    }

    /// Time passes: the enrolments that are over now.
    pub fn tick(&self, now: Clocks) -> Vec<Ended> {
        let mut peers = self.peers();
        let mut ended = std::mem::take(&mut peers.unrecorded);
        for (node, peer) in &mut peers.by_name {
            if peer.lease.next_tick() > now.boottime {
                continue;
            }
            for action in peer.lease.step(PeerEvent::Tick(now)) {
                if let PeerAction::Sever(reason) = action {
                    ended.push(peer.end(node, reason));
                }
            }
        }
        drop(peers);
        if !ended.is_empty() {
            self.note_progress();
        }
        ended
    }

    /// An operator's verdict over the enrolment that is in force.
    pub fn revoke(&self, node: &str, reason: &str) {
        self.end_with(node, PeerEvent::Revoke(reason.to_owned()), reason);
    }

    /// Taken out of service.
    pub fn retire(&self, node: &str, reason: &str) {
        self.end_with(node, PeerEvent::Retire(reason.to_owned()), reason);
    }

    fn end_with(&self, node: &str, event: PeerEvent, reason: &str) {
        if let Some(peer) = self.peers().by_name.get_mut(node) {
            peer.lease.step(event);
            end_session(peer.session.take(), SessionEnd::Severed(reason.to_owned()));
        }
        self.note_progress();
    }

    /// How a node stands.
    pub fn status(&self, node: &str, now: Clocks) -> Option<PeerStatus> {
        let peers = self.peers();
        let peer = peers.by_name.get(node)?;
        let lease_left_ms = match peer.lease.state() {
            PeerState::Active { deadline } => deadline.saturating_sub(now.boottime) / MS,
            _ => 0,
        };
        Some(PeerStatus {
            state: peer.lease.state().clone(),
            heartbeat_age_ms: peer.last_heartbeat.map(|at| now.boottime.saturating_sub(at) / MS),
            heartbeats: peer.lease.granted(),
            lease_left_ms,
            config_version: peer.config_version,
            revocation_version: peer.revocation_version,
            health: peer.health.clone(),
            connected: peer.session.is_some(),
        })
    }

    /// The nodes that may carry traffic, and the revocation version that each has applied.
    pub fn applied_revocations(&self) -> Vec<(String, u64)> {
        self.peers()
            .by_name
            .iter()
            .filter(|(_, peer)| matches!(peer.lease.state(), PeerState::Active { .. }))
            .map(|(node, peer)| (node.clone(), peer.revocation_version))
            .collect()
    }

    /// Changes whenever [`Registry::applied_revocations`] may have.
    pub fn watch_progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    fn note_progress(&self) {
        self.progress.send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl Peers {
    fn of_session(&mut self, node: &str, session: SessionId) -> Result<&mut Peer, Refused> {
        let peer = self.by_name.get_mut(node).ok_or(Refused::NotEnrolled)?;
        peer.check_in_force()?;
        match &peer.session {
            Some((id, _)) if *id == session => Ok(peer),
            _ => Err(Refused::Replaced),
        }
    }
}

impl Peer {
    fn check_in_force(&self) -> Result<(), Refused> {
        match self.lease.state() {
            PeerState::Enrolled | PeerState::Active { .. } => Ok(()),
            PeerState::Lost(reason) => Err(Refused::Ended(format!("lost ({reason})"))),
            PeerState::Compromised(reason) => Err(Refused::Ended(format!("compromised ({reason})"))),
            PeerState::Retired(reason) => Err(Refused::Ended(format!("retired ({reason})"))),
        }
    }

    fn outcome(&mut self, node: &str, actions: Vec<PeerAction>, now: Clocks) -> Outcome {
        let mut outcome = Outcome::Nothing;
        for action in actions {
            outcome = match action {
                PeerAction::Grant(grant) => {
                    self.last_heartbeat = Some(now.boottime);
                    Outcome::Grant(grant)
                }
                PeerAction::Sever(reason) => Outcome::Sever(self.end(node, reason)),
            };
        }
        outcome
    }

    fn end(&mut self, node: &str, reason: Reason) -> Ended {
        end_session(self.session.take(), SessionEnd::Severed(reason.to_string()));
        Ended { node: node.to_owned(), enrolment: self.enrolment.clone(), reason }
    }
}

/// The state machine's form of a heartbeat.
fn heartbeat(message: &control::Heartbeat) -> Result<Heartbeat, Refused> {
    let nonce = message.nonce.as_slice().try_into().map_err(|_| Refused::Malformed("nonce must have 16 bytes"))?;
    Ok(Heartbeat {
        sequence: message.sequence,
        nonce,
        clocks: Clocks {
            monotonic_raw: message.monotonic_raw_ns,
            boottime: message.boottime_ns,
            realtime: message.realtime_ns,
        },
        granted: message.granted_monotonic_raw_ns,
        host: super::host(&message.boot_id, &message.machine),
    })
}

/// A session whose task is gone already needs no telling.
fn end_session(session: Option<(SessionId, oneshot::Sender<SessionEnd>)>, end: SessionEnd) {
    if let Some((_, sender)) = session {
        drop(sender.send(end));
    }
}
