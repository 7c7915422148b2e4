//! The cluster that `lease_cluster.rs` runs: the real state machines, everything around them simulated from a seed.
//!
//! A node's session is a stream as the transport gives it: messages arrive in order, or not at all. S1 is asserted at every
//! renewal, S2 (nobody is lost who carries traffic) at every loss, S3 at every event of who is out.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use opencluster_policy::lease::{
    Clocks, Grant, Heartbeat, Host, NodeAction, NodeEvent, NodeLease, NodeState, PeerAction, PeerEvent, PeerLease,
    PeerState, Reason, Timing,
};

pub(crate) const MILLISECOND: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1000 * MILLISECOND;
pub(crate) const LEASE: u64 = 3 * SECOND;

const TIMING: Timing = Timing::new(LEASE, SECOND / 2);

/// How late timers run, at most.
const LATENESS: u64 = 3 * MILLISECOND;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Network {
    pub(crate) loss_percent: u64,
    pub(crate) least_delay: u64,
    pub(crate) jitter: u64,
}

/// What befalls a node.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fate {
    /// It stands still for so long, and none of its clocks shows it.
    Pause(usize, u64),
    /// A copy of it starts, so much later.
    Copy(usize, u64),
    /// It does not apply revocations any more.
    Deaf(usize),
}

#[derive(Clone, Debug)]
enum Event {
    Tick(usize),
    ControllerTick,
    Up(usize, Up),
    Down(usize, Down),
    Fate(Fate),
    Start(Box<Machine>),
}

#[derive(Clone, Debug)]
enum Up {
    Heartbeat(Heartbeat),
    Acknowledged(u64),
    Found(Reason),
}

#[derive(Clone, Debug)]
enum Down {
    Action(PeerAction),
    Revocations(u64),
}

/// A host that runs a node, the copies of one included.
#[derive(Clone, Debug)]
struct Machine {
    /// Whose enrolment it holds.
    node: usize,
    /// Of the node's enrolments.
    enrolment: u32,
    lease: NodeLease,
    first_sent: BTreeMap<u64, u64>,
    /// Its clock: what it started from, how fast it runs, how long it stood still.
    offset: u64,
    ppm: i64,
    stood_still: u64,
    still_until: u64,
    resumed: Option<u64>,
    deaf: bool,
    applied: u64,
    /// When the last message in each direction arrives: a later one does not overtake it.
    arrivals: [u64; 2],
}

#[derive(Debug)]
struct Peer {
    lease: PeerLease,
    enrolment: u32,
    ended_at: Option<u64>,
}

pub(crate) struct Cluster {
    network: Network,
    random: u64,
    now: u64,
    queue: BinaryHeap<Reverse<(u64, usize)>>,
    events: Vec<Option<Event>>,
    hosts: Vec<Machine>,
    peers: Vec<Peer>,
    revocations: u64,
    nonces: u64,
    tampered: Vec<bool>,
    pub(crate) suspicions: u32,
}

impl Machine {
    fn clock(&self, now: u64) -> u64 {
        let elapsed = now - self.stood_still;
        self.offset + elapsed.saturating_add_signed(elapsed as i64 / 1_000_000 * self.ppm)
    }

    fn carries(&self, now: u64) -> bool {
        match self.lease.state() {
            NodeState::Active { deadline } => now >= self.still_until && self.clock(now) < *deadline,
            _ => false,
        }
    }
}

fn clocks(time: u64) -> Clocks {
    Clocks { monotonic_raw: time, boottime: time, realtime: time }
}

impl Cluster {
    pub(crate) fn new(nodes: usize, network: Network, seed: u64) -> Self {
        let mut cluster = Self {
            network,
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            now: 0,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            hosts: Vec::new(),
            peers: Vec::new(),
            revocations: 0,
            nonces: 0,
            tampered: vec![false; nodes],
            suspicions: 0,
        };
        cluster.schedule(0, Event::ControllerTick);
        for node in 0..nodes {
            cluster.enrol(node);
        }
        cluster
    }

    fn enrol(&mut self, node: usize) {
        let nonce = self.nonce();
        let enrolment = self.peers.get(node).map_or(0, |peer| peer.enrolment + 1);
        let mut lease = PeerLease::enrolled(nonce, TIMING, Host::default(), clocks(self.now));
        lease.step(PeerEvent::Announced { version: self.revocations, now: clocks(self.now) });
        let peer = Peer { lease, enrolment, ended_at: None };
        if node < self.peers.len() {
            self.peers[node] = peer;
        } else {
            self.peers.push(peer);
        }
        let offset = self.draw(1_000_000 * SECOND);
        let ppm = self.draw(401) as i64 - 200;
        let shown = offset + self.now.saturating_add_signed(self.now as i64 / 1_000_000 * ppm);
        let host = Machine {
            node,
            enrolment,
            lease: NodeLease::enrolled(nonce, TIMING, Host::default(), clocks(shown)),
            first_sent: BTreeMap::new(),
            offset,
            ppm,
            stood_still: 0,
            still_until: 0,
            resumed: None,
            deaf: false,
            applied: 0,
            arrivals: [0; 2],
        };
        self.hosts.push(host);
        self.tampered[node] = false;
        let (number, start) = (self.hosts.len() - 1, self.draw(SECOND / 2));
        self.schedule(self.now + start, Event::Tick(number));
        self.send_down(number, Down::Revocations(self.revocations));
    }

