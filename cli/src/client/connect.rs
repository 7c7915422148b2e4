//! A connection that can be trusted: TCP or Unix socket, then TLS 1.3, then the controller's identity.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use hyper_util::rt::TokioIo;
use opencluster_identity::bundle::{BundleError, TrustBundle};
use opencluster_identity::key::{KeyError, PrivateKey};
use opencluster_identity::revocation::{RevocationSet, Revocations};
use opencluster_identity::svid::{Svid, SvidError, SvidStore};
use opencluster_identity::tls::{self, ExpectedPeer, TlsError};
use opencluster_identity::trust::Trust;
use opencluster_identity::verify::{VerifyError, verify_peer};
use opencluster_identity::{CertificateDer, SpiffeId, UnixTime};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::settings::{PemFile, Server, Settings};
use crate::error::whole_story;

/// Any transport.
pub(super) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// TLS over any transport, as hyper takes it.
pub(super) type Connection = TokioIo<TlsStream<Box<dyn Transport>>>;

/// Why there is no connection that can be trusted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The file of root certificates is not usable.
    #[error("{}: {source}", path.display())]
    Authority {
        /// Which file.
        path: PathBuf,
        /// What about it.
        source: BundleError,
    },
    /// The client certificate is not usable.
    #[error("{}: {message}", path.display())]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// What about it.
        message: String,
    },
    /// Nobody answers there.
    #[error("cannot connect to {server}: {source}")]
    Unreachable {
        /// Where.
        server: String,
        /// Why.
        source: io::Error,
    },
    /// Nobody answered there in time.
    #[error("cannot connect to {server}: no answer within {} s", timeout.as_secs_f32())]
    Timeout {
        /// Where.
        server: String,
        /// How long it had.
        timeout: std::time::Duration,
    },
    /// Somebody answers, but it is no controller of this cluster.
    #[error("{server} is not a controller of this cluster: {source}")]
    Untrusted {
        /// Where.
        server: String,
        /// Why.
        source: VerifyError,
    },
    /// Somebody answers, but no TLS connection came of it.
    #[error("no TLS connection to {server}: {source}")]
    Handshake {
        /// Where.
        server: String,
        /// Why.
        source: io::Error,
    },
    /// TLS cannot be set up on this side.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] TlsError),
}

impl ConnectError {
    /// No answer in time.
    pub(super) fn timeout(settings: &Settings) -> Self {
        Self::Timeout { server: settings.server.to_string(), timeout: settings.timeout }
    }

    /// Whether somebody answered at all.
    pub(crate) fn reached(&self) -> bool {
        matches!(self, Self::Untrusted { .. } | Self::Handshake { .. })
    }

    /// For programs.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::Authority { .. } | Self::Certificate { .. } | Self::Tls(_) => "bad-credentials",
            Self::Unreachable { .. } | Self::Timeout { .. } => "unreachable",
            Self::Untrusted { .. } | Self::Handshake { .. } => "untrusted",
        }
    }

    /// What to do.
    pub(super) fn hint(&self) -> String {
        let hint = match self {
            Self::Authority { .. } => {
                "OPENCLUSTER_CA must name the root certificate that `opencluster-controller ca --config FILE` prints"
            }
            Self::Certificate { .. } => {
                "OPENCLUSTER_CERT and OPENCLUSTER_KEY must name a certificate of this cluster and its key"
            }
            Self::Unreachable { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "this user may not use the controller's socket"
            }
            Self::Unreachable { .. } | Self::Timeout { .. } => {
                "is the controller running, and is OPENCLUSTER_SERVER its api_listen or api_socket?"
            }
            Self::Untrusted { .. } => {
                "is OPENCLUSTER_CA the root of this cluster, and this machine's clock right? If both are, somebody \
                 stands in the controller's place: do not go on"
            }
            Self::Handshake { .. } => "is this the controller's API port (7480), not its node port (7443)?",
            Self::Tls(_) => "",
        };
        hint.to_owned()
    }
}

