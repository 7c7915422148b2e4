//! From a [`Posture`] to tables, chains and rules: pure, so that what will be in the kernel can be read and tested here.
//!
//! Two tables: `inet opencluster` decides, `netdev opencluster` lets only what it marked leave the machine (packet
//! sockets do not pass the inet hooks), and asks for the lease once more: a packet may wait between the two, for the
//! address of a neighbour for instance. In every chain the first rule that matches decides, and the policy is drop.

use std::collections::BTreeSet;

use super::expression::Expression;
use super::expression::words::{self, Family, Part, Side};
use super::policy::{FIRST_CAPTURE_PORT, LAST_CAPTURE_PORT, Posture, Serving};

/// The name of both tables.
pub(crate) const TABLE: &str = "opencluster";

/// The set, in each of the tables, that is empty but while the lease lasts.
pub(crate) const LEASE_SET: &str = "lease";

/// The packet marks that the egress chains know, random and secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Marks {
    /// What is carried: leaves while the lease lasts.
    pub(crate) carried: u32,
    /// What it takes to earn a lease: the daemon's connections to its controllers, and IPv6's neighbour discovery.
    pub(crate) control: u32,
}

/// Connection marks: which of the accepting rules let a connection begin. Packets without a full socket (SYN-ACK,
/// TIME_WAIT, RST) are recognised by them.
mod connection {
    /// Tunnels, in and out.
    pub(super) const PEER: u32 = 0x0c5e_0001;
    /// Daemon to controller.
    pub(super) const CONTROL: u32 = 0x0c5e_0002;
    /// Proxy to a local application (or to its own tunnel port) over loopback.
    pub(super) const LOCAL: u32 = 0x0c5e_0003;
}

/// Everything that one batch puts into the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ruleset {
    pub(crate) tables: [Table; 2],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) family: TableFamily,
    pub(crate) lease: Lease,
    pub(crate) chains: Vec<Chain>,
}

/// What [`LEASE_SET`] holds while the lease lasts: all of it or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Lease {
    /// The protocol families that may be carried.
    Families([u8; 2]),
    /// The mark of what may leave.
    Mark(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum TableFamily {
    Inet = 1,
    Netdev = 5,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) hook: u32,
    pub(crate) priority: i32,
    pub(crate) accept_by_default: bool,
    pub(crate) device: Option<String>,
    pub(crate) rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) comment: String,
    pub(crate) expressions: Vec<Expression>,
}

impl Ruleset {
    /// Whether the chains are the same, whatever their rules.
    pub(crate) fn has_the_chains_of(&self, other: &Self) -> bool {
        let chains = |ruleset: &Self| -> Vec<Chain> {
            let chains = ruleset.tables.iter().flat_map(|table| &table.chains);
            chains.map(|chain| Chain { rules: Vec::new(), ..chain.clone() }).collect()
        };
        chains(self) == chains(other)
    }

    /// `interfaces` are all but loopback.
    pub(crate) fn new(posture: &Posture, marks: Marks, interfaces: &BTreeSet<String>) -> Self {
        let inet = match posture {
            Posture::Closed => vec![
                filter("output", hook::OUTPUT, local_only(Side::Destination)),
                filter("input", hook::INPUT, local_only(Side::Source)),
                filter("forward", hook::FORWARD, Vec::new()),
            ],
            Posture::Serving(serving) => vec![
                capture(serving),
                filter("output", hook::OUTPUT, output(serving, marks)),
                filter("input", hook::INPUT, input(serving)),
                filter("forward", hook::FORWARD, Vec::new()),
            ],
        };
        let open = matches!(posture, Posture::Serving(_));
        let egress = interfaces.iter().map(|interface| egress(interface, open.then_some(marks))).collect();
        Self {
            tables: [
                Table { family: TableFamily::Inet, lease: Lease::Families([words::IPV4, words::IPV6]), chains: inet },
                Table { family: TableFamily::Netdev, lease: Lease::Mark(marks.carried), chains: egress },
            ],
        }
    }
}

mod hook {
    pub(super) const INPUT: u32 = 1;
    pub(super) const FORWARD: u32 = 2;
    pub(super) const OUTPUT: u32 = 3;
    pub(super) const EGRESS: u32 = 1;
}

