//! R37: what a flow took, it gives back. After very many flows that ended in all ways that there are, proxies and daemons
//! hold what they held before: no descriptor more, no task, no thread, and no memory that grows with the number of flows.
//!
//! `OPENCLUSTER_SOAK_FLOWS=1000000` (`make soak`) makes it as many as a release is tested with.

use std::fmt;
use std::fs;
use std::time::Duration;

use anyhow::{Context, ensure};
use opencluster_integration::harness::{A_TO_B, Cluster, Wanted, Who};
use opencluster_integration::poll;
use opencluster_integration::report::Event;

/// Tunnels that nobody uses any more are closed after a minute.
const IDLE: Duration = Duration::from_secs(100);

/// After so long a proxy has counted its tunnels anew.
const SETTLE: Duration = Duration::from_secs(3);

/// What one process holds.
#[derive(Clone, Copy)]
struct Held {
    descriptors: usize,
    threads: u64,
    memory: u64,
}

impl Held {
    fn by(pid: i32) -> anyhow::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let number = |name: &str| -> anyhow::Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
            line.trim_start_matches(':').split_whitespace().next().context("no value")?.parse().context("no number")
        };
        // Each worker of a proxy has a table of its own. Those that share one count several times, before and after.
        let mut descriptors = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            descriptors += fs::read_dir(task?.path().join("fd"))?.count();
        }
        Ok(Self { descriptors, threads: number("Threads")?, memory: number("RssAnon")? * 1024 })
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { descriptors, threads, memory } = self;
        write!(f, "{descriptors} descriptors, {threads} threads, {} KiB", memory / 1024)
    }
}

/// A process that flows go through.
#[derive(Debug)]
struct Process {
    name: String,
    pid: i32,
    /// The node whose proxy it is.
    proxy: Option<&'static str>,
}

impl Process {
    fn all(cluster: &Cluster) -> anyhow::Result<Vec<Self>> {
        let mut all = Vec::new();
        for node in ["a", "b"] {
            all.push(Self { name: format!("daemon {node}"), pid: cluster.rig.daemon(node)?.pid, proxy: None });
            for pid in cluster.proxy(node)? {
                all.push(Self { name: format!("proxy {node} ({pid})"), pid, proxy: Some(node) });
            }
        }
        Ok(all)
    }

    /// What it holds besides tunnels, which are kept for the flows to come: their number goes up and down with what goes on
    /// at once, and a leak would hide in that.
    fn holds(&self, cluster: &Cluster) -> anyhow::Result<Held> {
        let mut held = Held::by(self.pid)?;
        if let Some(node) = self.proxy {
            let tunnels = cluster.metric(node, "opencluster_proxy_idle_tunnels")?
                + cluster.metric(node, "opencluster_proxy_open_tunnels")?;
            held.descriptors = held.descriptors.saturating_sub(tunnels as usize);
        }
        Ok(held)
    }
}

/// Tasks of both proxies.
fn tasks(cluster: &Cluster) -> anyhow::Result<f64> {
    Ok(cluster.metric("a", "opencluster_proxy_tasks")? + cluster.metric("b", "opencluster_proxy_tasks")?)
}

fn churn(cluster: &Cluster, count: u64) -> anyhow::Result<()> {
    let count = count.to_string();
    let arguments = ["churn", "--to", "10.88.0.12:9000", "--refused", "10.88.0.12:9001", "--count", &count];
    let (_, churned) = cluster.start(Who::Workload("a"), &arguments)?.event(Duration::from_mins(15))?;
    let Event::Churned { count, failed, error, milliseconds } = churned else { anyhow::bail!("{churned:?}") };
    eprintln!("{count} flows in {milliseconds} ms");
    ensure!(failed == 0, "{failed} flows: {}", error.unwrap_or_default());
    for node in ["a", "b"] {
        let open = || cluster.metric(node, "opencluster_proxy_open_flows");
        let gone = poll::until(IDLE, || open().map(|open| (open == 0.0).then_some(())).transpose());
        gone.with_context(|| format!("flows are left behind on {node}"))??;
    }
    Ok(())
}

fn leaves_nothing(test: &str, tunnels: &str) -> anyhow::Result<()> {
    let flows: u64 = std::env::var("OPENCLUSTER_SOAK_FLOWS").map_or(Ok(30_000), |flows| flows.parse())?;
    let cluster = Cluster::up(test, &Wanted { resources: A_TO_B, alone: true, tunnels, ..Wanted::default() })?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "it does not work at all");

    churn(&cluster, (flows / 3).min(50_000))?;
    let processes = Process::all(&cluster)?;
    poll::holds_for(SETTLE, || true);
    ensure!(processes.len() == 4, "two daemons and two proxies: {processes:?}");
    let tasks_before = tasks(&cluster)?;
    let before: Vec<_> = processes.iter().map(|process| process.holds(&cluster)).collect::<Result<_, _>>()?;
    churn(&cluster, flows)?;

    // What is kept because of what was going on at once must not depend on how many there were.
    let allowed = 1024 * 1024 + flows * 4;
    for (process, before) in processes.iter().zip(before) {
        let name = &process.name;
        let mut after = process.holds(&cluster)?;
        let fits = |after: &Held| {
            after.descriptors <= before.descriptors
                && after.threads <= before.threads
                && after.memory <= before.memory + allowed
        };
        let settled = poll::until(IDLE, || {
            let held = process.holds(&cluster);
            if let Ok(held) = &held {
                after = *held;
            }
            held.map(|held| fits(&held).then_some(())).transpose()
        });
        eprintln!("{name}: {before} before, {after} after");
        settled
            .with_context(|| format!("{name} held {before} before {flows} flows, and holds {after} after them"))??;
    }
    let less = poll::until(IDLE, || tasks(&cluster).map(|now| (now <= tasks_before).then_some(now)).transpose());
    let tasks_after = less.with_context(|| format!("{tasks_before} tasks before; more afterwards"))??;
    eprintln!("{tasks_before} tasks before, {tasks_after} after");
    Ok(())
}

#[test]
fn r37_flows_leave_nothing_behind_on_shared_tunnels() -> anyhow::Result<()> {
    leaves_nothing("r37_flows_leave_nothing_behind_on_shared_tunnels", "shared")
}

#[test]
fn r37_flows_leave_nothing_behind_on_leased_tunnels() -> anyhow::Result<()> {
    leaves_nothing("r37_flows_leave_nothing_behind_on_leased_tunnels", "leased")
}
