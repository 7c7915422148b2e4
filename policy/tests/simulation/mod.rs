//! One controller, one enrolment, one or more nodes that hold it, clocks that run apart, and a network: all simulated on one
//! true time, all following from a seed. Asserts S1, S2 and S3 at every event.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use opencluster_policy::lease::{
    Clocks, Grant, Heartbeat, Host, NodeAction, NodeEvent, NodeLease, NodeState, PeerAction, PeerEvent, PeerLease,
    PeerState, Reason, Timing,
};

pub(crate) const MILLISECOND: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1000 * MILLISECOND;

/// How late timers run at most.
const LATENESS: u64 = 3 * MILLISECOND;

/// How often the next tick's time is asked for again: other events may have brought it forward.
const POLL: u64 = 100 * MILLISECOND;

#[derive(Clone, Debug)]
pub(crate) struct Network {
    pub(crate) loss_percent: u32,
    pub(crate) repeat_percent: u32,
    /// Each message takes up to this.
    pub(crate) delay: u64,
    pub(crate) in_order: bool,
    /// Losses that may come one after another without a new grant arriving in between.
    pub(crate) losses_in_a_row: u32,
}

/// A host's clocks: they start anywhere, drift, and stand still while the host does.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    offset: u64,
    ppm: i64,
    stood_still: u64,
    still_until: u64,
}

impl Clock {
    pub(crate) fn new(offset: u64, ppm: i64) -> Self {
        Self { offset, ppm, stood_still: 0, still_until: 0 }
    }

    fn read(&self, true_time: u64) -> u64 {
        let elapsed = true_time - self.stood_still;
        self.offset + elapsed.saturating_add_signed(elapsed as i64 / 1_000_000 * self.ppm)
    }

    fn clocks(&self, true_time: u64) -> Clocks {
        let now = self.read(true_time);
        Clocks { monotonic_raw: now, boottime: now, realtime: now }
    }

    /// The first true time at which the clock shows this or more.
    fn when(&self, shown: u64) -> u64 {
        let elapsed = shown.saturating_sub(self.offset);
        let (mut early, mut late) = (self.stood_still, self.stood_still + 2 * elapsed + 1);
        while early < late {
            let middle = u64::midpoint(early, late);
            if self.read(middle) < shown { early = middle + 1 } else { late = middle }
        }
        late
    }

    fn stand_still(&mut self, from: u64, length: u64) {
        self.stood_still += length;
        self.still_until = from + length;
    }
}

/// A node, and what only the simulation knows of it.
#[derive(Clone, Debug)]
struct Node {
    lease: NodeLease,
    clock: Clock,
    /// When each heartbeat was first sent, by its own clock.
    first_sent: BTreeMap<u64, u64>,
    /// Messages to and from it.
    lost_in_a_row: u32,
}

/// A node as it was at some moment.
pub(crate) struct Snapshot {
    taken: u64,
    node: Node,
}

#[derive(Clone, Debug)]
enum Event {
    NodeTick(usize),
    PeerTick,
    AtPeer(usize, Heartbeat),
    AtNode(usize, PeerAction),
}

pub(crate) struct World {
    timing: Timing,
    now: u64,
    /// By time, then in the order in which they were made.
    queue: BinaryHeap<Reverse<(u64, usize)>>,
    events: Vec<Event>,
    random: u64,
    network: Network,
    silent: bool,
    /// Added to what each heartbeat takes.
    slower: u64,
    last_arrival: BTreeMap<(usize, bool), u64>,
    peer: PeerLease,
    peer_clock: Clock,
    nodes: Vec<Node>,
    nonces: u8,
    /// A copy or a pause: S2 speaks of neither.
    tampered: bool,
    pub(crate) grants: u32,
}

impl World {
    pub(crate) fn new(timing: Timing, peer_clock: Clock, network: Network, seed: u64) -> Self {
        let peer = PeerLease::enrolled([0; 16], timing, Host::default(), peer_clock.clocks(0));
        Self {
            timing,
            now: 0,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            random: seed | 1,
            network,
            silent: false,
            slower: 0,
            last_arrival: BTreeMap::new(),
            peer,
            peer_clock,
            nodes: Vec::new(),
            nonces: 0,
            tampered: false,
            grants: 0,
        }
    }

