//! Flows of all kinds at once: random sizes, half-closes, resets in the middle, stalls. Every byte that comes back is
//! compared with what it should be.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use opencluster_integration::report::Event;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Longer than any flow takes that goes on.
const PATIENCE: Duration = Duration::from_mins(1);

/// See [`run`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Where to: an echo server
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// Flows at once
    #[arg(long, value_name = "N", default_value_t = 24)]
    at_once: u64,
    /// For how long new ones are begun
    #[arg(long, value_name = "S", default_value_t = 10)]
    seconds: u64,
    /// What the random choices begin with
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Runs all of it and reports once.
pub(crate) async fn run(options: &Options) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let mut lanes = JoinSet::new();
    for lane in 0..options.at_once {
        lanes.spawn(one_after_another(options.to, StdRng::seed_from_u64(options.seed << 16 | lane), end));
    }
    let mut all = Sum::default();
    while let Some(sum) = lanes.join_next().await {
        all.add(sum?);
    }
    let Sum { whole, reset, bytes, failed, error } = all;
    crate::tell(&Event::Mixed { whole, reset, bytes, failed, error })
}

#[derive(Default)]
struct Sum {
    whole: u64,
    reset: u64,
    bytes: u64,
    failed: u64,
    error: Option<String>,
}

impl Sum {
    fn add(&mut self, other: Self) {
        self.whole += other.whole;
        self.reset += other.reset;
        self.bytes += other.bytes;
        self.failed += other.failed;
        self.error = self.error.take().or(other.error);
    }
}

async fn one_after_another(to: SocketAddr, mut random: StdRng, end: Instant) -> Sum {
    let mut sum = Sum::default();
    while Instant::now() < end {
        let plan = Plan::new(&mut random);
        match tokio::time::timeout(PATIENCE, plan.run(to)).await {
            Ok(Ok(bytes)) if plan.reset_after.is_none() => {
                sum.whole += 1;
                sum.bytes += bytes;
            }
            Ok(Ok(_)) => sum.reset += 1,
            Ok(Err(error)) => {
                sum.failed += 1;
                sum.error.get_or_insert(format!("{plan:?}: {error:#}"));
            }
            Err(_) => {
                sum.failed += 1;
                sum.error.get_or_insert(format!("{plan:?}: it stands still"));
            }
        }
    }
    sum
}

/// What one flow does.
#[derive(Clone, Debug)]
struct Plan {
    seed: u64,
    size: usize,
    /// Bytes in one write.
    piece: usize,
    /// After so many bytes this side stops for a while.
    stall_at: Option<usize>,
    /// After so many bytes this side resets.
    reset_after: Option<usize>,
    /// The end is sent at once, or only after everything has come back.
    half_close: bool,
}

impl Plan {
    fn new(random: &mut StdRng) -> Self {
        // Small ones are many, large ones are few: as in life.
        let size = random.random_range(1..4_000_000) >> random.random_range(0..14);
        let size = size.max(1);
        Self {
            seed: random.next_u64(),
            size,
            piece: random.random_range(1..=64 * 1024),
            stall_at: random.random_ratio(1, 4).then(|| random.random_range(0..size)),
            reset_after: random.random_ratio(1, 6).then(|| random.random_range(0..size)),
            half_close: random.random_ratio(1, 2),
        }
    }

    async fn run(&self, to: SocketAddr) -> anyhow::Result<u64> {
        let stream = TcpStream::connect(to).await.context("connect")?;
        stream.set_nodelay(true)?;
        let (mut reader, mut writer) = stream.into_split();
        let (writing, reading) = tokio::join!(self.write(&mut writer), self.read(&mut reader));
        if self.reset_after.is_some() {
            socket2::SockRef::from(writer.as_ref()).set_linger(Some(Duration::ZERO))?;
            return Ok(0);
        }
        writing.context("writing")?;
        let count = reading.context("reading")?;
        ensure!(count == self.size as u64, "{count} of {} bytes came back", self.size);
        if !self.half_close {
            writer.shutdown().await.context("the end")?;
        }
        let more = reader.read(&mut [0; 16]).await.context("the other end")?;
        ensure!(more == 0, "{more} bytes behind the last one");
        Ok(count)
    }

    async fn write(&self, writer: &mut tokio::net::tcp::OwnedWriteHalf) -> io::Result<()> {
        let mut source = StdRng::seed_from_u64(self.seed);
        let mut piece = vec![0; self.piece];
        let mut sent = 0;
        let limit = self.reset_after.unwrap_or(self.size);
        while sent < limit {
            let length = self.piece.min(self.size - sent);
            source.fill_bytes(&mut piece[..length]);
            writer.write_all(&piece[..length]).await?;
            sent += length;
        }
        if self.half_close && self.reset_after.is_none() {
            writer.shutdown().await?;
        }
        Ok(())
    }

    async fn read(&self, reader: &mut tokio::net::tcp::OwnedReadHalf) -> anyhow::Result<u64> {
        let mut source = StdRng::seed_from_u64(self.seed);
        let (mut received, mut expected) = (vec![0; self.piece], vec![0; self.piece]);
        let mut count = 0;
        let limit = self.reset_after.unwrap_or(self.size);
        while count < limit {
            if self.stall_at.is_some_and(|at| at <= count && count < at + self.piece) {
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
            let length = self.piece.min(self.size - count);
            reader.read_exact(&mut received[..length]).await?;
            source.fill_bytes(&mut expected[..length]);
            ensure!(received[..length] == expected[..length], "other bytes came back after {count}");
            count += length;
        }
        Ok(count as u64)
    }
}
