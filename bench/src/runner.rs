//! The run: every contender in every scenario in every round, interleaved, so that what the machine does besides falls on
//! all alike.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::process::Child;

use crate::contender::{self, Contender, External, Kind, Pki, Site};
use crate::error::BenchError;
use crate::histogram::Latencies;
use crate::measure::{Measurement, Sample, first_line, measure};
use crate::process;
use crate::report::{Failure, markdown};
use crate::scenario::Scenario;
use crate::stats::Ratio;
use crate::topology::Topology;

/// Between two measurements: the last one's connections are closed and their memory is given back.
const SETTLE: Duration = Duration::from_millis(200);

/// What to run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Names of the scenarios.
    pub scenarios: Vec<String>,
    /// Names of the contenders.
    pub contenders: Vec<String>,
    /// Those of them that are described by files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub externals: Vec<Arc<External>>,
    /// Rounds of every timed scenario.
    pub rounds: usize,
    /// Rounds of heavy scenarios (open, idle): they hardly vary, and each of them is long.
    pub heavy_rounds: usize,
    /// Measured seconds of a round.
    pub seconds: f64,
    /// Seconds before measuring.
    pub warmup_seconds: f64,
    /// How many files each process may open. Idle flows are at most half of it, less a few, for every contender.
    pub open_files: u64,
    /// The run's name: of its namespaces and of its rig.
    pub name: String,
    /// Where reports, logs and configurations go.
    pub folder: PathBuf,
}

/// What was measured of one contender in one scenario.
#[derive(Debug, Clone)]
pub struct Measured {
    rounds: BTreeMap<usize, BTreeMap<&'static str, f64>>,
    /// Latencies of all rounds together.
    pub latencies: Latencies,
    /// By the number of open flows: how much memory the contender had grown by, in every round.
    pub memory: BTreeMap<usize, Vec<f64>>,
}

