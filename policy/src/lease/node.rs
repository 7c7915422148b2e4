//! The node's side.

use super::{Clocks, Grant, Heartbeat, Host, Nanos, NodeAction, NodeEvent, NodeState, Nonce, Reason, Timing};

/// The node's side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeLease {
    state: NodeState,
    timing: Timing,
    /// What the next new heartbeat says.
    host: Host,
    /// For the next heartbeat.
    nonce: Nonce,
    /// When that nonce arrived: CLOCK_MONOTONIC_RAW.
    granted: Nanos,
    /// Of the last heartbeat.
    sequence: u64,
    /// Sent and not answered.
    outstanding: Option<Heartbeat>,
    /// When to send next, the outstanding heartbeat again or a new one: CLOCK_BOOTTIME.
    next_send: Nanos,
    /// When to give up waiting for the first grant: CLOCK_BOOTTIME.
    enrolment_ends: Nanos,
}

impl NodeLease {
    /// Just enrolled. To be called after the answer has arrived.
    pub fn enrolled(nonce: Nonce, timing: Timing, host: Host, now: Clocks) -> Self {
        Self {
            state: NodeState::Enrolling,
            timing,
            host,
            nonce,
            granted: now.monotonic_raw,
            sequence: 0,
            outstanding: None,
            next_send: now.boottime,
            enrolment_ends: now.boottime.saturating_add(timing.grace),
        }
    }

    /// The state.
    pub fn state(&self) -> &NodeState {
        &self.state
    }

    /// What to do about an event, in order.
    pub fn step(&mut self, event: NodeEvent) -> Vec<NodeAction> {
        let mut actions = Vec::new();
        // Time comes first, whatever happened: a grant that was read too late must not revive a lease that is over.
        if let NodeEvent::Tick(now) | NodeEvent::Grant(_, now) | NodeEvent::Connected(now) = &event {
            self.expire(*now, &mut actions);
        }
        if matches!(self.state, NodeState::Severed(_)) {
            return actions;
        }
        match event {
            NodeEvent::Tick(now) => self.send_if_due(now, &mut actions),
            NodeEvent::Grant(grant, now) => self.granted(grant, now, &mut actions),
            NodeEvent::Sever(reason) => self.sever(reason, &mut actions),
            NodeEvent::Connected(now) => {
                self.next_send = now.boottime;
                self.send_if_due(now, &mut actions);
            }
            NodeEvent::Measured(host) => self.host = host,
            NodeEvent::Found(reason) => {
                actions.push(NodeAction::Report(reason.clone()));
                self.sever(reason, &mut actions);
            }
        }
        actions
    }

    /// When `Tick` is due at the latest (CLOCK_BOOTTIME).
    pub fn next_tick(&self) -> Nanos {
        match self.state {
            NodeState::Enrolling => self.next_send.min(self.enrolment_ends),
            NodeState::Active { deadline } => self.next_send.min(deadline),
            NodeState::Severed(_) => Nanos::MAX,
        }
    }

    fn expire(&mut self, now: Clocks, actions: &mut Vec<NodeAction>) {
        let deadline = match self.state {
            NodeState::Enrolling => self.enrolment_ends,
            NodeState::Active { deadline } => deadline,
            NodeState::Severed(_) => return,
        };
        if now.boottime >= deadline {
            self.sever(Reason::LeaseExpired, actions);
        }
    }

    fn send_if_due(&mut self, now: Clocks, actions: &mut Vec<NodeAction>) {
        if now.boottime < self.next_send {
            return;
        }
        let heartbeat = *self.outstanding.get_or_insert_with(|| {
            self.sequence += 1;
            Heartbeat {
                sequence: self.sequence,
                nonce: self.nonce,
                clocks: now,
                granted: self.granted,
                host: self.host,
            }
        });
        self.next_send = now.boottime.saturating_add(self.timing.retry);
        actions.push(NodeAction::Send(heartbeat));
    }

    fn granted(&mut self, grant: Grant, now: Clocks, actions: &mut Vec<NodeAction>) {
        let foreign = |heartbeat: Heartbeat| heartbeat.sequence == grant.sequence && heartbeat.clocks != grant.sent;
        if grant.sequence > self.sequence || self.outstanding.is_some_and(foreign) {
            // An authenticated controller answered a heartbeat that this node has not sent: somebody else did, as this node.
            actions.push(NodeAction::Report(Reason::Protocol));
            self.sever(Reason::Protocol, actions);
            return;
        }
        let Some(answered) = self.outstanding.filter(|heartbeat| heartbeat.sequence == grant.sequence) else {
            // An answer that has been received before, repeated because the heartbeat was. It changes nothing.
            return;
        };
        self.outstanding = None;
        self.nonce = grant.nonce;
        self.granted = now.monotonic_raw;
        // Never longer than what was agreed at the enrolment, whatever the controller's configuration is now.
        let deadline = answered.clocks.boottime.saturating_add(grant.lease.min(self.timing.lease));
        if now.boottime < deadline {
            self.state = NodeState::Active { deadline };
            actions.push(NodeAction::Renew { deadline });
        } else if self.state != NodeState::Enrolling {
            // The lease before ran out earlier still, unless this grant cut it short.
            self.sever(Reason::LeaseExpired, actions);
            return;
        }
        // The next heartbeat keeps the rhythm of the first sending, and is late if this one had to be repeated.
        self.next_send =
            if grant.confirm { now.boottime } else { answered.clocks.boottime.saturating_add(self.timing.heartbeat) };
        self.send_if_due(now, actions);
    }

    fn sever(&mut self, reason: Reason, actions: &mut Vec<NodeAction>) {
        self.state = NodeState::Severed(reason.clone());
        self.outstanding = None;
        actions.push(NodeAction::Sever(reason));
    }
}
