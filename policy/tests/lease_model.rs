//! The lease protocol, checked in every state that it can reach within bounds (`docs/lease.md` says which and why).
//!
//! Each model is also run with the protocol broken in one way: that the checker finds what is then wrong is what makes its
//! silence about the real one worth something.

mod model;

use std::fmt::Debug;
use std::hash::Hash;
use std::time::Instant;

use model::revocation::{Gone, S2_BOUND};
use model::side::Mutant;
use model::world::{Controllers, Network, PAUSE, S1, S2, S3_BOOT, S3_CONTROLLER, S3_NODE, S4, S4_KNOWN, S5, Setting};
use opencluster_policy::lease::Timing;
use stateright::{Checker, HasDiscoveries, Model};

/// In ticks: a lease of three, a heartbeat in each.
const TIMING: Timing =
    Timing { lease: 3, heartbeat: 1, retry: 1, margin: 1, patience: 2, grace: 20, step: 1, drift_ppm: 0 };

const SHORT: Timing = Timing { lease: 2, ..TIMING };

/// One node, one controller, a network that does anything; the node is paused, its clock drifts, the controller crashes.
fn hostile() -> Setting {
    Setting {
        timing: TIMING,
        horizon: 4,
        network: Network::Hostile,
        controllers: Controllers::Alone,
        copies: false,
        pauses: 1,
        drift: 1,
        crashes: 1,
        mutant: None,
    }
}

/// The node becomes two, on its own boot or on another.
fn copies() -> Setting {
    Setting { horizon: 2, copies: true, pauses: 0, drift: 0, crashes: 0, ..hostile() }
}

/// The same, while the controller crashes.
fn copies_and_a_crash() -> Setting {
    Setting { timing: SHORT, crashes: 1, ..copies() }
}

/// Two controllers share a store; one of them may crash.
fn sharing() -> Setting {
    Setting { timing: SHORT, horizon: 3, controllers: Controllers::Sharing, pauses: 0, drift: 0, ..hostile() }
}

/// Two copies at two controllers.
fn copies_and_two_controllers() -> Setting {
    Setting { timing: SHORT, horizon: 1, controllers: Controllers::Sharing, ..copies() }
}

/// A healthy node. Any two exchanges in a row, each with one message lost and both others late, take
/// 2 × (1 + 2 × 1) = 6 ticks, and the clock gains one: a lease of 8 is long enough.
fn healthy() -> Setting {
    Setting {
        timing: Timing { lease: 8, heartbeat: 2, ..TIMING },
        horizon: 8,
        network: Network::Lossy { delay: 1, losses: 1 },
        pauses: 0,
        crashes: 0,
        ..hostile()
    }
}

/// A node that is paused for three ticks over a network that is prompt.
fn paused() -> Setting {
    Setting {
        timing: Timing { lease: 5, ..TIMING },
        horizon: 9,
        network: Network::Lossy { delay: 0, losses: 0 },
        pauses: 3,
        drift: 0,
        crashes: 0,
        ..hostile()
    }
}

fn gone() -> Gone {
    Gone { timing: SHORT, horizon: 9, mutant: None }
}

/// Visits all states. Nothing that must not be is, and what must be possible is.
fn holds<M>(name: &str, model: M)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync + 'static,
    M::Action: Clone + Debug + PartialEq,
{
    let start = Instant::now();
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
    checker.assert_properties();
    println!(
        "{name}: {} states, {} of them different, at most {} steps deep, in {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        start.elapsed().as_secs_f64()
    );
}

