//! The lease protocol's promises (S1–S5, see `lease`), on a network and with clocks that are simulated.

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
        2 => (0..4_u64, clocks(), 0..3_u8).prop_map(|(version, now, fresh)| PeerEvent::Acknowledged {
            version, now, fresh: [fresh; 16],
        }),
    ]
}

fn at(time: u64) -> Clocks {
    Clocks { monotonic_raw: time, boottime: time, realtime: time }
}

/// A node and its peer, both enrolled at 1 s, and the node's first heartbeat.
fn pair() -> (NodeLease, PeerLease, Heartbeat) {
    let mut node = NodeLease::enrolled([1; 16], TIMING, HOST, at(SECOND));
    let peer = PeerLease::enrolled([1; 16], TIMING, HOST, at(SECOND));
    let actions = node.step(NodeEvent::Connected(at(SECOND)));
    let [NodeAction::Send(heartbeat)] = actions.as_slice() else { panic!("{actions:?}") };
    (node, peer, *heartbeat)
}

fn receive(peer: &mut PeerLease, heartbeat: Heartbeat, time: u64, fresh: u8) -> PeerAction {
    let actions = peer.step(PeerEvent::Heartbeat { heartbeat, now: at(time), fresh: [fresh; 16] });
    let [action] = actions.as_slice() else { panic!("{actions:?}") };
    action.clone()
}

fn granted(action: PeerAction) -> Grant {
    match action {
        PeerAction::Grant(grant) => grant,
        PeerAction::Sever(reason) => panic!("severed: {reason:?}"),
    }
}

#[test]
fn r06_a_lease_counts_from_the_first_sending() {
    let (mut node, mut peer, heartbeat) = pair();
    assert_eq!(node.state(), &NodeState::Enrolling);
    // Unanswered, it is sent again, byte for byte.
    assert_eq!(node.step(NodeEvent::Tick(at(SECOND + 99 * MILLISECOND))), []);
    let again = node.step(NodeEvent::Tick(at(SECOND + 100 * MILLISECOND)));
    assert_eq!(again, [NodeAction::Send(heartbeat)]);
    let grant = granted(receive(&mut peer, heartbeat, 2 * SECOND, 2));
    assert_eq!(granted(receive(&mut peer, heartbeat, 3 * SECOND, 3)), grant, "the same answer to the same heartbeat");
    // The grant counts from 1 s, however late it comes; the next heartbeat is due at once.
    let actions = node.step(NodeEvent::Grant(grant, at(2 * SECOND)));
    assert_eq!(actions[0], NodeAction::Renew { deadline: 4 * SECOND });
    let NodeAction::Send(next) = &actions[1] else { panic!("{actions:?}") };
    assert_eq!((next.sequence, next.nonce, next.granted), (2, [2; 16], 2 * SECOND));
    // A grant that comes twice changes nothing.
    assert_eq!(node.step(NodeEvent::Grant(grant, at(2 * SECOND))), []);
    assert_eq!(node.state(), &NodeState::Active { deadline: 4 * SECOND });
    assert_eq!(node.step(NodeEvent::Tick(at(4 * SECOND))), [NodeAction::Sever(Reason::LeaseExpired)]);
    // A grant that was in the queue when the lease ran out revives nothing.
    let late = Grant { sequence: 2, sent: at(2 * SECOND), nonce: [3; 16], lease: 3 * SECOND, confirm: false };
    assert_eq!(node.step(NodeEvent::Grant(late, at(4 * SECOND))), []);
}

#[test]
fn r06_a_grant_read_after_the_deadline_does_not_renew() {
    let (mut node, mut peer, heartbeat) = pair();
    let grant = granted(receive(&mut peer, heartbeat, SECOND, 2));
    node.step(NodeEvent::Grant(grant, at(SECOND)));
    let sent = node.step(NodeEvent::Tick(at(SECOND + 500 * MILLISECOND)));
    assert!(matches!(sent.as_slice(), [NodeAction::Send(Heartbeat { sequence: 2, .. })]));
    // The daemon was stopped; the grant waited in the socket. It would be good until 4.5 s, but at 4 s the lease was over.
    let grant =
        Grant { sequence: 2, sent: at(SECOND + 500 * MILLISECOND), nonce: [3; 16], lease: 3 * SECOND, confirm: false };
    assert_eq!(node.step(NodeEvent::Grant(grant, at(4200 * MILLISECOND))), [NodeAction::Sever(Reason::LeaseExpired)]);
}