    pub(crate) fn enrol_all(&mut self) {
        for node in 0..self.peers.len() {
            self.enrol(node);
        }
    }

    pub(crate) fn at(&mut self, time: u64, fate: Fate) {
        self.schedule(time, Event::Fate(fate));
    }

    /// Each node is told, and applies it.
    pub(crate) fn revoke_somebody(&mut self) {
        self.revocations += 1;
        for peer in &mut self.peers {
            peer.lease.step(PeerEvent::Announced { version: self.revocations, now: clocks(self.now) });
        }
        for host in 0..self.hosts.len() {
            self.send_down(host, Down::Revocations(self.revocations));
        }
    }

    pub(crate) fn restart_controller(&mut self) {
        for peer in &mut self.peers {
            peer.lease.step(PeerEvent::Forgotten);
        }
    }

    pub(crate) fn carrying(&self) -> usize {
        self.hosts.iter().filter(|host| host.carries(self.now)).count()
    }

    pub(crate) fn peer(&self, node: usize) -> &PeerState {
        self.peers[node].lease.state()
    }

    /// The nodes that are out, for a failed assertion's message.
    pub(crate) fn ended(&self) -> Vec<(usize, &PeerState)> {
        let out = |state: &PeerState| !matches!(state, PeerState::Enrolled | PeerState::Active { .. });
        (0..self.peers.len()).map(|node| (node, self.peer(node))).filter(|(_, state)| out(state)).collect()
    }

    /// How long after it went on the node was found out.
    pub(crate) fn found_after_resume(&self, node: usize) -> Option<u64> {
        Some(self.peers[node].ended_at?.saturating_sub(self.hosts[node].resumed?))
    }

