//! An example of each rule of the lease protocol.

use opencluster_policy::lease::{
    Clocks, Grant, Heartbeat, Host, NodeAction, NodeEvent, NodeLease, NodeState, PeerAction, PeerEvent, PeerLease,
    PeerState, Reason, Timing,
};

const SECOND: u64 = 1_000_000_000;
const MILLISECOND: u64 = 1_000_000;
const TIMING: Timing = Timing::new(3 * SECOND, 500 * MILLISECOND);
const HOST: Host = Host { boot: [7; 32], machine: [8; 32] };

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

#[test]
fn r06_no_grant_long_after_a_verdict_that_could_not_be_announced() {
    let (mut node, mut peer, first) = pair();
    let grant = granted(receive(&mut peer, first, SECOND, 2));
    node.step(NodeEvent::Grant(grant, at(SECOND)));
    // Another node is out since now; the controller cannot write that down.
    peer.step(PeerEvent::Unannounced(Some(SECOND)));
    let NodeAction::Send(second) = node.step(NodeEvent::Tick(at(2 * SECOND)))[0] else { panic!() };
    let grant = granted(receive(&mut peer, second, 2 * SECOND, 3));
    node.step(NodeEvent::Grant(grant, at(2 * SECOND)));
    let NodeAction::Send(third) = node.step(NodeEvent::Tick(at(2500 * MILLISECOND)))[0] else { panic!() };
    let again = |now, fresh| PeerEvent::Heartbeat { heartbeat: third, now: at(now), fresh: [fresh; 16] };
    assert_eq!(peer.step(again(2500 * MILLISECOND, 4)), [], "half a lease after the verdict");
    let mut never = peer.clone();
    let end = never.next_tick();
    assert_eq!(never.step(PeerEvent::Tick(at(end))), [PeerAction::Sever(Reason::Unrecorded)], "it stays so");

    // It is written down and announced. The node still has to apply it; then the heartbeat that waits is granted.
    peer.step(PeerEvent::Announced { version: 1, now: at(4 * SECOND) });
    peer.step(PeerEvent::Unannounced(None));
    assert_eq!(peer.step(again(4 * SECOND, 5)), [], "the verdict is no newer for having waited");
    let acknowledged = PeerEvent::Acknowledged { version: 1, now: at(4100 * MILLISECOND), fresh: [6; 16] };
    let actions = peer.step(acknowledged);
    assert!(matches!(actions.as_slice(), [PeerAction::Grant(Grant { sequence: 3, .. })]), "{actions:?}");
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
