//! The controller's side, for one enrolment of one node.

use super::duty::Duty;
use super::elapsed::{Elapsed, Finding, Told};
use super::{Clocks, Grant, Heartbeat, Host, Nanos, Nonce, PeerAction, PeerEvent, PeerState, Reason, Timing};

/// The controller's side, for one enrolment of one node.
///
/// It is a plain value. A controller that is alone keeps it in memory. Controllers that share it keep it in their common
/// store, and each answers only after what it answers with was stored on the condition that nobody changed it meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerLease {
    state: PeerState,
    timing: Timing,
    /// Where it was enrolled.
    host: Host,
    /// What the next new heartbeat must carry.
    nonce: Nonce,
    /// The last heartbeat that was granted, and how: it may come again.
    last: Option<(Heartbeat, Grant)>,
    /// In order, but not granted while a revocation is not acknowledged.
    withheld: Option<Heartbeat>,
    elapsed: Elapsed,
    duty: Duty,
    /// When a node that never came is lost: CLOCK_BOOTTIME.
    enrolment_ends: Nanos,
}

impl PeerLease {
    /// Just enrolled with this nonce, on this host. To be called before the answer is sent.
    pub fn enrolled(nonce: Nonce, timing: Timing, host: Host, now: Clocks) -> Self {
        Self {
            state: PeerState::Enrolled,
            timing,
            host,
            nonce,
            last: None,
            withheld: None,
            elapsed: Elapsed::since(now.monotonic_raw),
            duty: Duty::default(),
            enrolment_ends: now.boottime.saturating_add(timing.grace).saturating_add(timing.margin),
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
                    actions.extend(self.heartbeat(heartbeat, now, fresh));
                }
                actions
            }
            PeerEvent::Tick(now) => self.expire(now),
            PeerEvent::Announced { version, now } => {
                self.duty.announced(version, now.boottime);
                Vec::new()
            }
            PeerEvent::Unannounced(since) => {
                self.duty.unannounced(since);
                Vec::new()
            }
            PeerEvent::Acknowledged { version, now, fresh } => self.acknowledged(version, now, fresh),
            PeerEvent::Revoke(why) => self.end(PeerState::Compromised(Reason::Revoked(why))),
            PeerEvent::Found(reason) => self.end(PeerState::Compromised(reason)),
            PeerEvent::Retire(why) => self.end(PeerState::Retired(Reason::Retired(why))),
            PeerEvent::Adopted(now) => {
                self.adopted(now);
                Vec::new()
            }
            PeerEvent::Forgotten => self.end(PeerState::Lost(Reason::Forgotten)),
        }
    }

    /// The answer to a heartbeat that was granted already and is sent again, because the grant was lost or slow. It changes
    /// nothing: the lease counts from the first sending. Whoever shares this value answers it without taking over.
    pub fn repetition(&self, heartbeat: &Heartbeat) -> Option<Grant> {
        self.last.filter(|(last, _)| last == heartbeat && self.ended().is_none()).map(|(_, grant)| grant)
    }

    /// How many heartbeats were granted. A repeated one counts once.
    pub fn granted(&self) -> u64 {
        self.last.map_or(0, |(last, _)| last.sequence)
    }

    /// When `Tick` is due at the latest (CLOCK_BOOTTIME).
    pub fn next_tick(&self) -> Nanos {
        self.deadline().unwrap_or(Nanos::MAX)
    }

    fn deadline(&self) -> Option<Nanos> {
        match self.state {
            PeerState::Enrolled => Some(self.enrolment_ends),
            PeerState::Active { deadline } => Some(deadline),
            PeerState::Lost(_) | PeerState::Compromised(_) | PeerState::Retired(_) => None,
        }
    }

    fn expire(&mut self, now: Clocks) -> Vec<PeerAction> {
        let reason = match self.withheld {
            None => Reason::LeaseExpired,
            Some(_) if self.duty.held_up(now.boottime, &self.timing) => Reason::Unrecorded,
            Some(_) => Reason::Unacknowledged,
        };
        match self.deadline() {
            Some(deadline) if now.boottime >= deadline => self.end(PeerState::Lost(reason)),
            _ => Vec::new(),
        }
    }

    /// `None`: no answer yet. The node sends it again, or its acknowledgement is what it waits for.
    fn heartbeat(&mut self, heartbeat: Heartbeat, now: Clocks, fresh: Nonce) -> Option<PeerAction> {
        if let Some(reason) = self.ended() {
            return Some(PeerAction::Sever(reason.clone()));
        }
        if let Some(grant) = self.repetition(&heartbeat) {
            return Some(PeerAction::Grant(grant));
        }
        let told = Told { granted: heartbeat.granted, sent: heartbeat.clocks.monotonic_raw };
        let confirm = match self.judge(&heartbeat, told, now) {
            Ok(finding) => finding == Finding::Suspect && !self.last.is_some_and(|(_, grant)| grant.confirm),
            Err(reason) => {
                self.state = PeerState::Compromised(reason.clone());
                return Some(PeerAction::Sever(reason));
            }
        };
        if self.duty.overdue(now.boottime, &self.timing) {
            self.withheld = Some(heartbeat);
            return None;
        }
        self.withheld = None;
        let Heartbeat { sequence, clocks: sent, .. } = heartbeat;
        let grant = Grant { sequence, sent, nonce: fresh, lease: self.timing.lease, confirm };
        self.elapsed.granted(told, now.monotonic_raw, &self.timing);
        self.nonce = fresh;
        self.last = Some((heartbeat, grant));
        // Received after it was sent, and so later than the node's own deadline.
        let deadline = now.boottime.saturating_add(self.timing.lease).saturating_add(self.timing.margin);
        self.state = PeerState::Active { deadline };
        Some(PeerAction::Grant(grant))
    }

    /// Whether a heartbeat that is not a repetition continues what was granted, and what its clocks say.
    fn judge(&self, heartbeat: &Heartbeat, told: Told, now: Clocks) -> Result<Finding, Reason> {
        if heartbeat.host.boot != self.host.boot {
            return Err(Reason::BootChanged);
        }
        if heartbeat.host.machine != self.host.machine {
            return Err(Reason::MachineChanged);
        }
        let expected = self.last.map_or(1, |(last, _)| last.sequence + 1);
        let other = self.withheld.is_some_and(|withheld| withheld != *heartbeat);
        if heartbeat.sequence != expected || heartbeat.nonce != self.nonce || other {
            return Err(Reason::NonceMismatch);
        }
        match self.elapsed.judge(told, now.monotonic_raw, &self.timing) {
            Finding::Paused => Err(Reason::TimeStep),
            finding => Ok(finding),
        }
    }

    fn acknowledged(&mut self, version: u64, now: Clocks, fresh: Nonce) -> Vec<PeerAction> {
        self.duty.acknowledged(version);
        let expired = self.expire(now);
        match self.withheld {
            Some(heartbeat) if expired.is_empty() && self.ended().is_none() => {
                self.heartbeat(heartbeat, now, fresh).into_iter().collect()
            }
            _ => expired,
        }
    }

    /// What is in force stays so for a lease at most from now: the node's last heartbeat was sent before.
    fn adopted(&mut self, now: Clocks) {
        if let PeerState::Active { deadline } = &mut self.state {
            *deadline = now.boottime.saturating_add(self.timing.lease).saturating_add(self.timing.margin);
        }
        self.enrolment_ends = now.boottime.saturating_add(self.timing.grace).saturating_add(self.timing.margin);
        self.elapsed = Elapsed::unknown();
        self.duty.rebase(now.boottime);
    }

    /// Goes to a terminal state, unless it is in one.
    fn end(&mut self, state: PeerState) -> Vec<PeerAction> {
        if self.ended().is_some() {
            return Vec::new();
        }
        self.state = state;
        self.ended().cloned().map(PeerAction::Sever).into_iter().collect()
    }

    /// Why it is over.
    fn ended(&self) -> Option<&Reason> {
        match &self.state {
            PeerState::Enrolled | PeerState::Active { .. } => None,
            PeerState::Lost(reason) | PeerState::Compromised(reason) | PeerState::Retired(reason) => Some(reason),
        }
    }
}
