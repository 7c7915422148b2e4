//! R06, R35: no controller, no traffic: whatever dies, every flow is dead within the lease.

use std::time::{Duration, Instant};

use anyhow::ensure;
use nix::sys::signal::Signal;
use opencluster_integration::cuts::{Cuts, measured};
use opencluster_integration::harness::{A_TO_B, Cluster, PATIENCE, Probe, Wanted, Who};
use opencluster_integration::layout::CONTROLLER;
use opencluster_integration::poll;
use opencluster_integration::report::Event;

const LEASE: Duration = Duration::from_secs(3);

/// The lease counts from the sending of a heartbeat, so traffic ends *before* a whole lease has passed since the loss,
/// save for what the kernel's clock and this machine's scheduler add to the observation.
const LEEWAY: Duration = Duration::from_millis(250);

/// One to each address, connecting again and again.
fn pulses<const N: usize>(cluster: &Cluster, who: Who, to: [String; N]) -> anyhow::Result<Vec<(String, Probe)>> {
    let mut pulses = Vec::new();
    for to in to {
        let mut pulse = cluster.start(who, &["pulse", "--again", "--to", &to, "--patience-ms", "6000"])?;
        pulse.expect_up()?;
        pulses.push((to, pulse));
    }
    Ok(pulses)
}

/// Over the mesh.
fn flows(cluster: &Cluster) -> anyhow::Result<Vec<(String, Probe)>> {
    pulses(cluster, Who::Workload("a"), cluster.addresses("b", 9000)?)
}

/// Every pulse stops within the lease after `loss`: how long each outlived it, and how it ended.
fn ends_within_the_lease(pulses: &mut [(String, Probe)], loss: Instant) -> anyhow::Result<Vec<(Duration, String)>> {
    let mut ends = Vec::new();
    for (to, pulse) in pulses {
        let (last_echo, how) = pulse.expect_down(PATIENCE)?;
        let lived = last_echo.saturating_duration_since(loss);
        eprintln!("{to}: last echo {} ms after the loss, then {how}", lived.as_millis());
        ensure!(lived <= LEASE + LEEWAY, "{to} still lived {lived:?} after the loss");
        ends.push((lived, how));
    }
    Ok(ends)
}

fn all_die_within_the_lease(pulses: &mut [(String, Probe)], loss: Instant) -> anyhow::Result<Vec<Duration>> {
    Ok(ends_within_the_lease(pulses, loss)?.into_iter().map(|(lived, _)| lived).collect())
}

/// None of them comes back, although they go on trying: processes of the workload from before the loss.
fn none_comes_back(pulses: &mut [(String, Probe)]) -> anyhow::Result<()> {
    for (to, pulse) in pulses {
        let told = pulse.told()?;
        ensure!(!told.iter().any(|event| matches!(event, Event::Up { .. })), "{to} came back: {told:?}");
    }
    Ok(())
}

/// Without anybody's loss the same pulses live longer than a lease: the positive control.
fn all_live_longer_than_the_lease(pulses: &mut [(String, Probe)]) -> anyhow::Result<()> {
    let started = Instant::now();
    for (to, pulse) in pulses {
        let span = (LEASE + LEEWAY).saturating_sub(started.elapsed()).max(Duration::from_millis(1));
        ensure!(pulse.is_quiet_for(span)?, "{to} died without a reason");
    }
    Ok(())
}

fn state_of(cluster: &Cluster, node: &str) -> String {
    match cluster.own_status(node) {
        Ok(status) => status["state"].as_str().unwrap_or_default().to_owned(),
        Err(error) => format!("unknown: {error:#}"),
    }
}

#[test]
fn r06_controller_loss_cuts_every_flow() -> anyhow::Result<()> {
    measured(LEASE, controller_loss_cuts_every_flow)
}

fn controller_loss_cuts_every_flow(cuts: &mut Cuts) -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
    let mut cluster = Cluster::up("r06_controller_loss_cuts_every_flow", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let mut pulses = flows(&cluster)?;
    all_live_longer_than_the_lease(&mut pulses)?;

    let controller = cluster.rig.daemon(CONTROLLER)?;
    let loss = Instant::now();
    controller.signal(Signal::SIGKILL)?;
    cuts.add("controller_killed", &all_die_within_the_lease(&mut pulses, loss)?);
    for node in ["a", "b"] {
        ensure!(
            poll::until_true(PATIENCE, || state_of(&cluster, node).starts_with("severed")),
            "{node} is not severed but {}",
            state_of(&cluster, node)
        );
    }
    ensure!(!cluster.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "a new connection went through");

    // Severed is for good: the controller's return does not bring the traffic back.
    cluster.rig.start_daemon(CONTROLLER)?;
    ensure!(poll::until_true(PATIENCE, || cluster.operator.status().is_ok()), "the controller did not come back");
    let still_severed = poll::holds_for(LEASE, || state_of(&cluster, "a").starts_with("severed"));
    ensure!(still_severed, "a is {} again", state_of(&cluster, "a"));
    none_comes_back(&mut pulses)?;
    ensure!(!cluster.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "traffic came back without an enrolment");
    Ok(())
}

