//! One connection, an echo every few milliseconds: when does it live, when does it die?

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use opencluster_integration::report::Event;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// See [`beat`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Where to
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// Between two echoes
    #[arg(long, value_name = "MS", default_value_t = 2)]
    every_ms: u64,
    /// How long an echo may be missing before the connection counts as dead
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    patience_ms: u64,
    /// Try again when it dies or cannot be made, for ever
    #[arg(long)]
    again: bool,
}

/// Beats until the connection dies, or until it is killed with `--again`. Only changes are told, and how many echoes there were
/// when a line on standard input asks.
pub(crate) async fn beat(options: &Options) -> anyhow::Result<()> {
    let mut told_down = false;
    let count = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&count);
    thread::spawn(move || {
        for _ in io::stdin().lines().map_while(Result::ok) {
            let told = crate::tell(&Event::Echoes { count: counted.load(Ordering::SeqCst) });
            if told.is_err() {
                break;
            }
        }
    });
    loop {
        let died = one_connection(options, &count).await?;
        let lived = matches!(died, Event::Down { echoes: 1.., .. });
        if lived || !told_down {
            crate::tell(&died)?;
            told_down = true;
        }
        if !options.again {
            return Ok(());
        }
        sleep(Duration::from_millis(options.every_ms)).await;
    }
}

async fn one_connection(options: &Options, count: &AtomicU64) -> anyhow::Result<Event> {
    let patience = Duration::from_millis(options.patience_ms);
    let started = Instant::now();
    let mut last = started;
    let mut echoes = 0_u64;
    let down = |how: String, last: Instant, echoes| Event::Down {
        how,
        since_last_echo_ms: last.elapsed().as_millis() as u64,
        echoes,
    };
    let mut stream = match timeout(patience, TcpStream::connect(options.to)).await {
        Err(_) => return Ok(down("no answer to the connect".to_owned(), last, 0)),
        Ok(Err(error)) => return Ok(down(how(&error), last, 0)),
        Ok(Ok(stream)) => stream,
    };
    stream.set_nodelay(true)?;
    loop {
        let sent = echoes.to_be_bytes();
        let mut received = [0; 8];
        let echo = async {
            stream.write_all(&sent).await?;
            stream.read_exact(&mut received).await
        };
        match timeout(patience, echo).await {
            Err(_) => return Ok(down("silent".to_owned(), last, echoes)),
            Ok(Err(error)) => return Ok(down(how(&error), last, echoes)),
            Ok(Ok(_)) if received != sent => return Ok(down("wrong echo".to_owned(), last, echoes)),
            Ok(Ok(_)) => {}
        }
        last = Instant::now();
        count.fetch_add(1, Ordering::SeqCst);
        if echoes == 0 {
            crate::tell(&Event::Up { milliseconds: started.elapsed().as_millis() as u64 })?;
        }
        echoes += 1;
        sleep(Duration::from_millis(options.every_ms)).await;
    }
}

fn how(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "reset".to_owned(),
        ErrorKind::UnexpectedEof => "closed".to_owned(),
        ErrorKind::ConnectionRefused => "refused".to_owned(),
        _ => error.to_string(),
    }
}
