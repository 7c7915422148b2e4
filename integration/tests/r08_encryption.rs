//! R08: what is on the wire is not what the applications say.

use anyhow::ensure;
use opencluster_integration::harness::{A_TO_B, Cluster, Wanted, Who};
use opencluster_integration::report::Event;

/// Long and odd enough not to come up by chance, short enough to be in one packet.
const MARKER: &str = "PLAINTEXT-MARKER-8f2d61c07be34a19";

#[test]
fn r08_no_plaintext_on_the_wire() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, bare: &["x", "y"], ..Wanted::default() };
    let cluster = Cluster::up("r08_no_plaintext_on_the_wire", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let _bare_echo = cluster.serve(Who::Host("y"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "it does not work at all");

    let send = |who, to| -> anyhow::Result<()> {
        let arguments = ["send", "tcp", "--times", "50", "--to", to, "--marker", MARKER];
        match cluster.probe(who, &arguments)? {
            Event::Attempted { sent: 50, answer, .. } if answer == MARKER => Ok(()),
            event => anyhow::bail!("to {to}: {event:?}"),
        }
    };
    let captures = ["a", "b", "ctl", "x"].map(|host| cluster.capture(host).map(|capture| (host, capture)));
    for to in ["10.88.0.12:9000", "[fd88::12]:9000"] {
        send(Who::Workload("a"), to)?;
    }
    // The positive control: the same between two hosts without Opencluster, there and back.
    send(Who::Host("x"), "10.88.0.201:9000")?;

    for capture in captures {
        let (host, capture) = capture?;
        let captured = capture.stop()?;
        let seen = captured.count(MARKER.as_bytes());
        match host {
            "x" => ensure!(seen >= 100, "the control saw only {seen} of 100 markers"),
            _ => ensure!(seen == 0, "{seen} markers in plaintext on the link of {host}"),
        }
        if matches!(host, "a" | "b") {
            let tunnel = captured.packets().iter().filter(|packet| is_tcp_of(packet, 15443)).count();
            ensure!(
                tunnel > 100,
                "only {tunnel} packets of tunnels on the link of {host}: was the traffic there at all?"
            );
        }
    }
    Ok(())
}

/// Whether a frame is TCP from or to a port, over IPv4 or IPv6 without extensions.
fn is_tcp_of(frame: &[u8], port: u16) -> bool {
    let header = match frame.get(12..14) {
        Some([0x08, 0x00]) if frame.get(23) == Some(&6) => 14 + usize::from(frame[14] & 15) * 4,
        Some([0x86, 0xdd]) if frame.get(20) == Some(&6) => 54,
        _ => return false,
    };
    let port = port.to_be_bytes();
    frame.get(header..header + 2) == Some(&port[..]) || frame.get(header + 2..header + 4) == Some(&port[..])
}

#[test]
fn r08_every_tcp_segment_between_nodes_is_a_tunnels() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
    let cluster = Cluster::up("r08_every_tcp_segment_between_nodes", &wanted)?;
    let capture = cluster.capture("a")?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "it does not work at all");
    // Beginning, middle and end, and ends that are none: all of a flow's life is looked at.
    cluster.probe(Who::Workload("a"), &["flows", "--to", "10.88.0.12:9000", "--count", "50"])?;
    ensure!(!cluster.reaches(Who::Workload("a"), "10.88.0.12:9999")?, "nobody offers that");

    let captured = capture.stop()?;
    let foreign: Vec<_> = captured
        .packets()
        .into_iter()
        .filter(|frame| is_tcp(frame) && !is_tcp_of(frame, 15443) && !is_tcp_of(frame, 7443))
        .map(|frame| hex::encode(&frame[..frame.len().min(74)]))
        .collect();
    ensure!(foreign.is_empty(), "TCP that is neither a tunnel's nor the controller's: {foreign:#?}");
    Ok(())
}

fn is_tcp(frame: &[u8]) -> bool {
    matches!(
        (frame.get(12..14), frame.get(23), frame.get(20)),
        (Some([0x08, 0x00]), Some(6), _) | (Some([0x86, 0xdd]), _, Some(6))
    )
}
