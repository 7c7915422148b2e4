//! The nodes that are enrolled, one by one: the registry's content.

use std::collections::BTreeMap;

use opencluster_api::control::NodeHealth;
use opencluster_identity::digest::Sha256Digest;
use opencluster_policy::lease::{Clocks, Grant, Nanos, PeerAction, PeerEvent, PeerLease, PeerState, Reason};
use tokio::sync::oneshot;

use super::ends::{Ended, Recorded, Unrecorded};

/// Who ends an enrolment when nobody else did.
pub(super) const CONTROLLER: &str = "controller";

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
pub struct SessionId(pub(super) u64);

/// What came of something that a node said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answer with this.
    Grant(Grant),
    /// Nothing to answer.
    Nothing,
    /// Nothing to answer to a heartbeat: the node gets no grant before it has applied the revocations that it was sent.
    Withheld,
    /// The same, for no fault of the node: an end could not be stored and announced in time.
    HeldUp,
    /// The node is out.
    Sever(Ended),
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
    /// Its life; `None`: it is over.
    pub life: Option<Life>,
}

/// The life of an enrolment that is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// The node.
    pub node: String,
    /// The enrolment.
    pub enrolment: String,
    /// When it was made: CLOCK_BOOTTIME.
    pub began: Nanos,
    /// It was told to take nothing new.
    pub cordoned: bool,
    /// It takes nothing, and carries nothing.
    pub drained: bool,
}

#[derive(Debug, Default)]
pub(super) struct Peers {
    pub(super) by_name: BTreeMap<String, Peer>,
    pub(super) sessions: u64,
    pub(super) unrecorded: Unrecorded,
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) enrolment: String,
    /// The key that its sessions must use.
    pub(super) key: Sha256Digest,
    /// The key of the certificate that it got since: the first session with it makes it the only one.
    pub(super) next_key: Option<Sha256Digest>,
    /// The one before: its certificate may still be valid, but it opens no session. (Those before it have ended: each is replaced
    /// when half of its life is over, or later.)
    pub(super) last_key: Option<Sha256Digest>,
    pub(super) lease: PeerLease,
    /// CLOCK_BOOTTIME of the enrolment.
    pub(super) began: Nanos,
    pub(super) cordoned: bool,
    pub(super) session: Option<(SessionId, oneshot::Sender<SessionEnd>)>,
    pub(super) last_heartbeat: Option<Nanos>,
    pub(super) config_version: u64,
    pub(super) revocation_version: u64,
    pub(super) health: NodeHealth,
}

impl Peers {
    /// An enrolment is over: until that is announced, the others go on for so long only.
    pub(super) fn ended(&mut self, ended: Ended, now: Clocks) -> Recorded {
        let before = self.unrecorded.since();
        let recorded = self.unrecorded.push(ended, now.boottime);
        let since = self.unrecorded.since();
        if since != before {
            for peer in self.by_name.values_mut() {
                peer.lease.step(PeerEvent::Unannounced(since));
            }
        }
        recorded
    }

    pub(super) fn of_session(&mut self, node: &str, session: SessionId) -> Result<&mut Peer, Refused> {
        let peer = self.by_name.get_mut(node).ok_or(Refused::NotEnrolled)?;
        peer.check_in_force()?;
        match &peer.session {
            Some((id, _)) if *id == session => Ok(peer),
            _ => Err(Refused::Replaced),
        }
    }
}

impl Peer {
    pub(super) fn life(&self, node: &str) -> Option<Life> {
        self.check_in_force().is_ok().then(|| Life {
            node: node.to_owned(),
            enrolment: self.enrolment.clone(),
            began: self.began,
            cordoned: self.cordoned,
            drained: !self.health.proxy_ready && self.health.flows == 0,
        })
    }

    /// Whether that is its life.
    pub(super) fn lives(&self, life: &Life) -> bool {
        self.enrolment == life.enrolment
    }

    /// Whether a certificate of this enrolment that may still be valid is for this key.
    pub(super) fn holds(&self, key: &Sha256Digest) -> bool {
        [Some(&self.key), self.next_key.as_ref(), self.last_key.as_ref()].contains(&Some(key))
    }

    pub(super) fn check_in_force(&self) -> Result<(), Refused> {
        match self.lease.state() {
            PeerState::Enrolled | PeerState::Active { .. } => Ok(()),
            PeerState::Lost(reason) => Err(Refused::Ended(format!("lost ({reason})"))),
            PeerState::Compromised(reason) => Err(Refused::Ended(format!("compromised ({reason})"))),
            PeerState::Retired(reason) => Err(Refused::Ended(format!("retired ({reason})"))),
        }
    }

    pub(super) fn outcome(&mut self, node: &str, actions: Vec<PeerAction>, now: Clocks) -> Outcome {
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

    pub(super) fn end(&mut self, node: &str, reason: Reason) -> Ended {
        end_session(self.session.take(), SessionEnd::Severed(reason.to_string()));
        Ended { node: node.to_owned(), enrolment: self.enrolment.clone(), actor: CONTROLLER.to_owned(), reason }
    }
}

/// A session whose task is gone already needs no telling.
pub(super) fn end_session(session: Option<(SessionId, oneshot::Sender<SessionEnd>)>, end: SessionEnd) {
    if let Some((_, sender)) = session {
        drop(sender.send(end));
    }
}
