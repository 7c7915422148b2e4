//! One measurement: a run of the load generator through a contender, and what the contender spent on it.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Child;

use crate::contender::{Contender, Service};
use crate::error::BenchError;
use crate::histogram::Latencies;
use crate::load::Outcome;
use crate::process;
use crate::runner::Settings;
use crate::scenario::{FIXED_CONNECTIONS, Scenario};

/// Idle flows are weighed this long after they were opened.
const WEIGH_AFTER: Duration = Duration::from_secs(1);

/// Opening 10,000 flows through a slow contender takes long.
const IDLE_LIMIT: Duration = Duration::from_secs(90);

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
}

/// Measures `contender` once.
pub(crate) async fn measure(
    at: &Measurement<'_>,
    contender: &Contender,
    settings: &Settings,
) -> Result<Sample, BenchError> {
    match at.scenario {
        Scenario::Idle(flows) => weigh(contender, flows.min(process::flows_within(settings.open_files))).await,
        scenario => timed(scenario, contender, settings).await,
    }
}

async fn timed(scenario: Scenario, contender: &Contender, settings: &Settings) -> Result<Sample, BenchError> {
    let (pattern, connections, service) = match scenario {
        Scenario::RoundTrip(n) => ("rr", n, Service::Echo),
        Scenario::Fixed(_) => ("fixed", FIXED_CONNECTIONS, Service::Echo),
        Scenario::Crr(n) => ("crr", n, Service::Echo),
        Scenario::Stream(n) => ("stream", n, Service::Sink),
        Scenario::StreamDown(n) => ("stream-down", n, Service::Source),
        Scenario::Idle(n) => ("hold", n, Service::Echo),
    };
    let mut args: Vec<String> = vec![pattern.into(), "--to".into(), contender.target(service).to_string()];
    let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
    option("--connections", connections.to_string());
    option("--seconds", settings.seconds.to_string());
    option("--warmup", settings.warmup_seconds.to_string());
    if let Scenario::Fixed(rate) = scenario {
        option("--rate", rate.to_string());
    }
    let pids = contender.processes()?.cpu;
    let before = process::cpu_seconds(&pids)?;
    let limit = Duration::from_secs_f64(settings.seconds + settings.warmup_seconds) + Duration::from_secs(30);
    let output = process::finished(contender.client(&args)?, limit).await?;
    let cpu = process::cpu_seconds(&pids)? - before;
    let outcome: Outcome = serde_json::from_slice(&output.stdout)
        .map_err(|source| BenchError::Json { what: "the client's outcome".into(), source })?;
    let cpu = (!pids.is_empty()).then_some(cpu);
    figures(scenario, outcome, cpu)
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
    Ok(Sample { figures, buckets: outcome.buckets })
}

/// Opens the flows, weighs the contender with them, and has every flow prove that it still works.
async fn weigh(contender: &Contender, flows: usize) -> Result<Sample, BenchError> {
    let pids = contender.processes()?.memory;
    let (rest, kernel_rest) = (process::memory(&pids)?, process::kernel_memory()?);
    let to = contender.target(Service::Echo).to_string();
    let args: Vec<String> = ["hold", "--to", &to, "--connections", &flows.to_string()].map(String::from).to_vec();
    let mut command = contender.client(&args)?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = process::spawned(&mut command)?;
    let line = first_line(&mut child, IDLE_LIMIT).await?;
    if line.is_empty() {
        let output = child.wait_with_output().await.map_err(BenchError::file("waiting for", "the client"))?;
        return Err(BenchError::Peer(process::tail(&output.stderr)));
    }
    let outcome: Outcome = serde_json::from_str(&line)
        .map_err(|source| BenchError::Json { what: "the client's outcome".into(), source })?;
    tokio::time::sleep(WEIGH_AFTER).await;
    let (held, kernel_held) = (process::memory(&pids)?, process::kernel_memory()?);

    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(b"\n").await.map_err(BenchError::file("releasing", "the client"))?;
    }
    let output = tokio::time::timeout(IDLE_LIMIT, child.wait_with_output())
        .await
        .map_err(|_| BenchError::Timeout { command: "the last echo".into(), seconds: IDLE_LIMIT.as_secs() })?
        .map_err(BenchError::file("waiting for", "the client"))?;
    if !output.status.success() {
        return Err(BenchError::Peer(format!("a held flow was dead: {}", process::tail(&output.stderr))));
    }
    let each = |with: u64, without: u64| (with as f64 - without as f64) / flows as f64;
    let mut figures = BTreeMap::from([
        ("flows", flows as f64),
        ("rate", outcome.rate()),
        ("kernel_bytes_per_flow", each(kernel_held, kernel_rest)),
    ]);
    if !pids.is_empty() {
        figures.insert("bytes_per_flow", each(held.pss, rest.pss));
        figures.insert("rss_bytes_per_flow", each(held.rss, rest.rss));
        figures.insert("rest_bytes", rest.pss as f64);
    }
    Ok(Sample { figures, buckets: outcome.buckets })
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
