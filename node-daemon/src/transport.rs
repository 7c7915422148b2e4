//! gRPC to a controller over a TLS connection of ours.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

/// gRPC is HTTP/2.
pub(crate) const ALPN: &[&[u8]] = &[b"h2"];

/// Why a controller cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransportError {
    #[error("controller {address}: cannot connect: {source}")]
    Connect { address: SocketAddr, source: io::Error },
    #[error("controller {address}: no answer within {} ms", .limit.as_millis())]
    Timeout { address: SocketAddr, limit: Duration },
    #[error("controller {address}: TLS: {source}")]
    Tls { address: SocketAddr, source: io::Error },
    #[error("controller {address}: HTTP/2: {source}")]
    Http { address: SocketAddr, source: tonic::transport::Error },
}

/// Connects within `limit`, TLS included.
pub(crate) async fn connect(
    address: SocketAddr,
    config: Arc<ClientConfig>,
    limit: Duration,
) -> Result<TlsStream<TcpStream>, TransportError> {
    let handshake = async {
        let stream = TcpStream::connect(address).await.map_err(|source| TransportError::Connect { address, source })?;
        tune(&stream).map_err(|source| TransportError::Connect { address, source })?;
        // Verified is the controller's SPIFFE ID, whatever address it has.
        let name = ServerName::IpAddress(address.ip().into());
        TlsConnector::from(config).connect(name, stream).await.map_err(|source| TransportError::Tls { address, source })
    };
    timeout(limit, handshake).await.unwrap_or(Err(TransportError::Timeout { address, limit }))
}

/// No Nagle; and what is lost is sent again at an even pace for the first six times, not each time half as often: a heartbeat
/// that is lost four times would cost the lease. (Linux: `Documentation/networking/tcp-thin.rst`.)
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    Ok(rustix::net::sockopt::set_tcp_thin_linear_timeouts(stream, true)?)
}

/// gRPC over this connection and no other: when it ends, so does the channel.
pub(crate) async fn channel(address: SocketAddr, stream: TlsStream<TcpStream>) -> Result<Channel, TransportError> {
    let mut only = Some(stream);
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let stream = only.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { stream.map(TokioIo::new) }
    });
    // The name is only what stands in the requests' :authority.
    Endpoint::from_static("http://controller.invalid")
        .connect_with_connector(connector)
        .await
        .map_err(|source| TransportError::Http { address, source })
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::tcp_thin_linear_timeouts;

    use super::*;

    #[tokio::test]
    async fn r13_what_a_session_loses_is_sent_again_at_an_even_pace() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let stream = TcpStream::connect(listener.local_addr().expect("address")).await.expect("connected");
        assert!(!tcp_thin_linear_timeouts(&stream).expect("option"), "the positive control");
        tune(&stream).expect("tuned");
        assert!(tcp_thin_linear_timeouts(&stream).expect("option") && stream.nodelay().expect("option"));
    }
}
