//! The controller's side, for one enrolment of one node.

use super::elapsed::{Elapsed, Told};
use super::{Clocks, Grant, Heartbeat, Nanos, Nonce, PeerAction, PeerEvent, PeerState, Reason, Timing};

/// The controller's side, for one enrolment of one node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerLease {
    state: PeerState,
    timing: Timing,
    /// What the next new heartbeat must carry.
    nonce: Nonce,
    /// The last heartbeat that was granted, and how: it may come again.
    last: Option<(Heartbeat, Grant)>,
    elapsed: Elapsed,
    /// When a node that never came is lost: CLOCK_BOOTTIME.
    enrolment_ends: Nanos,
}

impl PeerLease {
    /// Just enrolled with this nonce. To be called before the answer is sent.
    pub fn enrolled(nonce: Nonce, timing: Timing, now: Clocks) -> Self {
        Self {
            state: PeerState::Enrolled,
            timing,
            nonce,
            last: None,
            elapsed: Elapsed::since(now.monotonic_raw),
            enrolment_ends: now.boottime.saturating_add(timing.enrolment_grace()).saturating_add(timing.margin()),
        }
    }

    /// The state.
    pub fn state(&self) -> &PeerState {
        &self.state
    }

    /// What to do about an event, in order. A node that goes on sending after it was severed is told again each time.
    pub fn step(&mut self, event: PeerEvent) -> Vec<PeerAction> {
        match event {
            PeerEvent::Heartbeat { heartbeat, now, fresh } => {
                let mut actions = self.expire(now);
                if actions.is_empty() {
                    actions.push(self.heartbeat(heartbeat, now, fresh));
                }
                actions
            }
            PeerEvent::Tick(now) => self.expire(now),
            PeerEvent::Revoke(why) => self.end(PeerState::Compromised(Reason::Revoked(why))),
            PeerEvent::Found(reason) => self.end(PeerState::Compromised(reason)),
            PeerEvent::Retire => self.end(PeerState::Retired),
        }
    }

    /// When `Tick` is due at the latest (CLOCK_BOOTTIME).
    pub fn next_tick(&self) -> Nanos {
        self.deadline().unwrap_or(Nanos::MAX)
    }

    fn deadline(&self) -> Option<Nanos> {
        match self.state {
            PeerState::Enrolled => Some(self.enrolment_ends),
            PeerState::Active { deadline } => Some(deadline),
            PeerState::Lost(_) | PeerState::Compromised(_) | PeerState::Retired => None,
        }
    }

    fn expire(&mut self, now: Clocks) -> Vec<PeerAction> {
        match self.deadline() {
            Some(deadline) if now.boottime >= deadline => self.end(PeerState::Lost(Reason::LeaseExpired)),
            _ => Vec::new(),
        }
    }

    fn heartbeat(&mut self, heartbeat: Heartbeat, now: Clocks, fresh: Nonce) -> PeerAction {
        if let Some(reason) = self.ended() {
            return PeerAction::Sever(reason);
        }
        if let Some((last, grant)) = self.last
            && heartbeat == last
        {
            // Sent again because the grant was lost or slow. The lease counts from the first sending, so nothing is renewed.
            return PeerAction::Grant(grant);
        }
        let expected = self.last.map_or(1, |(last, _)| last.sequence + 1);
        if heartbeat.sequence != expected || heartbeat.nonce != self.nonce {
            return self.compromised(Reason::NonceMismatch);
        }
        let told = Told { granted: heartbeat.granted, sent: heartbeat.clocks.monotonic_raw };
        if self.elapsed.paused(told, now.monotonic_raw) {
            return self.compromised(Reason::TimeStep);
        }
        let grant = Grant { sequence: heartbeat.sequence, nonce: fresh, lease: self.timing.lease };
        self.nonce = fresh;
        self.last = Some((heartbeat, grant));
        // Received after it was sent, and so later than the node's own deadline.
        let deadline = now.boottime.saturating_add(self.timing.lease).saturating_add(self.timing.margin());
        self.state = PeerState::Active { deadline };
        PeerAction::Grant(grant)
    }

    fn compromised(&mut self, reason: Reason) -> PeerAction {
        self.state = PeerState::Compromised(reason.clone());
        PeerAction::Sever(reason)
    }

    /// Goes to a terminal state, unless it is in one.
    fn end(&mut self, state: PeerState) -> Vec<PeerAction> {
        if self.ended().is_some() {
            return Vec::new();
        }
        self.state = state;
        self.ended().map(PeerAction::Sever).into_iter().collect()
    }

    /// Why it is over.
    fn ended(&self) -> Option<Reason> {
        match &self.state {
            PeerState::Enrolled | PeerState::Active { .. } => None,
            PeerState::Lost(reason) | PeerState::Compromised(reason) => Some(reason.clone()),
            PeerState::Retired => Some(Reason::Revoked("the node was taken out of service".to_owned())),
        }
    }
}
