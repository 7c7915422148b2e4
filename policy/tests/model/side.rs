//! The two sides of the protocol as the models run them: as they are, or broken in one way.
//!
//! A mutant stands around the real machine and bends what goes in or comes out: the machine itself has no switch that could
//! be left on.

use opencluster_policy::lease::{
    Clocks, Grant, Heartbeat, Host, NodeAction, NodeEvent, NodeLease, NodeState, Nonce, PeerAction, PeerEvent,
    PeerLease, PeerState, Reason, Timing,
};

/// One way to get the protocol wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Mutant {
    /// A heartbeat may also carry the nonce before the last.
    AcceptPreviousNonce,
    /// A lease counts from when its grant arrived.
    CountFromReceipt,
    /// A repeated heartbeat gets a new grant with a new nonce.
    NewReplyToRepetition,
    /// A node whose lease is over takes a late grant all the same.
    NoLatch,
    /// The boot ID is not compared.
    NoBootCheck,
    /// The controller's clock ends no lease.
    NobodyIsLost,
    /// Whether revocations are acknowledged does not matter for grants.
    GrantUnacknowledged,
    /// A verdict that cannot be stored holds up nobody.
    GrantUnannounced,
    /// The time to apply a verdict counts from its announcement.
    CountFromAnnouncement,
    /// A heartbeat that is sent again shows the time at which it is sent again.
    NewBytesOnRetry,
    /// The clocks are not compared.
    NoTimeCheck,
    /// A late heartbeat is not followed up.
    NoConfirmation,
    /// A node takes a grant that answers another's heartbeat.
    AnyGrantWillDo,
    /// A heartbeat that takes longer than others did is taken for a pause.
    DelayIsPause,
    /// The controller's patience ends when the node's lease does.
    NoMargin,
    /// A controller that started anew takes the first nonce that it is shown.
    AnyNonceAfterRestart,
    /// Each of two controllers knows only what it granted itself.
    ControllersApart,
    /// Controllers that share a store write to it without looking whether it changed.
    BlindWrites,
}

/// A node's side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NodeSide {
    lease: NodeLease,
    mutant: Option<Mutant>,
    /// `CountFromReceipt`: how far the clock is set back, and when the outstanding heartbeat was sent by that clock.
    set_back: u64,
    sent: u64,
}

impl NodeSide {
    pub(crate) fn enrolled(timing: Timing, now: Clocks, mutant: Option<Mutant>) -> Self {
        let lease = NodeLease::enrolled([0; 16], timing, Host::default(), now);
        Self { lease, mutant, set_back: 0, sent: 0 }
    }

    pub(crate) fn state(&self) -> &NodeState {
        self.lease.state()
    }

    /// Whether a tick would do something.
    pub(crate) fn due(&self, now: Clocks) -> bool {
        self.lease.next_tick() <= self.bent(now).boottime
    }

    pub(crate) fn step(&mut self, event: NodeEvent) -> Vec<NodeAction> {
        match event {
            NodeEvent::Tick(now) => {
                let bent = self.bent(now);
                let actions = self.lease.step(NodeEvent::Tick(bent));
                self.straighten(actions, now)
            }
            NodeEvent::Grant(grant, now) => {
                let answers = |heartbeat: Heartbeat| heartbeat.sequence == grant.sequence;
                if self.mutant == Some(Mutant::CountFromReceipt) && self.outstanding().is_some_and(answers) {
                    self.set_back += self.bent(now).boottime - self.sent;
                }
                let bent = self.bent(now);
                let grant = match (self.mutant, self.outstanding()) {
                    (Some(Mutant::AnyGrantWillDo), Some(heartbeat)) => Grant { sent: heartbeat.clocks, ..grant },
                    (Some(Mutant::NoConfirmation), _) => Grant { confirm: false, ..grant },
                    _ => grant,
                };
                let actions = self.lease.step(NodeEvent::Grant(grant, bent));
                self.straighten(actions, now)
            }
            event => self.lease.step(event),
        }
    }

    /// The heartbeat that would be sent again now (or the next, if none waits for its grant).
    fn outstanding(&self) -> Option<Heartbeat> {
        let sent = self.lease.clone().step(NodeEvent::Connected(Clocks::default()));
        sent.iter().find_map(|action| if let NodeAction::Send(heartbeat) = action { Some(*heartbeat) } else { None })
    }

    fn bent(&self, now: Clocks) -> Clocks {
        let mut bent = now;
        match (self.mutant, self.lease.state()) {
            (Some(Mutant::CountFromReceipt), _) => {
                bent.boottime -= self.set_back;
                bent.monotonic_raw -= self.set_back;
            }
            (Some(Mutant::NoLatch), NodeState::Active { deadline }) => bent.boottime = now.boottime.min(deadline - 1),
            _ => {}
        }
        bent
    }

    fn straighten(&mut self, mut actions: Vec<NodeAction>, now: Clocks) -> Vec<NodeAction> {
        for action in &mut actions {
            match action {
                NodeAction::Renew { deadline } => *deadline += self.set_back,
                NodeAction::Send(heartbeat) => {
                    self.sent = heartbeat.clocks.boottime;
                    if self.mutant == Some(Mutant::NewBytesOnRetry) {
                        heartbeat.clocks = now;
                    }
                }
                NodeAction::Report(_) | NodeAction::Sever(_) => {}
            }
        }
        actions
    }
}

