//! The nodes that are enrolled, their leases, and what they said last.

use std::sync::{Mutex, MutexGuard, PoisonError};

use opencluster_api::control::{self, NodeHealth};
use opencluster_identity::digest::Sha256Digest;
use opencluster_policy::lease::{
    Clocks, Heartbeat, Host, Nonce, PeerAction, PeerEvent, PeerLease, PeerState, Reason, Timing,
};
use tokio::sync::{Notify, oneshot, watch};

use super::ends::{Ended, Recorded};
use super::peers::{CONTROLLER, Peer, Peers, end_session};
pub use super::peers::{Life, Outcome, PeerStatus, Refused, SessionEnd, SessionId};
use crate::state::revocation::Revoked;

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

/// See the module.
#[derive(Debug)]
pub struct Registry {
    timing: ClusterTiming,
    peers: Mutex<Peers>,
    /// Counts acknowledgements and ends of sessions, for those who wait for them.
    progress: watch::Sender<u64>,
    /// There is an end that must be stored.
    another: Notify,
}

impl Registry {
    /// Nobody is enrolled.
    pub fn new(timing: ClusterTiming) -> Self {
        Self { timing, peers: Mutex::new(Peers::default()), progress: watch::Sender::new(0), another: Notify::new() }
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
        let mut peers = self.peers();
        lease.step(PeerEvent::Unannounced(peers.unrecorded.since()));
        let peer = Peer {
            enrolment: id,
            key,
            next_key: None,
            last_key: None,
            lease,
            began: now.boottime,
            cordoned: false,
            session: None,
            last_heartbeat: None,
            config_version: 0,
            revocation_version: 0,
            health: NodeHealth::default(),
        };
        if let Some(before) = peers.by_name.insert(node.to_owned(), peer) {
            end_session(before.session, SessionEnd::Severed("the node enrolled again".into()));
        }
        drop(peers);
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
            peer.last_key = Some(std::mem::replace(&mut peer.key, *key));
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
        let outcome = peer.outcome(node, actions, now);
        peer.config_version = message.config_version;
        peer.revocation_version = message.revocation_version;
        if let Some(health) = &message.health {
            peer.health = health.clone();
        }
        Ok(match self.take_note(peers, outcome, now) {
            Outcome::Nothing if self.held_up(now) => Outcome::HeldUp,
            Outcome::Nothing => Outcome::Withheld,
            outcome => outcome,
        })
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
        Ok(self.take_note(peers, outcome, now))
    }

    /// A holder of one of the node's keys found out that it must not go on. `Err` in the answer: it was over before, for that
    /// reason. Not asked is whether it has the session: a copy of the node says the truth about both, and so does one that was
    /// restored from before a rotation.
    pub fn found(
        &self,
        node: &str,
        key: &Sha256Digest,
        reason: Reason,
        now: Clocks,
    ) -> Result<Result<(Ended, Recorded), Reason>, Refused> {
        let mut peers = self.peers();
        let peer = peers.by_name.get_mut(node).ok_or(Refused::NotEnrolled)?;
        if !peer.holds(key) {
            return Err(Refused::OtherKey);
        }
        let actions = peer.lease.step(PeerEvent::Found(reason));
        let found = match peer.outcome(node, actions, now) {
            Outcome::Sever(ended) => {
                let recorded = peers.ended(ended.clone(), now);
                self.another.notify_one();
                Ok((ended, recorded))
            }
            _ => match peer.lease.state() {
                PeerState::Lost(before) | PeerState::Compromised(before) | PeerState::Retired(before) => {
                    Err(before.clone())
                }
                // Whatever is found ends an enrolment that is in force.
                PeerState::Enrolled | PeerState::Active { .. } => return Err(Refused::NotEnrolled),
            },
        };
        drop(peers);
        self.note_progress();
        Ok(found)
    }

    /// What follows from an outcome for everybody else.
    fn take_note(&self, mut peers: MutexGuard<'_, Peers>, outcome: Outcome, now: Clocks) -> Outcome {
        if let Outcome::Sever(ended) = &outcome {
            drop(peers.ended(ended.clone(), now));
            self.another.notify_one();
        }
        drop(peers);
        self.note_progress();
        outcome
    }

