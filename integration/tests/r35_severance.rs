//! R04, R06, R35: a node that is out is closed on time whatever holds its daemon up, and keeps nothing: no flow, no socket, no
//! listener, no secret in memory.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use opencluster_integration::cuts::{Cuts, measured};
use opencluster_integration::harness::{A_TO_B, Cluster, PATIENCE, Probe, Wanted, Who};
use opencluster_integration::hindrance::{Disk, MemoryLimit, is_writing};
use opencluster_integration::poll;
use opencluster_integration::process::ProcessId;
use opencluster_integration::report::Event;

const LEASE: Duration = Duration::from_secs(3);
/// What the scheduler of a busy machine adds to what is observed.
const LEEWAY: Duration = Duration::from_millis(500);
/// From the operator's command to the last byte of a node that is revoked.
const SEVERED_WITHIN: Duration = Duration::from_secs(1);
const TARGETS: [&str; 2] = ["10.88.0.12:9000", "[fd88::12]:9000"];

fn up(test: &str) -> anyhow::Result<(Cluster, Probe)> {
    let cluster = Cluster::up(test, &Wanted { resources: A_TO_B, ..Wanted::default() })?;
    let echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    Ok((cluster, echo))
}

fn pulses(cluster: &Cluster) -> anyhow::Result<Vec<Probe>> {
    TARGETS
        .iter()
        .map(|to| {
            let mut pulse = cluster.start(Who::Workload("a"), &["pulse", "--to", to, "--patience-ms", "8000"])?;
            pulse.expect_up()?;
            Ok(pulse)
        })
        .collect()
}

fn all_live(pulses: &mut [Probe], span: Duration) -> anyhow::Result<()> {
    let until = Instant::now() + span;
    for pulse in pulses {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        ensure!(pulse.is_quiet_for(left)?, "it died without a reason");
    }
    Ok(())
}

/// Every pulse ends within `limit` of `loss`: how long each outlived it, and how it ended.
fn all_end(pulses: &mut [Probe], loss: Instant, limit: Duration) -> anyhow::Result<Vec<(Duration, String)>> {
    pulses
        .iter_mut()
        .map(|pulse| {
            let (last_echo, how) = pulse.expect_down(PATIENCE)?;
            let lived = last_echo.saturating_duration_since(loss);
            eprintln!("last echo {} ms after the loss, then {how}", lived.as_millis());
            ensure!(lived <= limit, "it still lived {lived:?} after the loss");
            Ok((lived, how))
        })
        .collect()
}

fn spans(ends: &[(Duration, String)]) -> Vec<Duration> {
    ends.iter().map(|(lived, _)| *lived).collect()
}

/// Looks out for something while something else is done: when it was first so.
fn watch(condition: impl Fn() -> bool + Send + 'static) -> thread::JoinHandle<Option<Instant>> {
    thread::spawn(move || poll::until(Duration::from_mins(2), || condition().then(Instant::now)))
}

fn seen(watch: thread::JoinHandle<Option<Instant>>, what: &str) -> anyhow::Result<Instant> {
    watch.join().map_err(|_| anyhow!("the watch for {what} panicked"))?.with_context(|| format!("no sign of {what}"))
}

/// The key that a node enrolled with, and those of its workload: digests of the public keys.
fn keys_of(cluster: &Cluster, node: &str) -> anyhow::Result<(String, Vec<String>)> {
    let audit: serde_json::Value =
        serde_json::from_str(&cluster.operator.run(&["audit", "list", "--last", "1000", "-o", "json"], "")?)?;
    let subject = format!("Node {node}");
    let enrolled = audit
        .as_array()
        .into_iter()
        .flatten()
        .rfind(|event| event["action"] == "node.enrol" && event["subject"] == subject)
        .and_then(|event| event["after"]["key"].as_str())
        .context("no enrolment in the audit trail")?
        .to_owned();
    let workload: serde_json::Value =
        serde_json::from_str(&cluster.operator.run(&["workload", "show", node, "-o", "json"], "")?)?;
    let keys = workload["keys"].as_array().into_iter().flatten().filter_map(|key| key["key"].as_str());
    Ok((enrolled, keys.map(str::to_owned).collect()))
}

