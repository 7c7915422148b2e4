//! Much data one way, a half-close, an answer the other way; checksums on both.

use std::net::SocketAddr;
use std::time::Instant;

use clap::Args;
use opencluster_integration::report::Event;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CHUNK: usize = 64 * 1024;

/// See [`sink`].
#[derive(Args, Debug)]
pub(crate) struct SinkOptions {
    /// Where
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
}

/// See [`send`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Where to
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// How much to send before the half-close
    #[arg(long, value_name = "N", default_value_t = 1 << 30)]
    bytes: u64,
    /// How much to have sent back after it
    #[arg(long, value_name = "N", default_value_t = 64 << 20)]
    back: u64,
    /// Of the random numbers that are sent
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Serves until it is killed. A connection that breaks is the sender's to report.
pub(crate) async fn sink(options: &SinkOptions) -> anyhow::Result<()> {
    let listener = crate::socket::listen(options.listen)?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            if let Err(error) = receive(stream).await {
                eprintln!("opencluster-probe: {error:#}");
            }
        });
    }
}

/// The request is: how much to send back (8 bytes), its seed (8 bytes), data until the half-close. The answer is the
/// data's SHA-256 and then what was asked for.
async fn receive(mut stream: TcpStream) -> anyhow::Result<()> {
    let (back, seed) = (stream.read_u64().await?, stream.read_u64().await?);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
    }
    stream.write_all(&hash.finalize()).await?;
    pour(&mut stream, back, seed).await?;
    stream.shutdown().await?;
    Ok(())
}

/// Sends, half-closes, receives and tells how it went.
pub(crate) async fn send(options: &Options) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut stream = TcpStream::connect(options.to).await?;
    let back_seed = options.seed ^ u64::MAX;
    stream.write_u64(options.back).await?;
    stream.write_u64(back_seed).await?;
    let sent = pour(&mut stream, options.bytes, options.seed).await?;
    stream.shutdown().await?;

    let mut theirs = [0; 32];
    stream.read_exact(&mut theirs).await?;
    let mut received = 0;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        received += count as u64;
    }
    let mut random = Random::new(back_seed);
    let mut expected = Sha256::new();
    each_chunk(options.back, |count| expected.update(random.fill(&mut buffer[..count])));
    crate::tell(&Event::Transferred {
        sent: options.bytes,
        upload_ok: sent[..] == theirs,
        received,
        download_ok: received == options.back && hash.finalize() == expected.finalize(),
        milliseconds: started.elapsed().as_millis() as u64,
    })
}

/// Sends so many random bytes: their SHA-256.
async fn pour(stream: &mut TcpStream, bytes: u64, seed: u64) -> anyhow::Result<[u8; 32]> {
    let mut random = Random::new(seed);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let count = left.min(CHUNK as u64) as usize;
        hash.update(random.fill(&mut buffer[..count]));
        stream.write_all(&buffer[..count]).await?;
        left -= count as u64;
    }
    Ok(hash.finalize().into())
}

fn each_chunk(bytes: u64, mut work: impl FnMut(usize)) {
    let mut left = bytes;
    while left > 0 {
        let count = left.min(CHUNK as u64);
        work(count as usize);
        left -= count;
    }
}

/// xorshift64: incompressible, reproducible, fast.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Never zero: xorshift would stay there.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn fill<'a>(&mut self, buffer: &'a mut [u8]) -> &'a [u8] {
        for word in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes()[..word.len()]);
        }
        buffer
    }
}
