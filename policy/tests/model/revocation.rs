//! How long the others go on taking flows of a node that is gone: the bound of S2.
//!
//! Node X sends a last heartbeat at some moment and is never heard again. Node P, its peer, runs the whole protocol over a
//! network that may lose or delay anything, pauses included; it takes flows of X while it carries traffic itself and has not
//! applied the revocation. The controller is on time: that is what its own deadline is for. Its store is not: writing the
//! verdict down, without which nothing is announced, takes as long as it likes, or for ever.

use opencluster_policy::lease::{
    Clocks, Heartbeat, Host, NodeAction, NodeEvent, PeerAction, PeerEvent, PeerState, Timing,
};
use stateright::{Model, Property};

use super::side::{Mutant, NodeSide, PeerSide};

#[derive(Clone, Debug)]
pub(crate) struct Gone {
    pub(crate) timing: Timing,
    pub(crate) horizon: u64,
    pub(crate) mutant: Option<Mutant>,
}

impl Gone {
    /// From the arrival of X's last heartbeat: its lease, the controller's margin, the patience with P, and P's own lease.
    pub(crate) fn bound(&self) -> u64 {
        self.timing.lease + self.timing.margin + self.timing.patience + self.timing.lease
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    real: u64,
    /// When X's last heartbeat arrived.
    last_heard: u64,
    /// X at the controller.
    gone: PeerSide,
    /// When the controller called it lost.
    verdict: Option<u64>,
    /// P, until when its kernel forwards, and P at the controller.
    node: NodeSide,
    kernel: u64,
    peer: PeerSide,
    grants: u8,
    up: Vec<Heartbeat>,
    down: Vec<PeerAction>,
    revocation_sent: bool,
    /// That took so long that nobody got a grant any more.
    sent_late: bool,
    applied: bool,
    acknowledged: bool,
}

impl World {
    /// P takes flows of X.
    fn takes(&self) -> bool {
        self.real < self.kernel && !self.applied
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Time,
    HeardOfX,
    NodeTick,
    Up(usize),
    Down(usize),
    /// The verdict is stored, and announced.
    Commit,
    /// The revocation reaches P and is applied.
    Apply,
    /// Its acknowledgement reaches the controller.
    Acknowledge,
}

fn clocks(time: u64) -> Clocks {
    Clocks { monotonic_raw: time, boottime: time, realtime: time }
}

fn insert<T: Ord>(list: &mut Vec<T>, item: T) {
    if let Err(place) = list.binary_search(&item) {
        list.insert(place, item);
    }
}

impl World {
    fn node_actions(&mut self, actions: Vec<NodeAction>) {
        for action in actions {
            match action {
                NodeAction::Send(heartbeat) => insert(&mut self.up, heartbeat),
                NodeAction::Renew { deadline } => self.kernel = deadline,
                NodeAction::Report(_) => {}
                NodeAction::Sever(_) => self.kernel = 0,
            }
        }
    }

    fn peer_actions(&mut self, actions: Vec<PeerAction>) {
        for action in actions {
            if let PeerAction::Grant(grant) = &action {
                self.grants = self.grants.max(grant.nonce[0]);
            }
            insert(&mut self.down, action);
        }
    }

