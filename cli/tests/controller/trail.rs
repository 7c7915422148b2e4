//! The audit trail and the state, seen from outside.

use crate::cluster::Cluster;
use crate::resources::PAIR;

#[test]
fn r36_the_trail_is_verified_without_trusting_the_controller() {
    let cluster = Cluster::start();
    cluster.apply(PAIR);
    let verified = cluster.json(&["audit", "verify"]);
    assert_eq!(verified["ok"], true);
    let events = verified["events"].as_u64().expect("a number");
    assert!(events >= 6, "one event for each resource at least: {events}");
    let listed = cluster.json(&["audit", "list"]);
    let last = listed.as_array().and_then(|events| events.last()).expect("events");
    assert_eq!(last["sequence"], events);
    assert_eq!(last["hash"], verified["head"]);

    let two = cluster.run(&["audit", "list", "--last", "2"]);
    assert_eq!(two.stdout.lines().count(), 3, "a heading and two events: {}", two.stdout);
    let from = cluster.json(&["audit", "list", "--from", "2"]);
    assert_eq!(from[0]["sequence"], 2);
}

#[test]
fn the_state_is_told() {
    let cluster = Cluster::start();
    let status = cluster.run(&["status"]);
    assert!(status.stdout.starts_with("Trust domain cli.test\n"), "{}", status.stdout);
    assert!(status.stdout.contains("spiffe://cli.test/controller/ctl at unix:"), "{}", status.stdout);
    let version = cluster.json(&["version"]);
    assert_eq!(version["client"], version["controller"]);
}

#[test]
fn check_finds_what_is_missing_and_says_what_to_do() {
    let cluster = Cluster::start();
    let empty = cluster.run(&["check"]);
    assert_eq!(empty.code, Some(0), "a cluster without nodes is in order: {}{}", empty.stdout, empty.stderr);
    assert!(empty.stdout.contains("✓ credentials are valid: "), "{}", empty.stdout);
    assert!(empty.stdout.contains("✓ audit chain is intact"), "{}", empty.stdout);
    assert!(empty.stdout.contains("! there are nodes: none"), "{}", empty.stdout);

    cluster.apply(PAIR);
    let failing = cluster.run(&["check"]);
    assert_eq!(failing.code, Some(1));
    assert!(failing.stdout.contains("! is active: it never enrolled"), "{}", failing.stdout);
    assert!(failing.stdout.contains("hint: opencluster node token a makes the token"), "{}", failing.stdout);
    assert!(failing.stdout.contains("✗ service default/echo has ready backends: 0 of 1"), "{}", failing.stdout);
    let json = cluster.run(&["check", "-o", "json"]);
    assert_eq!(json.code, Some(1));
    let report: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
    assert_eq!(report["ok"], false);
}