fn filter(name: &str, hook: u32, rules: Vec<Rule>) -> Chain {
    let name = name.to_owned();
    Chain { name, kind: "filter", hook, priority: 0, accept_by_default: false, device: None, rules }
}

/// Each workload's TCP goes to the proxy, whatever the address, except among loopback addresses. What is not redirected
/// meets the drop policy of `output`.
fn capture(serving: &Serving) -> Chain {
    let mut rules = Vec::new();
    for (workload, capture) in &serving.captures {
        for family in Family::BOTH {
            rules.push(rule(
                &format!("capture {workload}"),
                [
                    words::not_loopback(family, Side::Destination),
                    words::tcp(),
                    words::socket_of(capture.cgroup),
                    words::redirect(capture.port),
                ],
            ));
        }
    }
    // -100 is where destinations are translated; the filter chains at 0 see the result.
    let name = "capture".to_owned();
    Chain { name, kind: "nat", hook: hook::OUTPUT, priority: -100, accept_by_default: true, device: None, rules }
}

fn output(serving: &Serving, marks: Marks) -> Vec<Rule> {
    let carried = || [words::set_mark(marks.carried), words::accept()].concat();
    let control = || [words::set_mark(marks.control), words::accept()].concat();
    let mut rules = vec![
        // 1. What is under way, the most frequent first: nearly every packet is decided by one of these three. Tunnels
        //    keep to the wire; a captured connection is recognised before the question for the interface, since a
        //    redirected packet still shows the interface that it was routed to at first.
        rule(
            "tunnels",
            [
                words::ct_mark(connection::PEER),
                words::ct_state(words::ESTABLISHED),
                words::not_to_loopback(),
                lease(),
                carried(),
            ],
        ),
        rule("captured", [words::redirected(), lease(), words::accept()]),
        rule("proxied, local", [words::ct_mark(connection::LOCAL), words::to_loopback(), lease(), words::accept()]),
        // 2. The same without a lease, before anything else could accept it.
        rule("captured, no lease", [words::redirected(), words::drop()]),
        rule("proxied, local, no lease", [words::to_loopback(), words::ct_mark(connection::LOCAL), words::drop()]),
        // 3. Nobody connects to a capture port by itself: that would claim another workload's identity.
        rule(
            "direct connection to a capture port",
            [words::to_loopback(), words::tcp_to_ports(FIRST_CAPTURE_PORT, LAST_CAPTURE_PORT), words::drop()],
        ),
        rule(
            "proxy to a local application",
            [
                words::to_loopback(),
                words::tcp(),
                words::socket_of(serving.proxy),
                lease(),
                words::set_ct_mark(connection::LOCAL),
                words::accept(),
            ],
        ),
        rule("proxy, local, else", [words::to_loopback(), words::socket_of(serving.proxy), words::drop()]),
    ];
    if let Some(port) = serving.tunnel_port {
        rules.push(rule(
            "tunnels come from proxies only",
            [words::to_loopback(), words::tcp_to_port(port), words::drop()],
        ));
    }
    // 4. Loopback addresses are free among local processes; this node's own addresses are reached through the proxy.
    rules.extend(local_only(Side::Destination));
    rules.push(rule("no other local address", [words::to_loopback(), words::drop()]));

    // 5. From here on: the wire.
    rules.push(rule("invalid", [words::ct_state(words::INVALID), words::drop()]));
    rules.push(rule(
        "control connection",
        [words::ct_state(words::ESTABLISHED), words::ct_mark(connection::CONTROL), control()],
    ));
    // The daemon has to earn its lease first: no lease asked here, but no other destination either.
    for controller in &serving.controllers {
        rules.push(rule(
            "daemon to controller",
            [
                words::to_address(controller.ip()),
                words::tcp_to_port(controller.port()),
                words::socket_of(serving.daemon),
                words::set_ct_mark(connection::CONTROL),
                control(),
            ],
        ));
    }
    rules.push(rule(
        "proxy to other nodes",
        [words::tcp(), words::socket_of(serving.proxy), lease(), words::set_ct_mark(connection::PEER), carried()],
    ));
    // IPv6 cannot work without neighbour discovery: solicitation, advertisement, and the multicast membership report
    // that makes a snooping switch deliver them. (IPv4's ARP does not pass here: see the egress chain.)
    for (kind, name) in [(135, "neighbour solicitation"), (136, "neighbour advertisement"), (143, "multicast report")] {
        rules.push(rule(name, [words::icmpv6(kind), control()]));
    }
    rules
}