#[test]
fn r06_a_grant_is_never_longer_than_agreed_and_a_foreign_one_severs() {
    let (mut node, _, _) = pair();
    let long = Grant { sequence: 1, sent: at(SECOND), nonce: [2; 16], lease: 3600 * SECOND, confirm: false };
    assert_eq!(node.step(NodeEvent::Grant(long, at(SECOND)))[0], NodeAction::Renew { deadline: 4 * SECOND });
    let foreign = Grant { sequence: 9, sent: at(SECOND), nonce: [3; 16], lease: 3 * SECOND, confirm: false };
    assert_eq!(
        node.step(NodeEvent::Grant(foreign, at(SECOND))),
        [NodeAction::Report(Reason::Protocol), NodeAction::Sever(Reason::Protocol)]
    );
}

#[test]
fn r13_every_wrong_nonce_or_sequence_is_a_compromise() {
    let (_, _, first) = pair();
    for wrong in
        [Heartbeat { nonce: [9; 16], ..first }, Heartbeat { sequence: 2, ..first }, Heartbeat { sequence: 0, ..first }]
    {
        let (_, mut peer, _) = pair();
        assert_eq!(receive(&mut peer, wrong, SECOND, 2), PeerAction::Sever(Reason::NonceMismatch));
        // The true one comes too late: who of the two is the copy, nobody can know.
        assert_eq!(receive(&mut peer, first, SECOND, 2), PeerAction::Sever(Reason::NonceMismatch));
    }
    let (mut node, mut peer, first) = pair();
    let grant = granted(receive(&mut peer, first, SECOND, 2));
    let actions = node.step(NodeEvent::Grant(grant, at(SECOND)));
    assert_eq!(actions.len(), 1);
    let NodeAction::Send(second) = node.step(NodeEvent::Tick(at(2 * SECOND)))[0] else { panic!() };
    granted(receive(&mut peer, second, 2 * SECOND, 3));
    // One behind: a restored snapshot.
    assert_eq!(receive(&mut peer, first, 2 * SECOND, 4), PeerAction::Sever(Reason::NonceMismatch));
    assert_eq!(peer.state(), &PeerState::Compromised(Reason::NonceMismatch));
}

#[test]
fn r13_the_same_nonce_with_other_clocks_is_another_node() {
    let (mut node, mut peer, first) = pair();
    granted(receive(&mut peer, first, SECOND, 2));
    let NodeAction::Send(again) = node.step(NodeEvent::Tick(at(2 * SECOND)))[0] else { panic!() };
    assert_eq!(again, first);
    let fork = Heartbeat { clocks: at(2 * SECOND), ..first };
    assert_eq!(receive(&mut peer, fork, 2 * SECOND, 3), PeerAction::Sever(Reason::NonceMismatch));
}

#[test]
fn r06_revoked_retired_and_never_seen_nodes_end() {
    let (_, mut peer, first) = pair();
    assert_eq!(
        peer.step(PeerEvent::Revoke("stolen".to_owned())),
        [PeerAction::Sever(Reason::Revoked("stolen".to_owned()))]
    );
    assert_eq!(receive(&mut peer, first, SECOND, 2), PeerAction::Sever(Reason::Revoked("stolen".to_owned())));
    assert_eq!(peer.step(PeerEvent::Retire("too old".to_owned())), []);

    let (_, mut peer, first) = pair();
    let retired = Reason::Retired("too old".to_owned());
    assert_eq!(peer.step(PeerEvent::Retire("too old".to_owned())), [PeerAction::Sever(retired.clone())]);
    assert_eq!(receive(&mut peer, first, SECOND, 2), PeerAction::Sever(retired.clone()));
    assert_eq!(peer.state(), &PeerState::Retired(retired));

    let (mut node, mut peer, _) = pair();
    let end = peer.next_tick();
    assert_eq!(peer.step(PeerEvent::Tick(at(end - 1))), []);
    assert_eq!(peer.step(PeerEvent::Tick(at(end))), [PeerAction::Sever(Reason::LeaseExpired)]);
    assert_eq!(node.step(NodeEvent::Tick(at(end))), [NodeAction::Sever(Reason::LeaseExpired)]);
}

