//! A trial: a guest that carries a flow, something that is done to its machine, and what came of it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::Value;

use super::guest::{self, Guest, Options};
use super::image::Image;
use super::network::Count;
use crate::harness::{Cluster, Probe, Wanted, Who};
use crate::layout::CONTROLLER;
use crate::poll;

/// Where the guest's echo service listens.
const PORT: u16 = 9000;

/// How long a flow must have lived before anything is done to it.
const WARM_UP: Duration = Duration::from_secs(2);

/// How long a verdict may take at most before it counts as none: the lease has long run out by then.
const VERDICT: Duration = Duration::from_secs(15);

/// How long a machine may take at most to say that it has severed itself, when the verdict is there and it has forwarded
/// nothing for a while: the rest of its lease.
const SEVERED: Duration = Duration::from_secs(5);

/// What kind of machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// It has a VM generation ID.
    pub generation_id: bool,
    /// Snapshots of it can be taken inside the QEMU process.
    pub snapshots: bool,
}

/// An incident is over: something runs again.
#[derive(Debug)]
pub struct Resumed {
    at: Instant,
    heartbeats: u64,
    copies: Vec<Guest>,
    /// The machine itself runs (too).
    original: bool,
}

impl Resumed {
    /// The machine itself runs again, from now on. So many of its heartbeats were granted before.
    pub fn now(heartbeats: u64) -> Self {
        Self { at: Instant::now(), heartbeats, copies: Vec::new(), original: true }
    }

    /// These run in its place.
    #[must_use]
    pub fn instead(self, copies: Vec<Guest>) -> Self {
        Self { copies, original: false, ..self }
    }

    /// This one runs, too.
    #[must_use]
    pub fn beside(self, copy: Guest) -> Self {
        Self { copies: vec![copy], ..self }
    }
}

/// Whether tests with machines are not wanted: `OPENCLUSTER_VM=skip` says so, where QEMU cannot be installed.
pub fn skipped() -> bool {
    let skipped = std::env::var_os("OPENCLUSTER_VM").is_some_and(|value| value == "skip");
    if skipped {
        eprintln!("NOT TESTED: there is no QEMU here (OPENCLUSTER_VM=skip)");
    }
    skipped
}

/// A rig for guests: a controller and the node `a`, whose workload `a` uses the services of the guests.
#[derive(Debug)]
pub struct Field {
    /// The cluster.
    pub cluster: Cluster,
    image: Image,
    guests: u8,
}

/// What became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// What was done.
    pub incident: String,
    /// Whether the machine has a VM generation ID.
    pub vm_generation_id: bool,
    /// The controller's reason.
    pub found_by: String,
    /// From the moment in which the machine ran again to the controller's verdict.
    pub verdict_ms: u64,
    /// How many new heartbeats were granted meanwhile, to all copies together. One: the first one was late, and the next one,
    /// which the controller then asks for at once, proved that this was no delay.
    pub granted_heartbeats: u64,
    /// From then to the last echo of the flow through the guest; 0: there was none.
    pub last_echo_ms: u64,
    /// What the application at the other end got from then on, in echoes.
    pub echoes: u64,
    /// How many of them after the verdict.
    pub echoes_after_verdict: u64,
    /// What the machines that ran say themselves, in the end: each is severed, for these reasons.
    pub severed_by: Vec<String>,
    /// What the machine forwarded from then on, until nothing more came.
    pub forwarded_packets: u64,
    /// The same in bytes.
    pub forwarded_bytes: u64,
}

impl Field {
    /// Brings it up.
    pub fn up(test: &str) -> anyhow::Result<Self> {
        let cluster = Cluster::up(test, &Wanted { nodes: &["a"], alone: true, ..Wanted::default() })?;
        let image = Image::build(&cluster.rig.binaries)?;
        Ok(Self { cluster, image, guests: 0 })
    }

    /// Boots and enrols one more guest, and has it serve a flow from `a`.
    pub fn guest(&mut self, kind: Kind) -> anyhow::Result<(Guest, Probe)> {
        let index = self.guests;
        self.guests += 1;
        let Kind { generation_id, snapshots } = kind;
        let options = Options { name: format!("v{index}"), index, generation_id, snapshots };
        let mut guest = Guest::boot(&self.cluster.rig, &self.image, &options)?;
        self.cluster.operator.apply(&service(guest.name()))?;
        guest.enrol()?;
        guest.start_probe(&format!("echo --listen [::]:{PORT}"))?;
        let flow = self.flow(&guest)?;
        Ok((guest, flow))
    }

    /// A flow from `a` to the guest, with an echo every 10 ms, that has lived for a while. It is patient: what is looked for
    /// is when it gets its last echo, not when it gives up.
    pub fn flow(&self, guest: &Guest) -> anyhow::Result<Probe> {
        let to = guest.address(PORT).to_string();
        let arguments = ["pulse", "--again", "--to", &to, "--every-ms", "10", "--patience-ms", "30000"];
        let mut flow = self.cluster.start(Who::Workload("a"), &arguments)?;
        // The guest's echo service may just be starting: attempts that were refused are told, and made again.
        let up = poll::until_true(crate::harness::PATIENCE, || flow.expect_up().is_ok());
        ensure!(up, "no flow to {to}");
        ensure!(flow.is_quiet_for(WARM_UP)?, "the flow to {to} died without a reason");
        Ok(flow)
    }

