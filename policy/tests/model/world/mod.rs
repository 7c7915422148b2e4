//! A node (and perhaps a copy of it), its controller (or two that share a store), and everything between them, as a model
//! whose every state can be visited.
//!
//! Time comes in ticks. What a model leaves out costs nothing; what it allows, it allows at every step: the checker tries all
//! orders. The state holds, beside the machines, what an observer who sees everything needs to say whether the properties hold.

mod steps;

pub(crate) use steps::{PAUSE, S1, S2, S3_BOOT, S3_CONTROLLER, S3_NODE, S4, S4_KNOWN, S5};

use opencluster_policy::lease::{Clocks, Heartbeat, NodeAction, NodeEvent, PeerAction, PeerState, Reason, Timing};

use super::side::{Mutant, NodeSide, PeerSide};

/// Where the controllers' knowledge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Controllers {
    /// One, which forgets everything when it crashes.
    Alone,
    /// Two, which share a store with compare-and-swap.
    Sharing,
}

/// What becomes of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    /// Whatever was ever sent may arrive at any time, any number of times, in any order, or never.
    Hostile,
    /// In order; each message takes at most `delay` ticks or is lost, at most `losses` between two grants that arrive.
    Lossy { delay: u8, losses: u8 },
}

/// One model.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) timing: Timing,
    pub(crate) horizon: u64,
    pub(crate) network: Network,
    pub(crate) controllers: Controllers,
    /// The node may be copied, once, at any moment; the copy may start at any later one, on another boot or the same.
    pub(crate) copies: bool,
    /// Ticks for which the nodes' clocks may stand still in all.
    pub(crate) pauses: u8,
    /// Ticks that the nodes' clocks may gain or lose in all.
    pub(crate) drift: u8,
    /// How often controllers may crash.
    pub(crate) crashes: u8,
    pub(crate) mutant: Option<Mutant>,
}

/// A node's host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    pub(crate) side: NodeSide,
    pub(crate) clock: u64,
    /// Until when the kernel forwards packets, by the node's clock.
    kernel: u64,
    /// When each heartbeat was first sent, by the node's clock.
    first_sent: Vec<u64>,
    /// By its clock, when it became two; what it earned before is the common past.
    split: Option<u64>,
    other_boot: bool,
    /// It carried traffic once and then did not.
    was_cut: bool,
    /// It got a lease that it earned after the split.
    earned_alone: bool,
    /// A grant arrived since the last long pause.
    granted_since_pause: bool,
}

/// A message that is under way, and for how long.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Flying<T> {
    node: usize,
    message: T,
    age: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Controller {
    up: bool,
    pending: Option<Pending>,
    /// What only it knows: for controllers that do not share.
    own: Option<PeerSide>,
}

/// What was read from the store and handled, and is not written back yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pending {
    read: (usize, PeerSide),
    from: usize,
    heartbeat: Heartbeat,
    side: PeerSide,
    actions: Vec<PeerAction>,
}

/// What the observer has seen go wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Wrong {
    longer_than_earned: bool,
    revived: bool,
    granted_after_the_end: bool,
    granted_to_another_boot: bool,
    copies_unnoticed: bool,
    lost_while_carrying: bool,
    pause_missed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    hostile: bool,
    pub(crate) real: u64,
    pub(crate) nodes: Vec<Node>,
    copy: Option<Box<Node>>,
    copied: bool,
    controllers: Vec<Controller>,
    store: PeerSide,
    owner: usize,
    /// So many were given; a nonce that never left its controller may be drawn again.
    grants: u8,
    up: Vec<Flying<Heartbeat>>,
    down: Vec<Flying<PeerAction>>,
    losses: u8,
    pauses: u8,
    paused_in_a_row: u8,
    long_pause: bool,
    drift: u8,
    crashes: u8,
    /// Which copies the controller heard after they became two.
    heard: [bool; 2],
    wrong: Wrong,
}

/// The second controller's clock.
const OFFSET: u64 = 50;

impl Node {
    pub(crate) fn carries(&self) -> bool {
        self.clock < self.kernel
    }
}

impl World {
    fn controller_clocks(&self, controller: usize) -> Clocks {
        clocks(self.real + OFFSET * controller as u64, 0)
    }

    /// Its last word on the node.
    pub(crate) fn peer(&self) -> &PeerState {
        self.store.state()
    }

    fn tampered(&self) -> bool {
        self.nodes.len() > 1 || self.copied || self.pauses > 0
    }

    fn node_step(&mut self, timing: &Timing, number: usize, event: NodeEvent) {
        let node = &mut self.nodes[number];
        let actions = node.side.step(event);
        for action in actions {
            let node = &mut self.nodes[number];
            match action {
                NodeAction::Send(heartbeat) => {
                    let sequence = heartbeat.sequence as usize;
                    if node.first_sent.len() < sequence {
                        node.first_sent.push(node.clock);
                    }
                    let flying = Flying { node: number, message: heartbeat, age: 0 };
                    push(&mut self.up, flying, self.hostile);
                }
                NodeAction::Renew { deadline } => {
                    let earned = node.first_sent.last().map_or(0, |sent| sent + timing.lease);
                    self.wrong.longer_than_earned |= deadline > earned;
                    self.wrong.revived |= node.was_cut && deadline > node.clock;
                    let alone = node.split.is_some_and(|split| deadline > split + timing.lease);
                    self.wrong.granted_to_another_boot |= alone && node.other_boot;
                    node.earned_alone |= alone;
                    node.kernel = deadline;
                    node.granted_since_pause = true;
                    self.losses = 0;
                }
                NodeAction::Report(_) => {}
                NodeAction::Sever(_) => {
                    node.was_cut |= node.kernel > 0;
                    node.kernel = 0;
                }
            }
        }
    }

    /// What a controller did with an event is in force now.
    fn observe(&mut self, was_in_force: bool, heartbeat: Option<(usize, Heartbeat)>, actions: &[PeerAction]) {
        let granted = actions.iter().any(|action| matches!(action, PeerAction::Grant(_)));
        self.wrong.granted_after_the_end |= granted && !was_in_force;
        self.grants +=
            u8::from(granted && !actions.iter().any(|action| self.down.iter().any(|flying| flying.message == *action)));
        if let Some((node, heartbeat)) = heartbeat
            && was_in_force
            && self.nodes[node].split.is_some_and(|split| heartbeat.clocks.boottime > split)
        {
            self.heard[node] = true;
            self.wrong.copies_unnoticed |= self.heard == [true, true] && self.store.in_force();
        }
        if was_in_force && matches!(self.peer(), PeerState::Lost(Reason::LeaseExpired)) && !self.tampered() {
            self.wrong.lost_while_carrying |= self.nodes.iter().any(Node::carries);
        }
    }

    fn answer(&mut self, to: usize, actions: Vec<PeerAction>) {
        for action in actions {
            push(&mut self.down, Flying { node: to, message: action, age: 0 }, self.hostile);
        }
    }
}

fn clocks(time: u64, host: u64) -> Clocks {
    Clocks { monotonic_raw: time, boottime: time, realtime: host }
}

/// In the order of sending; where that does not matter, each message once.
fn push<T: Ord>(list: &mut Vec<Flying<T>>, flying: Flying<T>, hostile: bool) {
    if !hostile {
        list.push(flying);
    } else if let Err(place) = list.binary_search(&flying) {
        list.insert(place, flying);
    }
}