#[test]
fn states_are_small() {
    assert!(size_of::<NodeLease>() <= 384, "{}", size_of::<NodeLease>());
    assert!(size_of::<PeerLease>() <= 640, "{}", size_of::<PeerLease>());
}

#[test]
fn r06_no_grant_while_a_revocation_is_not_acknowledged() {
    let (mut node, mut peer, first) = pair();
    let grant = granted(receive(&mut peer, first, SECOND, 2));
    assert_eq!(node.step(NodeEvent::Grant(grant, at(SECOND))).len(), 1);
    peer.step(PeerEvent::Announced { version: 7, now: at(SECOND) });
    let NodeAction::Send(second) = node.step(NodeEvent::Tick(at(2 * SECOND)))[0] else { panic!() };
    let grant = granted(receive(&mut peer, second, 2 * SECOND, 3));
    node.step(NodeEvent::Grant(grant, at(2 * SECOND)));
    // Half a lease has passed since it was announced.
    let NodeAction::Send(third) = node.step(NodeEvent::Tick(at(2600 * MILLISECOND)))[0] else { panic!() };
    let event = |heartbeat| PeerEvent::Heartbeat { heartbeat, now: at(2600 * MILLISECOND), fresh: [4; 16] };
    assert_eq!(peer.step(event(third)), [], "withheld");
    assert_eq!(peer.step(event(third)), [], "and again");
    // An older version does not help; the newest does, and the waiting heartbeat is answered at once.
    let acknowledged = |version| PeerEvent::Acknowledged { version, now: at(2700 * MILLISECOND), fresh: [5; 16] };
    assert_eq!(peer.step(acknowledged(6)), []);
    let mut fork = peer.clone();
    let other = Heartbeat { clocks: at(2650 * MILLISECOND), ..third };
    assert_eq!(fork.step(event(other)), [PeerAction::Sever(Reason::NonceMismatch)], "a copy is found all the same");
    let actions = peer.step(acknowledged(7));
    assert!(
        matches!(actions.as_slice(), [PeerAction::Grant(Grant { sequence: 3, nonce: [5, ..], .. })]),
        "{actions:?}"
    );
}

#[test]
fn r06_who_never_acknowledges_is_lost_and_the_reason_is_kept() {
    let (mut node, mut peer, first) = pair();
    let grant = granted(receive(&mut peer, first, SECOND, 2));
    node.step(NodeEvent::Grant(grant, at(SECOND)));
    peer.step(PeerEvent::Announced { version: 1, now: at(SECOND) });
    let NodeAction::Send(second) = node.step(NodeEvent::Tick(at(3 * SECOND)))[0] else { panic!() };
    assert_eq!(peer.step(PeerEvent::Heartbeat { heartbeat: second, now: at(3 * SECOND), fresh: [3; 16] }), []);
    let end = peer.next_tick();
    assert_eq!(peer.step(PeerEvent::Tick(at(end))), [PeerAction::Sever(Reason::Unacknowledged)]);
    assert_eq!(peer.state(), &PeerState::Lost(Reason::Unacknowledged));
}

/// The node's side of one exchange at this moment of the controller's clock; the node's is `behind`.
fn exchange(node: &mut NodeLease, peer: &mut PeerLease, time: u64, behind: u64) -> PeerAction {
    let shown = at(time - behind);
    let NodeAction::Send(heartbeat) = node.step(NodeEvent::Connected(shown))[0] else { panic!() };
    let action = receive(peer, heartbeat, time, (time / MILLISECOND % 251) as u8);
    if let PeerAction::Grant(grant) = &action {
        let sent = node.step(NodeEvent::Grant(*grant, shown));
        assert_eq!(sent.iter().any(|action| matches!(action, NodeAction::Send(_))), grant.confirm);
    }
    action
}

