//! The packet filter in a real kernel. Each test has two hosts of its own and leaves nothing behind.

mod closing;
mod delayed;
mod host;
mod packets;
mod repair;

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::enforcer::Enforcer;
use super::policy::{FIRST_CAPTURE_PORT, Posture};
use host::{A, B, CONTROLLER, Hosts, PATIENCE, TUNNEL, address, echo, lease, output, pause, shell};

fn from_b(hosts: &Hosts, ip: &'static str, port: u16) -> bool {
    hosts.b.run(move || TcpStream::connect_timeout(&address(ip, port), PATIENCE).is_ok())
}

#[test]
fn r30_only_the_proxy_reaches_other_hosts() {
    let hosts = Hosts::new();
    let _filter = hosts.guarded();
    for ip in B {
        assert!(hosts.connect(Some("proxy"), ip, TUNNEL).expect("the proxy may").echoes());
        assert!(hosts.connect(None, ip, TUNNEL).is_none(), "a process outside of every workload reached {ip}");
        assert!(hosts.connect(Some("daemon"), ip, TUNNEL).is_none(), "the daemon reached a tunnel port");
        assert!(hosts.connect(Some("daemon"), ip, 80).is_none(), "the daemon reached any port");
    }
}

#[test]
fn r06_lease_expiry_stops_established_connections_and_a_renewal_lets_them_go_on() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    for ip in B {
        lease(&mut filter, 60_000);
        let mut client = hosts.connect(Some("proxy"), ip, TUNNEL).expect("with a lease");
        assert!(client.echoes());
        lease(&mut filter, 400);
        let begun = Instant::now();
        assert!(client.echoes(), "the lease lasts still");
        pause(400_u64.saturating_sub(begun.elapsed().as_millis() as u64) + 10);
        assert!(!client.echoes(), "the lease is over");
        assert!(hosts.connect(Some("proxy"), ip, TUNNEL).is_none(), "no new connection either");
        lease(&mut filter, 60_000);
        // What was sent in vain is sent again by TCP, at the latest a second later or so.
        assert!(client.line(PATIENCE * 4).is_some() || client.echoes(), "renewed");
    }
}

#[test]
fn r06_the_daemon_reaches_its_controllers_without_a_lease_and_nothing_else_does() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    filter.renew(0).expect("end the lease");
    for ip in B {
        assert!(hosts.connect(Some("daemon"), ip, CONTROLLER).expect("to earn a lease").echoes());
        assert!(hosts.connect(Some("proxy"), ip, CONTROLLER).is_none());
        assert!(hosts.connect(Some("workloads/default.a"), ip, CONTROLLER).is_none());
        assert!(hosts.connect(None, ip, CONTROLLER).is_none());
    }
}

#[test]
fn r03_the_wire_gets_in_at_the_tunnel_port_only_and_only_with_a_lease() {
    let hosts = Hosts::new();
    for ip in A {
        for port in [TUNNEL, 22, FIRST_CAPTURE_PORT] {
            echo(address(ip, port));
        }
        assert!(from_b(&hosts, ip, 22), "without the packet filter it would get in");
    }
    let mut filter = hosts.guarded();
    for ip in A {
        assert!(from_b(&hosts, ip, TUNNEL));
        assert!(!from_b(&hosts, ip, 22));
        assert!(!from_b(&hosts, ip, FIRST_CAPTURE_PORT));
        assert!(!from_b(&hosts, ip, 9), "not even a reset comes back");
    }
    filter.renew(0).expect("end the lease");
    for ip in A {
        assert!(!from_b(&hosts, ip, TUNNEL));
    }
}

#[test]
fn r30_a_workloads_connections_go_to_its_capture_port_whatever_their_address() {
    let hosts = Hosts::new();
    for ip in ["127.0.0.1", "::1"] {
        echo(address(ip, FIRST_CAPTURE_PORT));
    }
    let _filter = hosts.guarded();
    for ip in [B, A].concat() {
        // Nothing listens on this port, there or here: who answers is the capture listener.
        assert!(hosts.connect(Some("workloads/default.a"), ip, 4711).expect("captured").echoes(), "{ip}");
        assert!(hosts.connect(None, ip, 4711).is_none());
    }
}