fn input(serving: &Serving) -> Vec<Rule> {
    let mut rules = vec![
        // What is under way first: nearly every packet from the wire is of a tunnel. Its addresses were judged when the
        // tunnel began.
        rule(
            "tunnels",
            [words::ct_mark(connection::PEER), words::ct_state(words::ESTABLISHED), lease(), words::accept()],
        ),
        // The output chain has judged local packets already (with their sockets); this is the second lock on the same
        // door.
        rule(
            "direct connection to a capture port",
            [words::tcp_to_ports(FIRST_CAPTURE_PORT, LAST_CAPTURE_PORT), words::not_redirected(), words::drop()],
        ),
        rule("local", [words::from_loopback(), words::accept()]),
    ];
    // From here on: the wire. Loopback addresses do not come from there.
    for family in Family::BOTH {
        for side in [Side::Source, Side::Destination] {
            rules.push(rule("loopback address on the wire", [words::loopback(family, side), words::drop()]));
        }
    }
    rules.push(rule("invalid", [words::ct_state(words::INVALID), words::drop()]));
    for (kind, name) in [(135, "neighbour solicitation"), (136, "neighbour advertisement")] {
        rules.push(rule(name, [words::icmpv6(kind), words::from_this_link(), words::accept()]));
    }
    rules.push(rule(
        "control connection",
        [words::ct_state(words::ESTABLISHED), words::ct_mark(connection::CONTROL), words::accept()],
    ));
    // Path MTU discovery and unreachable networks, about connections of ours only.
    for (kind, name) in [(3, "destination unreachable, fragmentation needed"), (11, "time exceeded")] {
        rules.extend(about_our_connections(name, &words::icmp(kind)));
    }
    for (kind, name) in [(1, "destination unreachable"), (2, "packet too big"), (3, "time exceeded")] {
        rules.extend(about_our_connections(name, &words::icmpv6(kind)));
    }
    if let Some(port) = serving.tunnel_port {
        rules.push(rule(
            "tunnels from other nodes",
            [words::tcp_to_port(port), lease(), words::set_ct_mark(connection::PEER), words::accept()],
        ));
    }
    rules
}

fn about_our_connections(name: &str, message: &Part) -> [Rule; 2] {
    [
        rule(
            name,
            [message.clone(), words::ct_state(words::RELATED), words::ct_mark(connection::CONTROL), words::accept()],
        ),
        rule(
            name,
            [
                message.clone(),
                words::ct_state(words::RELATED),
                words::ct_mark(connection::PEER),
                lease(),
                words::accept(),
            ],
        ),
    ]
}

/// Among loopback addresses.
fn local_only(side: Side) -> Vec<Rule> {
    let interface = || match side {
        Side::Destination => words::to_loopback(),
        Side::Source => words::from_loopback(),
    };
    Family::BOTH
        .into_iter()
        .map(|family| {
            rule(
                "loopback",
                [
                    interface(),
                    words::loopback(family, Side::Source),
                    words::loopback(family, Side::Destination),
                    words::accept(),
                ],
            )
        })
        .collect()
}

/// Only what the output chain marked leaves, and the mark does not leave with it: who taps the wire or a packet socket
/// must not learn it. The mark of what is carried counts only while the lease lasts.
fn egress(interface: &str, marks: Option<Marks>) -> Chain {
    const ARP: u16 = 0x0806;
    let rules = marks.map_or_else(Vec::new, |marks| {
        vec![
            rule("carried", [words::mark_in_set(LEASE_SET), words::set_mark(0), words::accept()]),
            rule("control", [words::mark(marks.control), words::set_mark(0), words::accept()]),
            rule("address resolution", [words::ether_type(ARP), words::accept()]),
        ]
    });
    Chain {
        name: format!("egress-{interface}"),
        kind: "filter",
        hook: hook::EGRESS,
        priority: 0,
        accept_by_default: false,
        device: Some(interface.to_owned()),
        rules,
    }
}

/// The lease is a condition: it holds until the kernel's own timer ends it.
fn lease() -> Part {
    words::family_in_set(LEASE_SET)
}

fn rule<const N: usize>(comment: &str, parts: [Part; N]) -> Rule {
    Rule { comment: comment.to_owned(), expressions: parts.into_iter().flatten().collect() }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
