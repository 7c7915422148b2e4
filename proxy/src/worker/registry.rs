//! Everything that a worker holds for others: flows and tunnels. Each is registered *before* it is authorized, so that a
//! change of policy, a revocation or the end of the lease cannot slip in between.

use std::cell::{Cell, OnceCell, RefCell};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use opencluster_identity::SpiffeId;
use opencluster_policy::index::Decision;

use crate::tunnel::info::TunnelInfo;

/// Why something was cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The policy that is in force now does not allow it.
    Policy(String),
    /// An identity of it was revoked, or is not held here any more.
    Identity(String),
    /// The lease ran out.
    LeaseExpired,
    /// The controller said so.
    Severed,
    /// Too much of what was sent to applications of this node waits to be read.
    Overloaded,
    /// The shared tunnel cannot go on.
    Tunnel(String),
    /// A time limit.
    Timeout(&'static str),
    /// The proxy is shutting down and the time for draining is over.
    Draining,
}

impl Cut {
    /// For metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Policy(_) => "policy",
            Self::Identity(_) => "identity",
            Self::LeaseExpired => "lease_expired",
            Self::Severed => "severed",
            Self::Overloaded => "overloaded",
            Self::Tunnel(_) => "tunnel_broken",
            Self::Timeout(_) => "timeout",
            Self::Draining => "draining",
        }
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(reason) | Self::Identity(reason) | Self::Tunnel(reason) => f.write_str(reason),
            Self::LeaseExpired => f.write_str("the controller's lease ran out"),
            Self::Severed => f.write_str("this node was severed"),
            Self::Overloaded => f.write_str("the applications of this node leave too much unread"),
            Self::Timeout(what) => write!(f, "timeout: {what}"),
            Self::Draining => f.write_str("the proxy is shutting down"),
        }
    }
}

/// Lets the worker cut what another task is busy with.
#[derive(Debug, Default)]
pub struct Watch {
    cut: RefCell<Option<Cut>>,
    waker: RefCell<Option<Waker>>,
}

impl Watch {
    /// Cuts: the owner's next poll ends it. The first reason stays.
    pub fn cut(&self, reason: Cut) {
        self.cut.borrow_mut().get_or_insert(reason);
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Makes the owner look again.
    pub fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// The reason, if it was cut.
    pub fn reason(&self) -> Option<Cut> {
        self.cut.borrow().clone()
    }

    /// Ready once it is cut. Cheap enough for every poll.
    pub fn poll_cut(&self, context: &mut Context<'_>) -> Poll<Cut> {
        if let Some(reason) = &*self.cut.borrow() {
            return Poll::Ready(reason.clone());
        }
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|known| known.will_wake(context.waker())) {
            *waker = Some(context.waker().clone());
        }
        Poll::Pending
    }
}

/// Which way a flow goes through this proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// From an application of this node into a tunnel.
    Outbound,
    /// From a tunnel to an application of this node.
    Inbound,
}

impl Side {
    /// For logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// A flow.
#[derive(Debug)]
pub struct Flow {
    /// For being cut.
    pub watch: Watch,
    /// Which way.
    pub side: Side,
    /// The same on both sides.
    pub id: u64,
    /// The same along the whole path.
    pub trace: u128,
    /// Where it comes from: the application's address (outbound), the other node's (inbound).
    pub peer: SocketAddr,
    /// Where it wants to go.
    pub target: SocketAddr,
    /// The source's identity.
    pub source: Arc<SpiffeId>,
    /// The address that policies judge: the source node's.
    pub source_address: Cell<Option<IpAddr>>,
    /// The destination's identity, once it is known.
    pub destination: OnceCell<Arc<SpiffeId>>,
    /// The tunnel that carries it.
    pub tunnel: RefCell<Option<Rc<TunnelInfo>>>,
    /// The verdict in force.
    pub decision: Cell<Option<Decision>>,
    /// What dry-run policies would have decided, where that differs.
    pub dry_run: Cell<Option<Decision>>,
    /// Cut on this side, and waiting since then for the other side to end it too.
    ending_since: Cell<Option<Instant>>,
    /// The registry's, once it is registered.
    some_end: Option<Rc<Cell<bool>>>,
    /// When it arrived.
    pub started: Instant,
    accepted: Cell<bool>,
    sent: Cell<u64>,
    received: Cell<u64>,
    reported: Cell<(u64, u64)>,
}

impl Flow {
    /// A flow about which nothing is decided.
    pub fn new(side: Side, id: u64, trace: u128, peer: SocketAddr, target: SocketAddr, source: Arc<SpiffeId>) -> Self {
        Self {
            watch: Watch::default(),
            side,
            id,
            trace,
            peer,
            target,
            source,
            source_address: Cell::new(None),
            destination: OnceCell::new(),
            tunnel: RefCell::default(),
            decision: Cell::new(None),
            dry_run: Cell::new(None),
            ending_since: Cell::new(None),
            some_end: None,
            started: Instant::now(),
            accepted: Cell::new(false),
            sent: Cell::new(0),
            received: Cell::new(0),
            reported: Cell::new((0, 0)),
        }
    }

