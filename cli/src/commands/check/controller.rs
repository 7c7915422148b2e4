//! Is the controller there, is it the right one, and is it well?

use std::time::Duration as StdDuration;

use opencluster_api::rest::{ClusterStatus, Whoami};
use opencluster_identity::SpiffeId;
use time::{Duration, OffsetDateTime};

use super::report::{Check, Group};
use crate::client::{ClientError, Settings};
use crate::commands::operator::role_name;
use crate::output::human::{duration, instant};

const REACHABLE: &str = "controller is reachable";
const TRUSTED: &str = "controller is verified against the cluster's root";

/// More is a fault: certificates of nodes and workloads live an hour, leases seconds.
const MAX_SKEW: Duration = Duration::seconds(30);
/// Time enough to plan a change of authority.
const ROOT_WARNING: Duration = Duration::days(90);
const ISSUER_WARNING: Duration = Duration::days(30);

/// There is no connection.
pub(super) fn unreachable(error: &ClientError) -> Vec<Check> {
    let untrusted = matches!(error, ClientError::Connect(error) if error.reached());
    if untrusted {
        vec![Check::ok(REACHABLE, ""), Check::failed(TRUSTED, error.to_string(), error.hint())]
    } else {
        vec![Check::failed(REACHABLE, error.to_string(), error.hint())]
    }
}

/// There is a connection: which implies that the controller is the right one.
pub(super) fn reached(peer: &SpiffeId, settings: &Settings) -> Vec<Check> {
    vec![Check::ok(REACHABLE, settings.server.to_string()), Check::ok(TRUSTED, peer.to_string())]
}

pub(super) fn credentials(whoami: &Whoami, now: OffsetDateTime) -> Check {
    let name = "credentials are valid";
    let who = format!("{}, role {}", whoami.name, role_name(whoami.role));
    match instant(&whoami.expires) {
        Some(end) if end - now < Duration::hours(1) => Check::warning(
            name,
            format!("{who}, only until {}", whoami.expires),
            "an administrator makes new ones: opencluster operator create NAME --role ROLE",
        ),
        _ => Check::ok(name, format!("{who}, until {}", whoami.expires)),
    }
}

pub(super) fn group(status: &ClusterStatus, asked: [OffsetDateTime; 2]) -> Group {
    let mut group = Group::new(format!("controller of {}", status.trust_domain));
    group.push(version(&status.version));
    group.push(clock(&status.now, asked));
    let now = asked[1];
    group.push(expiry("root certificate", &status.root_expires, ROOT_WARNING, now));
    group.push(expiry("issuing certificate", &status.issuer_expires, ISSUER_WARNING, now));
    group.push(Check::require(
        "audit chain is intact",
        status.audit_chain_ok,
        "",
        "somebody changed the store behind the controller's back: opencluster audit verify says where",
    ));
    group
}

fn version(controller: &str) -> Check {
    let own = env!("CARGO_PKG_VERSION");
    if controller == own {
        Check::ok("versions match", own)
    } else {
        let detail = format!("the controller is {controller}, this opencluster is {own}");
        Check::warning("versions match", detail, "install the opencluster of the controller's version")
    }
}

/// The controller read its clock at some moment between our two readings: only what lies outside is skew.
fn clock(controller: &str, [before, after]: [OffsetDateTime; 2]) -> Check {
    let name = "clocks agree";
    let Some(controller) = instant(controller) else {
        return Check::failed(
            name,
            format!("the controller's time is '{controller}'"),
            "its answer is wrong: look at its log",
        );
    };
    // The controller prints whole seconds, rounded down.
    let skew = (before - controller - Duration::SECOND).max(controller - after);
    let skew = skew.max(Duration::ZERO);
    let detail = format!("{} apart", duration(StdDuration::try_from(skew).unwrap_or_default()));
    Check::require(name, skew <= MAX_SKEW, detail, "set the clock of this machine or the controller's (NTP)")
}

fn expiry(what: &str, end: &str, early: Duration, now: OffsetDateTime) -> Check {
    let name = format!("{what} is valid");
    let Some(instant) = instant(end) else {
        return Check::failed(name, format!("its end is '{end}'"), "the controller's answer is wrong: look at its log");
    };
    let left = instant - now;
    let hint = "docs/operations.md, \"Rotate\", says how to replace it";
    if !left.is_positive() {
        return Check::failed(name, format!("it ended {end}"), hint);
    }
    let detail = format!("{} left", duration(StdDuration::try_from(left).unwrap_or_default()));
    if left < early { Check::warning(name, detail, hint) } else { Check::ok(name, detail) }
}

#[cfg(test)]
mod tests {
    use opencluster_api::rest::Role;
    use time::macros::datetime;

    use super::*;
    use crate::commands::check::report::Outcome;
    use crate::commands::status::tests::healthy;

    const NOW: OffsetDateTime = datetime!(2026-11-24 16:00:00 UTC);

    fn outcomes(status: &ClusterStatus, now: OffsetDateTime) -> Vec<Outcome> {
        group(status, [now, now]).checks.iter().map(|check| check.result).collect()
    }

    #[test]
    fn a_healthy_controller_passes() {
        assert_eq!(outcomes(&healthy(), NOW), [Outcome::Ok; 5]);
    }

    #[test]
    fn each_fault_of_the_controller_is_found() {
        let fails = |index: usize, outcome, status: ClusterStatus, now| {
            assert_eq!(outcomes(&status, now)[index], outcome, "{status:?}");
        };
        fails(0, Outcome::Warning, ClusterStatus { version: "9.9.9".into(), ..healthy() }, NOW);
        fails(1, Outcome::Failed, healthy(), NOW + Duration::seconds(32));
        fails(1, Outcome::Failed, healthy(), NOW - Duration::seconds(32));
        fails(1, Outcome::Ok, healthy(), NOW + Duration::seconds(29));
        fails(1, Outcome::Failed, ClusterStatus { now: "soon".into(), ..healthy() }, NOW);
        fails(2, Outcome::Failed, ClusterStatus { root_expires: "2026-11-24T15:59:59Z".into(), ..healthy() }, NOW);
        fails(2, Outcome::Warning, ClusterStatus { root_expires: "2027-01-01T00:00:00Z".into(), ..healthy() }, NOW);
        fails(3, Outcome::Warning, ClusterStatus { issuer_expires: "2026-12-01T00:00:00Z".into(), ..healthy() }, NOW);
        fails(3, Outcome::Failed, ClusterStatus { issuer_expires: String::new(), ..healthy() }, NOW);
        fails(4, Outcome::Failed, ClusterStatus { audit_chain_ok: false, ..healthy() }, NOW);
    }

    #[test]
    fn a_slow_answer_is_no_skew() {
        let asked = [NOW - Duration::seconds(40), NOW + Duration::seconds(5)];
        assert_eq!(clock("2026-11-24T16:00:00Z", asked).result, Outcome::Ok);
    }

    #[test]
    fn credentials_that_end_soon_are_a_warning() {
        let whoami = |expires: &str| Whoami { name: "anna".into(), role: Role::Admin, expires: expires.into() };
        assert_eq!(credentials(&whoami("2026-11-24T16:30:00Z"), NOW).result, Outcome::Warning);
        assert_eq!(credentials(&whoami("2026-11-25T16:00:00Z"), NOW).result, Outcome::Ok);
    }
}
