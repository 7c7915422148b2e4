//! Thousands of flows that are opened, held, weighed, and asked whether they still live.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout};

use super::Sample;
use crate::contender::{Contender, Service};
use crate::error::BenchError;
use crate::load::Outcome;
use crate::process;

/// Idle flows are weighed this long after they were opened.
const WEIGH_AFTER: Duration = Duration::from_secs(1);

/// Opening 10,000 flows through a slow contender takes long.
const LIMIT: Duration = Duration::from_secs(90);

/// How long the CPU time of idle flows is counted.
pub(crate) const WATCH: Duration = Duration::from_secs(5);

/// Opens the flows one after another and measures nothing but how long that takes.
pub(super) async fn open(contender: &Contender, flows: usize) -> Result<Sample, BenchError> {
    let mut client = Client::start(contender, flows, &[])?;
    let outcome = client.opened().await?;
    client.go_on().await?;
    client.finish().await?;
    let figures = BTreeMap::from([("flows", flows as f64), ("seconds", outcome.seconds), ("rate", outcome.rate())]);
    Ok(Sample { figures, buckets: outcome.buckets, memory: Vec::new() })
}

/// Opens the flows, weighs the contender with a tenth, half and all of them, watches it for `watch`, and has every flow
/// prove that it still works.
pub(super) async fn weigh(contender: &Contender, flows: usize, watch: Duration) -> Result<Sample, BenchError> {
    let pids = contender.processes()?;
    let (rest, kernel_rest) = (process::memory(&pids.memory)?, process::kernel_memory()?);
    let mut marks: Vec<usize> = [flows / 10, flows / 2].into_iter().filter(|m| (1..flows).contains(m)).collect();
    marks.dedup();
    let mut client = Client::start(contender, flows, &marks)?;
    let mut memory = Vec::new();
    for mark in marks {
        client.opened().await?;
        tokio::time::sleep(WEIGH_AFTER).await;
        memory.push((mark, growth(process::memory(&pids.memory)?.pss, rest.pss)));
        client.go_on().await?;
    }
    let outcome = client.opened().await?;
    tokio::time::sleep(WEIGH_AFTER).await;
    let (held, kernel_held) = (process::memory(&pids.memory)?, process::kernel_memory()?);
    memory.push((flows, growth(held.pss, rest.pss)));
    let holders = usage(&pids.memory, watch);
    let everything = usage(&pids.cpu, watch);
    let (holders, everything) = tokio::join!(holders, everything);
    let (holders, everything) = (holders?, everything?);
    client.go_on().await?;
    client.finish().await?;

    let each = |with: u64, without: u64| growth(with, without) / flows as f64;
    let mut figures = BTreeMap::from([
        ("flows", flows as f64),
        ("rate", outcome.rate()),
        ("kernel_bytes_per_flow", each(kernel_held, kernel_rest)),
    ]);
    if pids.memory.is_empty() {
        memory.clear();
    } else {
        figures.insert("bytes_per_flow", each(held.pss, rest.pss));
        figures.insert("rss_bytes_per_flow", each(held.rss, rest.rss));
        figures.insert("rest_bytes", rest.pss as f64);
        figures.insert("idle_cpu_percent", holders);
        if pids.memory != pids.cpu {
            figures.insert("idle_cpu_all_percent", everything);
        }
    }
    Ok(Sample { figures, buckets: outcome.buckets, memory })
}

fn growth(with: u64, without: u64) -> f64 {
    with as f64 - without as f64
}

/// The share of one core that the processes use during `watch`, in percent.
async fn usage(pids: &[u32], watch: Duration) -> Result<f64, BenchError> {
    let (before, start) = (process::cpu_nanoseconds(pids)?, Instant::now());
    tokio::time::sleep(watch).await;
    // A thread that ended in between takes its time with it; idle processes have none of those.
    let used = process::cpu_nanoseconds(pids)?.saturating_sub(before);
    Ok(used as f64 / start.elapsed().as_nanos() as f64 * 100.0)
}

/// The client that opens and holds the flows.
struct Client {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Client {
    fn start(contender: &Contender, flows: usize, marks: &[usize]) -> Result<Self, BenchError> {
        let to = contender.target(Service::Echo).to_string();
        let mut args: Vec<String> =
            ["hold", "--to", &to, "--connections", &flows.to_string()].map(String::from).to_vec();
        for mark in marks {
            args.extend(["--mark".into(), mark.to_string()]);
        }
        let mut command = contender.client(&args)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = process::spawned(&mut command)?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(stdin), Some(stdout)) => Ok(Self { child, stdin, stdout: BufReader::new(stdout) }),
            _ => Err(BenchError::Peer("the client was started without pipes".into())),
        }
    }

    /// Waits until it has opened as many flows as it was to open next.
    async fn opened(&mut self) -> Result<Outcome, BenchError> {
        let mut line = String::new();
        tokio::time::timeout(LIMIT, self.stdout.read_line(&mut line))
            .await
            .map_err(|_| BenchError::Timeout { command: "opening flows".into(), seconds: LIMIT.as_secs() })?
            .map_err(BenchError::file("reading from", "the client's pipe"))?;
        if line.is_empty() {
            return Err(self.failed("the client ended").await?);
        }
        serde_json::from_str(&line).map_err(|source| BenchError::Json { what: "the client's outcome".into(), source })
    }

    /// Lets it go on with what comes next.
    async fn go_on(&mut self) -> Result<(), BenchError> {
        self.stdin.write_all(b"\n").await.map_err(BenchError::file("releasing", "the client"))
    }

    /// Waits until every flow has echoed once more.
    async fn finish(mut self) -> Result<(), BenchError> {
        let status = tokio::time::timeout(LIMIT, self.child.wait())
            .await
            .map_err(|_| BenchError::Timeout { command: "the last echo".into(), seconds: LIMIT.as_secs() })?
            .map_err(BenchError::file("waiting for", "the client"))?;
        if status.success() { Ok(()) } else { Err(self.failed("a held flow was dead").await?) }
    }

    async fn failed(&mut self, what: &str) -> Result<BenchError, BenchError> {
        let mut printed = Vec::new();
        if let Some(stderr) = self.child.stderr.as_mut() {
            let reading = tokio::io::AsyncReadExt::read_to_end(stderr, &mut printed);
            reading.await.map_err(BenchError::file("reading", "the client's errors"))?;
        }
        Ok(BenchError::Peer(format!("{what}: {}", process::tail(&printed))))
    }
}
