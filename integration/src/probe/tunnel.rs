//! Tunnels made and taken without a proxy: what an intruder gets to see of one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use opencluster_identity::SpiffeId;
use opencluster_integration::report::Event;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};

use crate::identity::Claim;

/// A tunnel for one flow at a time.
const LEASED: &[u8] = b"oct/1";
/// A tunnel that flows share: what a proxy makes first.
const SHARED: &[u8] = b"oct-shared/1";
const PATIENCE: Duration = Duration::from_secs(5);

/// See [`make`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The proxy
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// Whom to ask for
    #[arg(long, value_name = "SPIFFE-ID", default_value = "spiffe://rig.test/ns/default/sa/b")]
    peer: String,
    /// Where the flow is to go
    #[arg(long, value_name = "ADDRESS:PORT")]
    target: SocketAddr,
    /// What to say there
    #[arg(long, value_name = "TEXT")]
    marker: String,
    #[command(flatten)]
    claim: Claim,
}

/// See [`impostor`].
#[derive(Args, Debug)]
pub(crate) struct ImpostorOptions {
    /// Where
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    #[command(flatten)]
    claim: Claim,
}

/// Makes a tunnel to a proxy, opens a flow in it and tells what came back. A client's handshake is over before the server
/// has looked at its certificate: only an answer in the tunnel shows that it was let in.
pub(crate) async fn make(options: &Options) -> anyhow::Result<()> {
    let mut config = options.claim.client()?;
    config.alpn_protocols = vec![LEASED.to_vec()];
    let attempt = async {
        let stream = TcpStream::connect(options.to).await?;
        let name = server_name(&options.peer)?;
        let mut tls = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        tls.write_all(&flow(options.target, options.marker.as_bytes())).await?;
        let mut answer = vec![0; 4096];
        let mut length = tls.read(&mut answer).await?;
        // ACCEPT comes alone; the application's answer follows.
        if length == 4 && answer[0] == 2 {
            length += tls.read(&mut answer[4..]).await?;
        }
        answer.truncate(length);
        anyhow::Ok(answer)
    };
    let event = match timeout(PATIENCE, attempt).await {
        Ok(Ok(answer)) if answer.is_empty() => refused("closed without a word".to_owned()),
        Ok(Ok(answer)) => {
            let text = String::from_utf8_lossy(&answer).replace(|c: char| c.is_control(), " ").trim().to_owned();
            Event::Answered { frame: answer[0], text }
        }
        Ok(Err(error)) => refused(format!("{error:#}")),
        Err(_) => refused("no answer".to_owned()),
    };
    crate::tell(&event)
}

fn refused(why: String) -> Event {
    Event::Refused { why }
}

fn server_name(id: &str) -> anyhow::Result<ServerName<'static>> {
    Ok(opencluster_identity::tls::server_name(&SpiffeId::parse(id)?)?)
}

/// OPEN with the first bytes right behind it, written out: this side of the protocol does not share the proxy's code.
fn flow(target: SocketAddr, data: &[u8]) -> Vec<u8> {
    let mut open = vec![1, 0, if target.is_ipv4() { 4 } else { 6 }];
    open.extend(target.port().to_be_bytes());
    match target {
        SocketAddr::V4(address) => open.extend(address.ip().octets()),
        SocketAddr::V6(address) => open.extend(address.ip().octets()),
    }
    open.extend(7_u64.to_be_bytes());
    open.extend(7_u128.to_be_bytes());
    let mut frames = Vec::new();
    for (kind, payload) in [(1, open.as_slice()), (4, data)] {
        frames.extend((u32::try_from(payload.len()).unwrap_or(0) | (kind << 24)).to_be_bytes());
        frames.extend(payload);
    }
    frames
}

/// Takes tunnels as somebody else, and tells of each whether the client went through with it.
pub(crate) async fn impostor(options: &ImpostorOptions) -> anyhow::Result<()> {
    let mut config = options.claim.server()?;
    config.alpn_protocols = vec![SHARED.to_vec(), LEASED.to_vec()];
    let config = Arc::new(config);
    let listener = crate::socket::listen(options.listen)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let config = Arc::clone(&config);
        tokio::spawn(async move {
            let event = match timeout(PATIENCE, visit(stream, config)).await {
                Ok(Ok(event)) => event,
                Ok(Err(error)) => refused(format!("{error:#}")),
                Err(_) => refused("no word after the handshake".to_owned()),
            };
            if let Err(error) = crate::tell(&event) {
                eprintln!("opencluster-probe: {error:#}");
            }
        });
    }
}

/// A client that believes the certificate sends a flow; what it holds would be the application's.
async fn visit(stream: TcpStream, config: Arc<rustls::ServerConfig>) -> anyhow::Result<Event> {
    let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
    let mut tls = hello.into_stream(config).await?;
    let mut received = vec![0; 4096];
    let length = tls.read(&mut received).await?;
    if length == 0 {
        return Ok(refused("closed without a word".to_owned()));
    }
    received.truncate(length);
    let text = String::from_utf8_lossy(&received).replace(|c: char| c.is_control(), " ").trim().to_owned();
    Ok(Event::Answered { frame: received[0], text })
}
