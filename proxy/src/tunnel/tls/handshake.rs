//! TLS handshakes by rustls, on a nonblocking socket, with a bounded amount of memory.
//!
//! rustls' unbuffered interface is used here and nowhere else: it is the way to its kernel interface, which gives the
//! traffic keys of an established session to [`super::record`].

use std::io;
use std::sync::{Arc, OnceLock};

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert, ServerConnectionData, UnbufferedServerConnection};
use rustls::sign::CertifiedKey;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::record::{RecordError, Schedule, Session, record_length};
use crate::tunnel::oct;
use crate::tunnel::oct::frame::Framing;

/// What a peer may send before it is authenticated, in bytes: a chain of certificates fits several times over.
const MAX_INCOMING: usize = 32 * 1024;
/// The largest flight of ours.
const MAX_OUTGOING: usize = 64 * 1024;

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke.
    #[error("the connection broke during the TLS handshake: {0}")]
    Io(#[from] io::Error),
    /// The peer closed it.
    #[error("the peer closed the connection during the TLS handshake")]
    Closed,
    /// rustls or the certificate verifier refused.
    #[error("TLS handshake: {0}")]
    Tls(#[from] rustls::Error),
    /// The peer does not speak TLS.
    #[error("TLS handshake: {0}")]
    Record(#[from] RecordError),
    /// The peer sent more than a handshake can need.
    #[error("the peer sent more than {MAX_INCOMING} bytes before it was authenticated")]
    TooLarge,
    /// The peer is TLS but does not speak our protocol.
    #[error("the peer agreed to neither oct/1 nor oct-shared/1 (ALPN)")]
    Alpn,
    /// Authentication is mutual or there is none. The configuration sees to it; this is the second lock.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// A record could not be encoded.
    #[error("TLS handshake: a flight of ours exceeds {MAX_OUTGOING} bytes")]
    Encode,
}

/// What was agreed.
#[derive(Clone, Debug)]
pub struct Agreed {
    /// Which of the protocols.
    pub framing: Framing,
    /// The peer's chain, leaf first; verified by the configuration's verifier.
    pub chain: Vec<CertificateDer<'static>>,
    /// For example `TLS13_AES_128_GCM_SHA256`.
    pub suite: &'static str,
    /// For example `X25519MLKEM768`.
    pub group: &'static str,
    /// The server name that the client asked for (server side).
    pub server_name: Option<String>,
}

/// An established session, and what the peer already sent on it.
#[derive(Debug)]
pub struct Established {
    /// Keys.
    pub session: Session,
    /// What was agreed.
    pub agreed: Agreed,
    /// Bytes that arrived behind the handshake.
    pub leftover: Vec<u8>,
}

/// Client side. The configuration must have secret extraction enabled and offer `oct/1` (see `identity`).
pub async fn connect(
    socket: &mut TcpStream,
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
) -> Result<Established, HandshakeError> {
    let mut connection = UnbufferedClientConnection::new(config, server_name)?;
    let leftover = drive(socket, &mut connection).await?;
    let agreed = agreed(&connection, None)?;
    let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
    Ok(Established { session: Session::new(secrets, Schedule::Client(kernel))?, agreed, leftover })
}

/// Server side.
pub async fn accept(socket: &mut TcpStream, config: Arc<ServerConfig>) -> Result<Established, HandshakeError> {
    // The unbuffered interface does not tell the server name that the certificate was chosen by: note it on the way.
    let names = Arc::new(NotedName { resolver: Arc::clone(&config.cert_resolver), name: OnceLock::new() });
    let mut config = (*config).clone();
    config.cert_resolver = Arc::clone(&names) as _;
    let mut connection = UnbufferedServerConnection::new(Arc::new(config))?;
    let leftover = drive(socket, &mut connection).await?;
    let agreed = agreed(&connection, names.name.get().cloned())?;
    let (secrets, kernel) = connection.dangerous_into_kernel_connection()?;
    Ok(Established { session: Session::new(secrets, Schedule::Server(kernel))?, agreed, leftover })
}

/// Delegates, and remembers the server name. A client cannot change it on retry: rustls refuses that.
#[derive(Debug)]
struct NotedName {
    resolver: Arc<dyn ResolvesServerCert>,
    name: OnceLock<String>,
}

impl ResolvesServerCert for NotedName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let Some(name) = hello.server_name() {
            self.name.get_or_init(|| name.to_owned());
        }
        self.resolver.resolve(hello)
    }
}