/// What of the wanted keys, and how many AES keys in use, are in the memory of processes.
fn secrets(cluster: &Cluster, processes: &[i32], keys: &[String]) -> anyhow::Result<(BTreeSet<String>, usize)> {
    let mut command = Command::new(cluster.rig.binaries.path("opencluster-probe")?);
    command.arg("scan");
    for pid in processes {
        command.args(["--pid", &pid.to_string()]);
    }
    for key in keys {
        command.args(["--key", key]);
    }
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (mut found, mut expanded) = (BTreeSet::new(), 0);
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let Event::Scanned { keys, aes128, aes256, bytes, pid } = serde_json::from_slice(line)? else {
            bail!("not a scan");
        };
        eprintln!("process {pid}: {bytes} bytes, {} private keys, {aes128} AES-128, {aes256} AES-256", keys.len());
        found.extend(keys);
        expanded += aes128;
    }
    Ok((found, expanded))
}

fn lines(cluster: &Cluster, node: &str, command: &[&str]) -> anyhow::Result<Vec<String>> {
    let output = cluster.run(Who::Host(node), command)?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn has_no_proxy(cluster: &Cluster, node: &str) -> bool {
    // A process that has ended stays listed until its daemon, which may be stopped, has taken note.
    let lives = |pid: &i32| ProcessId::of(*pid).is_ok_and(ProcessId::is_alive);
    cluster.proxy(node).is_ok_and(|all| !all.iter().any(lives))
}

/// Nothing of a proxy is left on a node: no process, no listener, and no connection but between loopback addresses or of the daemon.
fn nothing_is_left(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    ensure!(poll::until_true(PATIENCE, || has_no_proxy(cluster, node)), "the proxy of {node} lives on");
    let listeners = lines(cluster, node, &["ss", "-Htln"])?;
    ensure!(listeners.is_empty(), "still listening on {node}: {listeners:?}");
    // A daemon that is stopped cannot close its own session, which carries nothing of anybody's.
    let filter = "not ( src 127.0.0.0/8 or src [::1] or dport = :7443 )";
    let connected = || lines(cluster, node, &["ss", "-Htn", "state", "connected", "exclude", "time-wait", filter]);
    let ended = poll::until_true(PATIENCE, || connected().is_ok_and(|sockets| sockets.is_empty()));
    ensure!(ended, "still connected on {node}: {:?}", connected()?);
    Ok(())
}

#[test]
fn r06_a_proxy_whose_daemon_hangs_ends_by_itself_with_every_secret() -> anyhow::Result<()> {
    let (cluster, _echo) = up("r06_a_proxy_whose_daemon_hangs")?;
    let mut pulses = pulses(&cluster)?;
    let (_, keys) = keys_of(&cluster, "a")?;
    let proxy = cluster.proxy("a")?;
    // The positive control: while it lives, the same search finds the workload's key and the sessions' keys.
    let (found, schedules) = secrets(&cluster, &proxy, &keys)?;
    ensure!(!found.is_empty() && schedules > 0, "the search does not find what is there: {found:?}, {schedules}");
    ensure!(!lines(&cluster, "a", &["ss", "-Htln"])?.is_empty(), "the search does not see listeners");
    all_live(&mut pulses, LEASE + LEEWAY)?;

    let loss = Instant::now();
    cluster.rig.daemon("a")?.signal(Signal::SIGSTOP)?;
    let ends = all_end(&mut pulses, loss, LEASE + LEEWAY)?;
    ensure!(ends.iter().all(|(_, how)| how == "reset"), "the application is told by a reset, not {ends:?}");
    // Nobody but the proxy itself can have ended it: its daemon is still stopped.
    nothing_is_left(&cluster, "a")?;
    let dead = proxy.iter().all(|pid| ProcessId::of(*pid).map_or(true, |process| !process.is_alive()));
    ensure!(dead, "a process of the proxy, and with it its memory, is still there");
    // The other side is rid of it as well.
    let empty = poll::until_true(PATIENCE, || cluster.node("b").is_ok_and(|node| node.flows == 0));
    ensure!(empty, "b still holds {} flows", cluster.node("b")?.flows);
    Ok(())
}

#[test]
fn r06_a_severed_node_keeps_no_flow_no_socket_and_no_secret() -> anyhow::Result<()> {
    measured(SEVERED_WITHIN, a_severed_node_keeps_nothing)
}

fn a_severed_node_keeps_nothing(cuts: &mut Cuts) -> anyhow::Result<()> {
    let (cluster, _echo) = up("r06_a_severed_node_keeps_nothing")?;
    let mut pulses = pulses(&cluster)?;
    let (own, workload) = keys_of(&cluster, "a")?;
    let daemon = cluster.rig.daemon("a")?;
    let (found, schedules) = secrets(&cluster, &[daemon.pid], std::slice::from_ref(&own))?;
    ensure!(found.contains(&own) && schedules > 0, "the search does not find what is there: {found:?}, {schedules}");
    let all: Vec<String> = workload.iter().cloned().chain([own]).collect();

    let command = Instant::now();
    cluster.operator.run(&["node", "revoke", "a", "--reason", "a test"], "")?;
    cuts.add("revoked_node_severed", &spans(&all_end(&mut pulses, command, SEVERED_WITHIN)?));
    nothing_is_left(&cluster, "a")?;
    let tracked = || lines(&cluster, "a", &["cat", "/proc/sys/net/netfilter/nf_conntrack_count"]);
    ensure!(poll::until_true(PATIENCE, || tracked().is_ok_and(|count| count == ["0"])), "{:?}", tracked()?);
    ensure!(daemon.is_alive(), "the daemon must stay, to say why nothing works");
    let (found, schedules) = secrets(&cluster, &[daemon.pid], &all)?;
    ensure!(found.is_empty(), "private keys in the daemon's memory: {found:?}");
    ensure!(schedules == 0, "{schedules} session keys in the daemon's memory");
    Ok(())
}

/// Kills the daemon of `a`, if there is one, and enrols the node anew.
fn enrol_again(cluster: &mut Cluster, token: &str) -> anyhow::Result<ProcessId> {
    let daemon = cluster.rig.daemon("a")?;
    if daemon.is_alive() {
        daemon.signal(Signal::SIGKILL)?;
    }
    let out = poll::until_true(PATIENCE, || cluster.node("a").is_ok_and(|node| node.state != "active"));
    ensure!(out, "the controller still takes it for active");
    cluster.rig.give_token("a", token)?;
    Ok(cluster.rig.start_daemon("a")?)
}

#[test]
fn r06_a_severed_node_stays_out_whatever_is_restarted() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, bare: &["y"], ..Wanted::default() };
    let mut cluster = Cluster::up("r06_a_severed_node_stays_out", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let _bare = cluster.serve(Who::Host("y"), &["echo", "--listen", "[::]:9000"])?;
    let outside = cluster.addresses("y", 9000)?;
    // The positive control: a daemon that is killed and gets a new token serves again, and opens its packet filter.
    let token = cluster.operator.token("a")?.token;
    let daemon = enrol_again(&mut cluster, &token)?;
    for (who, addresses) in [(Who::Workload("a"), TARGETS.map(str::to_owned)), (Who::Proxy("a"), outside.clone())] {
        for to in addresses {
            ensure!(cluster.comes_to_reach(who, &to)?, "{who:?} does not reach {to} to begin with");
        }
    }
    ensure!(!has_no_proxy(&cluster, "a"), "the search does not see the proxy");

    cluster.operator.run(&["node", "revoke", "a", "--reason", "a test"], "")?;
    ensure!(poll::until_true(PATIENCE, || has_no_proxy(&cluster, "a")), "its proxy lives on");
    // A proxy that ends by itself is started again within a tenth of a second or two: not this one.
    ensure!(poll::holds_for(LEASE, || has_no_proxy(&cluster, "a")), "a severed node has started a proxy");
    ensure!(daemon.is_alive(), "its daemon has ended by itself: then this is not about restarting it");

    for how in ["without a token", "with the token that it has used"] {
        let daemon = if how == "without a token" {
            daemon.signal(Signal::SIGKILL)?;
            cluster.rig.start_daemon("a")?
        } else {
            enrol_again(&mut cluster, &token)?
        };
        ensure!(poll::holds_for(LEASE, || has_no_proxy(&cluster, "a")), "started {how}, it has started a proxy");
        ensure!(!daemon.is_alive(), "started {how}, it goes on");
        let state = cluster.node("a")?.state;
        ensure!(state != "active", "started {how}, the controller takes it for {state}");
        for to in TARGETS {
            ensure!(!cluster.reaches(Who::Workload("a"), to)?, "started {how}, it carries traffic");
        }
        for to in &outside {
            ensure!(!cluster.reaches(Who::Proxy("a"), to)?, "started {how}, its packet filter is open");
        }
    }
    Ok(())
}

