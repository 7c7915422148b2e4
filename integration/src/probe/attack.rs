//! Bad peers: garbage, silence, slowness, and announcements of more than anybody should hold.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use opencluster_integration::report::Event;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// See [`attack`].
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// How
    #[arg(value_enum)]
    kind: Kind,
    /// Whom: ADDRESS:PORT or unix:PATH
    #[arg(long, value_name = "TARGET")]
    to: Target,
    /// How many connections at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    connections: usize,
    /// How long the other side may take to end them
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    patience_ms: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// Random bytes
    Garbage,
    /// Text of a protocol that is not spoken there
    Plaintext,
    /// A TLS record with a length beyond the limit, then bytes without end
    Oversized,
    /// A TLS handshake message of 16 MiB announced, sent in good records
    EndlessHello,
    /// A TLS client hello, one byte every now and then
    Slow,
    /// Nothing at all
    Silent,
    /// A length prefix of 4 GiB and then nothing
    HugeFrame,
}

#[derive(Clone, Debug)]
enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Target {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp),
        }
    }
}

/// How one connection ended.
struct End {
    by_peer: bool,
    lasted: Duration,
    received: u64,
}

/// Attacks and tells how the connections ended.
pub(crate) async fn attack(options: Options) -> anyhow::Result<()> {
    let mut tasks = JoinSet::new();
    for _ in 0..options.connections {
        let options = options.clone();
        tasks.spawn(async move { one(&options).await });
    }
    let (mut connected, mut ended_by_peer, mut longest, mut received) = (0, 0, Duration::ZERO, 0);
    while let Some(end) = tasks.join_next().await {
        let Some(end) = end? else { continue };
        connected += 1;
        received += end.received;
        if end.by_peer {
            ended_by_peer += 1;
            longest = longest.max(end.lasted);
        }
    }
    let longest_ms = longest.as_millis() as u64;
    crate::tell(&Event::Attacked { connected, ended_by_peer, longest_ms, received })
}

/// `None`: no connection came about.
async fn one(options: &Options) -> Option<End> {
    let patience = Duration::from_millis(options.patience_ms);
    match &options.to {
        Target::Tcp(address) => {
            let stream = timeout(patience, TcpStream::connect(address)).await.ok()?.ok()?;
            Some(until_the_end(stream, options.kind, patience).await)
        }
        Target::Unix(path) => {
            let stream = timeout(patience, UnixStream::connect(path)).await.ok()?.ok()?;
            Some(until_the_end(stream, options.kind, patience).await)
        }
    }
}

async fn until_the_end<S: AsyncRead + AsyncWrite>(stream: S, kind: Kind, patience: Duration) -> End {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let started = Instant::now();
    let mut received = 0;
    let read = async {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = reader.read(&mut buffer).await {
            received += count as u64;
        }
    };
    let write = async {
        // A write that fails is the other side's end of it; so is its answer: the reader sees both.
        if misbehave(&mut writer, kind).await.is_ok() {
            std::future::pending::<()>().await;
        }
    };
    let by_peer = timeout(patience, async {
        tokio::select! { () = read => {}, () = write => {} }
    })
    .await
    .is_ok();
    End { by_peer, lasted: started.elapsed(), received }
}

async fn misbehave(writer: &mut (impl AsyncWrite + Unpin), kind: Kind) -> std::io::Result<()> {
    match kind {
        Kind::Garbage => writer.write_all(&noise(64 * 1024)).await,
        Kind::Plaintext => writer.write_all(b"GET / HTTP/1.1\r\nHost: b\r\n\r\n").await,
        Kind::Oversized => {
            writer.write_all(&[22, 3, 1, 0xff, 0xff]).await?;
            loop {
                writer.write_all(&noise(16 * 1024)).await?;
            }
        }
        Kind::EndlessHello => {
            let mut record = vec![22, 3, 1, 0x3f, 0xff, 1, 0xff, 0xff, 0xff];
            record.resize(5 + 0x3fff, 0);
            for _ in 0..1024 {
                writer.write_all(&record).await?;
                record[5..].fill(0);
            }
            Ok(())
        }
        Kind::Slow => {
            for byte in [22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3].into_iter().chain(std::iter::repeat_n(7, 400)) {
                writer.write_all(&[byte]).await?;
                sleep(Duration::from_millis(250)).await;
            }
            Ok(())
        }
        Kind::Silent => Ok(()),
        Kind::HugeFrame => writer.write_all(&u32::MAX.to_be_bytes()).await,
    }
}

/// Reproducible bytes that begin like no protocol.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8 | 0x80
    })
    .take(count)
    .collect()
}
