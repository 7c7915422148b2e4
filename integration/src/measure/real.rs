//! Real daemons and proxies, with traffic between them.

use std::fs;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use opencluster_integration::figures::distribution;
use opencluster_integration::harness::{PATIENCE, Probe};
use opencluster_integration::operator::Operator;
use opencluster_integration::poll;
use opencluster_integration::report::Event;
use opencluster_integration::rig::Rig;
use opencluster_integration::state::StateDir;
use opencluster_integration::up::{self, Options};
use opencluster_integration::{binaries::Binaries, down};
use serde_json::{Value, json};

const RIG: &str = "ocrevoke";
/// Flows of the one that is revoked, each to another node.
const FLOWS: usize = 4;

/// Measures with so many nodes.
pub(crate) fn measure(nodes: usize, rounds: usize, node_rounds: usize) -> anyhow::Result<Value> {
    ensure!(nodes > FLOWS + node_rounds, "{nodes} nodes are too few for {node_rounds} rounds and {FLOWS} flows");
    let names: Vec<String> = (0..nodes).map(|number| format!("n{number}")).collect();
    let resources = Binaries::locate()?.target().join(format!("{RIG}.yaml"));
    fs::write(&resources, documents(&names))?;
    let options = Options {
        name: RIG.to_owned(),
        nodes: names.clone(),
        apply: vec![resources.clone()],
        // Two cores carry fifty hosts here: one thread for each proxy.
        workers: Some(1),
        ..Options::default()
    };
    let interrupted = AtomicBool::new(false);
    let started = Instant::now();
    let rig = up::up(&options, &interrupted, &mut |step| eprintln!("rig: {step}"));
    fs::remove_file(&resources)?;
    let figures = rig.map_err(anyhow::Error::from).and_then(|rig| {
        eprintln!("rig: {nodes} nodes after {:.1} s", started.elapsed().as_secs_f64());
        Bench { operator: rig.operator(), rig }.run(&names, rounds, node_rounds)
    });
    let state = StateDir::of(Binaries::locate()?.target(), RIG);
    down::down(RIG, Some(&state))?;
    figures
}

/// A service on each node that everybody may use.
fn documents(names: &[String]) -> String {
    let documents = names.iter().map(|name| {
        let service = json!({"apiVersion": "opencluster/v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"ports": [{"port": 9000}], "workloads": [name]}});
        let policy = json!({"apiVersion": "opencluster/v1", "kind": "Policy", "metadata": {"name": name},
            "spec": {"to": {"service": name}, "from": [{"namespace": "default"}]}});
        format!("{service}\n---\n{policy}")
    });
    documents.collect::<Vec<_>>().join("\n---\n")
}

struct Bench {
    rig: Rig,
    operator: Operator,
}

impl Bench {
    fn run(&self, names: &[String], rounds: usize, node_rounds: usize) -> anyhow::Result<Value> {
        let (first, others) = names.split_first().context("a node")?;
        let targets = &others[..FLOWS];
        let _echoes = targets
            .iter()
            .map(|name| {
                let mut echo = self.probe(name, &["echo", "--listen", "[::]:9000"])?;
                match echo.event(PATIENCE)?.1 {
                    Event::Listening { .. } => Ok(echo),
                    event => bail!("{event:?}"),
                }
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        eprintln!("rig: {rounds} revocations of a workload");
        let mut workload = Trials::default();
        for _ in 0..rounds {
            let mut pulses = self.pulses(first, targets)?;
            workload.revoke(&self.operator, &["workload", "revoke", first], &mut pulses)?;
            self.operator.run(&["workload", "restore", first, "--reason", "measured"], "")?;
        }
        eprintln!("rig: {node_rounds} revocations of a node");
        let mut node = Trials::default();
        for name in names.iter().rev().take(node_rounds) {
            let mut pulses = self.pulses(name, targets)?;
            node.revoke(&self.operator, &["node", "revoke", name], &mut pulses)?;
        }
        let active = self.operator.nodes()?.nodes.iter().filter(|node| node.state == "active").count();
        ensure!(active == names.len() - node_rounds, "{active} nodes are active: healthy ones were lost meanwhile");
        let (workload, node) = (workload.figures(), node.figures());
        Ok(json!({"nodes": names.len(), "flows": FLOWS, "workload": workload, "node": node}))
    }

    fn probe(&self, node: &str, arguments: &[&str]) -> anyhow::Result<Probe> {
        let mut command = self.rig.as_workload(node, "default", node)?;
        command.arg(self.rig.binaries.path("opencluster-probe")?).args(arguments);
        Probe::start(command, format!("{node} {}", arguments.join(" ")))
    }

    /// Flows that live.
    fn pulses(&self, from: &str, targets: &[String]) -> anyhow::Result<Vec<Probe>> {
        targets
            .iter()
            .map(|target| {
                let to = format!("{}:9000", self.rig.record.layout.host(target)?.v4);
                let arguments = ["pulse", "--to", &to, "--patience-ms", "5000"];
                // A workload that was restored a moment ago gets its certificate first.
                let pulse = poll::until(PATIENCE, || match self.probe(from, &arguments) {
                    Ok(mut pulse) => match pulse.event(PATIENCE) {
                        Ok((_, Event::Up { .. })) => Some(Ok(pulse)),
                        Ok(_) => None,
                        Err(error) => Some(Err(error)),
                    },
                    Err(error) => Some(Err(error)),
                });
                pulse.with_context(|| format!("no flow from {from} to {target}"))?
            })
            .collect()
    }
}

#[derive(Default)]
struct Trials {
    acknowledged: Vec<Duration>,
    last_bytes: Vec<Duration>,
}

impl Trials {
    /// From the start of the command, as an operator types it, to its end with everybody's acknowledgement.
    fn revoke(&mut self, operator: &Operator, command: &[&str], pulses: &mut [Probe]) -> anyhow::Result<()> {
        let command = [command, &["--reason", "measured", "-o", "json"]].concat();
        let begun = Instant::now();
        let answer: Value = serde_json::from_str(&operator.run(&command, "")?)?;
        let took = begun.elapsed();
        ensure!(answer["pending"] == json!([]), "{command:?}: {answer}");
        let mut last = Duration::ZERO;
        for pulse in pulses {
            let (last_echo, _) = pulse.expect_down(PATIENCE)?;
            last = last.max(last_echo.saturating_duration_since(begun));
        }
        self.acknowledged.push(took);
        self.last_bytes.push(last);
        Ok(())
    }

    fn figures(&self) -> Value {
        json!({
            "last_acknowledgement_ms": distribution(&self.acknowledged),
            "last_byte_ms": distribution(&self.last_bytes),
        })
    }
}