    /// The node that enrols: the controller's answer takes a moment.
    pub(crate) fn add_node(&mut self, clock: Clock) {
        self.now += 3 * MILLISECOND;
        let lease = NodeLease::enrolled([0; 16], self.timing, Host::default(), clock.clocks(self.now));
        self.nodes.push(Node { lease, clock, first_sent: BTreeMap::new(), lost_in_a_row: 0 });
        self.schedule(self.now, Event::NodeTick(0));
        self.schedule(self.now, Event::PeerTick);
    }

    pub(crate) fn snapshot(&self, node: usize) -> Snapshot {
        Snapshot { taken: self.now, node: self.nodes[node].clone() }
    }

    /// A copy starts next to the original; its clocks go on from where they were.
    pub(crate) fn restore(&mut self, snapshot: Snapshot) {
        let Snapshot { taken, mut node } = snapshot;
        node.clock.stand_still(taken, self.now - taken);
        self.nodes.push(node);
        self.tampered = true;
        self.schedule(self.now, Event::NodeTick(self.nodes.len() - 1));
    }

    /// The node stands still, and nothing that it can see tells it so.
    pub(crate) fn pause(&mut self, node: usize, length: u64) {
        self.tampered = true;
        let now = self.now;
        self.nodes[node].clock.stand_still(now, length);
    }

    /// Its patience is only lengthened: S2 must hold all the same.
    pub(crate) fn pause_controller(&mut self, length: u64) {
        let now = self.now;
        self.peer_clock.stand_still(now, length);
    }

    /// From now on heartbeats take longer (and grants do not).
    pub(crate) fn slow_down(&mut self, by: u64) {
        self.slower = by;
    }

    pub(crate) fn cut(&mut self) {
        self.silent = true;
    }

    pub(crate) fn heal(&mut self) {
        self.silent = false;
    }

    pub(crate) fn node_state(&self, node: usize) -> &NodeState {
        self.nodes[node].lease.state()
    }

    pub(crate) fn peer_state(&self) -> &PeerState {
        self.peer.state()
    }

    /// Whether the kernel lets its packets pass right now.
    pub(crate) fn carries_traffic(&self, node: usize) -> bool {
        let Node { lease, clock, .. } = &self.nodes[node];
        match lease.state() {
            NodeState::Active { deadline } => self.now >= clock.still_until && clock.read(self.now) < *deadline,
            _ => false,
        }
    }

    pub(crate) fn run_for(&mut self, length: u64) {
        let end = self.now + length;
        while let Some(&Reverse((time, number))) = self.queue.peek()
            && time <= end
        {
            self.queue.pop();
            self.now = time;
            let event = self.events[number].clone();
            self.happen(event);
        }
        self.now = end;
    }

    fn happen(&mut self, event: Event) {
        let still_until = match &event {
            Event::NodeTick(node) | Event::AtNode(node, _) => self.nodes[*node].clock.still_until,
            Event::PeerTick | Event::AtPeer(..) => self.peer_clock.still_until,
        };
        if self.now < still_until {
            return self.schedule(still_until, event);
        }
        match event {
            Event::NodeTick(node) => {
                let clocks = self.nodes[node].clock.clocks(self.now);
                self.step_node(node, NodeEvent::Tick(clocks), None);
                let next = self.nodes[node].lease.next_tick();
                if next != u64::MAX {
                    let lateness = 1 + self.draw(LATENESS);
                    let due = self.nodes[node].clock.when(next).clamp(self.now, self.now + POLL);
                    self.schedule(due + lateness, Event::NodeTick(node));
                }
            }
            Event::AtNode(node, PeerAction::Grant(grant)) => {
                let clocks = self.nodes[node].clock.clocks(self.now);
                self.step_node(node, NodeEvent::Grant(grant, clocks), Some(grant));
            }
            Event::AtNode(node, PeerAction::Sever(reason)) => self.step_node(node, NodeEvent::Sever(reason), None),
            Event::PeerTick => {
                let clocks = self.peer_clock.clocks(self.now);
                self.step_peer(None, PeerEvent::Tick(clocks));
                let next = self.peer.next_tick();
                if next != u64::MAX {
                    let lateness = 1 + self.draw(LATENESS);
                    let due = self.peer_clock.when(next).clamp(self.now, self.now + POLL);
                    self.schedule(due + lateness, Event::PeerTick);
                }
            }
            Event::AtPeer(node, heartbeat) => {
                self.nonces = self.nonces.wrapping_add(1);
                let mut fresh = [self.nonces; 16];
                fresh[..8].copy_from_slice(&self.now.to_le_bytes());
                let now = self.peer_clock.clocks(self.now);
                self.step_peer(Some(node), PeerEvent::Heartbeat { heartbeat, now, fresh });
            }
        }
    }