fn agreed(common: &CommonState, server_name: Option<String>) -> Result<Agreed, HandshakeError> {
    let framing = match common.alpn_protocol() {
        Some(oct::ALPN) => Framing::Leased,
        Some(oct::SHARED_ALPN) => Framing::Shared,
        _ => return Err(HandshakeError::Alpn),
    };
    let chain: Vec<_> = common.peer_certificates().unwrap_or_default().iter().map(|c| c.clone().into_owned()).collect();
    if chain.is_empty() {
        return Err(HandshakeError::NoCertificate);
    }
    Ok(Agreed {
        framing,
        chain,
        suite: common.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str()).unwrap_or("unknown"),
        group: common.negotiated_key_exchange_group().and_then(|group| group.name().as_str()).unwrap_or("unknown"),
        server_name,
    })
}

/// What client and server connections have in common but rustls gives no trait for.
trait Unbuffered {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
}

impl Unbuffered for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn common(&self) -> &CommonState {
        self
    }
}

impl Unbuffered for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn common(&self) -> &CommonState {
        self
    }
}

/// What rustls asks of us next.
enum Step {
    Again,
    Send,
    Receive,
}

/// Runs the handshake to its end; returns what arrived behind it.
async fn drive(socket: &mut TcpStream, connection: &mut impl Unbuffered) -> Result<Vec<u8>, HandshakeError> {
    let mut incoming: Vec<u8> = Vec::with_capacity(4096);
    // rustls sees whole records, one more each time: what follows the handshake belongs to the session, and must not
    // be decrypted here.
    let mut shown = 0;
    let mut outgoing = Vec::new();
    loop {
        let UnbufferedStatus { discard, state, .. } = connection.process(&mut incoming[..shown]);
        let step = match state {
            Ok(state) => step(state, &mut outgoing)?,
            Err(error) => {
                incoming.drain(..discard);
                shown -= discard;
                send_alert(socket, connection, &mut incoming[..shown]).await;
                return Err(error.into());
            }
        };
        incoming.drain(..discard);
        shown -= discard;
        match step {
            Step::Again => {}
            Step::Send => {
                socket.write_all(&outgoing).await?;
                outgoing.clear();
            }
            Step::Receive if !connection.common().is_handshaking() => return Ok(incoming),
            Step::Receive => loop {
                if let Some(length) = record_length(&incoming[shown..], true)? {
                    shown += length;
                    break;
                }
                if incoming.len() >= MAX_INCOMING {
                    return Err(HandshakeError::TooLarge);
                }
                if socket.read_buf(&mut incoming).await? == 0 {
                    return Err(HandshakeError::Closed);
                }
            },
        }
    }
}

fn step<Data>(state: ConnectionState<'_, '_, Data>, outgoing: &mut Vec<u8>) -> Result<Step, HandshakeError> {
    Ok(match state {
        ConnectionState::EncodeTlsData(mut flight) => {
            encode(outgoing, |buffer| flight.encode(buffer))?;
            Step::Again
        }
        ConnectionState::TransmitTlsData(transmit) => {
            // Sent right after this returns, before rustls is asked again.
            transmit.done();
            Step::Send
        }
        ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => Step::Receive,
        // Early data is not enabled, and nothing behind the handshake is shown to rustls.
        _ => return Err(HandshakeError::Closed),
    })
}

fn encode(
    outgoing: &mut Vec<u8>,
    mut flight: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<(), HandshakeError> {
    let start = outgoing.len();
    let written = match flight(&mut []) {
        Ok(written) => written,
        Err(EncodeError::InsufficientSize(size)) if start + size.required_size <= MAX_OUTGOING => {
            outgoing.resize(start + size.required_size, 0);
            flight(&mut outgoing[start..]).map_err(|_| HandshakeError::Encode)?
        }
        Err(_) => return Err(HandshakeError::Encode),
    };
    outgoing.truncate(start + written);
    Ok(())
}

/// Tells the peer why, as far as the connection still takes it: the handshake has failed already, and that is what is
/// reported.
///
/// rustls must see the same bytes again: it remembers where in them the message lies that it choked on.
async fn send_alert(socket: &mut TcpStream, connection: &mut impl Unbuffered, mut incoming: &mut [u8]) {
    let mut outgoing = Vec::new();
    loop {
        let UnbufferedStatus { discard, state, .. } = connection.process(incoming);
        let Ok(ConnectionState::EncodeTlsData(mut alert)) = state else { break };
        if encode(&mut outgoing, |buffer| alert.encode(buffer)).is_err() {
            return;
        }
        incoming = &mut incoming[discard..];
    }
    if let Err(error) = socket.write_all(&outgoing).await {
        tracing::debug!(%error, "the peer did not take the TLS alert");
    }
}