    /// There is a new version of the revocations. Who does not apply it in time gets no grants until it does.
    pub fn announced(&self, version: u64, now: Clocks) {
        for peer in self.peers().by_name.values_mut() {
            peer.lease.step(PeerEvent::Announced { version, now });
        }
    }

    /// The ends that the state must be told of, with their numbers.
    pub fn unrecorded(&self) -> Vec<(u64, Ended)> {
        self.peers().unrecorded.list()
    }

    /// Waits for another end.
    pub async fn another_end(&self) {
        self.another.notified().await;
    }

    /// The state was told of these ends, and their revocations were published.
    pub fn recorded(&self, ends: impl Iterator<Item = (u64, Revoked)>, now: Clocks) {
        let mut peers = self.peers();
        let mut version = 0;
        for (number, revoked) in ends {
            version = version.max(revoked.version);
            peers.unrecorded.recorded(number, revoked);
        }
        let since = peers.unrecorded.since();
        for peer in peers.by_name.values_mut() {
            // In this order: what is announced counts from its verdict.
            peer.lease.step(PeerEvent::Announced { version, now });
            peer.lease.step(PeerEvent::Unannounced(since));
        }
        drop(peers);
        self.note_progress();
    }

    /// Whether nobody gets a grant, because an end could not be stored and announced in time.
    pub fn held_up(&self, now: Clocks) -> bool {
        self.peers().unrecorded.since().is_some_and(|since| self.timing.timing().is_late(since, now.boottime))
    }

    /// Time passes: the enrolments that are over now.
    pub fn tick(&self, now: Clocks) -> Vec<Ended> {
        let mut peers = self.peers();
        let mut ended = Vec::new();
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
        for ended in &ended {
            drop(peers.ended(ended.clone(), now));
        }
        drop(peers);
        if !ended.is_empty() {
            self.another.notify_one();
            self.note_progress();
        }
        ended
    }

    /// An operator's verdict over the enrolment that is in force; `None`: there is none.
    pub fn revoke(&self, node: &str, actor: &str, reason: &str, now: Clocks) -> Option<Recorded> {
        self.end_with(node, PeerEvent::Revoke(reason.to_owned()), actor, now)
    }

    /// Taken out of service; `None`: no enrolment is in force.
    pub fn retire(&self, node: &str, actor: &str, reason: &str, now: Clocks) -> Option<Recorded> {
        self.end_with(node, PeerEvent::Retire(reason.to_owned()), actor, now)
    }

    /// The same for this enrolment only: the node may have made another one meanwhile.
    pub fn retire_life(&self, life: &Life, reason: &str, now: Clocks) -> Option<Recorded> {
        let peers = self.peers();
        let same = peers.by_name.get(&life.node).is_some_and(|peer| peer.lives(life));
        same.then(|| self.end_in(peers, &life.node, PeerEvent::Retire(reason.to_owned()), CONTROLLER, now)).flatten()
    }

    fn end_with(&self, node: &str, event: PeerEvent, actor: &str, now: Clocks) -> Option<Recorded> {
        self.end_in(self.peers(), node, event, actor, now)
    }

    fn end_in(
        &self,
        mut peers: MutexGuard<'_, Peers>,
        node: &str,
        event: PeerEvent,
        actor: &str,
        now: Clocks,
    ) -> Option<Recorded> {
        let peer = peers.by_name.get_mut(node)?;
        let [PeerAction::Sever(reason)]: [PeerAction; 1] = peer.lease.step(event).try_into().ok()? else { return None };
        let ended = Ended { actor: actor.to_owned(), ..peer.end(node, reason) };
        let recorded = peers.ended(ended, now);
        drop(peers);
        self.another.notify_one();
        self.note_progress();
        Some(recorded)
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
            life: peer.life(node),
        })
    }

    /// The lives of all enrolments that are in force.
    pub fn lives(&self) -> Vec<Life> {
        self.peers().by_name.iter().filter_map(|(node, peer)| peer.life(node)).collect()
    }

    /// This enrolment is cordoned from now on; `false`: it was, or is not in force any more.
    pub fn cordon(&self, life: &Life) -> bool {
        let mut peers = self.peers();
        let peer = peers.by_name.get_mut(&life.node).filter(|peer| peer.lives(life) && !peer.cordoned);
        peer.is_some_and(|peer| {
            peer.cordoned = true;
            true
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
