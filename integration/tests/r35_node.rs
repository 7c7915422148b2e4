//! R35: a node's own parts fail, or are attacked by its own root: it stays closed, or repairs itself.

use std::fs;
use std::time::Duration;

use anyhow::ensure;
use nix::sys::signal::Signal;
use opencluster_integration::harness::{A_TO_B, Cluster, PATIENCE, Wanted, Who};
use opencluster_integration::poll;
use opencluster_integration::process::ProcessId;
use opencluster_integration::report::Event;

#[test]
fn r35_firewall_flushed_by_root_stays_closed_or_comes_back() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, bare: &["y"], ..Wanted::default() };
    let cluster = Cluster::up("r35_firewall_flushed_by_root", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let _bare = cluster.serve(Who::Host("y"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "it does not work at all");
    let before = cluster.run(Who::Host("a"), &["nft", "-s", "list", "ruleset"])?;
    ensure!(!before.stdout.is_empty(), "there are no rules to flush");
    let [outside, _] = cluster.addresses("y", 9000)?;
    ensure!(cluster.reaches(Who::Proxy("a"), &outside)?, "the positive control: there is nobody to reach");

    let capture = cluster.capture("a")?;
    for attack in [
        &["nft", "flush", "ruleset"][..],
        &["nft", "delete", "table", "inet", "opencluster"],
        &["nft", "delete", "table", "netdev", "opencluster"],
        &["nft", "flush", "table", "inet", "opencluster"],
        // A chain of the attacker's own that accepts all: accepting in one chain is not accepting in all.
        &[
            "nft",
            "add table inet evil; add chain inet evil out { type filter hook output priority -500; }; add rule inet evil out accept",
        ],
        &["nft", "add chain inet opencluster evil"],
    ] {
        // Refused or not, what counts is what passes afterwards.
        cluster.run(Who::Host("a"), attack)?;
        for way in ["udp", "tcp", "packet4", "raw-ip"] {
            let arguments = ["send", way, "--times", "3", "--patience-ms", "200", "--to", &outside];
            let event = cluster.probe(Who::Host("a"), &[&arguments[..], &["--marker", "MARK-flush-END"]].concat())?;
            ensure!(!matches!(event, Event::Attempted { connected: true, .. }), "open after {attack:?}: {event:?}");
        }
    }
    let captured = capture.stop()?;
    ensure!(captured.count(b"MARK-flush-END") == 0, "something got out while the rules were being attacked");
    ensure!(!captured.packets().is_empty(), "the capture saw nothing, not even heartbeats");
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "the mesh does not work any more");
    let foreign = || {
        let rules = cluster.run(Who::Host("a"), &["nft", "list", "ruleset"]).ok()?;
        (!String::from_utf8_lossy(&rules.stdout).contains("table inet evil")).then_some(())
    };
    // Whether a foreign table is removed or only reported is the daemon's choice; that it is noticed is not.
    let noticed = || cluster.rig.log_tail("a", 400).contains("firewall");
    ensure!(foreign().is_some() || poll::until_true(PATIENCE, noticed), "nobody noticed the foreign table");
    Ok(())
}

#[test]
fn r35_proxy_killed_is_closed_and_then_works_again() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
    let cluster = Cluster::up("r35_proxy_killed", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let mut pulse = cluster.start(Who::Workload("a"), &["pulse", "--again", "--to", "10.88.0.12:9000"])?;
    pulse.expect_up()?;

    for node in ["a", "b"] {
        let capture = cluster.capture(node)?;
        let before = cluster.node(node)?.proxy_restarts;
        let processes = cluster.proxy(node)?;
        ensure!(!processes.is_empty(), "no proxy on {node}");
        for pid in processes {
            ProcessId::of(pid)?.signal(Signal::SIGKILL)?;
        }
        let (_, how) = pulse.expect_down(PATIENCE)?;
        let restarted = poll::until_true(PATIENCE, || cluster.node(node).is_ok_and(|now| now.proxy_restarts > before));
        ensure!(restarted, "the restart on {node} is not reported");
        let mut back = pulse.event(PATIENCE)?.1;
        while let Event::Down { .. } = back {
            back = pulse.event(PATIENCE)?.1;
        }
        eprintln!("{node}: {how}, then up again");
        ensure!(capture.stop()?.count(b"MARK") == 0, "plaintext");
        ensure!(cluster.node(node)?.state == "active", "{node} is {}", cluster.node(node)?.state);
    }
    Ok(())
}

#[test]
fn r35_proxy_without_descriptors_serves_on() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
    let cluster = Cluster::up("r35_proxy_without_descriptors", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let mut pulse =
        cluster.start(Who::Workload("a"), &["pulse", "--patience-ms", "5000", "--to", "10.88.0.12:9000"])?;
    pulse.expect_up()?;

    for node in ["a", "b"] {
        let proxy = *cluster.proxy(node)?.first().ok_or_else(|| anyhow::anyhow!("no proxy on {node}"))?;
        let open = fs::read_dir(format!("/proc/{proxy}/fd"))?.count();
        // The soft limit, and as the proxy's own user: neither needs a capability, and it can be lifted again.
        let limit = |files: usize| -> anyhow::Result<()> {
            let soft = format!("--nofile={files}:");
            let limited = cluster.run(Who::User(node, 65533), &["prlimit", "--pid", &proxy.to_string(), &soft])?;
            ensure!(limited.status.success(), "{}", String::from_utf8_lossy(&limited.stderr));
            Ok(())
        };
        limit(open + 20)?;

        let mut crowd = cluster.start(
            Who::Workload("a"),
            &["flows", "--to", "10.88.0.12:9000", "--count", "200", "--patience-ms", "2000"],
        )?;
        match crowd.event(Duration::from_mins(2))?.1 {
            Event::Opened { failed: 1.., count, .. } => eprintln!("{node}: {count} of 200 flows fitted"),
            event => anyhow::bail!("the limit on {node} was not felt, so this proves nothing: {event:?}"),
        }
        ensure!(pulse.told()?.is_empty(), "the flow that was there before broke");
        crowd.stop()?;
        // Once the crowd is gone there is room again, with the limit still in place.
        ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "no recovery on {node}");
        ensure!(cluster.proxy(node)?.contains(&proxy), "the proxy on {node} did not survive");
        limit(16384)?;
    }
    ensure!(pulse.told()?.is_empty(), "the flow that was there before broke");
    Ok(())
}
