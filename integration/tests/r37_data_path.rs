//! R37: whatever applications do with their connections, and whatever the network does, every byte arrives once and in
//! order, or the application is told.
//!
//! `OPENCLUSTER_MIX_SECONDS=60` makes the mixtures as long as a release is tested with.

use std::process::Command;

use anyhow::{Context, ensure};
use opencluster_integration::harness::{A_TO_B, Cluster, Wanted, Who};
use opencluster_integration::layout;
use opencluster_integration::report::Event;

/// Drops one packet in a hundred on its way over the switch, in both directions of every link.
fn lose_packets(cluster: &Cluster) -> anyhow::Result<()> {
    let switch = layout::netns(cluster.rig.name(), layout::SWITCH);
    for host in cluster.rig.record.layout.nodes() {
        let rules = format!(
            "table netdev loss-{port} {{\n chain lossy {{\n  type filter hook ingress device \"{port}\" priority 0\n  \
             numgen random mod 100 < 1 counter drop\n }}\n}}\n",
            port = host.port
        );
        let output = Command::new("ip").args(["netns", "exec", &switch, "nft", &rules]).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Packets that were dropped so far.
fn lost(cluster: &Cluster) -> anyhow::Result<u64> {
    let switch = layout::netns(cluster.rig.name(), layout::SWITCH);
    let output = Command::new("ip").args(["netns", "exec", &switch, "nft", "list", "ruleset"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let counts = text.split("counter packets ").skip(1).filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    Ok(counts.sum())
}

fn mixture(test: &str, tunnels: &str) -> anyhow::Result<()> {
    let cluster = Cluster::up(test, &Wanted { resources: A_TO_B, alone: true, tunnels, ..Wanted::default() })?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "it does not work at all");
    lose_packets(&cluster)?;

    let seconds = std::env::var("OPENCLUSTER_MIX_SECONDS").unwrap_or_else(|_| "10".to_owned());
    for to in ["10.88.0.12:9000", "[fd88::12]:9000"] {
        let mixed =
            cluster.probe(Who::Workload("a"), &["mix", "--to", to, "--at-once", "24", "--seconds", &seconds])?;
        let Event::Mixed { whole, reset, bytes, failed, error } = mixed else { anyhow::bail!("{mixed:?}") };
        eprintln!("{to}: {whole} flows whole ({bytes} bytes), {reset} reset, {failed} failed");
        ensure!(failed == 0, "{failed} flows: {}", error.unwrap_or_default());
        ensure!(whole > 50 && reset > 5, "too little happened: {whole} whole, {reset} reset");
    }
    let lost = lost(&cluster)?;
    ensure!(lost > 20, "only {lost} packets were lost: the test was none");

    let moved = cluster.metric("a", "opencluster_proxy_promotions_total")?;
    match tunnels {
        "shared" => ensure!(moved > 10.0, "{moved} flows moved to a tunnel of their own"),
        _ => ensure!(moved == 0.0, "{moved} flows moved, although all are leased"),
    }
    for node in ["a", "b"] {
        let open = || cluster.metric(node, "opencluster_proxy_open_flows");
        let gone = opencluster_integration::poll::until(opencluster_integration::harness::PATIENCE, || {
            open().map(|open| (open == 0.0).then_some(())).transpose()
        });
        gone.context("flows are left behind")??;
    }
    Ok(())
}

#[test]
fn r37_every_byte_arrives_under_loss_with_shared_tunnels() -> anyhow::Result<()> {
    mixture("r37_every_byte_arrives_under_loss_with_shared_tunnels", "shared")
}

#[test]
fn r37_every_byte_arrives_under_loss_with_leased_tunnels() -> anyhow::Result<()> {
    mixture("r37_every_byte_arrives_under_loss_with_leased_tunnels", "leased")
}