#[test]
fn r06_captured_connections_need_the_lease_too() {
    let hosts = Hosts::new();
    echo(address("127.0.0.1", FIRST_CAPTURE_PORT));
    let mut filter = hosts.guarded();
    let mut client = hosts.connect(Some("workloads/default.a"), B[0], 80).expect("captured");
    assert!(client.echoes());
    filter.renew(0).expect("end the lease");
    assert!(!client.echoes());
}

#[test]
fn r31_nobody_borrows_an_identity_by_connecting_to_a_capture_port() {
    let hosts = Hosts::new();
    for ip in ["127.0.0.1", "::1"] {
        echo(address(ip, FIRST_CAPTURE_PORT));
        echo(address(ip, FIRST_CAPTURE_PORT - 1));
    }
    let _filter = hosts.guarded();
    for who in [None, Some("proxy"), Some("workloads/default.a")] {
        for ip in ["127.0.0.1", "::1"] {
            assert!(hosts.connect(who, ip, FIRST_CAPTURE_PORT - 1).expect("loopback is free").echoes());
            assert!(hosts.connect(who, ip, FIRST_CAPTURE_PORT).is_none(), "{who:?} got into {ip}");
        }
    }
}

#[test]
fn r30_the_nodes_own_addresses_are_reached_through_the_proxy_only() {
    let hosts = Hosts::new();
    for ip in A {
        echo(address(ip, 8080));
        echo(address(ip, TUNNEL));
    }
    let mut filter = hosts.guarded();
    for ip in A {
        let mut delivered = hosts.connect(Some("proxy"), ip, 8080).expect("the proxy delivers");
        assert!(delivered.echoes());
        assert!(hosts.connect(Some("proxy"), ip, TUNNEL).expect("a tunnel to itself").echoes());
        assert!(hosts.connect(None, ip, 8080).is_none());
        assert!(hosts.connect(None, ip, TUNNEL).is_none());
        filter.renew(0).expect("end the lease");
        assert!(!delivered.echoes(), "what the proxy delivers needs the lease too");
        lease(&mut filter, 60_000);
    }
}

#[test]
fn r06_closed_means_closed() {
    let hosts = Hosts::new();
    for ip in [A[0], "127.0.0.1"] {
        echo(address(ip, TUNNEL));
    }
    let mut filter = hosts.guarded();
    let mut client = hosts.connect(Some("proxy"), B[0], TUNNEL).expect("before");
    assert!(client.echoes());
    filter.apply(Posture::Closed).expect("close");
    assert!(!client.echoes(), "an established connection ends");
    lease(&mut filter, 60_000);
    assert!(!client.echoes(), "no lease opens it again");
    for (who, port) in [("proxy", TUNNEL), ("daemon", CONTROLLER), ("workloads/default.a", 80)] {
        assert!(hosts.connect(Some(who), B[0], port).is_none(), "{who} got out");
    }
    assert!(!from_b(&hosts, A[0], TUNNEL));
    assert!(hosts.connect(None, "127.0.0.1", TUNNEL).expect("loopback stays").echoes());
}

#[test]
fn a_changed_posture_keeps_the_lease_and_established_connections() {
    let hosts = Hosts::new();
    echo(address("127.0.0.1", FIRST_CAPTURE_PORT));
    let mut filter = hosts.guarded();
    let mut tunnel = hosts.connect(Some("proxy"), B[1], TUNNEL).expect("tunnel");
    let mut captured = hosts.connect(Some("workloads/default.a"), B[0], 80).expect("captured");
    for _ in 0..20 {
        filter.apply(Posture::Serving(hosts.serving())).expect("apply");
        assert!(tunnel.echoes());
        assert!(captured.echoes());
    }
    lease(&mut filter, 500);
    filter.apply(Posture::Serving(hosts.serving())).expect("apply");
    assert!(tunnel.echoes());
    pause(500);
    assert!(!tunnel.echoes(), "the lease went over with its remaining time, not with a new one");
}

