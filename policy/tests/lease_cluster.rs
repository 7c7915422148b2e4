//! A whole cluster on virtual time: hundreds of nodes, their controller, revocations, loss, jitter, pauses, copies, restarts.
//!
//! Everything follows from a seed. `LEASE_SEEDS=200 cargo test -p opencluster-policy --test lease_cluster` tries more of them.

mod cluster;

use cluster::{Cluster, Fate, LEASE, MILLISECOND, Network, SECOND};
use opencluster_policy::lease::{PeerState, Reason};

fn seeds(few: u64) -> std::ops::Range<u64> {
    0..std::env::var("LEASE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(few)
}

/// What the protocol is made for: 15 % of all messages are lost, the others take up to 80 ms.
const ROUGH: Network = Network { loss_percent: 15, least_delay: MILLISECOND, jitter: 80 * MILLISECOND };

/// A data centre.
const QUIET: Network = Network { loss_percent: 0, least_delay: 200_000, jitter: 800_000 };

/// S5, and that loss and jitter are no alarm: a minute of 300 nodes, with revocations that all acknowledge.
#[test]
fn r06_no_healthy_node_of_hundreds_is_severed_at_15_percent_loss() {
    for seed in seeds(20) {
        let mut cluster = Cluster::new(300, ROUGH, seed);
        cluster.run_for(3 * SECOND);
        assert_eq!(cluster.carrying(), 300, "seed {seed}: all are in");
        for _ in 0..12 {
            cluster.revoke_somebody();
            cluster.run_for(5 * SECOND);
            assert_eq!(cluster.carrying(), 300, "seed {seed}: {:?}", cluster.ended());
        }
        assert!(cluster.suspicions > 0, "seed {seed}: loss makes heartbeats late, and that is looked into");
    }
}

/// R13: whatever is paused for 300 ms or more is found within an exchange of its first heartbeat, and nobody else is.
#[test]
fn r13_of_hundreds_exactly_the_paused_ones_are_found() {
    for seed in seeds(20) {
        let mut cluster = Cluster::new(200, QUIET, seed);
        cluster.run_for(3 * SECOND);
        for node in 0..40 {
            // From 300 ms to 2.25 s, at any moment between two heartbeats.
            cluster
                .at(3 * SECOND + node * 37 * MILLISECOND, Fate::Pause(node as usize, (300 + 50 * node) * MILLISECOND));
        }
        cluster.run_for(8 * SECOND);
        for node in 0..200 {
            let state = cluster.peer(node);
            if node < 40 {
                assert_eq!(state, &PeerState::Compromised(Reason::TimeStep), "seed {seed}, node {node}");
                let found = cluster.found_after_resume(node).expect("found");
                // The first heartbeat comes at the latest an interval after the resume.
                assert!(found <= 510 * MILLISECOND, "seed {seed}, node {node}: {} ms", found / MILLISECOND);
            } else {
                assert!(matches!(state, PeerState::Active { .. }), "seed {seed}, node {node}: {state:?}");
            }
        }
    }
}

/// S4: copies that start at once or later; the two fight for one enrolment until the controller knows.
#[test]
fn r13_of_hundreds_exactly_the_copied_ones_are_found() {
    for seed in seeds(20) {
        let mut cluster = Cluster::new(200, ROUGH, seed);
        cluster.run_for(3 * SECOND);
        for node in 0..40 {
            cluster.at(3 * SECOND + node * 41 * MILLISECOND, Fate::Copy(node as usize, node % 8 * 100 * MILLISECOND));
        }
        cluster.run_for(15 * SECOND);
        for node in 0..200 {
            let state = cluster.peer(node);
            if node < 40 {
                assert!(matches!(state, PeerState::Compromised(_)), "seed {seed}, node {node}: {state:?}");
            } else {
                assert!(matches!(state, PeerState::Active { .. }), "seed {seed}, node {node}: {state:?}");
            }
        }
        assert_eq!(cluster.carrying(), 160, "seed {seed}");
    }
}

/// R06: a controller that was restarted knows nothing: all are out, and come back only by enrolling anew.
#[test]
fn r06_a_restarted_controller_takes_nobody_back_without_enrolment() {
    for seed in seeds(20) {
        let mut cluster = Cluster::new(200, ROUGH, seed);
        cluster.run_for(3 * SECOND);
        cluster.restart_controller();
        cluster.run_for(LEASE + SECOND);
        assert_eq!(cluster.carrying(), 0, "seed {seed}");
        assert!((0..200).all(|node| cluster.peer(node) == &PeerState::Lost(Reason::Forgotten)), "seed {seed}");
        cluster.enrol_all();
        cluster.run_for(3 * SECOND);
        assert_eq!(cluster.carrying(), 200, "seed {seed}");
    }
}

/// S2: one that does not apply revocations loses its lease in time; its peers stop taking flows of who was revoked in time.
#[test]
fn r06_nodes_that_do_not_acknowledge_are_out_in_time() {
    for seed in seeds(20) {
        let mut cluster = Cluster::new(100, ROUGH, seed);
        cluster.run_for(3 * SECOND);
        for node in 0..10 {
            cluster.at(3 * SECOND, Fate::Deaf(node));
        }
        cluster.run_for(10 * MILLISECOND);
        cluster.revoke_somebody();
        // Until then the deaf ones may carry on, and the others do all the time.
        cluster.run_for(LEASE / 2 + LEASE + 10 * MILLISECOND);
        assert_eq!(cluster.carrying(), 90, "seed {seed}: {:?}", cluster.ended());
        cluster.run_for(SECOND);
        for node in 0..10 {
            assert_eq!(cluster.peer(node), &PeerState::Lost(Reason::Unacknowledged), "seed {seed}, node {node}");
        }
    }
}
