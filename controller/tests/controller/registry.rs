//! The registry alone, with clocks that the test sets.

use opencluster_api::control;
use opencluster_controller::lease::registry::{ClusterTiming, Enrolment, Outcome, Registry, SessionId};
use opencluster_controller::state::revocation::Revoked;
use opencluster_identity::digest::Sha256Digest;
use opencluster_policy::lease::{Clocks, Host};

const MS: u64 = 1_000_000;

fn at(ms: u64) -> Clocks {
    Clocks { monotonic_raw: ms * MS, boottime: ms * MS, realtime: ms * MS }
}

fn registry() -> Registry {
    Registry::new(ClusterTiming::new(3000, 500))
}

fn enrolment(id: &str) -> Enrolment {
    let key = Sha256Digest::of(id.as_bytes());
    // What heartbeats without a boot and a machine are taken for.
    let nothing = *Sha256Digest::of(b"").as_bytes();
    Enrolment { id: id.into(), key, host: Host { boot: nothing, machine: nothing }, nonce: [0; 16], revocations: 0 }
}

/// A node that does what it should.
struct Node<'a> {
    registry: &'a Registry,
    name: &'static str,
    session: SessionId,
    sequence: u64,
    nonce: Vec<u8>,
    granted: u64,
    applied: u64,
}

impl<'a> Node<'a> {
    fn enrol(registry: &'a Registry, name: &'static str, ms: u64) -> Self {
        registry.enrolled(name, enrolment(name), at(ms));
        let (session, ..) = registry.open_session(name, &Sha256Digest::of(name.as_bytes())).expect("enrolled");
        Self { registry, name, session, sequence: 0, nonce: vec![0; 16], granted: ms, applied: 0 }
    }

    fn beat(&mut self, ms: u64) -> Outcome {
        let heartbeat = control::Heartbeat {
            sequence: self.sequence + 1,
            nonce: self.nonce.clone(),
            monotonic_raw_ns: ms * MS,
            boottime_ns: ms * MS,
            realtime_ns: ms * MS,
            granted_monotonic_raw_ns: self.granted * MS,
            revocation_version: self.applied,
            ..control::Heartbeat::default()
        };
        let fresh = [self.sequence as u8 + 1; 16];
        let outcome = self.registry.heartbeat(self.name, self.session, &heartbeat, at(ms), fresh).expect("in force");
        if let Outcome::Grant(grant) = &outcome {
            (self.sequence, self.nonce, self.granted) = (grant.sequence, grant.nonce.to_vec(), ms);
        }
        outcome
    }

    fn is_granted(&mut self, ms: u64) {
        let outcome = self.beat(ms);
        assert!(matches!(outcome, Outcome::Grant(_)), "{} at {ms}: {outcome:?}", self.name);
    }
}

#[test]
fn r06_nobody_is_granted_a_lease_while_an_end_stays_unrecorded() {
    let registry = registry();
    let mut a = Node::enrol(&registry, "a", 0);
    let mut b = Node::enrol(&registry, "b", 0);
    a.is_granted(10);
    // Its lease and the margin, 26 ms, are over at 3036.
    for ms in (10..3030).step_by(500) {
        b.is_granted(ms);
    }
    assert_eq!(registry.tick(at(3035)), []);
    let ended = registry.tick(at(3036));
    assert_eq!(ended.len(), 1, "{ended:?}");
    assert_eq!(ended[0].node, "a");
    b.is_granted(3100);
    // Half a lease after the verdict.
    b.is_granted(4500);
    assert!(!registry.held_up(at(4535)));
    assert_eq!(b.beat(4536), Outcome::HeldUp);
    assert!(registry.held_up(at(4536)));
    let mut c = Node::enrol(&registry, "c", 4600);
    assert_eq!(c.beat(4600), Outcome::HeldUp, "nor is who comes later");

    let waiting = registry.unrecorded();
    assert_eq!(waiting.iter().map(|(_, ended)| ended.node.as_str()).collect::<Vec<_>>(), ["a"]);
    let revoked = Revoked { version: 1, identities: Vec::new() };
    registry.recorded(waiting.into_iter().map(|(number, _)| (number, revoked.clone())), at(4700));
    assert!(!registry.held_up(at(4700)));
    assert_eq!(registry.unrecorded(), []);
    assert_eq!(b.beat(4536), Outcome::Withheld, "now it is for b to apply it, and there is no more time for that");
    let applied = control::Acknowledgement { config_version: 0, revocation_version: 1 };
    let outcome = registry.acknowledged("b", b.session, applied, at(4800), [9; 16]).expect("in force");
    assert!(matches!(outcome, Outcome::Grant(_)), "{outcome:?}");
}

#[test]
fn r04_the_end_of_a_life_is_not_that_of_the_next() {
    let registry = registry();
    registry.enrolled("a", enrolment("first"), at(0));
    let first = registry.lives();
    // While somebody looks at the first, the node enrols again.
    registry.enrolled("a", enrolment("second"), at(1000));
    let second = registry.lives();
    assert_eq!((second.len(), second[0].began, second[0].enrolment.as_str()), (1, 1000 * MS, "second"));
    assert!(!registry.cordon(&first[0]));
    assert!(registry.retire_life(&first[0], "its life is over", at(1001)).is_none());
    assert_eq!(registry.lives(), second, "the new enrolment is in force and has a life");

    assert!(registry.cordon(&second[0]) && !registry.cordon(&second[0]));
    assert!(registry.lives()[0].cordoned);
    assert!(registry.retire_life(&second[0], "its life is over", at(1002)).is_some(), "positive control");
    assert_eq!(registry.lives(), []);
}
