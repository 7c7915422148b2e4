//! Decisions on live flows: policy, revocation, lease, severance. Each cut has a flow before it that worked.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use opencluster_api::control;
use opencluster_identity::revocation::RevocationSet;

use super::{ALLOW, HOUR, NO_POLICY, World, echo, eventually, is_cut};
use crate::control::apply;
use crate::shared::boottime;

const DENY: &str = "
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo}
spec: {to: {service: echo}, from: [{workload: a}]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: never}
spec: {to: {service: echo}, from: [{workload: a}], action: deny}
";

/// Whether a new connection gets no answer but a reset.
fn is_refused(world: &World) -> bool {
    let mut stream = world.connect();
    // The reset may come before the write or after it.
    let written = stream.write_all(b"marco").is_ok();
    stream.read(&mut [0; 5]).is_err() || !written
}

#[test]
fn r09_nothing_passes_without_a_policy() {
    let world = World::new(echo);
    World::echo(&mut world.connect());
    world.apply(NO_POLICY);
    assert!(is_refused(&world));
    world.apply(DENY);
    assert!(is_refused(&world), "a deny beats an allow");
    world.apply(ALLOW);
    World::echo(&mut world.connect());
}

#[test]
fn r09_the_destination_decides_even_if_the_source_does_not() {
    let world = World::new(echo);
    World::echo(&mut world.connect());
    world.b.shared.set_index(world.index(NO_POLICY));
    assert!(is_refused(&world));
    eventually("b counts the refusal", || {
        World::metrics(&world.b).contains("flows_refused_total{direction=\"inbound\",reason=\"denied\"} 1")
    });
    eventually("a counts it too", || {
        World::metrics(&world.a).contains("flows_refused_total{direction=\"outbound\",reason=\"denied\"} 1")
    });
}

#[test]
fn r09_a_policy_change_cuts_live_flows_at_once_on_either_side() {
    for change_at_destination in [false, true] {
        let world = World::new(echo);
        let mut stream = world.connect();
        World::echo(&mut stream);
        let site = if change_at_destination { &world.b } else { &world.a };
        let changed = Instant::now();
        site.shared.set_index(world.index(NO_POLICY));
        assert!(is_cut(&mut stream));
        assert!(changed.elapsed() < Duration::from_millis(500), "{:?}", changed.elapsed());
        eventually("both sides are rid of it", || {
            super::live_flows(&world.a).is_empty() && super::live_flows(&world.b).is_empty()
        });
    }
}

#[test]
fn an_unrelated_change_of_policy_cuts_nothing() {
    let world = World::new(echo);
    let mut stream = world.connect();
    World::echo(&mut stream);
    for _ in 0..10 {
        world.apply(ALLOW);
        World::echo(&mut stream);
    }
}

#[test]
fn r23_a_revoked_identity_is_cut_and_stays_out() {
    for revoked_at_destination in [false, true] {
        let world = World::new(echo);
        let mut stream = world.connect();
        World::echo(&mut stream);
        let site = if revoked_at_destination { &world.b } else { &world.a };
        let mut set = RevocationSet::new(2);
        set.revoke(world.a.workload.clone(), None);
        site.shared.trust.replace_revocations(set);
        site.shared.notify_workers();
        assert!(is_cut(&mut stream));
        assert!(is_refused(&world), "no new flow either");
        site.shared.trust.replace_revocations(RevocationSet::new(3));
        World::echo(&mut world.connect());
    }
}

#[test]
fn revoking_one_key_leaves_its_successor_alone() {
    let world = World::new(echo);
    let old = *world.a.shared.svids.get(&world.a.workload).expect("SVID").spki_sha256();
    let mut stream = world.connect();
    World::echo(&mut stream);
    world.install(&world.a, HOUR);
    let mut set = RevocationSet::new(2);
    set.revoke(world.a.workload.clone(), Some(old));
    world.b.shared.trust.replace_revocations(set.clone());
    world.b.shared.notify_workers();
    assert!(is_cut(&mut stream));
    world.a.shared.trust.replace_revocations(set);
    world.a.shared.notify_workers();
    eventually("flows with the new key pass", || !is_refused(&world));
}

#[test]
fn r31_a_revocation_set_that_cannot_be_read_refuses_everybody() {
    let world = World::new(echo);
    let mut stream = world.connect();
    World::echo(&mut stream);
    let set = |version, spiffe_id: &str, key: &[u8]| {
        let entry =
            control::Revocation { spiffe_id: spiffe_id.into(), spki_sha256: key.to_vec(), reason: "a test".into() };
        control::RevocationSet { version, entries: vec![entry] }
    };
    let stranger = "spiffe://test.example/ns/default/sa/stranger";
    apply::revocations(&world.b.shared, set(2, stranger, &[])).expect("a set");
    World::echo(&mut stream);
    assert!(apply::revocations(&world.b.shared, set(3, stranger, &[1, 2, 3])).is_err());
    assert!(is_cut(&mut stream), "nobody knows whom the new set names");
    assert!(is_refused(&world));
    assert!(apply::revocations(&world.b.shared, set(4, "not an ID", &[])).is_err());
    assert!(is_refused(&world));
    apply::revocations(&world.b.shared, set(5, stranger, &[])).expect("a set");
    World::echo(&mut world.connect());
    // An older one is refused, and changes nothing.
    assert!(apply::revocations(&world.b.shared, set(4, world.a.workload.as_str(), &[])).is_err());
    World::echo(&mut world.connect());
}

