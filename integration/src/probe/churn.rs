//! Very many short flows, each with an end of one kind or another: what they leave behind in the proxies is to be nothing.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use opencluster_integration::report::Event;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Longer than any of these flows takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Enough for a flow to be taken for bulk.
const BULK: usize = 300_000;

/// See [`run`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Where to: an echo server
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// Where flows are refused
    #[arg(long, value_name = "ADDRESS:PORT")]
    refused: SocketAddr,
    /// How many
    #[arg(long, value_name = "N")]
    count: u64,
    /// Flows at once
    #[arg(long, value_name = "N", default_value_t = 16)]
    at_once: u64,
}

/// Runs all of them and reports once.
pub(crate) async fn run(options: &Options) -> anyhow::Result<()> {
    let started = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut lanes = JoinSet::new();
    for _ in 0..options.at_once {
        let next = Arc::clone(&next);
        let (to, refused, count) = (options.to, options.refused, options.count);
        lanes.spawn(async move {
            let (mut failed, mut error) = (0, None);
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return (failed, error);
                }
                let outcome = tokio::time::timeout(PATIENCE, flow(number, to, refused)).await;
                if let Err(failure) = outcome.context("it stands still").flatten() {
                    failed += 1;
                    error.get_or_insert(format!("flow {number}: {failure:#}"));
                }
            }
        });
    }
    let (mut failed, mut error) = (0, None);
    while let Some(lane) = lanes.join_next().await {
        let (some, first) = lane?;
        failed += some;
        error = error.or(first);
    }
    let milliseconds = started.elapsed().as_millis() as u64;
    crate::tell(&Event::Churned { count: options.count, failed, error, milliseconds })
}

/// Most are a round trip and a close; every kind of end is among each 64.
async fn flow(number: u64, to: SocketAddr, refused: SocketAddr) -> anyhow::Result<()> {
    match number % 64 {
        0 => bulk(connect(to).await?).await,
        1..=3 => {
            let mut stream = connect(to).await?;
            echo(&mut stream, number).await?;
            // Dropped with a reset.
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            Ok(())
        }
        // Dropped before anything was said, in order.
        4 => connect(to).await.map(drop),
        5 | 6 => refusal(refused).await,
        // The other side ends first.
        kind if kind % 2 == 0 => {
            let mut stream = connect(to).await?;
            echo(&mut stream, number).await?;
            stream.shutdown().await?;
            ensure!(stream.read(&mut [0]).await.context("the end")? == 0, "something behind the end");
            Ok(())
        }
        _ => echo(&mut connect(to).await?, number).await,
    }
}

async fn connect(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(to).await.context("connect")?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn echo(stream: &mut TcpStream, number: u64) -> anyhow::Result<()> {
    let sent = number.to_be_bytes();
    stream.write_all(&sent).await.context("write")?;
    let mut received = [0; 8];
    stream.read_exact(&mut received).await.context("read")?;
    ensure!(received == sent, "the echo of another flow: {received:?} for {sent:?}");
    Ok(())
}

async fn bulk(stream: TcpStream) -> anyhow::Result<()> {
    let (mut reader, mut writer) = stream.into_split();
    let writing = async {
        writer.write_all(&vec![7; BULK]).await?;
        writer.shutdown().await
    };
    let mut back = Vec::with_capacity(BULK);
    let (written, read) = tokio::join!(writing, reader.read_to_end(&mut back));
    written.context("write")?;
    read.context("read")?;
    ensure!(back.len() == BULK, "{} of {BULK} bytes came back", back.len());
    Ok(())
}

/// The kernel completes the connection with the local proxy: the refusal is a reset behind it.
async fn refusal(to: SocketAddr) -> anyhow::Result<()> {
    let mut stream = match TcpStream::connect(to).await {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
        connected => connected.context("connect")?,
    };
    match stream.read(&mut [0]).await {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => bail!("not refused: {other:?}"),
    }
}
