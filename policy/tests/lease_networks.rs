//! The lease protocol's promises (S1–S5, see `lease`), over random networks and with clocks that run apart: all simulated.

mod simulation;

use opencluster_policy::lease::{
    Clocks, Grant, Heartbeat, Host, NodeAction, NodeEvent, NodeLease, NodeState, PeerAction, PeerEvent, PeerLease,
    PeerState, Reason, Timing,
};
use proptest::prelude::*;
use simulation::{Clock, MILLISECOND, Network, SECOND, World};

const TIMING: Timing = Timing::new(3 * SECOND, 500 * MILLISECOND);
const HOST: Host = Host { boot: [7; 32], machine: [8; 32] };

fn clock() -> impl Strategy<Value = Clock> {
    // Two clocks that run apart as far as the protocol allows for: ±250 parts in a million each.
    (0..1_000_000 * SECOND, -250..=250_i64).prop_map(|(offset, ppm)| Clock::new(offset, ppm))
}

/// In order, with loss (never more than two in a row), repetition and delay.
fn modest() -> impl Strategy<Value = Network> {
    (0..20_u32, 0..20_u32, 1..150_u64).prop_map(|(loss, repeat, delay)| Network {
        loss_percent: loss,
        repeat_percent: repeat,
        delay: delay * MILLISECOND,
        in_order: true,
        losses_in_a_row: 2,
    })
}

