//! Many connections held at once, each asked for an echo again and again.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use opencluster_integration::report::Event;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// See [`hold`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Where to
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 1)]
    count: usize,
    /// How many are being opened or asked at once
    #[arg(long, value_name = "N", default_value_t = 256)]
    at_once: usize,
    /// How long one may take to open or to answer
    #[arg(long, value_name = "MS", default_value_t = 20_000)]
    patience_ms: u64,
}

/// Opens them, then asks for an echo on all at every line of standard input; ends with it.
pub(crate) async fn hold(options: Options) -> anyhow::Result<()> {
    let patience = Duration::from_millis(options.patience_ms);
    let started = Instant::now();
    let (mut flows, failed, error) =
        all(0..options.count, options.at_once, move |number| open(options.to, number, patience)).await?;
    let count = flows.len();
    crate::tell(&Event::Opened { count, failed, error, milliseconds: millis(started) })?;

    // Blocking is right here: between two rounds there is nothing else to do.
    for line in io::stdin().lines() {
        line?;
        let started = Instant::now();
        let (alive, failed, error) = all(flows, options.at_once, move |flow| ask(flow, patience)).await?;
        let echoed = alive.len();
        crate::tell(&Event::Round { echoed, failed, error, milliseconds: millis(started) })?;
        flows = alive;
    }
    Ok(())
}

struct Flow {
    stream: TcpStream,
    number: usize,
    rounds: u64,
}

/// Opened *and* answered once: a proxy takes a connection before it knows whether it may.
async fn open(to: SocketAddr, number: usize, patience: Duration) -> anyhow::Result<Flow> {
    let stream = timeout(patience, TcpStream::connect(to)).await.context("no answer to the connect")??;
    stream.set_nodelay(true)?;
    ask(Flow { stream, number, rounds: 0 }, patience).await
}

/// A payload that no other flow and no other round has.
async fn ask(mut flow: Flow, patience: Duration) -> anyhow::Result<Flow> {
    flow.rounds += 1;
    let mut sent = [0; 16];
    sent[..8].copy_from_slice(&(flow.number as u64).to_be_bytes());
    sent[8..].copy_from_slice(&flow.rounds.to_be_bytes());
    let mut received = [0; 16];
    timeout(patience, async {
        flow.stream.write_all(&sent).await?;
        flow.stream.read_exact(&mut received).await
    })
    .await
    .context("no echo in time")??;
    if received != sent {
        bail!("flow {} got the echo of another: {received:?} for {sent:?}", flow.number);
    }
    Ok(flow)
}

/// Runs `work` on all items, so many at once: the successes, the number of failures and the first of them.
async fn all<I, T, F>(
    items: impl IntoIterator<Item = I>,
    at_once: usize,
    work: impl Fn(I) -> F,
) -> anyhow::Result<(Vec<T>, usize, Option<String>)>
where
    F: Future<Output = anyhow::Result<T>> + Send + 'static,
    T: Send + 'static,
{
    let permits = Arc::new(Semaphore::new(at_once));
    let mut tasks = JoinSet::new();
    for item in items {
        let job = work(item);
        let permit = Arc::clone(&permits).acquire_owned().await?;
        tasks.spawn(async move {
            let outcome = job.await;
            drop(permit);
            outcome
        });
    }
    let (mut done, mut failed, mut error) = (Vec::new(), 0, None);
    while let Some(outcome) = tasks.join_next().await {
        match outcome? {
            Ok(item) => done.push(item),
            Err(failure) => {
                failed += 1;
                error.get_or_insert_with(|| format!("{failure:#}"));
            }
        }
    }
    Ok((done, failed, error))
}

fn millis(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}
