//! R06, R35: no controller, no traffic: whatever dies, every flow is dead within the lease.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use opencluster_integration::binaries::Binaries;
use opencluster_integration::figures;
use opencluster_integration::harness::{A_TO_B, Cluster, PATIENCE, Probe, Wanted, Who};
use opencluster_integration::layout::CONTROLLER;
use opencluster_integration::poll;
use opencluster_integration::report::Event;
use serde_json::json;

const LEASE: Duration = Duration::from_secs(3);

/// The lease counts from the sending of a heartbeat, so traffic ends *before* a whole lease has passed since the loss,
/// save for what the kernel's clock and this machine's scheduler add to the observation.
const LEEWAY: Duration = Duration::from_millis(250);

fn pulses(cluster: &Cluster) -> anyhow::Result<Vec<(&'static str, Probe)>> {
    let mut pulses = Vec::new();
    for to in ["10.88.0.12:9000", "[fd88::12]:9000"] {
        let mut pulse =
            cluster.start(Who::Workload("a"), &["pulse", "--again", "--to", to, "--patience-ms", "6000"])?;
        pulse.expect_up()?;
        pulses.push((to, pulse));
    }
    Ok(pulses)
}

/// Every pulse stops within the lease after `loss`: how long each outlived it.
fn all_die_within_the_lease(pulses: &mut [(&str, Probe)], loss: Instant) -> anyhow::Result<Vec<Duration>> {
    let mut spans = Vec::new();
    for (to, pulse) in pulses {
        let (last_echo, how) = pulse.expect_down(PATIENCE)?;
        let lived = last_echo.saturating_duration_since(loss);
        eprintln!("{to}: last echo {} ms after the loss, then {how}", lived.as_millis());
        ensure!(lived <= LEASE + LEEWAY, "{to} still lived {lived:?} after the loss");
        spans.push(lived);
    }
    Ok(spans)
}

/// Does it once, or `CUT_ROUNDS` times, and reports how long flows outlived the loss.
fn measured(what: &str, once: impl Fn() -> anyhow::Result<Vec<Duration>>) -> anyhow::Result<()> {
    let rounds = std::env::var("CUT_ROUNDS").map_or(Ok(1), |rounds| rounds.parse()).context("CUT_ROUNDS")?;
    let mut spans = Vec::new();
    for _ in 0..rounds {
        spans.extend(once()?);
    }
    let report = json!({"last_byte_ms": figures::distribution(&spans), "bound_ms": LEASE.as_millis() as u64});
    Ok(figures::record(Binaries::locate()?.target(), &format!("cut_{what}"), report)?)
}

/// None of them comes back, although they go on trying: processes of the workload from before the loss.
fn none_comes_back(pulses: &mut [(&str, Probe)]) -> anyhow::Result<()> {
    for (to, pulse) in pulses {
        let told = pulse.told()?;
        ensure!(!told.iter().any(|event| matches!(event, Event::Up { .. })), "{to} came back: {told:?}");
    }
    Ok(())
}

/// Without anybody's loss the same pulses live longer than a lease: the positive control.
fn all_live_longer_than_the_lease(pulses: &mut [(&str, Probe)]) -> anyhow::Result<()> {
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
    measured("controller_killed", controller_loss_cuts_every_flow)
}

fn controller_loss_cuts_every_flow() -> anyhow::Result<Vec<Duration>> {
    let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
    let mut cluster = Cluster::up("r06_controller_loss_cuts_every_flow", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let mut pulses = pulses(&cluster)?;
    all_live_longer_than_the_lease(&mut pulses)?;

    let controller = cluster.rig.daemon(CONTROLLER)?;
    let loss = Instant::now();
    controller.signal(Signal::SIGKILL)?;
    let spans = all_die_within_the_lease(&mut pulses, loss)?;
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
    Ok(spans)
}

#[test]
fn r06_controller_that_hangs_cuts_every_flow() -> anyhow::Result<()> {
    measured("controller_stopped", || {
        let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
        let cluster = Cluster::up("r06_controller_that_hangs_cuts_every_flow", &wanted)?;
        let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
        let mut pulses = pulses(&cluster)?;
        let loss = Instant::now();
        cluster.rig.daemon(CONTROLLER)?.signal(Signal::SIGSTOP)?;
        all_die_within_the_lease(&mut pulses, loss)
    })
}

/// Kills or stops the daemon of `node`: the kernel closes it, with nobody's help.
fn closes_without_its_daemon(test: &str, node: &str, signal: Signal) -> anyhow::Result<Vec<Duration>> {
    let cluster = Cluster::up(test, &Wanted { resources: A_TO_B, ..Wanted::default() })?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let mut pulses = pulses(&cluster)?;
    let loss = Instant::now();
    cluster.rig.daemon(node)?.signal(signal)?;
    let spans = all_die_within_the_lease(&mut pulses, loss)?;

    let lost = poll::until_true(PATIENCE, || cluster.node(node).is_ok_and(|node| node.state == "lost"));
    ensure!(lost, "the controller takes it for {}", cluster.node(node)?.state);
    if signal == Signal::SIGSTOP {
        // It wakes up, and its lease is over: a pause is not forgiven.
        cluster.rig.daemon(node)?.signal(Signal::SIGCONT)?;
        let severed = poll::until_true(PATIENCE, || state_of(&cluster, node).starts_with("severed"));
        ensure!(severed, "after the pause {node} is {}", state_of(&cluster, node));
        ensure!(!cluster.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "it carries traffic after the pause");
        none_comes_back(&mut pulses)?;
    }
    Ok(spans)
}

#[test]
fn r06_daemon_killed_closes_within_the_lease() -> anyhow::Result<()> {
    let test = "r06_daemon_killed_closes_within_the_lease";
    measured("daemon_killed", || closes_without_its_daemon(test, "a", Signal::SIGKILL))
}

#[test]
fn r06_daemon_stopped_closes_within_the_lease() -> anyhow::Result<()> {
    let test = "r06_daemon_stopped_closes_within_the_lease";
    measured("daemon_stopped", || closes_without_its_daemon(test, "a", Signal::SIGSTOP))
}

#[test]
fn r06_daemon_of_the_destination_killed_closes_within_the_lease() -> anyhow::Result<()> {
    let test = "r06_daemon_of_the_destination_killed";
    measured("destinations_daemon_killed", || closes_without_its_daemon(test, "b", Signal::SIGKILL))
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
