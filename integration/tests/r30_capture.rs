//! R03, R30: there is no way in, and no way out but through the proxy.

use std::collections::BTreeMap;

use anyhow::ensure;
use opencluster_integration::capture::Captured;
use opencluster_integration::harness::{A_TO_B, Cluster, Wanted, Who};
use opencluster_integration::report::Event;

const V4: &str = "10.88.0.201:9000";
const V6: &str = "[fd88::201]:9000";

/// A way out of a host: its name and the probe's arguments. Each is tried with its own marker.
const WAYS: [(&str, &[&str]); 24] = [
    ("tcp4", &["tcp", "--to", V4]),
    ("tcp6", &["tcp", "--to", V6]),
    ("tcp-low-mark", &["tcp", "--to", V4, "--mark", "1"]),
    ("tcp-high-mark", &["tcp", "--to", V4, "--mark", "0xffffffff"]),
    ("tcp-bound", &["tcp", "--to", V4, "--bind", "10.88.0.11:0"]),
    ("tcp-from-tunnel-port", &["tcp", "--to", V4, "--bind", "10.88.0.11:15443"]),
    ("tcp-to-controller-port", &["tcp", "--to", "10.88.0.201:7443"]),
    ("tcp-to-tunnel-port", &["tcp", "--to", "10.88.0.201:15443"]),
    ("udp4", &["udp", "--to", V4]),
    ("udp6", &["udp", "--to", V6]),
    ("udp-dns", &["udp", "--to", "10.88.0.201:53"]),
    ("udp-marked", &["udp", "--to", V4, "--mark", "0x77"]),
    ("icmp4", &["icmp", "--to", V4]),
    ("icmp6", &["icmp", "--to", V6]),
    ("raw-ip", &["raw-ip", "--to", V4]),
    ("sctp", &["sctp", "--to", V4]),
    ("raw-tcp", &["raw-tcp", "--to", "10.88.0.201:15443"]),
    ("source-route", &["source-route", "--to", V4]),
    ("packet4", &["packet4", "--to", V4]),
    ("packet6", &["packet6", "--to", V6]),
    ("packet-other", &["packet-other", "--to", V4]),
    ("packet-vlan", &["packet-vlan", "--to", V4]),
    ("packet-bypass", &["packet-bypass", "--to", V4]),
    ("xdp", &["xdp", "--to", V4]),
];

/// Another way out needs another address to be its own: only a bare host's.
fn arguments(host_address: &str, way: &[&str], marker: &str) -> Vec<String> {
    let mut arguments = vec!["send".to_owned()];
    arguments.extend(way.iter().map(|argument| argument.replace("10.88.0.11:", &format!("{host_address}:"))));
    arguments.extend(["--marker", marker, "--times", "2", "--patience-ms", "300"].map(str::to_owned));
    arguments
}

fn marker(way: &str, who: &str) -> String {
    format!("MARK-{way}-{who}-END")
}

/// Tries every way as somebody; what the probe says of each.
fn try_all(cluster: &Cluster, who: Who, label: &str, address: &str) -> anyhow::Result<BTreeMap<&'static str, Event>> {
    let mut outcomes = BTreeMap::new();
    for (way, how) in WAYS {
        let arguments = arguments(address, how, &marker(way, label));
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        outcomes.insert(way, cluster.probe(who, &arguments)?);
    }
    Ok(outcomes)
}

/// The ways by which markers of somebody are in a capture.
fn leaks(captured: &Captured, label: &str) -> Vec<&'static str> {
    WAYS.into_iter().map(|(way, _)| way).filter(|way| captured.count(marker(way, label).as_bytes()) > 0).collect()
}

fn serve_everything(cluster: &Cluster) -> anyhow::Result<opencluster_integration::harness::Probe> {
    let listen = ["echo", "--listen", "[::]:9000", "--listen", "[::]:7443", "--listen", "[::]:15443"];
    cluster.serve(Who::Host("y"), &listen)
}