/// Anything goes.
fn hostile() -> impl Strategy<Value = Network> {
    (0..95_u32, 0..60_u32, 1..8_000_u64).prop_map(|(loss, repeat, delay)| Network {
        loss_percent: loss,
        repeat_percent: repeat,
        delay: delay * MILLISECOND,
        in_order: false,
        losses_in_a_row: u32::MAX,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// S1, S2 and S3 are asserted by the simulation at every event. A hostile network may end the lease, never stretch it.
    #[test]
    fn r06_no_network_stretches_a_lease(
        seed in any::<u64>(), node in clock(), controller in clock(), network in prop_oneof![hostile(), modest()],
    ) {
        let mut world = World::new(TIMING, controller, network, seed);
        world.add_node(node);
        world.run_for(60 * SECOND);
    }

    /// S5, and the positive control of all the others: it is active all the time.
    #[test]
    fn r06_a_healthy_node_is_never_severed(
        seed in any::<u64>(), node in clock(), controller in clock(), network in modest(),
    ) {
        let mut world = World::new(TIMING, controller, network, seed);
        world.add_node(node);
        world.run_for(2 * SECOND);
        for _ in 0..200 {
            world.run_for(SECOND);
            prop_assert!(world.carries_traffic(0), "{:?} {:?}", world.node_state(0), world.peer_state());
        }
        prop_assert!(world.grants > 150);
    }

    /// The network falls silent: the node stops within a lease of its last grant's heartbeat, and only then is it lost.
    #[test]
    fn r06_silence_severs_and_then_loses(
        seed in any::<u64>(), node in clock(), controller in clock(), network in modest(), until in 2 * SECOND..20 * SECOND,
    ) {
        let mut world = World::new(TIMING, controller, network, seed);
        world.add_node(node);
        world.run_for(until);
        prop_assert!(world.carries_traffic(0));
        world.cut();
        world.run_for(TIMING.lease + TIMING.lease / 500);
        prop_assert_eq!(world.node_state(0), &NodeState::Severed(Reason::LeaseExpired));
        // What is still under way may earn the controller's patience, not the node's.
        world.run_for(SECOND);
        prop_assert_eq!(world.peer_state(), &PeerState::Lost(Reason::LeaseExpired));
        // There is no way back.
        world.heal();
        world.run_for(10 * SECOND);
        prop_assert_eq!(world.node_state(0), &NodeState::Severed(Reason::LeaseExpired));
        prop_assert_eq!(world.peer_state(), &PeerState::Lost(Reason::LeaseExpired));
    }

    /// S4: a copy is made (a snapshot restored at once or later, next to the original). Soon at most one is active, and when
    /// both have been heard the controller knows.
    #[test]
    fn r13_of_two_clones_at_most_one_stays_active(
        seed in any::<u64>(), node in clock(), controller in clock(), network in prop_oneof![hostile(), modest()],
        when in SECOND..10 * SECOND, later in prop_oneof![Just(0), 0..4 * SECOND],
    ) {
        let mut world = World::new(TIMING, controller, network, seed);
        world.add_node(node);
        world.run_for(when);
        let copy = world.snapshot(0);
        world.run_for(later);
        world.restore(copy);
        // What each of them has, and what both may get for an unanswered heartbeat (the same bytes from either), counts from
        // before the copy was made.
        world.run_for(TIMING.lease + TIMING.lease / 100);
        for _ in 0..40 {
            world.run_for(250 * MILLISECOND);
            prop_assert!(!(world.carries_traffic(0) && world.carries_traffic(1)), "{:?}", world.peer_state());
        }
    }

    #[test]
    fn r13_clones_that_are_both_heard_are_found_out(
        seed in any::<u64>(), node in clock(), controller in clock(), network in modest(),
        when in SECOND..10 * SECOND, later in 0..4 * SECOND,
    ) {
        let mut world = World::new(TIMING, controller, network, seed);
        world.add_node(node);
        world.run_for(when);
        let copy = world.snapshot(0);
        world.run_for(later);
        world.restore(copy);
        world.run_for(5 * SECOND);
        prop_assert!(matches!(world.peer_state(), PeerState::Compromised(_)), "{:?}", world.peer_state());
        world.run_for(5 * SECOND);
        prop_assert!(!world.carries_traffic(0) && !world.carries_traffic(1));
    }

    /// A pause that no clock of the node shows.
    #[test]
    fn r13_a_pause_is_found_out(
        seed in any::<u64>(), node in clock(), controller in clock(), network in modest(),
        when in 2 * SECOND..30 * SECOND, pause in 0..2 * SECOND,
    ) {
        let mut world = World::new(TIMING, controller, network.clone(), seed);
        world.add_node(node);
        world.run_for(when);
        prop_assert!(world.carries_traffic(0));
        // Found for certain: longer than the bound and what the network's own delay can hide (repeated sending included).
        let pause = pause + 60 * MILLISECOND + 2 * network.delay;
        world.pause(0, pause);
        world.run_for(pause + 20 * SECOND);
        let state = world.peer_state();
        prop_assert!(
            matches!(state, PeerState::Compromised(Reason::TimeStep) | PeerState::Lost(Reason::LeaseExpired)),
            "{:?} after a pause of {} ms", state, pause / MILLISECOND
        );
        prop_assert!(!world.carries_traffic(0));
    }

    /// No delay looks like a pause: not one that grows and stays, not one in one direction only, and neither does a pause of
    /// the controller.
    #[test]
    fn r13_delay_is_no_pause(
        seed in any::<u64>(), node in clock(), controller in clock(), network in modest(), change in 5 * SECOND..20 * SECOND,
        slower in 0..900_u64, controller_pause in 0..700_u64,
    ) {
        let mut world = World::new(TIMING, controller, network, seed);
        world.add_node(node);
        world.run_for(change);
        world.slow_down(slower * MILLISECOND);
        world.run_for(change);
        world.pause_controller(controller_pause * MILLISECOND);
        world.run_for(20 * SECOND);
        prop_assert!(!matches!(world.peer_state(), PeerState::Compromised(_)), "{:?}", world.peer_state());
    }

    /// S3, and that nothing that arrives can make either side panic.
    #[test]
    fn r06_terminal_is_terminal_whatever_comes(
        node_events in proptest::collection::vec(node_event(), 1..60),
        peer_events in proptest::collection::vec(peer_event(), 1..60),
    ) {
        let mut node = NodeLease::enrolled([0; 16], TIMING, Host::default(), Clocks::default());
        let mut severed: Option<NodeState> = None;
        for event in node_events {
            let actions = node.step(event);
            if let Some(severed) = &severed {
                prop_assert_eq!(node.state(), severed);
                prop_assert!(actions.is_empty());
                prop_assert_eq!(node.next_tick(), u64::MAX);
            } else if let NodeState::Severed(reason) = node.state() {
                prop_assert_eq!(actions.last(), Some(&NodeAction::Sever(reason.clone())));
                severed = Some(node.state().clone());
            }
        }
        let mut peer = PeerLease::enrolled([0; 16], TIMING, Host::default(), Clocks::default());
        let mut ended: Option<PeerState> = None;
        for event in peer_events {
            let actions = peer.step(event);
            if let Some(ended) = &ended {
                prop_assert_eq!(peer.state(), ended);
                prop_assert!(actions.iter().all(|action| matches!(action, PeerAction::Sever(_))));
            } else if !matches!(peer.state(), PeerState::Enrolled | PeerState::Active { .. }) {
                prop_assert!(matches!(actions.as_slice(), [PeerAction::Sever(_)]));
                ended = Some(peer.state().clone());
            }
        }
    }
}

fn clocks() -> impl Strategy<Value = Clocks> {
    prop_oneof![4 => 0..20 * SECOND, 1 => any::<u64>()].prop_map(at)
}

fn heartbeat() -> impl Strategy<Value = Heartbeat> {
    let time = || prop_oneof![4 => 0..20 * SECOND, 1 => any::<u64>()];
    let host = prop_oneof![8 => Just(Host::default()), 1 => Just(HOST)];
    (prop_oneof![4 => 0..4_u64, 1 => any::<u64>()], 0..3_u8, clocks(), time(), host).prop_map(
        |(sequence, nonce, clocks, granted, host)| Heartbeat { sequence, nonce: [nonce; 16], clocks, granted, host },
    )
}

fn node_event() -> impl Strategy<Value = NodeEvent> {
    let grant = (0..4_u64, clocks(), any::<u8>(), prop_oneof![Just(0), Just(3 * SECOND), any::<u64>()], any::<bool>())
        .prop_map(|(sequence, sent, nonce, lease, confirm)| Grant {
            sequence,
            sent,
            nonce: [nonce; 16],
            lease,
            confirm,
        });
    prop_oneof![
        4 => clocks().prop_map(NodeEvent::Tick),
        4 => (grant, clocks()).prop_map(|(grant, now)| NodeEvent::Grant(grant, now)),
        1 => Just(NodeEvent::Sever(Reason::BootChanged)),
        2 => clocks().prop_map(NodeEvent::Connected),
        1 => Just(NodeEvent::Measured(HOST)),
        1 => Just(NodeEvent::Found(Reason::GenerationChanged)),
    ]
}

fn peer_event() -> impl Strategy<Value = PeerEvent> {
    prop_oneof![
        8 => (heartbeat(), clocks(), 0..3_u8).prop_map(|(heartbeat, now, fresh)| PeerEvent::Heartbeat {
            heartbeat, now, fresh: [fresh; 16],
        }),
        4 => clocks().prop_map(PeerEvent::Tick),
        1 => Just(PeerEvent::Revoke("said so".to_owned())),
        1 => Just(PeerEvent::Found(Reason::BootChanged)),
        1 => Just(PeerEvent::Retire("too old".to_owned())),
        1 => Just(PeerEvent::Forgotten),
        1 => clocks().prop_map(PeerEvent::Adopted),
        2 => (0..4_u64, clocks()).prop_map(|(version, now)| PeerEvent::Announced { version, now }),
        1 => proptest::option::of(clocks()).prop_map(|now| PeerEvent::Unannounced(now.map(|now| now.boottime))),
        2 => (0..4_u64, clocks(), 0..3_u8).prop_map(|(version, now, fresh)| PeerEvent::Acknowledged {
            version, now, fresh: [fresh; 16],
        }),
    ]
}

fn at(time: u64) -> Clocks {
    Clocks { monotonic_raw: time, boottime: time, realtime: time }
}
