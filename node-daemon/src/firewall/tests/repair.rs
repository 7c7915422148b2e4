//! Others who change the rules.

use tokio::sync::mpsc;

use super::super::enforcer::Enforcer;
use super::super::policy::Posture;
use super::super::{Event, Firewall};
use super::host::{B, CONTROLLER, Hosts, TUNNEL, lease, output, pause, poll, shell};
use crate::clock;

const DAMAGE: [&str; 6] = [
    "nft delete table inet opencluster",
    "nft delete table netdev opencluster",
    "nft flush chain inet opencluster output",
    "nft insert rule inet opencluster output accept",
    "nft add element inet opencluster lease '{ ipv4, ipv6 }'",
    "nft add element netdev opencluster lease '{ 0x1 }'",
];

const INET_LEASE: &str = "nft list set inet opencluster lease";
const EGRESS_LEASE: &str = "nft list set netdev opencluster lease";

#[test]
fn r03_another_root_process_cannot_change_our_tables() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    filter.renew(0).expect("end the lease");
    let before = output("nft list ruleset");
    for damage in DAMAGE {
        assert!(!shell(damage), "{damage} was accepted");
    }
    shell("nft flush ruleset");
    assert_eq!(output("nft list ruleset"), before);
    assert!(hosts.connect(None, B[0], 80).is_none());
    assert_eq!(filter.verify().expect("verify"), None);
}

#[test]
fn r03_the_tables_stay_closed_when_their_owner_is_gone_and_can_be_taken_over() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    lease(&mut filter, 300);
    drop(filter);
    assert!(hosts.connect(None, B[0], 80).is_none(), "the rules are still there");
    pause(300);
    assert!(hosts.connect(Some("proxy"), B[0], TUNNEL).is_none(), "and without a lease");
    let _next = hosts.guarded();
    assert!(hosts.connect(Some("proxy"), B[0], TUNNEL).expect("the next daemon").echoes());
}

#[test]
fn r03_damaged_tables_are_put_back() {
    let hosts = Hosts::new();
    let mut filter = Enforcer::with_table_flags(0, None).expect("enforcer");
    filter.apply(Posture::Serving(hosts.serving())).expect("apply");
    for damage in DAMAGE.into_iter().take(4).chain(["nft flush ruleset"]) {
        assert_eq!(filter.verify().expect("verify"), None, "before {damage}");
        assert!(shell(damage), "{damage} was refused");
        assert!(filter.verify().expect("verify").is_some(), "{damage} was not noticed");
        assert!(hosts.connect(None, B[0], 80).is_none(), "open after {damage}");
        assert!(hosts.connect(Some("daemon"), B[0], CONTROLLER).is_some(), "closed too far after {damage}");
    }
}

#[test]
fn r30_a_new_interface_is_guarded() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    assert!(shell("ip link add extra0 type veth peer name extra1"));
    assert!(filter.verify().expect("verify").is_some_and(|what| what.contains("extra0")));
    assert!(output("nft list table netdev opencluster").contains("device \"extra0\""));
    assert!(shell("ip link delete extra0"));
    assert!(filter.verify().expect("verify").is_some());
    assert_eq!(filter.verify().expect("verify"), None);
}

#[test]
fn r07_changes_by_others_are_reported_with_who_made_them() {
    let _hosts = Hosts::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let (sender, mut events) = mpsc::channel(16);
    let firewall = Firewall::start(Posture::Closed, None, sender).expect("start");
    runtime.block_on(firewall.apply(Posture::Closed)).expect("our own changes are not reported");
    pause(50);
    assert!(events.try_recv().is_err());
    assert!(shell("nft add table inet somebody"));
    let mut event = None;
    poll("an event", || {
        event = events.try_recv().ok();
        event.is_some()
    });
    assert!(matches!(&event, Some(Event::Changed { by }) if by.contains("nft")), "{event:?}");
}

#[test]
fn r06_a_renewal_for_a_moment_that_is_over_is_no_lease_for_ever() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    for deadline in [0, clock::boottime(), clock::boottime() + 1, clock::boottime() + 3_000_000] {
        filter.renew(deadline).expect("renew");
        pause(10);
        for set in [INET_LEASE, EGRESS_LEASE] {
            assert!(!output(set).contains("elements"), "deadline {deadline}, {set}");
        }
    }
    lease(&mut filter, 60_000);
    for set in [INET_LEASE, EGRESS_LEASE] {
        assert!(output(set).contains(" timeout "), "{set}");
    }
}

/// The clock was read so long before the kernel got the lease: as after a SIGSTOP in between.
#[test]
fn r06_a_renewal_that_was_held_up_does_not_stretch_the_lease() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    let open = || [INET_LEASE, EGRESS_LEASE].map(|set| output(set).contains("elements"));
    let now = clock::boottime();
    filter.renew_as_of(now - 5_000_000_000, now - 1_000_000_000).expect("renew");
    assert_eq!(open(), [false; 2], "its lease was over before the kernel got it");

    let deadline = clock::boottime() + 600_000_000;
    filter.renew_as_of(clock::boottime() - 5_000_000_000, deadline).expect("renew");
    assert_eq!(open(), [true; 2], "the positive control: something of it was left");
    poll("the deadline", || clock::boottime() > deadline + 10_000_000);
    assert_eq!(open(), [false; 2], "it ends with its deadline");
}