    fn step_node(&mut self, number: usize, event: NodeEvent, grant: Option<Grant>) {
        let node = &mut self.nodes[number];
        let before = node.lease.state().clone();
        let actions = node.lease.step(event);
        if matches!(before, NodeState::Severed(_)) {
            assert_eq!(node.lease.state(), &before, "S3: severed is terminal");
            assert_eq!(actions, [], "S3: who is severed does nothing");
        }
        let shown = node.clock.read(self.now);
        if let NodeState::Active { deadline } = node.lease.state() {
            assert!(shown < *deadline, "S1: active past its deadline");
        }
        for action in actions {
            match action {
                NodeAction::Send(heartbeat) => {
                    self.nodes[number].first_sent.entry(heartbeat.sequence).or_insert(shown);
                    let slower = self.slower;
                    self.send(number, true, slower, &Event::AtPeer(number, heartbeat));
                }
                NodeAction::Renew { deadline } => {
                    self.grants += 1;
                    self.nodes[number].lost_in_a_row = 0;
                    self.check_renewal(number, deadline, grant.expect("only grants renew"));
                }
                NodeAction::Report(reason) => panic!("nobody copied this node's key: {reason:?}"),
                NodeAction::Sever(reason) => {
                    assert_eq!(self.nodes[number].lease.state(), &NodeState::Severed(reason));
                }
            }
        }
    }

    fn check_renewal(&self, number: usize, deadline: u64, grant: Grant) {
        let Node { clock, first_sent, .. } = &self.nodes[number];
        let earned = first_sent[&grant.sequence] + self.timing.lease;
        assert!(deadline <= earned, "S1: a lease longer than counted from the first sending");
        if let (PeerState::Active { deadline: patience }, false) = (self.peer.state(), self.tampered) {
            assert!(self.peer_clock.when(*patience) >= clock.when(deadline), "S2: the controller is less patient");
        }
    }

    fn step_peer(&mut self, from: Option<usize>, event: PeerEvent) {
        let before = self.peer.state().clone();
        let actions = self.peer.step(event);
        if !matches!(before, PeerState::Enrolled | PeerState::Active { .. }) {
            assert_eq!(self.peer.state(), &before, "S3: it is terminal");
        }
        if self.peer.state() == &PeerState::Lost(Reason::LeaseExpired) && self.peer.state() != &before && !self.tampered
        {
            assert!((0..self.nodes.len()).all(|node| !self.carries_traffic(node)), "S2: lost while it carries traffic");
        }
        // The verdict of a tick goes to all; they learn of it with their next heartbeat anyway.
        let receivers = from.map_or(0..self.nodes.len(), |node| node..node + 1);
        for action in actions {
            for node in receivers.clone() {
                self.send(node, false, 0, &Event::AtNode(node, action.clone()));
            }
        }
    }

    fn send(&mut self, node: usize, up: bool, slower: u64, event: &Event) {
        if self.silent {
            return;
        }
        let copies = 1 + u32::from(self.percent(self.network.repeat_percent));
        for _ in 0..copies {
            let may_be_lost = self.nodes[node].lost_in_a_row < self.network.losses_in_a_row;
            if may_be_lost && self.percent(self.network.loss_percent) {
                self.nodes[node].lost_in_a_row += 1;
                continue;
            }
            let mut arrival = self.now + slower + 1 + self.draw(self.network.delay);
            if self.network.in_order {
                let last = self.last_arrival.entry((node, up)).or_default();
                arrival = arrival.max(*last + 1);
                *last = arrival;
            }
            self.schedule(arrival, event.clone());
        }
    }

    fn schedule(&mut self, time: u64, event: Event) {
        self.queue.push(Reverse((time, self.events.len())));
        self.events.push(event);
    }

    fn percent(&mut self, percent: u32) -> bool {
        self.draw(100) < u64::from(percent)
    }

    /// xorshift64*
    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16) % below
    }
}