#[test]
fn r30_no_way_out_of_a_host_but_through_the_proxy() -> anyhow::Result<()> {
    let wanted = Wanted { nodes: &["a"], bare: &["x", "y"], ..Wanted::default() };
    let cluster = Cluster::up("r30_no_way_out_of_a_host", &wanted)?;
    let _echo = serve_everything(&cluster)?;

    // The positive control: from a host without Opencluster every one of these ways leads out, and is seen.
    let capture = cluster.capture("x")?;
    try_all(&cluster, Who::Host("x"), "control", "10.88.0.200")?;
    let out = leaks(&capture.stop()?, "control");
    let blind: Vec<_> = WAYS.iter().map(|(way, _)| *way).filter(|way| !out.contains(way)).collect();
    ensure!(blind.is_empty(), "these ways lead nowhere even without Opencluster, so they prove nothing: {blind:?}");

    let capture = cluster.capture("a")?;
    for (who, label) in [
        (Who::Workload("a"), "workload"),
        (Who::Host("a"), "root"),
        // Nobody, and the user that the proxy runs as: a user ID is no pass.
        (Who::User("a", 65534), "nobody"),
        (Who::User("a", 65533), "proxyuser"),
    ] {
        let outcomes = try_all(&cluster, who, label, "10.88.0.11")?;
        for (way, outcome) in outcomes {
            if let Event::Attempted { connected: true, answer, .. } = outcome {
                anyhow::bail!("{label} got an answer by {way}: {answer:?}");
            }
        }
    }
    let captured = capture.stop()?;
    for label in ["workload", "root", "nobody", "proxyuser"] {
        let leaks = leaks(&captured, label);
        ensure!(leaks.is_empty(), "{label} got a marker out by {leaks:?}");
    }
    ensure!(!captured.packets().is_empty(), "the capture saw nothing at all, not even heartbeats: it proves nothing");
    Ok(())
}

#[test]
fn r30_both_families_are_captured_alike() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
    let cluster = Cluster::up("r30_both_families_are_captured_alike", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    for to in ["10.88.0.12:9000", "[fd88::12]:9000"] {
        ensure!(cluster.comes_to_reach(Who::Workload("a"), to)?, "{to}");
    }
    // Who is not a workload has no network at all.
    for who in [Who::Host("a"), Who::User("a", 65533), Who::User("a", 65534)] {
        for to in ["10.88.0.12:9000", "[fd88::12]:9000"] {
            ensure!(!cluster.reaches(who, to)?, "{who:?} reached {to}");
        }
    }
    Ok(())
}

