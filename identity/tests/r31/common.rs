//! Two clusters' worth of authorities, forged certificates, and handshakes between rustls configurations.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use opencluster_identity::authority::{Issuer, Root};
use opencluster_identity::key::PrivateKey;
use opencluster_identity::revocation::RevocationSet;
use opencluster_identity::svid::{Svid, SvidStore};
use opencluster_identity::tls::{self, ClientAuth, ExpectedPeer, ServerIdentity};
use opencluster_identity::trust::Trust;
use opencluster_identity::verify::VerifyError;
use opencluster_identity::{CertificateDer, SpiffeId, TrustDomain, UnixTime};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use time::OffsetDateTime;
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

/// An authority that signs whatever it is told to: a compromised or careless one, made without our code.
pub(crate) struct ForgingCa {
    pub(crate) root_der: CertificateDer<'static>,
    pub(crate) issuer_der: CertificateDer<'static>,
    issuer: rcgen::Issuer<'static, KeyPair>,
}

impl ForgingCa {
    pub(crate) fn new(root_domain: &str, issuer_domain: &str) -> Self {
        let root_key = KeyPair::generate().unwrap();
        let root_params = Self::ca_params("Forged root", root_domain, 1);
        let root_der = root_params.self_signed(&root_key).unwrap().der().clone();
        let root = rcgen::Issuer::new(root_params, root_key);
        let issuer_key = KeyPair::generate().unwrap();
        let issuer_params = Self::ca_params("Forged issuer", issuer_domain, 0);
        let issuer_der = issuer_params.signed_by(&issuer_key, &root).unwrap().der().clone();
        Self { root_der, issuer_der, issuer: rcgen::Issuer::new(issuer_params, issuer_key) }
    }

    /// Trusts the forger; nothing is revoked.
    pub(crate) fn trust(&self) -> Trust {
        let bundle = opencluster_identity::bundle::TrustBundle::from_der([self.root_der.clone()]).unwrap();
        let trust = Trust::with_bundle(bundle);
        trust.replace_revocations(RevocationSet::new(1));
        trust
    }

    pub(crate) fn forge(&self, params: &CertificateParams) -> Forged {
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Forged { chain: vec![leaf, self.issuer_der.clone()], key }
    }

    /// Until when the issuer's own certificate counts.
    pub(crate) fn issuer_not_after(&self) -> UnixTime {
        let (_, issuer) = X509Certificate::from_der(&self.issuer_der).unwrap();
        UnixTime::since_unix_epoch(Duration::from_secs(issuer.validity().not_after.timestamp() as u64))
    }

    /// Signs an authority below the issuer, and with that a leaf: one CA too many.
    pub(crate) fn forge_below(&self, params: &CertificateParams) -> Forged {
        let sub_key = KeyPair::generate().unwrap();
        let sub_params = Self::ca_params("Forged sub-issuer", "cluster.test", 0);
        let sub_der = sub_params.signed_by(&sub_key, &self.issuer).unwrap().der().clone();
        let sub = rcgen::Issuer::new(sub_params, sub_key);
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &sub).unwrap().der().clone();
        Forged { chain: vec![leaf, sub_der, self.issuer_der.clone()], key }
    }

    fn ca_params(name: &str, domain: &str, path_length: u8) -> CertificateParams {
        let mut params = leaf_params(&format!("spiffe://{domain}"));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.extended_key_usages = vec![];
        params
    }
}

/// A certificate chain with its key, for rustls without any of our checks.
pub(crate) struct Forged {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: KeyPair,
}

impl Forged {
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }

    /// A client that shows this certificate and accepts any server.
    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        let config = gullible_client().with_client_auth_cert(self.chain.clone(), self.private_key()).unwrap();
        with_alpn(config)
    }

    /// A server that shows this certificate and accepts any client.
    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        let mut config = ServerConfig::builder_with_provider(tls::crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.private_key())
            .unwrap();
        config.alpn_protocols = ALPN.iter().map(|protocol| protocol.to_vec()).collect();
        Arc::new(config)
    }
}

/// What our own issuer would put into a leaf, valid for an hour around now.
pub(crate) fn leaf_params(uri: &str) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = now - HOUR / 2;
    params.not_after = now + HOUR / 2;
    params
}

/// A client that shows no certificate and accepts any server.
pub(crate) fn nobody() -> Arc<ClientConfig> {
    with_alpn(gullible_client().with_no_client_auth())
}

fn with_alpn(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = ALPN.iter().map(|protocol| protocol.to_vec()).collect();
    Arc::new(config)
}

fn gullible_client() -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    ClientConfig::builder_with_provider(tls::crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible))
}

#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
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