/// Makes the daemon of `a` do something: it takes a configuration, and says so in its log.
fn change(cluster: &Cluster, name: &str, size: usize) -> anyhow::Result<()> {
    let filler = "x".repeat(1000);
    let documents: Vec<String> = (0..size.max(1))
        .map(|number| {
            format!(
                "{{apiVersion: opencluster/v1, kind: Policy, metadata: {{name: {name}-{number}, labels: {{filler: {filler}}}}}, \
                 spec: {{to: {{service: echo}}, from: [{{workload: b}}]}}}}"
            )
        })
        .collect();
    Ok(cluster.operator.apply(&documents.join("\n---\n"))?)
}

#[test]
fn r06_a_daemon_whose_disk_hangs_is_closed_on_time() -> anyhow::Result<()> {
    measured(LEASE, a_daemon_whose_disk_hangs)
}

fn a_daemon_whose_disk_hangs(cuts: &mut Cuts) -> anyhow::Result<()> {
    let (mut cluster, _echo) = up("r06_a_daemon_whose_disk_hangs")?;
    cluster.rig.daemon("a")?.signal(Signal::SIGKILL)?;
    let lost = poll::until_true(PATIENCE, || cluster.node("a").is_ok_and(|node| node.state == "lost"));
    ensure!(lost, "{}", cluster.node("a")?.state);
    let disk = Disk::new(&cluster.rig.state.log("a"))?;
    let token = cluster.operator.token("a")?;
    cluster.rig.give_token("a", &token.token)?;
    let daemon = cluster.rig.start_daemon("a")?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), TARGETS[0])?, "it does not work to begin with");
    let mut pulses = pulses(&cluster)?;
    // The positive control: with a disk that works, the same change harms nobody.
    change(&cluster, "works", 1)?;
    all_live(&mut pulses, LEASE + LEEWAY)?;

    disk.hang()?;
    // From the moment it hangs, not from when the operator's command has returned: that may be later.
    let hangs = watch(move || is_writing(daemon));
    change(&cluster, "hangs", 1)?;
    let loss = seen(hangs, "a daemon that hangs")?;
    cuts.add("disk_hangs", &spans(&all_end(&mut pulses, loss, LEASE + LEEWAY)?));
    let lost = poll::until_true(PATIENCE, || cluster.node("a").is_ok_and(|node| node.state == "lost"));
    ensure!(lost, "the controller takes it for {}", cluster.node("a")?.state);
    Ok(())
}