/// The controller's side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PeerSide {
    lease: PeerLease,
    timing: Timing,
    mutant: Option<Mutant>,
    /// What a mutant remembers beside it.
    before: Option<Box<PeerLease>>,
    last: Option<Heartbeat>,
    nonces: [Nonce; 2],
    least: Option<u64>,
    any: bool,
    skipped: u64,
}

impl PeerSide {
    pub(crate) fn enrolled(timing: Timing, now: Clocks, mutant: Option<Mutant>) -> Self {
        let lease = PeerLease::enrolled([0; 16], timing, Host::default(), now);
        Self {
            lease,
            timing,
            mutant,
            before: None,
            last: None,
            nonces: [[0; 16]; 2],
            least: None,
            any: false,
            skipped: 0,
        }
    }

    pub(crate) fn state(&self) -> &PeerState {
        self.lease.state()
    }

    pub(crate) fn in_force(&self) -> bool {
        matches!(self.state(), PeerState::Enrolled | PeerState::Active { .. })
    }

    pub(crate) fn due(&self, now: Clocks) -> bool {
        self.lease.next_tick() <= now.boottime
    }

    pub(crate) fn repetition(&self, heartbeat: &Heartbeat) -> Option<Grant> {
        self.lease.repetition(heartbeat)
    }

    pub(crate) fn step(&mut self, event: PeerEvent) -> Vec<PeerAction> {
        match (self.mutant, event) {
            (Some(Mutant::NobodyIsLost), PeerEvent::Tick(_))
            | (Some(Mutant::GrantUnacknowledged), PeerEvent::Announced { .. })
            | (Some(Mutant::GrantUnannounced), PeerEvent::Unannounced(_)) => Vec::new(),
            (Some(Mutant::CountFromAnnouncement), event @ PeerEvent::Announced { .. }) => {
                self.lease.step(PeerEvent::Unannounced(None));
                self.lease.step(event)
            }
            (Some(Mutant::AnyNonceAfterRestart), PeerEvent::Forgotten) => {
                self.any = true;
                Vec::new()
            }
            (Some(mutant), PeerEvent::Heartbeat { heartbeat, now, fresh }) => self.bent(mutant, heartbeat, now, fresh),
            (_, event) => self.lease.step(event),
        }
    }

    fn bent(&mut self, mutant: Mutant, heartbeat: Heartbeat, now: Clocks, fresh: Nonce) -> Vec<PeerAction> {
        let take = |lease: &mut PeerLease, heartbeat| lease.step(PeerEvent::Heartbeat { heartbeat, now, fresh });
        match mutant {
            Mutant::NoBootCheck => take(&mut self.lease, Heartbeat { host: Host::default(), ..heartbeat }),
            Mutant::NoTimeCheck => take(&mut self.lease, Heartbeat { granted: u64::MAX, ..heartbeat }),
            Mutant::NewReplyToRepetition => {
                match (&self.before, self.last) {
                    (Some(before), Some(last)) if last == heartbeat => self.lease = PeerLease::clone(before),
                    _ => self.before = Some(Box::new(self.lease.clone())),
                }
                self.last = Some(heartbeat);
                take(&mut self.lease, heartbeat)
            }
            Mutant::DelayIsPause => {
                let took = now.monotonic_raw.saturating_sub(heartbeat.clocks.monotonic_raw);
                if self.last != Some(heartbeat) && self.least.is_some_and(|least| took > least + self.timing.step) {
                    return self.lease.step(PeerEvent::Found(Reason::TimeStep));
                }
                self.last = Some(heartbeat);
                self.least = Some(self.least.map_or(took, |least| least.min(took)));
                take(&mut self.lease, heartbeat)
            }
            Mutant::AcceptPreviousNonce => {
                let mut bent = heartbeat;
                if self.last != Some(heartbeat) && self.nonces.contains(&heartbeat.nonce) {
                    bent.nonce = self.nonces[1];
                    bent.sequence = self.last.map_or(0, |last| last.sequence) + 1;
                }
                self.lease_with(heartbeat, bent, take)
            }
            Mutant::AnyNonceAfterRestart => {
                if std::mem::take(&mut self.any) {
                    let lease = PeerLease::enrolled(heartbeat.nonce, self.timing, Host::default(), now);
                    (self.lease, self.skipped) = (lease, heartbeat.sequence - 1);
                }
                let Some(sequence) = heartbeat.sequence.checked_sub(self.skipped) else {
                    return self.lease.step(PeerEvent::Found(Reason::NonceMismatch));
                };
                self.lease_with(heartbeat, Heartbeat { sequence, ..heartbeat }, take)
            }
            _ => take(&mut self.lease, heartbeat),
        }
    }

    /// Gives the machine `bent` instead of what came, and answers what came.
    fn lease_with(
        &mut self,
        came: Heartbeat,
        bent: Heartbeat,
        take: impl Fn(&mut PeerLease, Heartbeat) -> Vec<PeerAction>,
    ) -> Vec<PeerAction> {
        let mut actions = take(&mut self.lease, bent);
        for action in &mut actions {
            if let PeerAction::Grant(grant) = action {
                if grant.nonce != self.nonces[1] {
                    self.nonces = [self.nonces[1], grant.nonce];
                }
                self.last = Some(bent);
                *grant = Grant { sequence: came.sequence, ..*grant };
            }
        }
        actions
    }
}