    /// What the controller does on time in each tick.
    fn controller_tick(&mut self) {
        let now = clocks(self.real);
        if self.gone.due(now) {
            for action in self.gone.step(PeerEvent::Tick(now)) {
                if matches!(action, PeerAction::Sever(_)) {
                    self.verdict = Some(self.real);
                    self.peer.step(PeerEvent::Unannounced(self.verdict));
                }
            }
        }
        let actions = self.peer.step(PeerEvent::Tick(now));
        self.peer_actions(actions);
    }
}

impl Model for Gone {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let start = clocks(0);
        let mut gone = PeerSide::enrolled(self.timing, start, self.mutant);
        let first = Heartbeat { sequence: 1, nonce: [0; 16], clocks: start, granted: 0, host: Host::default() };
        gone.step(PeerEvent::Heartbeat { heartbeat: first, now: start, fresh: [1; 16] });
        vec![World {
            real: 0,
            last_heard: 0,
            gone,
            verdict: None,
            node: NodeSide::enrolled(self.timing, start, self.mutant),
            kernel: 0,
            peer: PeerSide::enrolled(self.timing, start, self.mutant),
            grants: 0,
            up: Vec::new(),
            down: Vec::new(),
            revocation_sent: false,
            sent_late: false,
            applied: false,
            acknowledged: false,
        }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.real < self.horizon {
            steps.push(Step::Time);
        }
        // It is heard for a while, or not.
        if world.last_heard < world.real && world.real <= 1 {
            steps.push(Step::HeardOfX);
        }
        if world.node.due(clocks(world.real)) {
            steps.push(Step::NodeTick);
        }
        steps.extend((0..world.up.len()).map(Step::Up));
        steps.extend((0..world.down.len()).map(Step::Down));
        if world.verdict.is_some() && !world.revocation_sent {
            steps.push(Step::Commit);
        }
        if world.revocation_sent && !world.applied {
            steps.push(Step::Apply);
        }
        if world.applied && !world.acknowledged {
            steps.push(Step::Acknowledge);
        }
    }

    fn next_state(&self, before: &World, step: Step) -> Option<World> {
        let mut world = before.clone();
        let now = clocks(world.real);
        match step {
            Step::Time => {
                world.real += 1;
                world.controller_tick();
            }
            Step::HeardOfX => {
                let heartbeat =
                    Heartbeat { sequence: 2, nonce: [1; 16], clocks: now, granted: 0, host: Host::default() };
                world.gone.step(PeerEvent::Heartbeat { heartbeat, now, fresh: [2; 16] });
                world.last_heard = world.real;
            }
            Step::NodeTick => {
                let actions = world.node.step(NodeEvent::Tick(now));
                world.node_actions(actions);
            }
            Step::Up(number) => {
                let (heartbeat, fresh) = (world.up[number], [world.grants + 1; 16]);
                let actions = world.peer.step(PeerEvent::Heartbeat { heartbeat, now, fresh });
                world.peer_actions(actions);
            }
            Step::Down(number) => {
                let event = match world.down[number].clone() {
                    PeerAction::Grant(grant) => NodeEvent::Grant(grant, now),
                    PeerAction::Sever(reason) => NodeEvent::Sever(reason),
                };
                let actions = world.node.step(event);
                world.node_actions(actions);
            }
            Step::Commit => {
                world.revocation_sent = true;
                world.sent_late = world.verdict.is_some_and(|verdict| world.real >= verdict + self.timing.patience);
                world.peer.step(PeerEvent::Announced { version: 1, now });
                world.peer.step(PeerEvent::Unannounced(None));
            }
            Step::Apply => world.applied = true,
            Step::Acknowledge => {
                world.acknowledged = true;
                let fresh = [world.grants + 1; 16];
                let actions = world.peer.step(PeerEvent::Acknowledged { version: 1, now, fresh });
                world.peer_actions(actions);
            }
        }
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(S2_BOUND, |gone: &Gone, world: &World| {
                !world.takes() || world.real < world.last_heard + gone.bound()
            }),
            Property::sometimes("the bound is not much too long", |gone: &Gone, world: &World| {
                world.takes() && world.real + 2 >= world.last_heard + gone.bound()
            }),
            Property::sometimes("P goes on when it has acknowledged", |_, world: &World| {
                world.acknowledged
                    && world.real < world.kernel
                    && matches!(world.peer.state(), PeerState::Active { .. })
            }),
            Property::sometimes("P goes on when the store was late, but not too late", |_, world: &World| {
                world.sent_late && world.acknowledged && world.real < world.kernel && world.peer.in_force()
            }),
        ]
    }
}

pub(crate) const S2_BOUND: &str = "S2: no peer takes flows of a lost node later than the bound";
