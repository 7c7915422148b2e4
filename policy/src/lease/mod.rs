//! The lease: what lets a node carry traffic, as two pure state machines, one for each side of the heartbeat.
//!
//! Stop and wait: a node makes the next heartbeat only after the grant for the one before has arrived; until then it
//! sends the same heartbeat again. Each grant brings a nonce that the next heartbeat must carry, so that a restored
//! snapshot or a second clone is one nonce behind and is found out. A lease counts from the node's own clock when it first
//! sent the heartbeat that earned it: delay can only shorten it.
//!
//! Neither side reads a clock, draws a random number or does I/O: events come in, actions go out. What holds, however
//! messages are lost, delayed, repeated or reordered (`tests/lease.rs` shows each):
//!
//! - **S1** A node carries traffic only until its lease, counted from its own first sending, is over.
//! - **S2** The controller does not call a node lost before the node's own lease is over.
//! - **S3** Severed, lost, compromised and retired are terminal.
//! - **S4** Of two copies of a node at most one stays active.
//! - **S5** A healthy node over a network with modest loss is never severed.
//!
//! S2 speaks of clocks that run. A node whose clock stood still (a paused guest) may carry on after it was called lost, until
//! its own lease is over; that is what `TimeStep` and the nonces are for, and why all others refuse whoever was lost.
//!
//! Clocks are read as close to the wire as can be, but on the right side of it: *before* a message is sent, *after* it was
//! received. Reading late or early on that side costs accuracy only; on the wrong side it could make delay look like a pause.
//!
//! S5 asks one thing of the transport: within a session messages arrive in order, and opening a session ends the one before.
//! A straggler from an old session would be a heartbeat with an old nonce, and that is what a restored snapshot looks like.

pub use node::NodeLease;
pub use peer::PeerLease;

mod elapsed;
mod node;
mod peer;

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
    /// When the grant (or the answer to the enrolment) before it arrived: CLOCK_MONOTONIC_RAW. Together with `clocks` it
    /// tells the controller how far the clocks can be apart at most, whatever the network did.
    pub granted: Nanos,
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
    /// Evidence from elsewhere: another boot ID, an attestation that failed.
    Found(Reason),
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

/// How long a node may take from its enrolment to its first grant, in leases. It carries nothing until then, so that this
/// is only about tidiness: a node that was enrolled and never came is lost, too.
const ENROLMENT_GRACE: u64 = 10;

impl Timing {
    /// How much later than the node the controller calls a lease over: for clocks that run apart (2,000 parts in a million,
    /// which is more than what a faulty oscillator and a slewing time daemon add up to on both sides) and for the ticks of
    /// timers in the kernel.
    pub fn margin(&self) -> Nanos {
        self.lease / 500 + 20_000_000
    }

    fn enrolment_grace(&self) -> Nanos {
        self.lease.saturating_mul(ENROLMENT_GRACE)
    }
}