#[test]
fn a_changed_posture_loses_no_packet() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    // A busy machine may be as slow as a lost packet once, but not three times.
    let worst = (0..3).map(|_| worst_round_trip(&hosts, &mut filter)).min().expect("three");
    assert!(worst < 190_000, "a round trip took {worst} µs");
}

/// In microseconds, while the rules change 150 times: a lost packet shows as TCP's shortest retransmission timeout, 200 ms.
fn worst_round_trip(hosts: &Hosts, filter: &mut Enforcer) -> u64 {
    let script = format!(
        "echo $$ > {}/proxy/cgroup.procs; exec 3<>/dev/tcp/{}/{TUNNEL}; worst=0; echo begun; \
         while ! read -t 0; do begun=${{EPOCHREALTIME/./}}; echo x >&3; read -r x <&3; \
         took=$((${{EPOCHREALTIME/./}} - begun)); ((took > worst)) && worst=$took; done; echo $worst",
        hosts.base.display(),
        B[0]
    );
    let mut command = Command::new("timeout");
    command.args(["60", "bash", "-c", &script]);
    let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("bash");
    let mut output = BufReader::new(client.stdout.take().expect("piped"));
    let mut line = String::new();
    output.read_line(&mut line).expect("it begins");
    for _ in 0..150 {
        filter.apply(Posture::Serving(hosts.serving())).expect("apply");
    }
    drop(client.stdin.take());
    line.clear();
    output.read_line(&mut line).expect("it ends");
    client.wait().expect("client");
    line.trim().parse().expect("a number")
}

#[test]
fn what_the_kernel_has_is_what_is_meant() {
    let hosts = Hosts::new();
    let mut filter = hosts.guarded();
    filter.renew(0).expect("end the lease: its time would differ at every run");
    let mount = crate::cgroup::mount_point().expect("cgroup2");
    let base = hosts.base.strip_prefix(mount).expect("below the mount").display().to_string();
    let listing = output("nft list table inet opencluster; nft list table netdev opencluster");
    let marks = ["\"tunnels\"", "\"control connection\""].map(|comment| mark_set_by(&listing, comment));
    let listing: String = listing
        .replace(&base, "BASE")
        // nft names cgroups from /sys/fs/cgroup on, where version 2 may lie below.
        .replace("\"unified/BASE", "\"BASE")
        .replace(&marks[0], "CARRIED")
        .replace(&marks[1], "CONTROL")
        .lines()
        .map(|line| line.split(" # ").next().unwrap_or(line).trim_end().to_owned() + "\n")
        .collect();
    if shell("test -n \"$OPENCLUSTER_BLESS\"") {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/src/firewall/tests/listing.nft"), &listing)
            .expect("bless");
    }
    pretty_compare(&listing, include_str!("listing.nft"));
}

/// The random mark that the rule with this comment sets.
fn mark_set_by(listing: &str, comment: &str) -> String {
    let rule = listing.lines().find(|line| line.contains("meta mark set") && line.contains(comment)).expect("a rule");
    let start = rule.find("meta mark set ").expect("a mark") + "meta mark set ".len();
    rule[start..].split_whitespace().next().expect("a mark").to_owned()
}

fn pretty_compare(actual: &str, expected: &str) {
    for (line, (actual, expected)) in actual.lines().zip(expected.lines()).enumerate() {
        assert_eq!(actual, expected, "line {} of the listing (OPENCLUSTER_BLESS=1 writes a new one)", line + 1);
    }
    assert_eq!(actual.lines().count(), expected.lines().count(), "the listing's length");
}
