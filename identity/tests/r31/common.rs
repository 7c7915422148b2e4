//! Two clusters' worth of authorities, peers with forged certificates, and handshakes between rustls configurations.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use opencluster_forge::{Forged, ForgingCa, gullible_client, gullible_server};
use opencluster_identity::authority::{Issuer, Root};
use opencluster_identity::key::PrivateKey;
use opencluster_identity::revocation::RevocationSet;
use opencluster_identity::svid::{Svid, SvidStore};
use opencluster_identity::tls::{self, ClientAuth, ExpectedPeer, ServerIdentity};
use opencluster_identity::trust::Trust;
use opencluster_identity::verify::VerifyError;
use opencluster_identity::{SpiffeId, TrustDomain, UnixTime};
use rcgen::CertificateParams;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use x509_parser::prelude::{FromDer, X509Certificate};

pub(crate) const ALPN: &[&[u8]] = &[b"oct/1"];
pub(crate) const HOUR: Duration = Duration::from_hours(1);

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.test").unwrap()
}

pub(crate) fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

pub(crate) fn workload(name: &str) -> SpiffeId {
    SpiffeId::workload(&domain(), "default", name).unwrap()
}

pub(crate) fn after(time: UnixTime, wait: Duration) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(time.as_secs()) + wait)
}

pub(crate) fn an_hour_before(time: UnixTime) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(time.as_secs() - HOUR.as_secs()))
}

/// What the controller has.
pub(crate) struct Cluster {
    pub(crate) root: Root,
    pub(crate) issuer: Issuer,
}

impl Cluster {
    pub(crate) fn new(domain: &TrustDomain) -> Self {
        let now = UnixTime::now();
        let root = Root::create(domain, 100 * HOUR, now).unwrap();
        let issuer = root.create_issuer(10 * HOUR, now).unwrap();
        Self { root, issuer }
    }

    pub(crate) fn svid(&self, id: &SpiffeId) -> Svid {
        let key = PrivateKey::generate().unwrap();
        let issued = self.issuer.issue(&key.csr_der(id).unwrap(), id, HOUR, UnixTime::now()).unwrap();
        Svid::new(id, issued.chain, key).unwrap()
    }

    /// Trusts this cluster; nothing is revoked.
    pub(crate) fn trust(&self) -> Trust {
        let trust = Trust::with_bundle(self.root.bundle().unwrap());
        trust.replace_revocations(RevocationSet::new(1));
        trust
    }

    /// A process that holds these identities.
    pub(crate) fn process(&self, ids: &[&SpiffeId]) -> Process {
        let svids = SvidStore::new();
        for id in ids {
            svids.install(self.svid(id));
        }
        Process { svids, trust: self.trust() }
    }
}

pub(crate) struct Process {
    pub(crate) svids: SvidStore,
    pub(crate) trust: Trust,
}

impl Process {
    pub(crate) fn client(&self, own: &SpiffeId) -> Arc<ClientConfig> {
        tls::client_config(&self.svids, own, &self.trust, ExpectedPeer::ServerName, ALPN).unwrap()
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        let identity = ServerIdentity::ByServerName(self.svids.clone());
        tls::server_config(identity, &self.trust, ClientAuth::Required, ALPN).unwrap()
    }
}

/// Trusts the forger; nothing is revoked.
pub(crate) fn trust_in(ca: &ForgingCa) -> Trust {
    let bundle = opencluster_identity::bundle::TrustBundle::from_der([ca.root().unwrap().clone()]).unwrap();
    let trust = Trust::with_bundle(bundle);
    trust.replace_revocations(RevocationSet::new(1));
    trust
}

/// Until when the forger's issuer counts.
pub(crate) fn issuer_not_after(ca: &ForgingCa) -> UnixTime {
    let (_, issuer) = X509Certificate::from_der(ca.issuer()).unwrap();
    UnixTime::since_unix_epoch(Duration::from_secs(issuer.validity().not_after.timestamp() as u64))
}

/// A client that shows this certificate and accepts any server.
pub(crate) fn forged_client(forged: &Forged) -> Arc<ClientConfig> {
    let client = gullible_client(&tls::crypto_provider()).unwrap();
    with_alpn(client.with_client_auth_cert(forged.chain.clone(), forged.private_key()).unwrap())
}

/// A server that shows this certificate and accepts any client.
pub(crate) fn forged_server(forged: &Forged) -> Arc<ServerConfig> {
    let mut config = gullible_server(&tls::crypto_provider(), forged.chain.clone(), forged.private_key()).unwrap();
    config.alpn_protocols = ALPN.iter().map(|protocol| protocol.to_vec()).collect();
    Arc::new(config)
}

/// What our own issuer would put into a leaf, valid for an hour around now.
pub(crate) fn leaf_params(uri: &str) -> CertificateParams {
    opencluster_forge::leaf_params(&[uri]).unwrap()
}

/// A client that shows no certificate and accepts any server.
pub(crate) fn nobody() -> Arc<ClientConfig> {
    with_alpn(gullible_client(&tls::crypto_provider()).unwrap().with_no_client_auth())
}

fn with_alpn(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = ALPN.iter().map(|protocol| protocol.to_vec()).collect();
    Arc::new(config)
}

pub(crate) type ClientStream = client::TlsStream<DuplexStream>;
pub(crate) type ServerStream = server::TlsStream<DuplexStream>;

/// How a handshake ended at both ends, with four bytes there and back: a TLS 1.3 client learns only by reading that the
/// server has refused it.
pub(crate) struct Ends {
    pub(crate) client: io::Result<ClientStream>,
    pub(crate) server: io::Result<ServerStream>,
}

impl Ends {
    pub(crate) fn both(self) -> (ClientStream, ServerStream) {
        (self.client.expect("the client's end"), self.server.expect("the server's end"))
    }

    /// Refused by our verification on the client's side; and the server noticed.
    pub(crate) fn refused_by_client(self) -> VerifyError {
        self.server.expect_err("the server must not be left with a connection");
        refusal(&self.client.expect_err("the client must refuse"))
    }

    /// Refused by our verification on the server's side; and the client noticed.
    pub(crate) fn refused_by_server(self) -> VerifyError {
        self.client.expect_err("the client must not be left with a connection");
        refusal(&self.server.expect_err("the server must refuse"))
    }
}

pub(crate) fn refusal(error: &io::Error) -> VerifyError {
    tls::refusal(error).unwrap_or_else(|| panic!("not a refusal of ours: {error}")).clone()
}

pub(crate) async fn connect(client: Arc<ClientConfig>, server: Arc<ServerConfig>, name: ServerName<'static>) -> Ends {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let client = async move {
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        ping(&mut stream).await?;
        Ok(stream)
    };
    let server = async move {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        echo(&mut stream).await?;
        Ok(stream)
    };
    let (client, server) = tokio::join!(client, server);
    Ends { client, server }
}

pub(crate) async fn connect_to(client: Arc<ClientConfig>, server: Arc<ServerConfig>, peer: &SpiffeId) -> Ends {
    connect(client, server, tls::server_name(peer).unwrap()).await
}

pub(crate) async fn ping(stream: &mut ClientStream) -> io::Result<()> {
    stream.write_all(b"ping").await?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"ping");
    Ok(())
}

pub(crate) async fn echo(stream: &mut ServerStream) -> io::Result<()> {
    let mut question = [0; 4];
    stream.read_exact(&mut question).await?;
    stream.write_all(&question).await
}
