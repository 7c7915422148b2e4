//! What may happen next in a world, what comes of it, and what must hold in every world.

use opencluster_policy::lease::{Clocks, Heartbeat, Host, NodeEvent, NodeState, PeerAction, PeerEvent};
use stateright::{Model, Property};

use super::{Controller, Controllers, Network, Node, OFFSET, Pending, Setting, World, Wrong, clocks};
use crate::model::side::{Mutant, NodeSide, PeerSide};

/// How a host's clock fares in one tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Pace {
    Even,
    Still,
    Slow,
    Fast,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Time(Vec<Pace>),
    NodeTick(usize),
    ControllerTick(usize),
    /// The heartbeat with this number in the list arrives at this controller.
    Up(usize, usize),
    LoseUp,
    Down(usize, usize),
    LoseDown,
    Write(usize),
    Crash(usize),
    Restart(usize),
    TakeOver(usize),
    Copy,
    StartCopy {
        other_boot: bool,
    },
}

impl Setting {
    fn hostile(&self) -> bool {
        self.network == Network::Hostile
    }

    fn apart(&self) -> bool {
        self.mutant == Some(Mutant::ControllersApart)
    }

    fn node_clocks(world: &World, node: usize) -> Clocks {
        // No two hosts read the same nanosecond at each of their heartbeats.
        clocks(world.nodes[node].clock, node as u64)
    }

    fn paces(&self, world: &World) -> Vec<Vec<Pace>> {
        let mut all = vec![vec![]];
        for _ in &world.nodes {
            let mut next = Vec::new();
            for before in all {
                for pace in [Pace::Even, Pace::Still, Pace::Slow, Pace::Fast] {
                    let mut paces: Vec<Pace> = before.clone();
                    paces.push(pace);
                    let used = |kinds: &[Pace]| paces.iter().filter(|pace| kinds.contains(pace)).count() as u8;
                    if world.pauses + used(&[Pace::Still]) <= self.pauses
                        && world.drift + used(&[Pace::Slow, Pace::Fast]) <= self.drift
                    {
                        next.push(paces);
                    }
                }
            }
            all = next;
        }
        all
    }

    /// Nothing that must happen in this tick is left to do.
    fn tick_is_done(&self, world: &World) -> bool {
        let Network::Lossy { delay, .. } = self.network else { return true };
        let late = |age: u8| age >= delay;
        !world.up.iter().any(|flying| late(flying.age))
            && !world.down.iter().any(|flying| late(flying.age))
            && !(0..world.nodes.len()).any(|node| world.nodes[node].side.due(Self::node_clocks(world, node)))
    }

    fn receive(&self, world: &mut World, controller: usize, from: usize, heartbeat: Heartbeat) {
        let now = world.controller_clocks(controller);
        let mut fresh = [world.grants; 16];
        fresh[1] = 1 + controller as u8;
        let event = PeerEvent::Heartbeat { heartbeat, now, fresh };
        if self.controllers == Controllers::Sharing
            && let Some(grant) = world.store.repetition(&heartbeat)
        {
            // Whichever of them answers takes nothing over.
            return world.answer(from, vec![PeerAction::Grant(grant)]);
        }
        let mut side = match world.controllers[controller].own.take() {
            Some(own) => own,
            None => world.store.clone(),
        };
        if world.owner != controller && !self.apart() {
            side.step(PeerEvent::Adopted(now));
        }
        let was_in_force = side.in_force();
        let actions = side.step(event);
        if self.apart() {
            world.controllers[controller].own = Some(side.clone());
        }
        if self.controllers == Controllers::Sharing && !self.apart() && side != world.store {
            let read = (world.owner, world.store.clone());
            let pending = Pending { read, from, heartbeat, side, actions };
            world.controllers[controller].pending = Some(pending);
            return;
        }
        world.store = side;
        world.observe(was_in_force, Some((from, heartbeat)), &actions);
        world.answer(from, actions);
    }

    fn write(&self, world: &mut World, controller: usize) {
        let Some(pending) = world.controllers[controller].pending.take() else { return };
        if pending.read != (world.owner, world.store.clone()) && self.mutant != Some(Mutant::BlindWrites) {
            // The node sends it again.
            return;
        }
        let was_in_force = world.store.in_force();
        world.owner = controller;
        world.store = pending.side;
        world.observe(was_in_force, Some((pending.from, pending.heartbeat)), &pending.actions);
        world.answer(pending.from, pending.actions);
    }
}