    /// Accounts for bytes from the application into the tunnel.
    pub fn add_sent(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
    }

    /// Accounts for bytes from the tunnel to the application.
    pub fn add_received(&self, bytes: usize) {
        self.received.set(self.received.get() + bytes as u64);
    }

    /// Bytes from the application into the tunnel.
    pub fn sent(&self) -> u64 {
        self.sent.get()
    }

    /// Bytes from the tunnel to the application.
    pub fn received(&self) -> u64 {
        self.received.get()
    }

    /// It was cut on this side; the other side has to end it too.
    pub fn ends(&self) {
        self.ending_since.set(Some(Instant::now()));
        if let Some(some_end) = &self.some_end {
            some_end.set(true);
        }
    }

    /// Nothing of what was sent counts: it will be sent again.
    pub fn forget_sent(&self) {
        self.sent.set(0);
        self.reported.set((0, self.reported.get().1));
    }

    /// What was carried since this was last asked: (sent, received).
    pub fn take_unreported(&self) -> (u64, u64) {
        let now = (self.sent.get(), self.received.get());
        let (sent, received) = self.reported.replace(now);
        (now.0 - sent, now.1 - received)
    }

    /// The destination accepted it.
    pub fn accepted(&self) {
        self.accepted.set(true);
    }

    /// Whether the destination accepted it.
    pub fn is_accepted(&self) -> bool {
        self.accepted.get()
    }
}

/// What an inbound tunnel is doing.
#[derive(Clone, Copy, Debug)]
pub enum Phase {
    /// Waits for the next flow, since then.
    Idle(Instant),
    /// Part of an OPEN has arrived, since then.
    Opening(Instant),
    /// Carries a flow.
    Busy,
}

/// An inbound tunnel.
#[derive(Debug)]
pub struct Held {
    /// For being cut.
    pub watch: Watch,
    /// Who is at the other end.
    pub info: Rc<TunnelInfo>,
    /// What it is doing.
    pub phase: Cell<Phase>,
}

/// A list of things with stable places, which are reused.
#[derive(Debug)]
struct Slots<T> {
    places: Vec<Option<Rc<T>>>,
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    fn insert(&mut self, value: Rc<T>) -> u32 {
        if let Some(place) = self.free.pop() {
            self.places[place as usize] = Some(value);
            return place;
        }
        self.places.push(Some(value));
        self.places.len() as u32 - 1
    }

    fn remove(&mut self, place: u32) {
        if self.places[place as usize].take().is_some() {
            self.free.push(place);
        }
        if self.free.len() == self.places.len() {
            // Empty: give the memory of a past crowd back.
            *self = Self::default();
        }
    }

    fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    fn iter(&self) -> impl Iterator<Item = &Rc<T>> {
        self.places.iter().flatten()
    }

    fn all(&self) -> Vec<Rc<T>> {
        self.iter().cloned().collect()
    }
}

/// A worker's flows and inbound tunnels.
#[derive(Debug, Default)]
pub struct Registry {
    flows: RefCell<Slots<Flow>>,
    held: RefCell<Slots<Held>>,
    /// Some flow may be waiting for the other side to end it: where none is, nobody has to look at thousands.
    some_end: Rc<Cell<bool>>,
}

/// Keeps a flow registered.
#[derive(Debug)]
pub struct FlowGuard {
    registry: Rc<Registry>,
    flow: Rc<Flow>,
    place: u32,
}

impl FlowGuard {
    /// The flow, for others to account in.
    pub fn shared(&self) -> Rc<Flow> {
        Rc::clone(&self.flow)
    }
}

impl std::ops::Deref for FlowGuard {
    type Target = Flow;
    fn deref(&self) -> &Flow {
        &self.flow
    }
}

impl Drop for FlowGuard {
    fn drop(&mut self) {
        self.registry.flows.borrow_mut().remove(self.place);
    }
}

/// Keeps an inbound tunnel registered.
#[derive(Debug)]
pub struct HeldGuard {
    registry: Rc<Registry>,
    held: Rc<Held>,
    place: u32,
}

impl std::ops::Deref for HeldGuard {
    type Target = Held;
    fn deref(&self) -> &Held {
        &self.held
    }
}

impl Drop for HeldGuard {
    fn drop(&mut self) {
        self.registry.held.borrow_mut().remove(self.place);
    }
}

impl Registry {
    /// Registers a flow.
    pub fn add_flow(self: &Rc<Self>, mut flow: Flow) -> FlowGuard {
        flow.some_end = Some(Rc::clone(&self.some_end));
        if flow.ending_since.get().is_some() {
            self.some_end.set(true);
        }
        let flow = Rc::new(flow);
        let place = self.flows.borrow_mut().insert(Rc::clone(&flow));
        FlowGuard { registry: Rc::clone(self), flow, place }
    }

