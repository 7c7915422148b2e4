//! The lease: what lets a node carry traffic, as two pure state machines, one for each side of the heartbeat.
//!
//! Stop and wait: a node makes the next heartbeat only after the grant for the one before has arrived; until then it
//! sends the same heartbeat again. Each grant brings a nonce that the next heartbeat must carry, so that a restored
//! snapshot or a second clone is one nonce behind and is found out. A lease counts from the node's own clock when it first
//! sent the heartbeat that earned it: delay can only shorten it.

/// Nanoseconds of CLOCK_BOOTTIME unless said otherwise.
pub type Nanos = u64;

/// 16 random bytes.
pub type Nonce = [u8; 16];

/// The clocks of a host at one moment, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Clocks {
    /// CLOCK_MONOTONIC_RAW
    pub monotonic_raw: u64,
    /// CLOCK_BOOTTIME: the one that leases are counted in.
    pub boottime: u64,
    /// CLOCK_REALTIME
    pub realtime: u64,
}

/// The cluster's timing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timing {
    /// How long a grant lasts.
    pub lease: Nanos,
    /// How often a heartbeat is sent, answered or not.
    pub heartbeat: Nanos,
}

/// What a node sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Heartbeat {
    /// From 1.
    pub sequence: u64,
    /// The nonce of the grant (or enrolment) before.
    pub nonce: Nonce,
    /// When it was first sent.
    pub clocks: Clocks,
}

/// What a controller answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    /// The heartbeat's.
    pub sequence: u64,
    /// For the next heartbeat.
    pub nonce: Nonce,
    /// From the heartbeat's first sending.
    pub lease: Nanos,
}

/// Why a node is severed, lost or compromised.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No grant arrived in time.
    LeaseExpired,
    /// A heartbeat carried a nonce that is not the last one: a copy or a restored snapshot.
    NonceMismatch,
    /// The node's clock and the controller's moved apart: it was paused.
    TimeStep,
    /// It started again without enrolling.
    BootChanged,
    /// An operator or the controller said so.
    Revoked(String),
    /// A grant that does not answer what was asked.
    Protocol,
}

/// The node's states.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NodeState {
    /// Enrolled, no grant yet: carries nothing.
    Enrolling,
    /// Carries traffic until the deadline.
    Active {
        /// CLOCK_BOOTTIME.
        deadline: Nanos,
    },
    /// Terminal.
    Severed(Reason),
}

/// What happens to a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NodeEvent {
    /// Time passes: at least at every heartbeat interval and at the deadline.
    Tick(Clocks),
    /// A grant arrived.
    Grant(Grant, Clocks),
    /// The controller's verdict arrived.
    Sever(Reason),
    /// The session was opened anew: the outstanding heartbeat is sent at once.
    Connected(Clocks),
}

/// What a node must do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NodeAction {
    /// Send this (the first time, or again: then byte for byte).
    Send(Heartbeat),
    /// Traffic may be carried until then; renew the kernel's lease and the proxy's.
    Renew {
        /// CLOCK_BOOTTIME.
        deadline: Nanos,
    },
    /// Drop everything, for good.
    Sever(Reason),
}

/// The node's side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeLease {
    state: NodeState,
}

impl NodeLease {
    /// Just enrolled.
    pub fn enrolled(_nonce: Nonce, _timing: Timing, _now: Clocks) -> Self {
        todo!()
    }
    /// The state.
    pub fn state(&self) -> &NodeState {
        &self.state
    }
    /// What to do about an event, in order.
    pub fn step(&mut self, _event: NodeEvent) -> Vec<NodeAction> {
        todo!()
    }
    /// When `Tick` is due at the latest (CLOCK_BOOTTIME).
    pub fn next_tick(&self) -> Nanos {
        todo!()
    }
}

/// The controller's states for one node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerState {
    /// Enrolled, no heartbeat yet.
    Enrolled,
    /// Its lease runs until then, by the controller's clock (an upper bound of the node's own deadline).
    Active {
        /// The controller's CLOCK_BOOTTIME.
        deadline: Nanos,
    },
    /// Its lease ran out.
    Lost(Reason),
    /// It was found out.
    Compromised(Reason),
    /// It was taken out of service in order.
    Retired,
}

/// What happens at the controller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerEvent {
    /// A heartbeat arrived; `fresh` is a new random nonce to use if it is granted.
    Heartbeat {
        /// What arrived.
        heartbeat: Heartbeat,
        /// The controller's clocks.
        now: Clocks,
        /// New random bytes.
        fresh: Nonce,
    },
    /// Time passes.
    Tick(Clocks),
    /// An operator's verdict.
    Revoke(String),
    /// Taken out of service.
    Retire,
}

/// What the controller must do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerAction {
    /// Answer.
    Grant(Grant),
    /// Revoke its identities everywhere and tell it.
    Sever(Reason),
}

/// The controller's side, for one enrolment of one node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerLease {
    state: PeerState,
}

impl PeerLease {
    /// Just enrolled with this nonce.
    pub fn enrolled(_nonce: Nonce, _timing: Timing, _now: Clocks) -> Self {
        todo!()
    }
    /// The state.
    pub fn state(&self) -> &PeerState {
        &self.state
    }
    /// What to do about an event, in order.
    pub fn step(&mut self, _event: PeerEvent) -> Vec<PeerAction> {
        todo!()
    }
    /// When `Tick` is due at the latest (CLOCK_BOOTTIME).
    pub fn next_tick(&self) -> Nanos {
        todo!()
    }
}