    /// The controller's reason for ending a node, when it comes.
    pub fn verdict(&self, node: &str, since: Instant) -> Option<(String, Duration)> {
        poll::until(VERDICT.saturating_sub(since.elapsed()), || self.reason(node)).map(|why| (why, since.elapsed()))
    }

    /// The controller's reason for having ended a node, from its log.
    pub fn reason(&self, node: &str) -> Option<String> {
        let log = fs::read_to_string(self.cluster.rig.state.log(CONTROLLER)).ok()?;
        log.lines().filter(|line| line.contains("node.severed")).find_map(|line| {
            let entry = serde_json::from_str::<Value>(line).ok()?;
            (entry["event"] == "node.severed" && entry["node"] == node)
                .then(|| entry["reason"].as_str().unwrap_or_default().to_owned())
        })
    }

    /// Does something to a guest's machine and watches what comes of it.
    pub fn trial(
        &mut self,
        what: &str,
        kind: Kind,
        incident: impl FnOnce(&mut Guest) -> anyhow::Result<Resumed>,
    ) -> anyhow::Result<Outcome> {
        let (mut guest, mut flow) = self.guest(kind)?;
        let Resumed { at, heartbeats, mut copies, original } = incident(&mut guest).with_context(|| what.to_owned())?;
        let before = flow.echoes()?;
        let verdict = self.verdict(guest.name(), at);
        let until_verdict = flow.echoes()?;
        let forwarding: Vec<&Guest> = copies.iter().chain([&guest]).collect();
        let forwarded = settled(&forwarding);
        for machine in copies.iter().chain([&guest]) {
            guest::keep_console(machine, &self.cluster.logs())?;
        }
        let (found_by, verdict) = verdict.with_context(|| format!("{what}: nobody noticed"))?;
        let forwarded = forwarded.with_context(|| what.to_owned())?;
        let (last_echo, how) = flow.expect_down(Duration::from_secs(40))?;
        let echoes = flow.echoes()?;
        let severed_by = copies
            .iter_mut()
            .chain(original.then_some(&mut guest))
            .map(severed)
            .collect::<anyhow::Result<_>>()
            .with_context(|| what.to_owned())?;
        let outcome = Outcome {
            incident: what.to_owned(),
            vm_generation_id: kind.generation_id,
            found_by,
            verdict_ms: verdict.as_millis() as u64,
            granted_heartbeats: guest.heartbeats()?.saturating_sub(heartbeats),
            last_echo_ms: last_echo.saturating_duration_since(at).as_millis() as u64,
            echoes: echoes - before,
            echoes_after_verdict: echoes - until_verdict,
            severed_by,
            forwarded_packets: forwarded.packets,
            forwarded_bytes: forwarded.bytes,
        };
        eprintln!("{}; the flow ended: {how}", serde_json::to_string(&outcome)?);
        Ok(outcome)
    }
}

/// Why a guest has severed itself, in its own words. One that the controller cannot tell goes on until its lease ends. All that
/// a node does then succeeds on Debian's kernel, too.
fn severed(guest: &mut Guest) -> anyhow::Result<String> {
    let mut last = String::new();
    let reason = poll::until(SEVERED, || match guest.own_status() {
        Ok(status) if status["state"] == "severed" => Some(status["reason"].as_str().unwrap_or_default().to_owned()),
        Ok(status) => {
            last = status.to_string();
            None
        }
        Err(error) => {
            last = error.to_string();
            None
        }
    });
    let reason = reason.with_context(|| format!("{} goes on: {last}", guest.machine.name()))?;
    let console = guest.machine.console();
    let failed: Vec<_> =
        console.lines().filter(|line| NOT_SEVERED_WHOLE.iter().any(|text| line.contains(text))).collect();
    ensure!(failed.is_empty(), "{} severed itself only in part: {failed:?}", guest.machine.name());
    Ok(reason)
}

/// What a node says of a part of its severance that failed.
const NOT_SEVERED_WHOLE: [&str; 4] = [
    "the lease could not be ended",
    "the packet filter could not be closed",
    "not every connection could be reset",
    "tracked connections could not be forgotten",
];

/// What the guests have forwarded, once they forward nothing more.
fn settled(guests: &[&Guest]) -> anyhow::Result<Count> {
    const SILENCE: Duration = Duration::from_secs(1);
    let read = || -> anyhow::Result<Count> {
        let mut sum = Count::default();
        for guest in guests {
            let count = guest.machine.link().forwarded()?;
            sum.packets += count.packets;
            sum.bytes += count.bytes;
        }
        Ok(sum)
    };
    let deadline = Instant::now() + VERDICT;
    let mut last = read()?;
    let mut since = Instant::now();
    while since.elapsed() < SILENCE {
        ensure!(Instant::now() < deadline, "the guest still forwards: {last:?}");
        let now = read()?;
        if now != last {
            last = now;
            since = Instant::now();
        }
    }
    Ok(last)
}

/// The service of a guest's workload, and a policy that lets `a` use it.
fn service(name: &str) -> String {
    format!(
        "apiVersion: opencluster/v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
         spec: {{ports: [{{port: {PORT}}}], workloads: [{name}]}}\n---\n\
         apiVersion: opencluster/v1\nkind: Policy\nmetadata: {{name: a-to-{name}, namespace: default}}\n\
         spec: {{to: {{service: {name}}}, from: [{{workload: a}}]}}\n"
    )
}
