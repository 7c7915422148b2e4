//! Accepting connections: TLS before anything else, with limits on everything that a stranger can make us hold.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use opencluster_identity::trust::Trust;
use opencluster_identity::verify::PeerVerified;
use opencluster_identity::{UnixTime, tls};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::attest::limit::source_group;

/// How long a client has for the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long to wait when the system has no descriptor left for another connection.
const OUT_OF_RESOURCES: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// `None` over a Unix socket.
    pub address: Option<SocketAddr>,
    /// Whose certificate it showed, verified; `None`: it showed none.
    pub identity: Option<PeerVerified>,
}

/// A listening socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}")]
pub struct ListenError {
    address: String,
    source: io::Error,
}

/// What listens.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket, whose file is removed at the end.
    Unix(UnixListener, SocketFile),
}

/// The file of a Unix socket.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "the socket's file was gone already");
        }
    }
}

impl Listener {
    /// Listens on a TCP address.
    pub async fn tcp(address: SocketAddr) -> Result<Self, ListenError> {
        let failed = |source| ListenError { address: address.to_string(), source };
        Ok(Self::Tcp(TcpListener::bind(address).await.map_err(failed)?))
    }

    /// Listens on a Unix socket that only this user can connect to. One that a controller left behind is replaced; anything
    /// else at that path, and a socket that somebody serves, is left alone.
    pub async fn unix(path: &Path) -> Result<Self, ListenError> {
        use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
        let failed = |source| ListenError { address: path.display().to_string(), source };
        if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
            if UnixStream::connect(path).await.is_ok() {
                return Err(failed(io::ErrorKind::AddrInUse.into()));
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        let file = SocketFile(path.to_owned());
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self::Unix(listener, file))
    }

    /// Where it listens, for the log.
    pub fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => listener.local_addr().map_or_else(|error| error.to_string(), |it| it.to_string()),
            Self::Unix(_, file) => format!("unix:{}", file.0.display()),
        }
    }

    /// Its TCP address.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix(..) => None,
        }
    }

    async fn accept(&self) -> io::Result<(Socket, Option<SocketAddr>)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Heartbeats and grants are small and urgent: no Nagle, and what is lost is sent again at an even pace for the
                // first six times (Linux: `Documentation/networking/tcp-thin.rst`).
                stream.set_nodelay(true)?;
                rustix::net::sockopt::set_tcp_thin_linear_timeouts(&stream, true)?;
                Ok((Socket::Tcp(stream), Some(address)))
            }
            Self::Unix(listener, _) => Ok((Socket::Unix(listener.accept().await?.0), None)),
        }
    }
}

/// How to serve.
#[derive(Clone)]
pub struct Rules {
    /// The name of the listener in the log.
    pub name: &'static str,
    /// TLS, with optional client certificates.
    pub tls: Arc<ServerConfig>,
    /// To know whose certificate it was.
    pub trust: Trust,
    /// At most so many connections at a time; more are closed at once.
    pub connections: Arc<Semaphore>,
    /// At most so many of one address that have shown no certificate (yet).
    pub strangers: Strangers,
    /// Who shows no certificate is cut off after this long, whatever it is doing.
    pub anonymous_life: Option<Duration>,
}

/// Accepts until the controller ends. `serve` gets every connection whose handshake succeeded.
pub async fn accept<F, S>(listener: Listener, rules: Rules, mut shutdown: watch::Receiver<bool>, serve: S)
where
    S: Fn(Connection) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let acceptor = TlsAcceptor::from(Arc::clone(&rules.tls));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutting_down(&mut shutdown) => return,
        };
        let (socket, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(event = "listen.accept-failed", listener = rules.name, %error, "a connection was not accepted");
                tokio::time::sleep(OUT_OF_RESOURCES).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&rules.connections).try_acquire_owned() else {
            tracing::warn!(event = "listen.full", listener = rules.name, "too many connections: closed a new one");
            continue;
        };
        let Some(stranger) = rules.strangers.enter(address) else {
            tracing::debug!(event = "listen.full", listener = rules.name, ?address, "too many of this address: closed");
            continue;
        };
        let (acceptor, rules, serve) = (acceptor.clone(), rules.clone(), serve.clone());
        tokio::spawn(async move {
            match handshake(&acceptor, socket, address, &rules, (permit, stranger)).await {
                Ok(connection) => serve(connection).await,
                Err(reason) => {
                    tracing::info!(event = "listen.refused", listener = rules.name, ?address, reason, "TLS failed");
                }
            }
        });
    }
}

/// Waits until the controller ends.
pub async fn shutting_down(shutdown: &mut watch::Receiver<bool>) {
    // An error says that nobody is left to say it: that is the end, too.
    drop(shutdown.wait_for(|shutting_down| *shutting_down).await);
}

async fn handshake(
    acceptor: &TlsAcceptor,
    socket: Socket,
    address: Option<SocketAddr>,
    rules: &Rules,
    (permit, stranger): (OwnedSemaphorePermit, Stranger),
) -> Result<Connection, String> {
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(socket)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            return Err(tls::refusal(&error).map_or_else(|| error.to_string(), ToString::to_string));
        }
        Err(_) => return Err("no handshake in time".into()),
    };
    let identity =
        tls::peer_of(stream.get_ref().1, &rules.trust, UnixTime::now()).map_err(|error| error.to_string())?;
    let deadline = match (&identity, rules.anonymous_life) {
        (None, Some(life)) => Some(Box::pin(tokio::time::sleep(life))),
        _ => None,
    };
    let stranger = identity.is_none().then_some(stranger);
    Ok(Connection { stream, peer: Peer { address, identity }, deadline, _permit: permit, _stranger: stranger })
}

/// Counts the connections of each address that have shown no certificate (yet), so that no address takes the places of
/// all others. Counted as in [`FailureLimit`](crate::attest::limit::FailureLimit).
#[derive(Clone, Debug)]
pub struct Strangers {
    most: usize,
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A counted connection.
#[derive(Debug)]
struct Stranger {
    of: Strangers,
    group: Option<IpAddr>,
}

impl Strangers {
    /// At most so many of one address.
    pub fn at_most(most: usize) -> Self {
        Self { most, counts: Arc::default() }
    }

    /// `None`: too many. A Unix socket's peers have no address and are not counted.
    fn enter(&self, address: Option<SocketAddr>) -> Option<Stranger> {
        let group = address.map(|address| source_group(address.ip()));
        if let Some(group) = group {
            let mut counts = self.counts();
            let count = counts.entry(group).or_default();
            if *count >= self.most {
                return None;
            }
            *count += 1;
        }
        Some(Stranger { of: self.clone(), group })
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // Counts are whole at every moment.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let Some(group) = self.group else { return };
        let mut counts = self.of.counts();
        if let Some(count) = counts.get_mut(&group) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&group);
            }
        }
    }
}

/// A connection after its handshake.
pub struct Connection {
    stream: TlsStream<Socket>,
    peer: Peer,
    deadline: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
    _stranger: Option<Stranger>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Connection").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Connection {
    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    fn check_deadline(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(deadline) = &mut self.deadline else { return Ok(()) };
        if deadline.as_mut().poll(context).is_pending() {
            return Ok(());
        }
        // A timer that has fired must not be polled again: the next read fails too, and asks for a moment later.
        deadline.as_mut().reset(Instant::now());
        Err(io::Error::new(io::ErrorKind::TimedOut, "a client without a certificate has stayed too long"))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_deadline(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// TCP or Unix.
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