impl Model for Setting {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let start = clocks(0, 0);
        let node = Node {
            side: NodeSide::enrolled(self.timing, start, self.mutant),
            clock: 0,
            kernel: 0,
            first_sent: Vec::new(),
            split: None,
            other_boot: false,
            was_cut: false,
            earned_alone: false,
            granted_since_pause: false,
        };
        let mut timing = self.timing;
        if self.mutant == Some(Mutant::NoMargin) {
            timing.margin = 0;
        }
        let store = PeerSide::enrolled(timing, start, self.mutant);
        let count = if self.controllers == Controllers::Sharing || self.apart() { 2 } else { 1 };
        let controller = |number: usize| {
            let mut own = store.clone();
            if number > 0 {
                own.step(PeerEvent::Adopted(clocks(OFFSET * number as u64, 0)));
            }
            Controller { up: true, pending: None, own: self.apart().then_some(own) }
        };
        vec![World {
            hostile: self.hostile(),
            real: 0,
            nodes: vec![node],
            copy: None,
            copied: false,
            controllers: (0..count).map(controller).collect(),
            store: store.clone(),
            owner: 0,
            grants: 0,
            up: Vec::new(),
            down: Vec::new(),
            losses: 0,
            pauses: 0,
            paused_in_a_row: 0,
            long_pause: false,
            drift: 0,
            crashes: 0,
            heard: [false; 2],
            wrong: Wrong::default(),
        }]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.real < self.horizon && self.tick_is_done(world) {
            steps.extend(self.paces(world).into_iter().map(Step::Time));
        }
        for node in 0..world.nodes.len() {
            // After the end a new heartbeat is only told so again: with copies about, that is left out.
            let matters = !self.copies || world.store.in_force() || !world.nodes[node].carries();
            if matters && world.nodes[node].side.due(Self::node_clocks(world, node)) {
                steps.push(Step::NodeTick(node));
            }
        }
        for (number, controller) in world.controllers.iter().enumerate() {
            if !controller.up {
                steps.push(Step::Restart(number));
                continue;
            }
            if world.crashes < self.crashes {
                steps.push(Step::Crash(number));
            }
            if world.owner == number && world.store.due(world.controller_clocks(number)) {
                steps.push(Step::ControllerTick(number));
            }
            if world.owner != number && !world.controllers[world.owner].up {
                steps.push(Step::TakeOver(number));
            }
            if controller.pending.is_some() {
                steps.push(Step::Write(number));
            } else if self.hostile() {
                if !self.copies || world.store.in_force() {
                    steps.extend((0..world.up.len()).map(|message| Step::Up(number, message)));
                }
            } else if !world.up.is_empty() {
                steps.push(Step::Up(number, 0));
            }
        }
        if self.hostile() {
            for (message, flying) in world.down.iter().enumerate() {
                // An answer goes to whoever holds the key: the copy may have taken over the connection.
                steps.extend(
                    (0..world.nodes.len())
                        .filter(|node| flying.node == *node || self.copies)
                        .map(|node| Step::Down(node, message)),
                );
            }
        } else if let Some(first) = world.down.first() {
            steps.push(Step::Down(first.node, 0));
        }
        if let Network::Lossy { losses, .. } = self.network
            && world.losses < losses
        {
            if !world.up.is_empty() {
                steps.push(Step::LoseUp);
            }
            if !world.down.is_empty() {
                steps.push(Step::LoseDown);
            }
        }
        if self.copies && !world.copied {
            steps.push(Step::Copy);
        }
        if world.copy.is_some() {
            steps.push(Step::StartCopy { other_boot: false });
            steps.push(Step::StartCopy { other_boot: true });
        }
    }

    fn next_state(&self, before: &World, step: Step) -> Option<World> {
        let mut world = before.clone();
        match step {
            Step::Time(paces) => {
                world.real += 1;
                for flying in &mut world.up {
                    flying.age = flying.age.saturating_add(u8::from(!self.hostile()));
                }
                for flying in &mut world.down {
                    flying.age = flying.age.saturating_add(u8::from(!self.hostile()));
                }
                for (node, pace) in world.nodes.iter_mut().zip(&paces) {
                    node.clock += match pace {
                        Pace::Even => 1,
                        Pace::Still | Pace::Slow => 0,
                        Pace::Fast => 2,
                    };
                    node.was_cut |= node.kernel > 0 && !node.carries();
                }
                world.pauses += paces.iter().filter(|pace| **pace == Pace::Still).count() as u8;
                world.drift += paces.iter().filter(|pace| matches!(pace, Pace::Slow | Pace::Fast)).count() as u8;
                world.paused_in_a_row = if paces[0] == Pace::Still { world.paused_in_a_row + 1 } else { 0 };
                // Over a network that delays nothing, all that follows from the first heartbeat has followed by now.
                world.wrong.pause_missed |=
                    !self.hostile() && world.long_pause && world.nodes[0].granted_since_pause && world.store.in_force();
                if u64::from(world.paused_in_a_row) > self.timing.step + 1 {
                    world.long_pause = true;
                    world.nodes[0].granted_since_pause = false;
                }
            }
            Step::NodeTick(node) => {
                let now = Self::node_clocks(&world, node);
                world.node_step(&self.timing, node, NodeEvent::Tick(now));
            }
            Step::ControllerTick(controller) => {
                let now = world.controller_clocks(controller);
                let mut side = world.store.clone();
                let was_in_force = side.in_force();
                let actions = side.step(PeerEvent::Tick(now));
                world.store = side;
                world.observe(was_in_force, None, &actions);
                world.answer(0, actions);
            }
            Step::Up(controller, message) => {
                let flying = if self.hostile() { world.up[message].clone() } else { world.up.remove(message) };
                self.receive(&mut world, controller, flying.node, flying.message);
            }
            Step::Down(node, message) => {
                let flying = if self.hostile() { world.down[message].clone() } else { world.down.remove(message) };
                let now = Self::node_clocks(&world, node);
                let event = match flying.message {
                    PeerAction::Grant(grant) => NodeEvent::Grant(grant, now),
                    PeerAction::Sever(reason) => NodeEvent::Sever(reason),
                };
                world.node_step(&self.timing, node, event);
            }
            Step::LoseUp => {
                world.up.remove(0);
                world.losses += 1;
            }
            Step::LoseDown => {
                world.down.remove(0);
                world.losses += 1;
            }
            Step::Write(controller) => self.write(&mut world, controller),
            Step::Crash(controller) => {
                world.crashes += 1;
                world.controllers[controller].up = false;
                world.controllers[controller].pending = None;
            }
            Step::Restart(controller) => {
                world.controllers[controller].up = true;
                if self.controllers == Controllers::Alone {
                    world.store.step(PeerEvent::Forgotten);
                }
            }
            Step::TakeOver(controller) => {
                let now = world.controller_clocks(controller);
                world.store.step(PeerEvent::Adopted(now));
                world.owner = controller;
            }
            Step::Copy => {
                world.copied = true;
                let split = world.nodes[0].clock;
                world.nodes[0].split = Some(split);
                world.copy = Some(Box::new(world.nodes[0].clone()));
            }
            Step::StartCopy { other_boot } => {
                let mut node = *world.copy.take()?;
                if other_boot {
                    node.other_boot = true;
                    node.side.step(NodeEvent::Measured(Host { boot: [1; 32], machine: [0; 32] }));
                }
                world.nodes.push(node);
            }
        }
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(S1, |_, world: &World| !world.wrong.longer_than_earned),
            Property::always(S2, |_, world: &World| !world.wrong.lost_while_carrying),
            Property::always(S3_NODE, |_, world: &World| !world.wrong.revived),
            Property::always(S3_CONTROLLER, |_, world: &World| !world.wrong.granted_after_the_end),
            Property::always(S3_BOOT, |_, world: &World| !world.wrong.granted_to_another_boot),
            Property::always(S4, |_, world: &World| world.nodes.iter().filter(|node| node.earned_alone).count() < 2),
            Property::always(S4_KNOWN, |_, world: &World| !world.wrong.copies_unnoticed),
            Property::always(S5, |setting: &Setting, world: &World| {
                setting.hostile()
                    || world.pauses > 0
                    || world.crashes > 0
                    || (world.store.in_force() && !matches!(world.nodes[0].side.state(), NodeState::Severed(_)))
            }),
            Property::always(PAUSE, |_, world: &World| !world.wrong.pause_missed),
        ]
    }
}

pub(crate) const S1: &str = "S1: a lease is never longer than counted from the first sending";
pub(crate) const S2: &str = "S2: a node is not called lost before its own lease is over";
pub(crate) const S3_NODE: &str = "S3: who was cut off carries nothing again";
pub(crate) const S3_CONTROLLER: &str = "S3: nothing is granted after the end";
pub(crate) const S3_BOOT: &str = "S3: another boot earns nothing";
pub(crate) const S4: &str = "S4: of two copies at most one earns a lease";
pub(crate) const S4_KNOWN: &str = "S4: when both copies were heard, the controller knows";
pub(crate) const S5: &str = "S5: a healthy node is never severed, lost or accused";
pub(crate) const PAUSE: &str =
    "R13: a pause is found by the first heartbeat after it and the one that the controller asks for at once";