#[test]
fn r06_a_daemon_killed_for_want_of_memory_is_closed_on_time() -> anyhow::Result<()> {
    measured(LEASE, a_daemon_killed_for_want_of_memory)
}

fn a_daemon_killed_for_want_of_memory(cuts: &mut Cuts) -> anyhow::Result<()> {
    let (cluster, _echo) = up("r06_a_daemon_killed_for_want_of_memory")?;
    let mut pulses = pulses(&cluster)?;
    let daemon = cluster.rig.daemon("a")?;
    // The positive control: without a limit, the daemon takes the same amount of configuration.
    change(&cluster, "fits", 500)?;
    all_live(&mut pulses, LEASE + LEEWAY)?;

    let limit = MemoryLimit::on(&cluster, daemon, 128 * 1024)?;
    ensure!(limit.kills()? == 0, "killed before its time");
    let killed = watch(move || !daemon.is_alive());
    let mut rounds = 0;
    while daemon.is_alive() {
        rounds += 1;
        ensure!(rounds < 20, "the limit was not felt, so this proves nothing");
        change(&cluster, &format!("bursts{rounds}"), 500)?;
    }
    let loss = seen(killed, "the daemon's end")?;
    ensure!(limit.kills()? == 1, "it was not the kernel that ended it for want of memory");
    cuts.add("daemon_killed_for_want_of_memory", &spans(&all_end(&mut pulses, loss, LEASE + LEEWAY)?));
    let lost = poll::until_true(PATIENCE, || cluster.node("a").is_ok_and(|node| node.state == "lost"));
    ensure!(lost, "the controller takes it for {}", cluster.node("a")?.state);
    ensure!(!cluster.reaches(Who::Workload("a"), TARGETS[0])?, "it carries traffic without a daemon");
    Ok(())
}