/// The checker finds that exactly this does not hold.
fn breaks<M>(model: M, property: &'static str)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync + 'static,
    M::Action: Clone + Debug + PartialEq,
{
    let checker = model.checker().finish_when(HasDiscoveries::AllOf([property].into())).spawn_bfs().join();
    checker.assert_any_discovery(property);
}

#[test]
fn r06_the_lease_holds_over_a_hostile_network() {
    holds("hostile", hostile());
}

#[test]
fn r13_of_two_copies_one_stays_and_the_controller_knows() {
    holds("copies", copies());
    holds("copies and a crash", copies_and_a_crash());
}

#[test]
fn r06_two_controllers_are_as_good_as_one() {
    holds("sharing", sharing());
    holds("copies and two controllers", copies_and_two_controllers());
}

#[test]
fn r06_a_healthy_node_is_never_severed_in_any_state() {
    holds("healthy", healthy());
}

#[test]
fn r13_a_pause_is_found_by_the_heartbeat_after_it() {
    holds("paused", paused());
}

#[test]
fn r06_no_peer_takes_flows_of_a_lost_node_after_the_bound() {
    holds("gone", gone());
}

#[test]
fn r06_the_checker_finds_what_is_wrong_with_time() {
    breaks(Setting { mutant: Some(Mutant::CountFromReceipt), ..hostile() }, S1);
    breaks(Setting { mutant: Some(Mutant::NoMargin), ..hostile() }, S2);
    breaks(Setting { mutant: Some(Mutant::NoLatch), ..hostile() }, S3_NODE);
    breaks(Gone { mutant: Some(Mutant::NobodyIsLost), ..gone() }, S2_BOUND);
    breaks(Gone { mutant: Some(Mutant::GrantUnacknowledged), ..gone() }, S2_BOUND);
    breaks(Gone { mutant: Some(Mutant::GrantUnannounced), ..gone() }, S2_BOUND);
    breaks(Gone { mutant: Some(Mutant::CountFromAnnouncement), ..gone() }, S2_BOUND);
    breaks(Setting { mutant: Some(Mutant::NoTimeCheck), ..paused() }, PAUSE);
    breaks(Setting { mutant: Some(Mutant::NoConfirmation), ..paused() }, PAUSE);
}

#[test]
fn r13_the_checker_finds_what_is_wrong_with_copies() {
    breaks(Setting { mutant: Some(Mutant::AcceptPreviousNonce), ..copies() }, S4);
    breaks(Setting { mutant: Some(Mutant::AnyGrantWillDo), ..copies() }, S4);
    breaks(Setting { mutant: Some(Mutant::NoBootCheck), ..copies() }, S3_BOOT);
    breaks(Setting { mutant: Some(Mutant::AnyNonceAfterRestart), ..copies_and_a_crash() }, S4);
    breaks(Setting { mutant: Some(Mutant::ControllersApart), ..copies() }, S4_KNOWN);
    breaks(Setting { mutant: Some(Mutant::BlindWrites), ..copies_and_two_controllers() }, S4_KNOWN);
    breaks(Setting { mutant: Some(Mutant::BlindWrites), ..sharing() }, S3_CONTROLLER);
}

#[test]
fn r06_the_checker_finds_false_alarms() {
    breaks(Setting { mutant: Some(Mutant::NewReplyToRepetition), ..healthy() }, S5);
    breaks(Setting { mutant: Some(Mutant::NewBytesOnRetry), ..healthy() }, S5);
    breaks(Setting { mutant: Some(Mutant::DelayIsPause), ..healthy() }, S5);
    // The bound is not only good enough but needed: a shorter lease than it asks for, and healthy nodes are severed.
    breaks(Setting { timing: Timing { lease: 6, ..healthy().timing }, ..healthy() }, S5);
}

/// Larger bounds, which take minutes and gigabytes: `make soak` runs them.
mod deep {
    use super::*;

    #[test]
    #[ignore = "takes minutes"]
    fn a_hostile_network() {
        let drifting = Setting { horizon: 6, pauses: 2, drift: 2, crashes: 2, ..hostile() };
        // The margin is what covers drift: twice the drift asks for twice the margin.
        breaks(drifting.clone(), S2);
        holds("hostile", Setting { timing: Timing { margin: 2, ..TIMING }, ..drifting });
    }

    #[test]
    #[ignore = "takes minutes"]
    fn copies_of_a_node() {
        holds("copies", Setting { horizon: 3, ..copies() });
        holds("copies and a crash", Setting { timing: TIMING, ..copies_and_a_crash() });
        holds("copies and two controllers", Setting { horizon: 2, ..copies_and_two_controllers() });
    }

    #[test]
    #[ignore = "takes more than eight minutes"]
    fn two_controllers_that_share_a_store() {
        holds("sharing", Setting { horizon: 6, crashes: 2, ..sharing() });
    }

    #[test]
    #[ignore = "takes minutes"]
    fn a_healthy_node_and_a_paused_one() {
        holds("healthy", Setting { horizon: 10, ..healthy() });
        holds("paused", Setting { horizon: 14, pauses: 5, ..paused() });
    }

    #[test]
    #[ignore = "takes more than ten minutes"]
    fn a_lost_node_and_its_peers() {
        holds("gone", Gone { timing: TIMING, horizon: 12, ..gone() });
    }
}
