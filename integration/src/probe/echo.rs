//! The echo server.

use std::net::SocketAddr;

use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// See [`serve`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Where; may be repeated
    #[arg(long, required = true, value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,
}

/// Serves until it is killed.
pub(crate) async fn serve(options: &Options) -> anyhow::Result<()> {
    let mut servers = JoinSet::new();
    for address in &options.listen {
        let listener = crate::socket::listen(*address)?;
        servers.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(echo(stream));
            }
        });
    }
    while let Some(ended) = servers.join_next().await {
        let outcome: std::io::Result<()> = ended?;
        outcome?;
    }
    Ok(())
}

/// Until the client has closed its direction, or the connection breaks: that is the client's to report.
async fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 4096];
    loop {
        match stream.read(&mut buffer).await {
            Ok(count @ 1..) => {
                if stream.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
            Ok(0) | Err(_) => return,
        }
    }
}