/// Connects; the identity is the controller's, verified.
pub(super) async fn connect(settings: &Settings) -> Result<(SpiffeId, Connection), ConnectError> {
    let bundle = TrustBundle::from_pem(settings.ca.text.as_bytes())
        .map_err(|source| ConnectError::Authority { path: settings.ca.path.clone(), source })?;
    let config = client_config(settings, &bundle)?;
    // Operators have no feed of revocations: a controller's certificate ends by itself within hours.
    let trust = Trust::with_bundle(bundle);
    let server = settings.server.to_string();
    let transport = transport(&settings.server)
        .await
        .map_err(|source| ConnectError::Unreachable { server: server.clone(), source })?;
    let stream = TlsConnector::from(config)
        .connect(server_name(&settings.server), transport)
        .await
        .map_err(|source| refused(&server, source))?;
    let peer = tls::controller_of(stream.get_ref().1, &trust, now())
        .map_err(|source| ConnectError::Untrusted { server, source })?;
    Ok((peer.id().clone(), TokioIo::new(stream)))
}

fn client_config(settings: &Settings, bundle: &TrustBundle) -> Result<Arc<ClientConfig>, ConnectError> {
    let trust = Trust::with_bundle(bundle.clone());
    let alpn: &[&[u8]] = &[b"http/1.1"];
    let Some((certificate, key)) = &settings.certificate else {
        return Ok(tls::anonymous_client_config(&trust, ExpectedPeer::AnyController, alpn)?);
    };
    let svid = client_certificate(certificate, key, bundle)?;
    let (id, svids) = (svid.id().clone(), SvidStore::new());
    svids.install(svid);
    Ok(tls::client_config(&svids, &id, &trust, ExpectedPeer::AnyController, alpn)?)
}

/// The operator's own certificate: judged here as the controller will, so that the fault has a name.
fn client_certificate(certificate: &PemFile, key: &PemFile, bundle: &TrustBundle) -> Result<Svid, ConnectError> {
    let bad = |file: &PemFile, message: String| ConnectError::Certificate { path: file.path.clone(), message };
    let chain = CertificateDer::pem_slice_iter(certificate.text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| bad(certificate, format!("not PEM: {error}")))?;
    let nothing_revoked = Revocations::not_loaded();
    nothing_revoked.replace(RevocationSet::new(0));
    let own = verify_peer(&chain, bundle, &nothing_revoked, bundle.domain(), now())
        .map_err(|error: VerifyError| bad(certificate, whole_story(&error)))?;
    let private_key =
        PrivateKey::from_pem(key.text.as_bytes()).map_err(|error: KeyError| bad(key, whole_story(&error)))?;
    Svid::new(own.id(), chain, private_key).map_err(|error: SvidError| bad(certificate, whole_story(&error)))
}

async fn transport(server: &Server) -> io::Result<Box<dyn Transport>> {
    match server {
        Server::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        }
        Server::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
    }
}

/// Controllers are known by their SPIFFE ID: the name only has to be one.
fn server_name(server: &Server) -> ServerName<'static> {
    let host = match server {
        Server::Tcp { host, .. } => ServerName::try_from(host.clone()).ok(),
        Server::Unix(_) => None,
    };
    host.unwrap_or_else(|| ServerName::from(std::net::IpAddr::from([127, 0, 0, 1])))
}

/// The reason of our own verifier, where it was that which ended the handshake.
fn refused(server: &str, source: io::Error) -> ConnectError {
    let server = server.to_owned();
    match tls::refusal(&source).cloned() {
        Some(source) => ConnectError::Untrusted { server, source },
        None => ConnectError::Handshake { server, source },
    }
}

fn now() -> UnixTime {
    // Before 1970 every certificate is not valid yet, which is the right answer.
    UnixTime::since_unix_epoch(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}