    pub(crate) fn run_for(&mut self, length: u64) {
        let end = self.now + length;
        while let Some(&Reverse((time, number))) = self.queue.peek()
            && time <= end
        {
            self.queue.pop();
            self.now = time.max(self.now);
            if let Some(event) = self.events[number].take() {
                self.happen(event);
            }
        }
        self.now = end;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick(number) => {
                if self.waits(number, Event::Tick(number)) {
                    return;
                }
                let now = clocks(self.hosts[number].clock(self.now));
                self.node_step(number, NodeEvent::Tick(now));
                let next = self.hosts[number].lease.next_tick();
                if next != u64::MAX {
                    let wait = next.saturating_sub(now.boottime).min(100 * MILLISECOND) + 1 + self.draw(LATENESS);
                    self.schedule(self.now + wait, Event::Tick(number));
                }
            }
            Event::ControllerTick => {
                for node in 0..self.peers.len() {
                    self.peer_step(node, None, PeerEvent::Tick(clocks(self.now)));
                }
                self.schedule(self.now + 20 * MILLISECOND, Event::ControllerTick);
            }
            Event::Up(number, message) => self.received_up(number, message),
            Event::Down(number, message) => {
                if self.waits(number, Event::Down(number, message.clone())) {
                    return;
                }
                self.received_down(number, message);
            }
            Event::Fate(Fate::Pause(node, length)) => {
                let now = self.now;
                let host = &mut self.hosts[node];
                host.stood_still += length;
                host.still_until = now + length;
                host.resumed = Some(now + length);
                self.tampered[node] = true;
            }
            Event::Fate(Fate::Copy(node, later)) => {
                let mut copy = self.hosts[node].clone();
                copy.stood_still += later;
                self.tampered[node] = true;
                self.schedule(self.now + later, Event::Start(Box::new(copy)));
            }
            Event::Fate(Fate::Deaf(node)) => self.hosts[node].deaf = true,
            Event::Start(host) => {
                self.hosts.push(*host);
                self.schedule(self.now, Event::Tick(self.hosts.len() - 1));
            }
        }
    }

    /// What comes to a host that stands still waits until it goes on.
    fn waits(&mut self, number: usize, event: Event) -> bool {
        let until = self.hosts[number].still_until;
        let waits = self.now < until;
        if waits {
            self.schedule(until, event);
        }
        waits
    }

    fn received_up(&mut self, number: usize, message: Up) {
        let Machine { node, enrolment, .. } = self.hosts[number];
        if self.peers[node].enrolment != enrolment {
            // Its key is revoked: it has no session.
            return;
        }
        let (now, fresh) = (clocks(self.now), self.nonce());
        let event = match message {
            Up::Heartbeat(heartbeat) => PeerEvent::Heartbeat { heartbeat, now, fresh },
            Up::Acknowledged(version) => PeerEvent::Acknowledged { version, now, fresh },
            Up::Found(reason) => PeerEvent::Found(reason),
        };
        self.peer_step(node, Some(number), event);
    }

    fn received_down(&mut self, number: usize, message: Down) {
        let now = clocks(self.hosts[number].clock(self.now));
        match message {
            Down::Action(PeerAction::Grant(grant)) => self.node_step(number, NodeEvent::Grant(grant, now)),
            Down::Action(PeerAction::Sever(reason)) => self.node_step(number, NodeEvent::Sever(reason)),
            Down::Revocations(version) => {
                let host = &mut self.hosts[number];
                if !host.deaf {
                    host.applied = host.applied.max(version);
                    let applied = host.applied;
                    self.send_up(number, Up::Acknowledged(applied));
                }
            }
        }
    }

    fn node_step(&mut self, number: usize, event: NodeEvent) {
        let grant = if let NodeEvent::Grant(grant, _) = &event { Some(*grant) } else { None };
        let now = self.now;
        let host = &mut self.hosts[number];
        let before = host.lease.state().clone();
        let actions = host.lease.step(event);
        if matches!(before, NodeState::Severed(_)) {
            assert_eq!((host.lease.state(), actions.as_slice()), (&before, [].as_slice()), "S3: severed is terminal");
        }
        for action in actions {
            let host = &mut self.hosts[number];
            match action {
                NodeAction::Send(heartbeat) => {
                    let shown = host.clock(now);
                    let first = *host.first_sent.entry(heartbeat.sequence).or_insert(shown);
                    assert_eq!(heartbeat.clocks.boottime, first, "sent again as it was");
                    // What was lost of the revocations goes along with each heartbeat.
                    let (applied, deaf) = (host.applied, host.deaf);
                    self.send_up(number, Up::Acknowledged(applied));
                    self.send_up(number, Up::Heartbeat(heartbeat));
                    if applied < self.revocations && !deaf {
                        self.send_down(number, Down::Revocations(self.revocations));
                    }
                }
                NodeAction::Renew { deadline } => {
                    let Grant { sequence, confirm, .. } = grant.expect("only grants renew");
                    assert!(deadline <= host.first_sent[&sequence] + LEASE, "S1: counted from the first sending");
                    self.suspicions += u32::from(confirm);
                }
                NodeAction::Report(reason) => self.send_up(number, Up::Found(reason)),
                NodeAction::Sever(_) => {}
            }
        }
    }

    fn peer_step(&mut self, node: usize, from: Option<usize>, event: PeerEvent) {
        let peer = &mut self.peers[node];
        let was = peer.lease.state().clone();
        let actions = peer.lease.step(event);
        let ended = !matches!(peer.lease.state(), PeerState::Enrolled | PeerState::Active { .. });
        if !matches!(was, PeerState::Enrolled | PeerState::Active { .. }) {
            assert_eq!(peer.lease.state(), &was, "S3: it is terminal");
        } else if ended {
            peer.ended_at = Some(self.now);
            let lost = matches!(peer.lease.state(), PeerState::Lost(_));
            let carries = |host: &Machine| host.node == node && host.carries(self.now);
            assert!(self.tampered[node] || !lost || !self.hosts.iter().any(carries), "S2: lost while it carries");
        }
        if let Some(number) = from {
            for action in actions {
                self.send_down(number, Down::Action(action));
            }
        }
    }

    fn send_up(&mut self, number: usize, message: Up) {
        self.send(number, 0, Event::Up(number, message));
    }

    fn send_down(&mut self, number: usize, message: Down) {
        self.send(number, 1, Event::Down(number, message));
    }

    fn send(&mut self, number: usize, direction: usize, event: Event) {
        if self.draw(100) < self.network.loss_percent {
            return;
        }
        let arrival = self.now + self.network.least_delay + self.draw(self.network.jitter);
        let last = &mut self.hosts[number].arrivals[direction];
        *last = arrival.max(*last + 1);
        let arrival = *last;
        self.schedule(arrival, event);
    }

    fn schedule(&mut self, time: u64, event: Event) {
        self.queue.push(Reverse((time, self.events.len())));
        self.events.push(Some(event));
    }

    fn nonce(&mut self) -> [u8; 16] {
        self.nonces += 1;
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&self.nonces.to_le_bytes());
        nonce
    }

    /// xorshift64*
    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16) % below
    }
}