/// A service on `a`, too, and a short life for `a`: fifteen seconds to serve, fifteen to drain.
const SHORT_LIFE: &str = "
apiVersion: opencluster/v1
kind: Node
metadata: {name: a}
spec: {addresses: [10.88.0.11, 'fd88::11'], maxAge: 30s}
---
apiVersion: opencluster/v1
kind: Service
metadata: {name: back}
spec: {ports: [{port: 9000}], workloads: [a]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: b-to-back}
spec: {to: {service: back}, from: [{workload: b}]}
";

#[test]
fn r04_a_node_at_the_end_of_its_life_drains_and_is_retired() -> anyhow::Result<()> {
    const LIFE: Duration = Duration::from_secs(30);
    let (mut cluster, _echo) = up("r04_a_node_at_the_end_of_its_life")?;
    let back = cluster.serve(Who::Workload("a"), &["echo", "--listen", "[::]:9000"])?;
    let left = cluster.node("a")?.age_left_ms.context("an end of its life")?;
    ensure!(left > 6 * 86_400_000, "the cluster's own limit is a week, {left} ms are left");
    cluster.operator.apply(SHORT_LIFE)?;
    let left = Duration::from_millis(cluster.node("a")?.age_left_ms.context("an end of its life")?);
    let end = Instant::now() + left;
    ensure!(left < LIFE, "{left:?}");
    let listed = cluster.operator.run(&["node", "list"], "")?;
    ensure!(listed.contains("LIFE LEFT"), "{listed}");
    ensure!(cluster.comes_to_reach(Who::Workload("b"), "10.88.0.11:9000")?, "it does not serve to begin with");
    let mut old = pulses(&cluster)?;

    let cordoned = poll::until_true(LIFE, || cluster.node("a").is_ok_and(|node| node.cordoned));
    ensure!(cordoned && Instant::now() < end, "it was not cordoned before its end");
    // New flows are refused in either direction; those that were there go on.
    let refused = poll::until_true(PATIENCE, || {
        cluster.reaches(Who::Workload("b"), "10.88.0.11:9000").is_ok_and(|reached| !reached)
    });
    ensure!(refused && Instant::now() < end, "new flows are taken until the end");
    ensure!(!cluster.reaches(Who::Workload("a"), TARGETS[0])?, "a new workload is started on it");
    ensure!(cluster.node("a")?.state == "active", "{}", cluster.node("a")?.state);
    all_live(&mut old, Duration::from_secs(1))?;

    all_end(&mut old, end, LEEWAY)?;
    let retired = poll::until_true(PATIENCE, || cluster.node("a").is_ok_and(|node| node.state == "retired"));
    ensure!(retired, "the controller takes it for {}", cluster.node("a")?.state);
    let severed = poll::until_true(PATIENCE, || {
        cluster.own_status("a").is_ok_and(|status| status["state"].as_str().is_some_and(|state| state == "severed"))
    });
    ensure!(severed, "{:?}", cluster.own_status("a")?);
    back.stop()?;
    nothing_is_left(&cluster, "a")?;

    // Wiped and enrolled again, it lives again.
    cluster.rig.daemon("a")?.signal(Signal::SIGKILL)?;
    let token = cluster.operator.token("a")?;
    cluster.rig.give_token("a", &token.token)?;
    cluster.rig.start_daemon("a")?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), TARGETS[0])?, "it does not come back by a new enrolment");
    Ok(())
}
