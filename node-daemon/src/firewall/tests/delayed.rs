//! A packet that was let out while the lease lasted and waits on its way: here, for the address of its neighbour.

use std::time::{Duration, Instant};

use super::host::{B, Hosts, TUNNEL, lease, output, pause, poll, shell};

/// From now on host B does not say which hardware address it has, and counts what comes to its tunnel port.
fn silence(hosts: &Hosts) {
    hosts.b.run(|| {
        assert!(shell(
            "nft 'add table netdev quiet; \
             add chain netdev quiet in { type filter hook ingress device \"eth0\" priority 0; }; \
             add rule netdev quiet in meta protocol arp drop; \
             add rule netdev quiet in icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } drop; \
             add rule netdev quiet in tcp dport 15443 counter comment \"arrived\"; \
             add chain netdev quiet out { type filter hook egress device \"eth0\" priority 0; }; \
             add rule netdev quiet out meta protocol arp drop; \
             add rule netdev quiet out icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } drop'"
        ));
    });
}

fn arrived(hosts: &Hosts) -> u64 {
    let listing = hosts.b.run(|| output("nft list chain netdev quiet in"));
    let rule = listing.lines().find(|line| line.contains("\"arrived\"")).expect("rule");
    let count = rule.split("counter packets ").nth(1).and_then(|rest| rest.split_whitespace().next());
    count.expect("a count").parse().expect("a number")
}

/// How many packets arrive at B of a connection that was begun under a lease of so many milliseconds, and whose first packet
/// waits for longer than [`WAIT`].
fn arrive(ip: &str, lease_milliseconds: u64) -> u64 {
    let hosts = Hosts::new();
    silence(&hosts);
    let mut filter = hosts.guarded();
    let hardware = hosts.b.run(|| output("ip -br link show eth0 | awk '{print $3}'"));
    // Whatever is known of B is forgotten.
    shell(&format!("ip neighbour delete {ip} dev eth0"));
    lease(&mut filter, lease_milliseconds);
    let begun = Instant::now();
    let _waiting = hosts.begin_to_connect(Some("proxy"), ip, TUNNEL);
    poll("the packet to wait for its neighbour's address", || {
        output(&format!("ip neighbour show {ip} dev eth0")).contains("INCOMPLETE")
    });
    pause(WAIT.saturating_sub(begun.elapsed().as_millis() as u64) + 20);
    assert_eq!(arrived(&hosts), 0, "it did not wait");
    // The kernel gives up after three seconds: until then, this sends what waits.
    assert!(shell(&format!("ip neighbour replace {ip} lladdr {} dev eth0 nud permanent", hardware.trim())));
    pause(100);
    assert!(begun.elapsed() < Duration::from_millis(2900), "too slow to prove anything");
    arrived(&hosts)
}

const WAIT: u64 = 700;

#[test]
fn r06_a_packet_that_was_delayed_past_the_end_of_its_lease_does_not_leave() {
    for ip in B {
        assert!(arrive(ip, 60_000) > 0, "the positive control: under a longer lease it leaves, to {ip}");
        assert_eq!(arrive(ip, WAIT), 0, "it left for {ip} after the lease");
    }
}
