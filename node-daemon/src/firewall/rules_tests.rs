use std::collections::BTreeMap;

use super::super::expression::Verdict;
use super::super::policy::Capture;
use super::*;
use crate::cgroup::Cgroup;

fn serving() -> Serving {
    Serving {
        daemon: Cgroup { id: 11, level: 2 },
        proxy: Cgroup { id: 12, level: 2 },
        controllers: ["10.0.0.2:7443".parse().expect("address"), "[fd00::2]:7443".parse().expect("address")].into(),
        tunnel_port: Some(15443),
        captures: BTreeMap::from([(
            "default/a".to_owned(),
            Capture { cgroup: Cgroup { id: 13, level: 3 }, port: FIRST_CAPTURE_PORT },
        )]),
    }
}

fn ruleset(posture: &Posture) -> Ruleset {
    Ruleset::new(posture, MARKS, &BTreeSet::from(["eth0".to_owned()]))
}

const MARKS: Marks = Marks { carried: 0xdead_beef, control: 0x0bad_cafe };

fn accepts(rule: &Rule) -> bool {
    rule.expressions.contains(&Expression::Verdict(Verdict::Accept))
}

fn holds(rule: &Rule, part: &Part) -> bool {
    rule.expressions.windows(part.len()).any(|window| window == part.as_slice())
}

#[test]
fn r06_every_rule_that_accepts_carried_traffic_asks_for_the_lease() {
    let without_lease: BTreeSet<&str> = [
        "loopback",
        "local",
        "control",
        "address resolution",
        "control connection",
        "daemon to controller",
        "neighbour solicitation",
        "neighbour advertisement",
        "multicast report",
    ]
    .into();
    let ruleset = ruleset(&Posture::Serving(serving()));
    let mut asked = 0;
    let rules = ruleset.tables.iter().flat_map(|table| &table.chains).flat_map(|chain| &chain.rules);
    for rule in rules.filter(|rule| accepts(rule)) {
        if holds(rule, &lease()) || holds(rule, &words::mark_in_set(LEASE_SET)) {
            asked += 1;
        } else {
            // ICMP errors about the control connection are the one more exception.
            let about_control = holds(rule, &words::ct_mark(connection::CONTROL));
            assert!(without_lease.contains(rule.comment.as_str()) || about_control, "{rule:?} accepts without a lease");
        }
    }
    assert!(asked >= 8, "only {asked} rules ask for the lease");
}

#[test]
fn r03_every_filter_chain_drops_by_default() {
    for posture in [Posture::Closed, Posture::Serving(serving())] {
        let ruleset = ruleset(&posture);
        let mut filters = 0;
        for chain in ruleset.tables.iter().flat_map(|table| &table.chains).filter(|chain| chain.kind == "filter") {
            assert!(!chain.accept_by_default, "{} accepts by default", chain.name);
            filters += 1;
        }
        assert_eq!(filters, 4, "output, input, forward, egress");
    }
}

#[test]
fn closed_accepts_nothing_but_loopback() {
    let ruleset = ruleset(&Posture::Closed);
    for rule in ruleset.tables.iter().flat_map(|table| &table.chains).flat_map(|chain| &chain.rules) {
        assert_eq!(rule.comment, "loopback");
    }
}

#[test]
fn what_goes_to_the_wire_is_marked_by_whether_it_needs_the_lease_and_what_stays_is_not() {
    let ruleset = ruleset(&Posture::Serving(serving()));
    let output = ruleset.tables[0].chains.iter().find(|chain| chain.name == "output").expect("output");
    let mut stay = 0;
    for rule in output.rules.iter().filter(|rule| accepts(rule)) {
        let stays = holds(rule, &words::to_loopback()) || holds(rule, &words::redirected());
        let leased = holds(rule, &lease());
        assert_eq!(holds(rule, &words::set_mark(MARKS.carried)), leased && !stays, "{rule:?}");
        assert_eq!(holds(rule, &words::set_mark(MARKS.control)), !leased && !stays, "{rule:?}");
        stay += u32::from(stays);
    }
    assert_eq!(stay, 5, "captured, proxied, delivered, and loopback of both families");
}

#[test]
fn r06_what_is_under_way_without_a_lease_meets_its_drop_before_any_rule_that_accepts_without_one() {
    let ruleset = ruleset(&Posture::Serving(serving()));
    let output = ruleset.tables[0].chains.iter().find(|chain| chain.name == "output").expect("output");
    let position = |comment: &str| output.rules.iter().position(|rule| rule.comment == comment).expect("rule");
    let first_without = output.rules.iter().position(|rule| accepts(rule) && !holds(rule, &lease())).expect("some");
    for comment in ["captured, no lease", "proxied, local, no lease"] {
        assert!(position(comment) < first_without, "{comment}");
    }
}

/// What nearly every packet costs: conditions that are tried until its rule accepts.
#[test]
fn packets_under_way_are_accepted_by_the_first_rules() {
    let ruleset = ruleset(&Posture::Serving(serving()));
    for (chain, comment, at_most) in
        [("output", "tunnels", 0), ("output", "captured", 1), ("output", "proxied, local", 2), ("input", "tunnels", 0)]
    {
        let chain = ruleset.tables[0].chains.iter().find(|found| found.name == chain).expect("chain");
        let position = chain.rules.iter().position(|rule| rule.comment == comment).expect("rule");
        assert!(position <= at_most, "{comment} is rule {position} of {}", chain.name);
    }
}

#[test]
fn before_the_node_is_known_there_is_no_way_in() {
    let ruleset = ruleset(&Posture::Serving(Serving { tunnel_port: None, ..serving() }));
    let input = ruleset.tables[0].chains.iter().find(|chain| chain.name == "input").expect("input");
    assert!(input.rules.iter().all(|rule| rule.comment != "tunnels from other nodes"));
}