#[test]
fn r13_a_pause_of_300_ms_is_found_within_the_first_exchange_after_it() {
    let (mut node, mut peer, _) = pair();
    for beat in 2..20 {
        assert!(!granted(exchange(&mut node, &mut peer, beat * SECOND / 2, 0)).confirm);
    }
    // It may as well be the network: the next one is wanted at once, and says that it was not.
    let late = granted(exchange(&mut node, &mut peer, 10 * SECOND, 300 * MILLISECOND));
    assert!(late.confirm);
    let found = exchange(&mut node, &mut peer, 10 * SECOND + MILLISECOND, 300 * MILLISECOND);
    assert_eq!(found, PeerAction::Sever(Reason::TimeStep));
}

#[test]
fn r13_a_late_heartbeat_is_followed_up_once_and_forgiven() {
    let (mut node, mut peer, _) = pair();
    for beat in 2..20 {
        granted(exchange(&mut node, &mut peer, beat * SECOND / 2, 0));
    }
    let NodeAction::Send(slow) = node.step(NodeEvent::Connected(at(10 * SECOND)))[0] else { panic!() };
    let grant = granted(receive(&mut peer, slow, 10 * SECOND + 400 * MILLISECOND, 2));
    assert!(grant.confirm);
    let actions = node.step(NodeEvent::Grant(grant, at(10 * SECOND + 400 * MILLISECOND)));
    let NodeAction::Send(next) = actions[1] else { panic!("{actions:?}") };
    let grant = granted(receive(&mut peer, next, 10 * SECOND + 800 * MILLISECOND, 3));
    assert!(!grant.confirm, "slow as it is: one that was asked for is not followed up");
}

#[test]
fn r13_a_grant_for_a_copys_heartbeat_severs_and_is_reported() {
    let (mut node, mut peer, first) = pair();
    let grant = granted(receive(&mut peer, first, SECOND, 2));
    let foreign = Grant { sent: at(SECOND + 1), ..grant };
    let severed = [NodeAction::Report(Reason::Protocol), NodeAction::Sever(Reason::Protocol)];
    assert_eq!(node.step(NodeEvent::Grant(foreign, at(SECOND))), severed);
}

#[test]
fn r13_another_boot_and_another_machine_are_told_apart() {
    for (host, reason) in [
        (Host { boot: [1; 32], ..HOST }, Reason::BootChanged),
        (Host { machine: [1; 32], ..HOST }, Reason::MachineChanged),
    ] {
        let (mut node, mut peer, first) = pair();
        let grant = granted(receive(&mut peer, first, SECOND, 2));
        node.step(NodeEvent::Measured(host));
        node.step(NodeEvent::Grant(grant, at(SECOND)));
        let NodeAction::Send(second) = node.step(NodeEvent::Tick(at(2 * SECOND)))[0] else { panic!() };
        assert_eq!(receive(&mut peer, second, 2 * SECOND, 3), PeerAction::Sever(reason));
    }
    let (mut node, ..) = pair();
    let found = node.step(NodeEvent::Found(Reason::GenerationChanged));
    assert_eq!(
        found,
        [NodeAction::Report(Reason::GenerationChanged), NodeAction::Sever(Reason::GenerationChanged)],
        "told first, while there is a way to tell it"
    );
}

#[test]
fn r06_another_controller_takes_over_without_accusing_or_shortening() {
    let (mut node, mut peer, first) = pair();
    let grant = granted(receive(&mut peer, first, SECOND, 2));
    node.step(NodeEvent::Grant(grant, at(SECOND)));
    // Its clock has nothing to do with the other's.
    let there = 900 * SECOND;
    peer.step(PeerEvent::Adopted(at(there)));
    assert_eq!(peer.state(), &PeerState::Active { deadline: there + TIMING.lease + TIMING.margin });
    assert_eq!(peer.repetition(&first), Some(grant));
    let NodeAction::Send(second) = node.step(NodeEvent::Tick(at(2 * SECOND)))[0] else { panic!() };
    granted(receive(&mut peer, second, there + SECOND, 3));
}