impl Measured {
    /// The names of the figures that there are.
    pub fn figures(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.rounds.values().flat_map(|r| r.keys().copied()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// A figure by round; a round that failed is `None`.
    pub fn rounds(&self, figure: &str) -> Vec<Option<f64>> {
        let count = self.rounds.keys().max().map_or(0, |last| last + 1);
        (0..count).map(|round| self.rounds.get(&round)?.get(figure).copied()).collect()
    }
}

/// Everything that was measured so far; it outlives an interrupted run.
#[derive(Debug, Default)]
pub struct Results {
    measured: BTreeMap<(String, String), Measured>,
    /// What went wrong.
    pub failures: Vec<Failure>,
    /// Versions of the contenders' programs.
    pub versions: BTreeMap<String, String>,
}

impl Results {
    /// Nothing yet; `versions` are those of the contenders' programs.
    pub fn new(versions: BTreeMap<String, String>) -> Self {
        Self { versions, ..Self::default() }
    }

    /// What was measured of `contender` in `scenario`.
    pub fn get(&self, scenario: &str, contender: &str) -> Option<&Measured> {
        self.measured.get(&(scenario.to_owned(), contender.to_owned()))
    }

    /// The ratio of a figure over the rounds that both completed.
    pub fn ratio(&self, scenario: &str, figure: &str, ours: &str, theirs: &str) -> Option<Ratio> {
        let ours = self.get(scenario, ours)?.rounds(figure);
        let theirs = self.get(scenario, theirs)?.rounds(figure);
        let pairs: (Vec<f64>, Vec<f64>) = ours.into_iter().zip(theirs).filter_map(|(a, b)| Some((a?, b?))).unzip();
        Ratio::of(&pairs.0, &pairs.1)
    }

    fn record(&mut self, at: &Measurement<'_>, sample: Sample) -> Result<(), BenchError> {
        let key = (at.scenario.to_string(), at.contender.to_owned());
        let measured = match self.measured.entry(key) {
            std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::btree_map::Entry::Vacant(e) => {
                e.insert(Measured { rounds: BTreeMap::new(), latencies: Latencies::new()?, memory: BTreeMap::new() })
            }
        };
        measured.latencies.add_buckets(&sample.buckets)?;
        for (flows, bytes) in sample.memory {
            measured.memory.entry(flows).or_default().push(bytes);
        }
        measured.rounds.insert(at.round, sample.figures);
        Ok(())
    }

    fn failed(&mut self, contender: &str, scenario: Option<String>, what: String) {
        eprintln!("{contender}{}: {what}", scenario.as_ref().map(|s| format!(" at {s}")).unwrap_or_default());
        self.failures.push(Failure { contender: contender.to_owned(), scenario, what });
    }
}

/// Runs it all; what was measured is in `results` whatever happens. The topology is built and removed by the caller.
pub async fn run(settings: &Settings, topology: &Topology, results: &mut Results) -> Result<(), BenchError> {
    let scenarios: Vec<Scenario> =
        settings.scenarios.iter().map(|n| n.parse()).collect::<Result<_, String>>().map_err(BenchError::Peer)?;
    let pki = Pki::create(&settings.folder.join("pki"))?;
    let site =
        Site { name: &settings.name, topology, pki: &pki, folder: &settings.folder, open_files: settings.open_files };
    let mut server = start_server(topology, settings).await?;
    let mut field = Vec::new();
    for name in &settings.contenders {
        eprintln!("starting {name}");
        let kind = Kind::from_name(name, &settings.externals)?;
        match Contender::start(kind, &site).await {
            Ok(contender) => field.push(Some(contender)),
            Err(error) => results.failed(name, None, format!("does not take part: {error}")),
        }
    }
    let mut progress = Progress::new(settings, &scenarios, field.len());
    for (round, scenario, time) in schedule(settings, &scenarios) {
        let round = round * scenario.times_a_round() + time;
        // Whoever comes first in a round comes last in the next: being warmed up by a neighbour evens out.
        for turn in 0..field.len() {
            let place = (turn + round) % field.len();
            let Some(contender) = field[place].take() else { continue };
            let name = contender.kind().name().to_owned();
            let at = Measurement { scenario, contender: &name, round };
            let (contender, result) = take_turn(&at, contender, &site, settings).await;
            field[place] = contender;
            progress.step(&at, &result);
            match result {
                Ok(sample) => results.record(&at, sample)?,
                Err(error) => {
                    results.failed(at.contender, Some(scenario.to_string()), format!("round {}: {error}", round + 1));
                }
            }
            tokio::time::sleep(SETTLE).await;
        }
    }
    for contender in field.into_iter().flatten() {
        contender.stop().await?;
    }
    server.kill().await.map_err(BenchError::file("stopping", "the server"))
}

/// What is measured after what: round by round, scenario by scenario.
fn schedule(settings: &Settings, scenarios: &[Scenario]) -> Vec<(usize, Scenario, usize)> {
    let rounds = |scenario: Scenario| if scenario.is_heavy() { settings.heavy_rounds } else { settings.rounds };
    (0..settings.rounds.max(settings.heavy_rounds))
        .flat_map(|round| scenarios.iter().map(move |&scenario| (round, scenario)))
        .filter(|&(round, scenario)| round < rounds(scenario))
        .flat_map(|(round, scenario)| (0..scenario.times_a_round()).map(move |time| (round, scenario, time)))
        .collect()
}

/// One measurement; gives the contender back, unless it could not be started again.
///
/// A heavy scenario has a contender of its own: memory that earlier scenarios left to the process must not hide the
/// growth, and what is left of thousands of flows must not slow down the scenarios after it.
async fn take_turn(
    at: &Measurement<'_>,
    contender: Contender,
    site: &Site<'_>,
    settings: &Settings,
) -> (Option<Contender>, Result<Sample, BenchError>) {
    if !at.scenario.is_heavy() {
        let result = measure(at, &contender, settings).await;
        return (Some(contender), result);
    }
    let fresh = match restart(contender, site).await {
        Ok(fresh) => fresh,
        Err(error) => return (None, Err(error)),
    };
    let result = measure(at, &fresh, settings).await;
    match restart(fresh, site).await {
        Ok(next) => (Some(next), result),
        Err(error) => (None, Err(error)),
    }
}

async fn restart(contender: Contender, site: &Site<'_>) -> Result<Contender, BenchError> {
    let kind = contender.kind().clone();
    contender.stop().await?;
    Contender::start(kind, site).await
}

async fn start_server(topology: &Topology, settings: &Settings) -> Result<Child, BenchError> {
    let log = settings.folder.join("server.log");
    let errors = std::fs::File::create(&log).map_err(BenchError::file("creating", &log))?;
    let mut command = process::in_namespace(&topology.server(), process::own_program()?)?;
    command.args(contender::server_args()).stdout(Stdio::piped()).stderr(errors);
    let mut child = process::spawned(&mut command)?;
    let line = first_line(&mut child, Duration::from_secs(10)).await?;
    if line.trim() == "ready" {
        return Ok(child);
    }
    let printed = std::fs::read(&log).map_err(BenchError::file("reading", &log))?;
    Err(BenchError::Peer(format!("the server did not start: {}", process::tail(&printed))))
}

/// The figures that progress shows.
const SHOWN: [&str; 8] =
    ["rate", "p50_us", "p99_us", "gbit_s", "bytes_per_flow", "idle_cpu_percent", "seconds", "p99_growth"];

struct Progress {
    done: usize,
    total: usize,
    start: Instant,
}

impl Progress {
    fn new(settings: &Settings, scenarios: &[Scenario], contenders: usize) -> Self {
        Self { done: 0, total: schedule(settings, scenarios).len() * contenders, start: Instant::now() }
    }

    fn step(&mut self, at: &Measurement<'_>, result: &Result<Sample, BenchError>) {
        self.done += 1;
        let what = match result {
            Ok(sample) => sample
                .figures
                .iter()
                .filter(|(name, _)| SHOWN.contains(name))
                .map(|(name, value)| format!("{name} {}", markdown::number(*value)))
                .collect::<Vec<_>>()
                .join("  "),
            Err(_) => "FAILED".into(),
        };
        eprintln!(
            "[{:>4.0} s, {:>3}/{}] {:<9} round {}  {:<8} {what}",
            self.start.elapsed().as_secs_f64(),
            self.done,
            self.total,
            at.scenario.to_string(),
            at.round + 1,
            at.contender,
        );
    }
}

#[cfg(test)]
pub(crate) mod test_support {
    use super::*;

    impl Results {
        /// Adds a latency, for tests of what is made of it.
        pub(crate) fn record_latency(&mut self, scenario: &str, contender: &str, latency: Duration) {
            self.measured.get_mut(&(scenario.into(), contender.into())).unwrap().latencies.record(latency);
        }
    }

    /// Results made of (scenario, contender, figure, rounds), and the settings of a run that asked for just these.
    pub(crate) fn results(data: &[(&str, &str, &'static str, &[f64])]) -> (Settings, Results) {
        let mut results = Results::default();
        let mut settings = Settings {
            scenarios: Vec::new(),
            contenders: Vec::new(),
            externals: Vec::new(),
            rounds: 3,
            heavy_rounds: 1,
            seconds: 1.0,
            warmup_seconds: 0.2,
            open_files: 1 << 20,
            name: "test".into(),
            folder: PathBuf::new(),
        };
        for &(scenario, contender, figure, values) in data {
            for (list, name) in [(&mut settings.scenarios, scenario), (&mut settings.contenders, contender)] {
                if !list.iter().any(|n| n == name) {
                    list.push(name.to_owned());
                }
            }
            for (round, &value) in values.iter().enumerate() {
                let at = Measurement { scenario: scenario.parse().unwrap(), contender, round };
                let sample =
                    Sample { figures: BTreeMap::from([(figure, value)]), buckets: Vec::new(), memory: Vec::new() };
                results.record(&at, sample).unwrap();
            }
        }
        (settings, results)
    }

    #[test]
    fn rounds_that_failed_for_one_are_left_out_of_the_ratio_of_both() {
        let (_, mut results) = results(&[("rr-1", "us", "rate", &[2.0, 20.0, 4.0])]);
        for (round, value) in [(0, 1.0), (2, 2.0)] {
            let at = Measurement { scenario: Scenario::RoundTrip(1), contender: "haproxy", round };
            let sample = Sample { figures: BTreeMap::from([("rate", value)]), buckets: Vec::new(), memory: Vec::new() };
            results.record(&at, sample).unwrap();
        }
        assert_eq!(results.get("rr-1", "haproxy").unwrap().rounds("rate"), [Some(1.0), None, Some(2.0)]);
        let ratio = results.ratio("rr-1", "rate", "us", "haproxy").unwrap();
        assert!((ratio.ratio - 2.0).abs() < 1e-9, "round 2 of us has no partner: {ratio:?}");
    }
}
