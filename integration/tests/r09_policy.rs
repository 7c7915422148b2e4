//! R09: nothing passes without a policy, and what a policy says counts for live flows too; many flows, much data.

use std::time::{Duration, Instant};

use anyhow::ensure;
use opencluster_integration::harness::{A_TO_B, Cluster, PATIENCE, Wanted, Who};
use opencluster_integration::report::Event;

const SERVICE: &str = "
apiVersion: opencluster/v1
kind: Service
metadata: {name: echo, namespace: default}
spec: {ports: [{port: 9000}], workloads: [b]}
";

const ALLOW: &str = "
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo, namespace: default}
spec: {to: {service: echo, ports: [9000]}, from: [{workload: a}]}
";

const DENY: &str = "
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-not-to-echo, namespace: default}
spec: {to: {service: echo}, from: [{workload: a}], action: deny}
";

/// Well under a second, as promised; from the operator's command to the last echo.
const SOON: Duration = Duration::from_secs(1);

#[test]
fn r09_without_a_policy_everything_is_denied() -> anyhow::Result<()> {
    let wanted = Wanted { nodes: &["a", "b", "c"], resources: SERVICE, ..Wanted::default() };
    let cluster = Cluster::up("r09_without_a_policy_everything_is_denied", &wanted)?;
    let listen = ["echo", "--listen", "[::]:9000", "--listen", "[::]:9001"];
    let _echo = cluster.serve(Who::Workload("b"), &listen)?;
    let reach = |who, to| cluster.reaches(Who::Workload(who), to);
    ensure!(!reach("a", "10.88.0.12:9000")? && !reach("a", "[fd88::12]:9000")?, "without a policy");
    ensure!(cluster.metric("a", "opencluster_proxy_flows_refused_total")? > 0.0, "the refusal is not counted");

    cluster.operator.apply(ALLOW)?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "with the policy, IPv4");
    ensure!(reach("a", "[fd88::12]:9000")?, "with the policy, IPv6");
    ensure!(!reach("a", "10.88.0.12:9001")?, "a port that no service has");
    ensure!(!reach("c", "10.88.0.12:9000")?, "a workload that the policy does not name");
    ensure!(!reach("b", "10.88.0.11:9000")?, "the other way round");

    cluster.operator.apply(DENY)?;
    let denied = Instant::now();
    while reach("a", "10.88.0.12:9000")? {
        ensure!(denied.elapsed() < PATIENCE, "a deny does not beat an allow");
    }
    Ok(())
}

#[test]
fn r09_policy_changes_cut_and_open_live_traffic() -> anyhow::Result<()> {
    let cluster = Cluster::up("r09_policy_changes_cut_and_open", &Wanted { resources: SERVICE, ..Wanted::default() })?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let mut pulse = cluster.start(Who::Workload("a"), &["pulse", "--again", "--to", "10.88.0.12:9000"])?;
    pulse.expect_down(PATIENCE)?;

    for round in 0..3 {
        let allowed = Instant::now();
        cluster.operator.apply(ALLOW)?;
        let opened = pulse.expect_up()?.duration_since(allowed);
        ensure!(pulse.is_quiet_for(Duration::from_millis(300))?, "it does not stay open");
        let forbidden = Instant::now();
        if round == 1 {
            cluster.operator.apply(DENY)?;
        } else {
            cluster.operator.delete("policy", "a-to-echo")?;
        }
        let (last_echo, how) = pulse.expect_down(PATIENCE)?;
        let cut = last_echo.saturating_duration_since(forbidden);
        eprintln!("opened within {} ms, cut within {} ms: {how}", opened.as_millis(), cut.as_millis());
        ensure!(opened < SOON, "it took {opened:?} to open");
        ensure!(cut < SOON, "it took {cut:?} to cut a live flow");
        ensure!(how == "reset", "the application was told {how} instead of a reset");
        if round == 1 {
            cluster.operator.delete("policy", "a-to-echo")?;
            cluster.operator.delete("policy", "a-not-to-echo")?;
        }
    }
    Ok(())
}

#[test]
fn r09_ten_thousand_flows_are_held_and_all_echo() -> anyhow::Result<()> {
    const FLOWS: usize = 10_000;
    let wanted = Wanted { resources: A_TO_B, alone: true, ..Wanted::default() };
    let cluster = Cluster::up("r09_ten_thousand_flows", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "it does not work at all");
    let count = FLOWS.to_string();
    let arguments = ["flows", "--to", "10.88.0.12:9000", "--count", &count, "--patience-ms", "60000"];
    let mut flows = cluster.start(Who::Workload("a"), &arguments)?;
    match flows.event(Duration::from_mins(2))?.1 {
        Event::Opened { count: FLOWS, failed: 0, milliseconds, .. } => eprintln!("opened in {milliseconds} ms"),
        event => anyhow::bail!("{event:?}"),
    }
    for _ in 0..3 {
        let (echoed, failed) = flows.round()?;
        ensure!(echoed == FLOWS && failed == 0, "{echoed} flows echoed, {failed} did not");
    }
    let held = cluster.metric("a", "opencluster_proxy_open_flows")?;
    ensure!(held >= FLOWS as f64, "the proxy counts {held} flows");
    // They come and go: what they held is given back.
    flows.stop()?;
    let started = Instant::now();
    while cluster.metric("a", "opencluster_proxy_open_flows")? > 0.0 {
        ensure!(
            started.elapsed() < PATIENCE,
            "flows stay behind: {}",
            cluster.metric("a", "opencluster_proxy_open_flows")?
        );
    }
    Ok(())
}

#[test]
fn r09_a_gigabyte_goes_through_half_closed() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, alone: true, ..Wanted::default() };
    let cluster = Cluster::up("r09_a_gigabyte_goes_through_half_closed", &wanted)?;
    let _sink = cluster.serve(Who::Workload("b"), &["sink", "--listen", "[::]:9001"])?;
    let sent = 1_u64 << 30;
    let event =
        cluster.probe(Who::Workload("a"), &["transfer", "--to", "10.88.0.12:9001", "--bytes", &sent.to_string()])?;
    match event {
        Event::Transferred { sent: went, upload_ok: true, received, download_ok: true, milliseconds } => {
            ensure!(went == sent && received == 64 << 20, "{went} bytes there, {received} back");
            eprintln!("1 GiB and 64 MiB back in {milliseconds} ms");
            Ok(())
        }
        event => anyhow::bail!("{event:?}"),
    }
}
