//! Fairness: what many small flows feel of one bulk flow beside them.

use std::process::Stdio;
use std::time::Duration;

use super::{Sample, load_args, parsed};
use crate::contender::{Contender, Service};
use crate::error::BenchError;
use crate::histogram::Latencies;
use crate::load::Outcome;
use crate::process;
use crate::runner::Settings;
use crate::scenario::{FAIR_RATE, Scenario};

/// The bulk flow runs alone for so long before the small ones are measured beside it.
const HEAD_START: Duration = Duration::from_millis(300);

/// And is to last so much longer than they, however long it takes to start them.
const MARGIN: f64 = 1.5;

/// The small flows at a fixed rate, alone and then beside a bulk flow.
pub(super) async fn measure(contender: &Contender, flows: usize, settings: &Settings) -> Result<Sample, BenchError> {
    let limit = Duration::from_secs_f64(2.0 * settings.seconds) + Duration::from_secs(30);
    let mut small = load_args("fixed", contender.target(Service::Echo), flows, settings);
    small.extend(["--rate".into(), FAIR_RATE.to_string()]);
    let alone = parsed(&process::finished(contender.client(&small)?, limit).await?)?;

    let longer = Settings { seconds: settings.seconds + MARGIN, ..settings.clone() };
    let mut bulk = contender.client(&load_args("stream", contender.target(Service::Sink), 1, &longer))?;
    bulk.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let bulk = process::spawned(&mut bulk)?;
    tokio::time::sleep(HEAD_START).await;
    let beside = parsed(&process::finished(contender.client(&small)?, limit).await?)?;
    let bulk = tokio::time::timeout(limit, bulk.wait_with_output())
        .await
        .map_err(|_| BenchError::Timeout { command: "the bulk flow".into(), seconds: limit.as_secs() })?
        .map_err(BenchError::file("waiting for", "the bulk flow"))?;
    if !bulk.status.success() {
        return Err(BenchError::Peer(format!("the bulk flow: {}", process::tail(&bulk.stderr))));
    }
    let bulk = parsed(&bulk)?;
    let quantiles = |outcome: &Outcome| {
        let mut latencies = Latencies::new()?;
        latencies.add_buckets(&outcome.buckets)?;
        Ok::<_, BenchError>((latencies.quantile_us(0.5), latencies.quantile_us(0.99)))
    };
    let (_, alone_p99) = quantiles(&alone)?;
    let mut sample = super::figures(Scenario::Fair(flows), beside, None)?;
    let p99 = sample.figures.get("p99_us").copied().unwrap_or(f64::NAN);
    sample.figures.insert("alone_p99_us", alone_p99);
    sample.figures.insert("p99_growth", p99 / alone_p99);
    sample.figures.insert("gbit_s", bulk.bytes as f64 * 8e-9 / bulk.seconds);
    Ok(sample)
}
