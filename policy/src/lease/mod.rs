//! The lease: what lets a node carry traffic, as two pure state machines, one for each side of the heartbeat.
//!
//! Stop and wait: a node makes the next heartbeat only after the grant for the one before has arrived; until then it
//! sends the same heartbeat again. Each grant brings a nonce that the next heartbeat must carry, so that a restored
//! snapshot or a second clone is one nonce behind and is found out. A lease counts from the node's own clock when it first
//! sent the heartbeat that earned it: delay can only shorten it.
//!
//! Neither side reads a clock, draws a random number or does I/O: events come in, actions go out. `docs/lease.md` states what
//! holds, with its bounds, and how that is checked: however messages are lost, delayed, repeated or reordered,
//!
//! - **S1** a node carries traffic only until its lease, counted from its own first sending, is over;
//! - **S2** no peer takes a flow of a node later than a fixed time after its last valid heartbeat, and a node is not called
//!   lost before its own lease is over;
//! - **S3** severed, lost, compromised and retired are terminal;
//! - **S4** of two copies of a node at most one stays active, and the controller knows that there were two;
//! - **S5** a healthy node over a network with modest loss is never severed.
//!
//! Clocks are read as close to the wire as can be, but on the right side of it: *before* a message is sent, *after* it was
//! received. Reading late or early on that side costs accuracy only; on the wrong side it could make delay look like a pause.
//!
//! S5 asks one thing of the transport: within a session messages arrive in order, and opening a session ends the one before.
//! A straggler from an old session would be a heartbeat with an old nonce, and that is what a restored snapshot looks like.

pub use node::NodeLease;
pub use peer::PeerLease;
pub use reason::Reason;

mod duty;
mod elapsed;
mod node;
mod peer;
mod reason;

/// Nanoseconds of CLOCK_BOOTTIME unless said otherwise.
pub type Nanos = u64;

/// 16 random bytes.
pub type Nonce = [u8; 16];

/// The clocks of a host at one moment, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Clocks {
    /// CLOCK_MONOTONIC_RAW
    pub monotonic_raw: u64,
    /// CLOCK_BOOTTIME: the one that leases are counted in.
    pub boottime: u64,
    /// CLOCK_REALTIME
    pub realtime: u64,
}

/// What tells one host from another, and one boot of it from the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host {
    /// A digest of the kernel's random boot ID.
    pub boot: [u8; 32],
    /// A digest of the hardware's and the hypervisor's identity.
    pub machine: [u8; 32],
}

/// The cluster's timing. [`Timing::new`] makes one out of the two figures that are configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timing {
    /// How long a grant lasts.
    pub lease: Nanos,
    /// How often a new heartbeat is made.
    pub heartbeat: Nanos,
    /// How long an unanswered heartbeat waits before it is sent again.
    pub retry: Nanos,
    /// How much later than the node the controller calls a lease over.
    pub margin: Nanos,
    /// How long after a verdict a node that has not applied it, for whatever reason, goes on getting grants.
    pub patience: Nanos,
    /// How long a node may take from its enrolment to its first grant. It carries nothing until then, so that this is only
    /// about tidiness: a node that was enrolled and never came is lost, too.
    pub grace: Nanos,
    /// A permanent step of the clocks' difference above this is a pause. Drift comes on top.
    pub step: Nanos,
    /// The most that two clocks drift apart, in parts in a million.
    pub drift_ppm: u32,
}

impl Timing {
    /// From the length of a lease and how often heartbeats are made.
    pub const fn new(lease: Nanos, heartbeat: Nanos) -> Self {
        Self {
            lease,
            heartbeat,
            // With 15 % of all messages lost, one exchange in four fails: twenty and more in a row then do not happen.
            retry: heartbeat / 5,
            // Clocks that run apart (2,000 parts in a million: more than what a faulty oscillator and a slewing time daemon
            // add up to on both sides), and the ticks of timers in the kernel.
            margin: lease / 500 + 20_000_000,
            patience: lease / 2,
            grace: lease.saturating_mul(10),
            step: 50_000_000,
            // CLOCK_MONOTONIC_RAW is not slewed, and an ordinary oscillator is within 100.
            drift_ppm: 500,
        }
    }

    /// Whether a verdict is so old that who has not applied it gets no grant.
    pub const fn is_late(&self, verdict: Nanos, now: Nanos) -> bool {
        now >= verdict.saturating_add(self.patience)
    }
}

/// What a node sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
    /// Where it was made.
    pub host: Host,
}

/// What a controller answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Grant {
    /// The heartbeat's.
    pub sequence: u64,
    /// The heartbeat's: an answer to a copy of the node, with the same sequence, shows other clocks.
    pub sent: Clocks,
    /// For the next heartbeat.
    pub nonce: Nonce,
    /// From the heartbeat's first sending.
    pub lease: Nanos,
    /// The next heartbeat is wanted at once: this one was late, and the next tells whether that was the network.
    pub confirm: bool,
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
    /// Time passes: at least whenever [`NodeLease::next_tick`] says.
    Tick(Clocks),
    /// A grant arrived.
    Grant(Grant, Clocks),
    /// The controller's verdict arrived.
    Sever(Reason),
    /// The session was opened anew: the outstanding heartbeat is sent at once.
    Connected(Clocks),
    /// What the host is known by was read again: the next new heartbeat says so.
    Measured(Host),
    /// The node found out itself what it must not go on with.
    Found(Reason),
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
    /// Tell the controller, if that is still possible, why this node severs itself.
    Report(Reason),
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
    Retired(Reason),
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
    /// This version of the revocations is about to be sent to the node.
    Announced {
        /// It grows with each change.
        version: u64,
        /// The controller's clocks.
        now: Clocks,
    },
    /// The oldest verdict over another node whose revocation has no version yet: CLOCK_BOOTTIME. `None`: all have been announced.
    /// (Who stores verdicts takes its time, or cannot. Nobody gets a grant long after a verdict that it has not applied,
    /// whosever fault that is.)
    Unannounced(Option<Nanos>),
    /// The node says which version it has applied.
    Acknowledged {
        /// It, and all before.
        version: u64,
        /// The controller's clocks.
        now: Clocks,
        /// New random bytes, for the grant that may have waited for this.
        fresh: Nonce,
    },
    /// An operator's verdict.
    Revoke(String),
    /// Evidence: what the node reported of itself, an attestation that failed.
    Found(Reason),
    /// Taken out of service, for this reason.
    Retire(String),
    /// Another controller, with other clocks, takes over what was stored by the one before.
    Adopted(Clocks),
    /// The controller started anew, without knowing what it granted last.
    Forgotten,
}

/// What the controller must do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerAction {
    /// Answer.
    Grant(Grant),
    /// Revoke its identities everywhere and tell it.
    Sever(Reason),
}
