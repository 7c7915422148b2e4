//! One measurement: a run of the load generator through a contender, and what the contender spent on it.

mod fair;
mod idle;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Output;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;

use crate::contender::{Contender, Service};
use crate::error::BenchError;
use crate::histogram::Latencies;
use crate::load::Outcome;
use crate::process;
use crate::runner::Settings;
use crate::scenario::{FIXED_CONNECTIONS, Scenario};

/// What is measured, and when.
pub(crate) struct Measurement<'a> {
    pub(crate) scenario: Scenario,
    pub(crate) contender: &'a str,
    pub(crate) round: usize,
}

/// What a measurement brought.
pub(crate) struct Sample {
    pub(crate) figures: BTreeMap<&'static str, f64>,
    pub(crate) buckets: Vec<(u64, u64)>,
    /// How much memory the contender has grown by with so many flows open.
    pub(crate) memory: Vec<(usize, f64)>,
}

/// Measures `contender` once.
pub(crate) async fn measure(
    at: &Measurement<'_>,
    contender: &Contender,
    settings: &Settings,
) -> Result<Sample, BenchError> {
    let within = |flows: usize| flows.min(process::flows_within(settings.open_files));
    match at.scenario {
        Scenario::Idle(flows) => {
            idle::weigh(contender, within(flows), idle::WATCH.min(Duration::from_secs_f64(3.0 * settings.seconds)))
                .await
        }
        Scenario::Open(flows) => idle::open(contender, within(flows)).await,
        Scenario::Fair(flows) => fair::measure(contender, flows, settings).await,
        Scenario::RoundTrip(n) => timed(at.scenario, "rr", n, Service::Echo, contender, settings).await,
        Scenario::Fixed(_) => timed(at.scenario, "fixed", FIXED_CONNECTIONS, Service::Echo, contender, settings).await,
        Scenario::First(_) => timed(at.scenario, "first", 1, Service::Echo, contender, settings).await,
        Scenario::Crr(n) => timed(at.scenario, "crr", n, Service::Echo, contender, settings).await,
        Scenario::Stream(n) => timed(at.scenario, "stream", n, Service::Sink, contender, settings).await,
        Scenario::StreamDown(n) => timed(at.scenario, "stream-down", n, Service::Source, contender, settings).await,
    }
}

async fn timed(
    scenario: Scenario,
    pattern: &str,
    connections: usize,
    service: Service,
    contender: &Contender,
    settings: &Settings,
) -> Result<Sample, BenchError> {
    let mut args = load_args(pattern, contender.target(service), connections, settings);
    if let Scenario::Fixed(rate) | Scenario::First(rate) = scenario {
        args.extend(["--rate".into(), rate.to_string()]);
    }
    let pids = contender.processes()?.cpu;
    let before = process::cpu_seconds(&pids)?;
    let limit = Duration::from_secs_f64(settings.seconds + settings.warmup_seconds) + Duration::from_secs(30);
    let output = process::finished(contender.client(&args)?, limit).await?;
    let cpu = process::cpu_seconds(&pids)? - before;
    let cpu = (!pids.is_empty()).then_some(cpu);
    figures(scenario, parsed(&output)?, cpu)
}

/// The arguments of a run of the load generator.
fn load_args(pattern: &str, to: SocketAddr, connections: usize, settings: &Settings) -> Vec<String> {
    let options = [
        ("--to", to.to_string()),
        ("--connections", connections.to_string()),
        ("--seconds", settings.seconds.to_string()),
        ("--warmup", settings.warmup_seconds.to_string()),
    ];
    let options = options.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
    std::iter::once(pattern.to_owned()).chain(options).collect()
}

/// What a run of the load generator printed.
fn parsed(output: &Output) -> Result<Outcome, BenchError> {
    serde_json::from_slice(&output.stdout)
        .map_err(|source| BenchError::Json { what: "the client's outcome".into(), source })
}

/// The figures of a timed run; `cpu` is what the contender's processes used during all of it.
fn figures(scenario: Scenario, outcome: Outcome, cpu: Option<f64>) -> Result<Sample, BenchError> {
    if outcome.operations == 0 {
        return Err(BenchError::Peer(match outcome.first_error {
            Some(error) => format!("nothing succeeded: {error}"),
            None => "nothing completed in the measured time".into(),
        }));
    }
    let mut figures = BTreeMap::new();
    if matches!(scenario, Scenario::Stream(_) | Scenario::StreamDown(_)) {
        figures.insert("gbit_s", outcome.bytes as f64 * 8e-9 / outcome.seconds);
        if let Some(cpu) = cpu {
            figures.insert("cpu_s_per_gb", cpu / (outcome.bytes as f64 / 1e9));
        }
    } else {
        let mut latencies = Latencies::new()?;
        latencies.add_buckets(&outcome.buckets)?;
        figures.insert("rate", outcome.rate());
        figures.insert("p50_us", latencies.quantile_us(0.5));
        figures.insert("p99_us", latencies.quantile_us(0.99));
        if let Some(cpu) = cpu {
            figures.insert("cpu_us_per_op", cpu * 1e6 / outcome.operations_total as f64);
        }
        if let Some(lag) = outcome.send_lag_p99_us {
            figures.insert("send_lag_p99_us", lag);
        }
    }
    if outcome.errors > 0 {
        figures.insert("errors", outcome.errors as f64);
    }
    Ok(Sample { figures, buckets: outcome.buckets, memory: Vec::new() })
}

/// The first line that a program prints; empty when it ended without one.
pub(crate) async fn first_line(child: &mut Child, limit: Duration) -> Result<String, BenchError> {
    let Some(stdout) = child.stdout.as_mut() else {
        return Err(BenchError::Peer("a program was started without a pipe to read from".into()));
    };
    let mut line = String::new();
    tokio::time::timeout(limit, BufReader::new(stdout).read_line(&mut line))
        .await
        .map_err(|_| BenchError::Timeout { command: "waiting for \"ready\"".into(), seconds: limit.as_secs() })?
        .map_err(BenchError::file("reading from", "a program's pipe"))?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_stream_and_of_round_trips() {
        let outcome = Outcome { operations: 4, bytes: 2_000_000_000, seconds: 2.0, ..Outcome::default() };
        let sample = figures(Scenario::Stream(4), outcome, Some(1.0)).unwrap();
        assert_eq!(sample.figures, BTreeMap::from([("gbit_s", 8.0), ("cpu_s_per_gb", 0.5)]));
        let outcome = Outcome {
            operations: 100,
            operations_total: 200,
            seconds: 2.0,
            buckets: vec![(70_000, 100)],
            errors: 3,
            ..Outcome::default()
        };
        let sample = figures(Scenario::RoundTrip(1), outcome, Some(0.01)).unwrap();
        assert!((sample.figures["rate"] - 50.0).abs() < 1e-9);
        assert!((sample.figures["cpu_us_per_op"] - 50.0).abs() < 1e-9);
        assert!((sample.figures["errors"] - 3.0).abs() < 1e-9);
        assert!((sample.figures["p50_us"] - 70.0).abs() < 0.1);
        assert!(figures(Scenario::Crr(8), Outcome::default(), None).is_err(), "nothing measured is not zero");
    }
}