#[test]
fn r31_a_revocation_counts_as_enforced_when_every_worker_has_cut_what_it_forbids() {
    let world = World::with(echo, &crate::limits::Limits::default(), 2);
    let shared = &world.b.shared;
    eventually("the first set is enforced", || shared.enforced_revocations() == 1);
    let mut streams: Vec<_> = (0..8).map(|_| world.connect()).collect();
    streams.iter_mut().for_each(World::echo);
    let entry = control::Revocation { spiffe_id: world.a.workload.to_string(), ..control::Revocation::default() };
    apply::revocations(shared, control::RevocationSet { version: 7, entries: vec![entry] }).expect("a set");
    eventually("enforced", || shared.enforced_revocations() == 7);
    assert!(super::live_flows(&world.b).is_empty(), "enforced, with flows that go on");
    assert!(streams.iter_mut().all(is_cut));
}

#[test]
fn r31_the_key_of_a_revoked_identity_is_dropped_where_it_lives() {
    let world = World::new(echo);
    World::echo(&mut world.connect());
    let old = *world.a.shared.svids.get(&world.a.workload).expect("SVID").spki_sha256();
    let entry = control::Revocation {
        spiffe_id: world.a.workload.to_string(),
        spki_sha256: old.as_bytes().to_vec(),
        reason: "a test".into(),
    };
    let set = |version| control::RevocationSet { version, entries: vec![entry.clone()] };
    apply::revocations(&world.a.shared, set(2)).expect("a set");
    assert!(!world.a.shared.holds(&world.a.workload), "a revoked key is kept");
    world.install(&world.a, HOUR);
    apply::revocations(&world.a.shared, set(3)).expect("a set");
    assert!(world.a.shared.holds(&world.a.workload), "its successor is not revoked");
    World::echo(&mut world.connect());
}

#[test]
fn r06_the_end_of_the_lease_cuts_every_flow_drops_every_key_and_is_final() {
    for lease_of_destination in [false, true] {
        let world = World::new(echo);
        // This world's lease is an hour: make a short one by a new world whose lease is never extended.
        let mut stream = world.connect();
        World::echo(&mut stream);
        let site = if lease_of_destination { &world.b } else { &world.a };
        site.shared.expire_lease_at(boottime() + 300_000_000);
        let start = Instant::now();
        assert!(is_cut(&mut stream));
        assert!(start.elapsed() > Duration::from_millis(200), "not before its time");
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        eventually("severed", || site.shared.is_severed());
        assert!(site.shared.identities().is_empty(), "keys are gone");
        // A late renewal changes nothing.
        site.shared.set_lease(boottime() + 3600 * 1_000_000_000);
        if lease_of_destination {
            assert!(is_refused(&world));
        } else {
            eventually("the listener is closed", || std::net::TcpStream::connect(world.a.capture).is_err());
        }
    }
}

#[test]
fn a_renewed_lease_goes_on() {
    let world = World::new(echo);
    let mut stream = world.connect();
    World::echo(&mut stream);
    world.b.shared.expire_lease_at(boottime() + 300_000_000);
    for _ in 0..6 {
        std::thread::park_timeout(Duration::from_millis(100));
        world.b.shared.set_lease(boottime() + 300_000_000);
        World::echo(&mut stream);
    }
}

#[test]
fn r06_severance_cuts_every_flow_at_once() {
    let world = World::new(echo);
    let mut stream = world.connect();
    World::echo(&mut stream);
    let start = Instant::now();
    world.b.shared.sever();
    assert!(is_cut(&mut stream));
    assert!(start.elapsed() < Duration::from_millis(500));
    assert!(is_refused(&world));
}

#[test]
fn nothing_is_carried_before_everything_has_arrived() {
    use crate::shared::NotReady;
    let world = World::new(echo);
    World::echo(&mut world.connect());
    let log = world.a.shared.log.clone();
    let fresh = crate::shared::Shared::new(world.a.shared.node.clone(), crate::limits::Limits::default(), 1, log);
    assert_eq!(fresh.readiness(), Err(NotReady::TrustBundle));
    fresh.trust.replace_bundle(world.root.bundle().expect("bundle")).expect("bundle");
    assert_eq!(fresh.readiness(), Err(NotReady::NoLease));
    fresh.set_lease(boottime() + 1_000_000_000);
    assert_eq!(fresh.readiness(), Err(NotReady::Revocations));
    fresh.trust.replace_revocations(RevocationSet::new(1));
    assert_eq!(fresh.readiness(), Err(NotReady::Configuration));
    fresh.set_index(world.index(ALLOW));
    assert_eq!(fresh.readiness(), Ok(()));
    fresh.sever();
    assert_eq!(fresh.readiness(), Err(NotReady::Severed));
}