#[test]
fn r30_the_proxys_own_ports_are_no_way_around_it() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, bare: &["x"], ..Wanted::default() };
    let cluster = Cluster::up("r30_the_proxys_own_ports", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "the ordinary way does not work");

    // What listens on node a: the capture ports are among it, so that what follows tries what is there.
    let sockets = cluster.run(Who::Host("a"), &["ss", "-Hltn"])?;
    let sockets = String::from_utf8_lossy(&sockets.stdout).into_owned();
    let mut ports: Vec<u16> =
        sockets.lines().filter_map(|line| line.split_whitespace().nth(3)?.rsplit_once(':')?.1.parse().ok()).collect();
    ports.sort_unstable();
    ports.dedup();
    ensure!(ports.contains(&15443) && ports.iter().any(|port| (15100..15400).contains(port)), "listening: {sockets}");

    for port in ports {
        for who in [Who::Workload("a"), Who::Host("a"), Who::User("a", 65533), Who::Host("x")] {
            for address in ["127.0.0.1", "[::1]", "10.88.0.11", "[fd88::11]"] {
                let to = format!("{address}:{port}");
                let arguments =
                    ["send", "tcp", "--times", "1", "--patience-ms", "400", "--to", &to, "--marker", "MARK-own"];
                if let Event::Attempted { answer, .. } = cluster.probe(who, &arguments)? {
                    ensure!(answer != "MARK-own", "{who:?} was carried by {to}");
                    // A TLS alert is all that a port which is meant for others may say.
                    let text = answer.chars().filter(char::is_ascii_alphanumeric).count();
                    ensure!(text < 8, "{who:?} was answered by {to}: {answer:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn r03_every_inbound_port_is_closed_but_the_tunnels() -> anyhow::Result<()> {
    const PORTS: [u16; 5] = [22, 80, 9000, 9001, 30000];
    let wanted = Wanted { nodes: &["a"], bare: &["x", "y"], ..Wanted::default() };
    let cluster = Cluster::up("r03_every_inbound_port_is_closed", &wanted)?;
    // Servers of a workload, and servers of root outside of every workload.
    let listen = |offset: u16| {
        let addresses = PORTS.iter().flat_map(move |port| ["--listen".to_owned(), format!("[::]:{}", port + offset)]);
        ["echo".to_owned()].into_iter().chain(addresses).collect::<Vec<_>>()
    };
    let (of_workload, of_root) = (listen(0), listen(100));
    let (of_workload, of_root): (Vec<_>, Vec<_>) =
        (of_workload.iter().map(String::as_str).collect(), of_root.iter().map(String::as_str).collect());
    let mut servers = Vec::new();
    for (who, listen) in [
        (Who::Workload("a"), &of_workload),
        (Who::Host("a"), &of_root),
        (Who::Host("y"), &of_workload),
        (Who::Host("y"), &of_root),
    ] {
        servers.push(cluster.serve(who, listen)?);
    }
    for port in PORTS.into_iter().flat_map(|port| [port, port + 100]) {
        for (closed, open) in [("10.88.0.11", "10.88.0.201"), ("[fd88::11]", "[fd88::201]")] {
            for (address, is_open) in [(open, true), (closed, false)] {
                let to = format!("{address}:{port}");
                let arguments =
                    ["send", "tcp", "--times", "1", "--patience-ms", "300", "--to", &to, "--marker", "MARK"];
                let event = cluster.probe(Who::Host("x"), &arguments)?;
                let reached = matches!(event, Event::Attempted { connected: true, .. });
                ensure!(reached == is_open, "{to}: {event:?}");
            }
        }
    }
    for address in ["10.88.0.11", "[fd88::11]"] {
        let to = format!("{address}:15443");
        let silent = cluster.probe(Who::Host("x"), &["attack", "silent", "--patience-ms", "300", "--to", &to])?;
        ensure!(matches!(silent, Event::Attacked { connected: 1, .. }), "the tunnel port {to} is not open: {silent:?}");
    }

    // Not even an echo request is answered; by the bare host it is: request and answer carry the marker.
    let capture = cluster.capture("x")?;
    for to in ["10.88.0.11:0", "10.88.0.201:0", "[fd88::11]:0", "[fd88::201]:0"] {
        let marker = format!("MARK-{to}-END");
        cluster.probe(Who::Host("x"), &["send", "icmp", "--times", "2", "--to", to, "--marker", &marker])?;
    }
    let captured = capture.stop()?;
    let seen = |to: &str| captured.count(format!("MARK-{to}-END").as_bytes());
    let counts = ["10.88.0.201:0", "[fd88::201]:0", "10.88.0.11:0", "[fd88::11]:0"].map(seen);
    ensure!(counts == [4, 4, 2, 2], "echo requests and answers seen of y, y, a, a: {counts:?}");

    // An answer that is not seen may only have been kept from leaving. Nothing gets in, either: the kernel's counters of what
    // came past the filter stand still.
    for (host, address, gets_in) in [("y", "10.88.0.201", true), ("a", "10.88.0.11", false)] {
        let before = arrived(&cluster, host)?;
        for way in ["udp", "icmp", "tcp"] {
            let to = format!("{address}:4444");
            let arguments = ["send", way, "--times", "2", "--patience-ms", "300", "--to", &to, "--marker", "MARK"];
            cluster.probe(Who::Host("x"), &arguments)?;
        }
        let after = arrived(&cluster, host)?;
        let moved: Vec<_> = before.iter().zip(&after).map(|(before, after)| after > before).collect();
        ensure!(
            moved == [gets_in; 3],
            "[UDP to closed ports, echo requests, resets sent] of {host}: {before:?} {after:?}"
        );
    }
    Ok(())
}

/// What came past a host's packet filter: datagrams to closed UDP ports, echo requests, and resets sent for TCP ports that
/// are closed. No honest traffic of a rig moves these.
fn arrived(cluster: &Cluster, host: &str) -> anyhow::Result<[u64; 3]> {
    let output = cluster.run(Who::Host(host), &["cat", "/proc/net/snmp"])?;
    let text = String::from_utf8(output.stdout)?;
    let counter = |protocol: &str, name: &str| -> anyhow::Result<u64> {
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(':'));
        let (Some(names), Some(values)) = (lines.next(), lines.next()) else { anyhow::bail!("no {protocol}: {text}") };
        let at = names.split_whitespace().position(|found| found == name);
        let value = at.and_then(|at| values.split_whitespace().nth(at));
        Ok(value.ok_or_else(|| anyhow::anyhow!("no {protocol} {name}: {text}"))?.parse()?)
    };
    Ok([counter("Udp", "NoPorts")?, counter("Icmp", "InEchos")?, counter("Tcp", "OutRsts")?])
}
