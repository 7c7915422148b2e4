//! Closing, when something is in its way.

use std::time::{Duration, Instant};

use super::super::enforcer::Enforcer;
use super::super::express;
use super::super::policy::Posture;
use super::host::{B, CONTROLLER, Hosts, TUNNEL, lease, output, shell};

fn is_closed() -> bool {
    let listing = output("nft list table inet opencluster; nft list table netdev opencluster");
    listing.contains("\"loopback\"") && !listing.contains("\"tunnels\"") && !listing.contains("elements")
}

/// An AF_XDP socket of somebody else holds a queue: what cannot be guarded is to be closed all the same, and at once.
#[test]
fn r35_a_queue_that_another_holds_does_not_keep_the_filter_from_closing() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    let mut clients: Vec<_> =
        B.iter().map(|ip| hosts.connect(Some("proxy"), ip, TUNNEL).expect("with a lease")).collect();
    assert!(shell("ip link add extra0 type veth peer name extra1"));
    let index = nix::net::if_::if_nametoindex("extra0").expect("extra0");
    let foreign = express::try_to_take(index, 0).expect("a free queue");
    let error = filter.verify().expect_err("it cannot be held");
    assert!(error.to_string().contains("AF_XDP"), "{error}");
    filter.apply(Posture::Serving(hosts.serving())).expect_err("the positive control: it is in the way");
    assert!(clients.iter_mut().all(super::host::Client::echoes), "and traffic still passes");
    // The tables were put right first: the new interface is guarded but for that queue.
    assert!(output("nft list table netdev opencluster").contains("device \"extra0\""));

    let begun = Instant::now();
    filter.apply(Posture::Closed).expect("closed");
    assert!(begun.elapsed() < Duration::from_millis(700), "it waited for the queue: {:?}", begun.elapsed());
    assert!(is_closed());
    assert!(!clients.iter_mut().any(super::host::Client::echoes));
    filter.verify().expect_err("and it is still reported");
    assert!(is_closed());
    drop(foreign);
    assert_eq!(filter.verify().expect("verify"), None);
}

/// They go away with their owner.
const OWNED_NOT_PERSISTENT: u32 = 0x2;

/// Somebody else owns the tables when they are to be closed.
#[test]
fn r35_what_could_not_be_closed_is_closed_by_the_next_verification_and_never_opened_again() {
    let hosts = Hosts::new();
    let mut filter = Enforcer::with_table_flags(0, None).expect("enforcer");
    filter.apply(Posture::Serving(hosts.serving())).expect("apply");
    lease(&mut filter, 60_000);
    assert!(shell("nft delete table inet opencluster && nft delete table netdev opencluster"));
    // It wants no interface, so the queues are not in its way.
    let mut owner = Enforcer::with_table_flags(OWNED_NOT_PERSISTENT, Some(Vec::new())).expect("enforcer");
    owner.apply(Posture::Serving(hosts.serving())).expect("apply");
    let refused = filter.apply(Posture::Closed).expect_err("another owns the tables");
    assert!(refused.to_string().contains("refused"), "{refused}");
    filter.verify().expect_err("still");
    assert!(hosts.connect(Some("daemon"), B[0], CONTROLLER).is_some(), "the positive control: they are the other's");
    drop(owner);
    assert!(filter.verify().expect("now it can").is_some());
    assert!(is_closed());
    lease(&mut filter, 60_000);
    assert!(is_closed(), "no lease opens it");
    assert_eq!(filter.verify().expect("verify"), None);
}