    /// Registers an inbound tunnel.
    pub fn add_held(self: &Rc<Self>, info: Rc<TunnelInfo>) -> HeldGuard {
        let held = Rc::new(Held { watch: Watch::default(), info, phase: Cell::new(Phase::Idle(Instant::now())) });
        let place = self.held.borrow_mut().insert(Rc::clone(&held));
        HeldGuard { registry: Rc::clone(self), held, place }
    }

    /// How many flows.
    pub fn flow_count(&self) -> usize {
        self.flows.borrow().len()
    }

    /// How many inbound tunnels.
    pub fn held_count(&self) -> usize {
        self.held.borrow().len()
    }

    /// All flows.
    pub fn flows(&self) -> Vec<Rc<Flow>> {
        self.flows.borrow().all()
    }

    /// All inbound tunnels.
    pub fn held(&self) -> Vec<Rc<Held>> {
        self.held.borrow().all()
    }

    /// Cuts everything.
    pub fn cut_all(&self, reason: &Cut) {
        for flow in self.flows() {
            flow.watch.cut(reason.clone());
        }
        for held in self.held() {
            held.watch.cut(reason.clone());
        }
    }

    /// Cuts inbound tunnels that have been idle, or busy with one OPEN, for too long, and flows that the peer does not end.
    pub fn cut_slow(&self, now: Instant, idle: Duration, opening: Duration) {
        // In place: this runs every second, and a cut only wakes who owns what is cut.
        if self.some_end.take() {
            for flow in self.flows.borrow().iter() {
                let Some(since) = flow.ending_since.get() else { continue };
                self.some_end.set(true);
                if now.duration_since(since) > opening {
                    flow.watch.cut(Cut::Timeout("the peer did not end a flow that was cut"));
                }
            }
        }
        for held in self.held.borrow().iter() {
            match held.phase.get() {
                Phase::Idle(since) if now.duration_since(since) > idle => {
                    held.watch.cut(Cut::Timeout("the tunnel was idle"));
                }
                Phase::Opening(since) if now.duration_since(since) > opening => {
                    held.watch.cut(Cut::Timeout("the peer did not complete its OPEN frame"));
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use opencluster_identity::TrustDomain;

    use super::*;

    const IDLE: Duration = Duration::from_mins(2);
    const OPENING: Duration = Duration::from_secs(5);

    fn flow() -> Flow {
        let domain = TrustDomain::parse("test.example").expect("domain");
        let source = Arc::new(SpiffeId::workload(&domain, "default", "a").expect("id"));
        let address = SocketAddr::from(([192, 0, 2, 1], 1));
        Flow::new(Side::Outbound, 1, 2, address, address, source)
    }

    #[test]
    fn flows_that_the_peer_does_not_end_are_cut_in_time_and_others_are_not() {
        let registry = Rc::new(Registry::default());
        let running = registry.add_flow(flow());
        let look = |after| registry.cut_slow(Instant::now() + after, IDLE, OPENING);
        look(2 * OPENING);
        let ending = registry.add_flow(flow());
        ending.ends();
        // Cut before anybody could register it.
        let refused = flow();
        refused.ends();
        let refused = registry.add_flow(refused);
        for _ in 0..3 {
            look(OPENING / 2);
            assert_eq!((ending.watch.reason(), refused.watch.reason()), (None, None));
        }
        look(2 * OPENING);
        for cut in [&ending, &refused] {
            assert!(matches!(cut.watch.reason(), Some(Cut::Timeout(_))));
        }
        assert_eq!(running.watch.reason(), None);
        // Nobody is looked at any more, until somebody ends.
        drop((ending, refused));
        look(OPENING);
        assert!(!registry.some_end.get());
        running.ends();
        look(2 * OPENING);
        assert!(matches!(running.watch.reason(), Some(Cut::Timeout(_))));
    }
}