#[test]
fn r06_controller_that_hangs_cuts_every_flow() -> anyhow::Result<()> {
    measured(LEASE, |cuts| {
        let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
        let cluster = Cluster::up("r06_controller_that_hangs_cuts_every_flow", &wanted)?;
        let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
        let mut pulses = flows(&cluster)?;
        all_live_longer_than_the_lease(&mut pulses)?;
        let loss = Instant::now();
        cluster.rig.daemon(CONTROLLER)?.signal(Signal::SIGSTOP)?;
        cuts.add("controller_stopped", &all_die_within_the_lease(&mut pulses, loss)?);
        Ok(())
    })
}

/// Kills or stops the daemon of `node`: nobody's help closes it. The proxy dies with its daemon, or ends just before the
/// lease does, so that flows over the mesh do not show what the kernel does. A connection to a host without Opencluster from the
/// cgroup of the proxy does: it needs nothing but the lease, in either direction of its packets, and nobody ends it.
fn closes_without_its_daemon(
    test: &str,
    node: &str,
    signal: Signal,
    what: &str,
    cuts: &mut Cuts,
) -> anyhow::Result<()> {
    let cluster = Cluster::up(test, &Wanted { resources: A_TO_B, bare: &["y"], ..Wanted::default() })?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let _bare = cluster.serve(Who::Host("y"), &["echo", "--listen", "[::]:9000"])?;
    let mut flows = flows(&cluster)?;
    let mut leased = pulses(&cluster, Who::Proxy(node), cluster.addresses("y", 9000)?)?;
    all_live_longer_than_the_lease(&mut flows)?;
    all_live_longer_than_the_lease(&mut leased)?;
    let loss = Instant::now();
    cluster.rig.daemon(node)?.signal(signal)?;
    cuts.add(what, &all_die_within_the_lease(&mut flows, loss)?);
    let ends = ends_within_the_lease(&mut leased, loss)?;
    ensure!(ends.iter().all(|(_, how)| how == "silent"), "not the kernel ended it: {ends:?}");
    let spans: Vec<_> = ends.into_iter().map(|(lived, _)| lived).collect();
    cuts.add(&format!("kernel_{what}"), &spans);

    let lost = poll::until_true(PATIENCE, || cluster.node(node).is_ok_and(|node| node.state == "lost"));
    ensure!(lost, "the controller takes it for {}", cluster.node(node)?.state);
    none_comes_back(&mut leased)?;
    for to in cluster.addresses("y", 9000)? {
        ensure!(!cluster.reaches(Who::Proxy(node), &to)?, "a new connection to {to} without a lease");
    }
    if signal == Signal::SIGSTOP {
        // It wakes up, and its lease is over: a pause is not forgiven.
        cluster.rig.daemon(node)?.signal(Signal::SIGCONT)?;
        let severed = poll::until_true(PATIENCE, || state_of(&cluster, node).starts_with("severed"));
        ensure!(severed, "after the pause {node} is {}", state_of(&cluster, node));
        ensure!(!cluster.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "it carries traffic after the pause");
        none_comes_back(&mut flows)?;
    }
    Ok(())
}

#[test]
fn r06_daemon_killed_closes_within_the_lease() -> anyhow::Result<()> {
    let test = "r06_daemon_killed_closes_within_the_lease";
    measured(LEASE, |cuts| closes_without_its_daemon(test, "a", Signal::SIGKILL, "daemon_killed", cuts))
}

#[test]
fn r06_daemon_stopped_closes_within_the_lease() -> anyhow::Result<()> {
    let test = "r06_daemon_stopped_closes_within_the_lease";
    measured(LEASE, |cuts| closes_without_its_daemon(test, "a", Signal::SIGSTOP, "daemon_stopped", cuts))
}

#[test]
fn r06_daemon_of_the_destination_killed_closes_within_the_lease() -> anyhow::Result<()> {
    let test = "r06_daemon_of_the_destination_killed";
    measured(LEASE, |cuts| closes_without_its_daemon(test, "b", Signal::SIGKILL, "destinations_daemon_killed", cuts))
}

#[test]
fn r06_a_lost_node_returns_only_with_a_new_token() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
    let mut cluster = Cluster::up("r06_a_lost_node_returns_only_with_a_new_token", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "it never worked");
    let used = cluster.operator.token("a")?;

    let daemon = cluster.rig.daemon("a")?;
    daemon.signal(Signal::SIGKILL)?;
    let lost = poll::until_true(PATIENCE, || cluster.node("a").is_ok_and(|node| node.state == "lost"));
    ensure!(lost, "the controller takes it for {}", cluster.node("a")?.state);

    // The token of its first enrolment is not there any more, so there is nothing to enrol with.
    let again = cluster.rig.start_daemon("a")?;
    ensure!(poll::until_true(PATIENCE, || !again.is_alive()), "it runs without a token");
    ensure!(!cluster.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "it carries traffic without an enrolment");

    cluster.rig.give_token("a", &used.token)?;
    cluster.rig.start_daemon("a")?;
    let active = poll::until_true(PATIENCE, || cluster.node("a").is_ok_and(|node| node.state == "active"));
    ensure!(active, "with a new token it is {}", cluster.node("a")?.state);
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "with a new token nothing goes through");
    Ok(())
}
