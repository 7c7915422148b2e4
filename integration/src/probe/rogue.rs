//! A node of the attacker's own: enrolled by a real token, with real certificates in its hands instead of a proxy's.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use hyper_util::rt::TokioIo;
use opencluster_api::control::control_client::ControlClient;
use opencluster_api::control::enrolment_client::EnrolmentClient;
use opencluster_api::control::{
    self, Acknowledgement, CertificateRequest, EnrolRequest, EnrolResponse, NodeHealth, NodeMessage,
    controller_message, node_message,
};
use opencluster_forge::gullible_client;
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::tls::{crypto_provider, enrolment_client_config};
use opencluster_integration::report::Event;
use opencluster_policy::lease::{Clocks, Grant, Host, NodeAction, NodeEvent, NodeLease, Timing};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustix::time::{ClockId, clock_gettime};
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::{Barrier, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

/// Which controller, and with what.
#[derive(Args, Clone, Debug)]
pub(crate) struct Enrolment {
    /// The controller
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "10.88.0.2:7443")]
    controller: SocketAddr,
    /// The one-time token
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
}

/// See [`race`].
#[derive(Args, Debug)]
pub(crate) struct RaceOptions {
    #[command(flatten)]
    enrolment: Enrolment,
    /// How many at the same moment
    #[arg(long, value_name = "N", default_value_t = 2)]
    attempts: usize,
    /// Claim to be this node instead of the token's
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
}

/// See [`node`].
#[derive(Args, Debug)]
pub(crate) struct NodeOptions {
    #[command(flatten)]
    enrolment: Enrolment,
    /// Identities to get certificates for
    #[arg(long = "as", required = true, value_name = "SPIFFE-ID")]
    identities: Vec<String>,
    /// Where to put them: 0.chain.pem, 0.key.pem, 1.chain.pem, …
    #[arg(long, value_name = "DIRECTORY")]
    out: PathBuf,
}

struct Token {
    node: String,
    secret: String,
    root: Sha256Digest,
}

impl Enrolment {
    fn token(&self) -> anyhow::Result<Token> {
        let text = fs::read_to_string(&self.token_file)?;
        let parts: Vec<_> = text.trim().split('.').collect();
        let ["oct1", node, secret, root] = parts[..] else { bail!("not a token") };
        let root = Sha256Digest::from_bytes(&hex::decode(root)?).context("the fingerprint")?;
        Ok(Token { node: node.to_owned(), secret: secret.to_owned(), root })
    }

    async fn client(&self, token: &Token) -> anyhow::Result<EnrolmentClient<Channel>> {
        Ok(EnrolmentClient::new(channel(self.controller, enrolment_client_config(token.root, &[b"h2"])?).await?))
    }
}

/// Uses one token several times at the same moment, and tells how often it was granted.
pub(crate) async fn race(options: &RaceOptions) -> anyhow::Result<()> {
    let token = Arc::new(options.enrolment.token()?);
    let start = Arc::new(Barrier::new(options.attempts));
    let mut attempts = JoinSet::new();
    for _ in 0..options.attempts {
        let (token, start) = (Arc::clone(&token), Arc::clone(&start));
        let enrolment = options.enrolment.clone();
        let node = options.node.clone().unwrap_or_else(|| token.node.clone());
        attempts.spawn(async move {
            let mut client = enrolment.client(&token).await?;
            let (request, _) = request(&token, &node)?;
            start.wait().await;
            anyhow::Ok(client.enrol(request).await.map(|_| ()))
        });
    }
    let (mut granted, mut refused, mut why) = (0, 0, None);
    while let Some(outcome) = attempts.join_next().await {
        match outcome?? {
            Ok(()) => granted += 1,
            Err(status) => {
                refused += 1;
                why.get_or_insert_with(|| format!("{}: {}", status.code(), status.message()));
            }
        }
    }
    crate::tell(&Event::Enrolled { granted, refused, why })
}

fn request(token: &Token, node: &str) -> anyhow::Result<(EnrolRequest, KeyPair)> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
    let (csr_der, key) = csr(&format!("spiffe://rig.test/node/{node}"))?;
    Ok((
        EnrolRequest { node: node.to_owned(), token: token.secret.clone(), csr_der, boot_id, machine: Vec::new() },
        key,
    ))
}

fn csr(id: &str) -> anyhow::Result<(Vec<u8>, KeyPair)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
    params.distinguished_name = DistinguishedName::new();
    Ok((params.serialize_request(&key)?.der().to_vec(), key))
}

/// Enrols, gets certificates, writes them down, and sends heartbeats until standard input ends: the node counts as
/// active, and its certificates as good.
pub(crate) async fn node(options: &NodeOptions) -> anyhow::Result<()> {
    let token = options.enrolment.token()?;
    let (request, key) = request(&token, &token.node)?;
    let boot_id = request.boot_id.clone();
    let enrolled = options.enrolment.client(&token).await?.enrol(request).await?.into_inner();
    let channel = channel(options.enrolment.controller, node_config(&enrolled, &key)?).await?;

    let timing = Timing::new(millis(enrolled.lease_ms), millis(enrolled.heartbeat_ms));
    let nonce = enrolled.nonce.as_slice().try_into().context("the nonce")?;
    let mut lease = NodeLease::enrolled(nonce, timing, Host::default(), clocks());
    let (sender, outgoing) = mpsc::channel(64);
    let mut keys = Vec::new();
    let first = lease.step(NodeEvent::Connected(clocks()));
    send(&sender, first, &boot_id, Acknowledgement::default()).await?;
    for (number, id) in options.identities.iter().enumerate() {
        let (csr_der, key) = csr(id)?;
        let request = CertificateRequest { request_id: number as u64, spiffe_id: id.clone(), csr_der };
        sender.send(NodeMessage { message: Some(node_message::Message::CertificateRequest(request)) }).await?;
        keys.push(key);
    }
    let mut incoming = ControlClient::new(channel).session(ReceiverStream::new(outgoing)).await?.into_inner();

    let mut ended = spawn_end_of_input();
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    let (mut certificates, mut applied) = (0, Acknowledgement::default());
    loop {
        tokio::select! {
            _ = &mut ended => return Ok(()),
            _ = tick.tick() => {
                let due = lease.step(NodeEvent::Tick(clocks()));
                send(&sender, due, &boot_id, applied).await?;
            }
            message = incoming.message() => match message?.context("the controller ended the session")?.message {
                Some(controller_message::Message::Grant(grant)) => {
                    let nonce = grant.nonce.as_slice().try_into().context("the nonce")?;
                    let lease_ns = millis(grant.lease_ms);
                    let sent = Clocks {
                        monotonic_raw: grant.monotonic_raw_ns,
                        boottime: grant.boottime_ns,
                        realtime: grant.realtime_ns,
                    };
                    let grant = Grant { sequence: grant.sequence, sent, nonce, lease: lease_ns, confirm: grant.confirm };
                    let due = lease.step(NodeEvent::Grant(grant, clocks()));
                    send(&sender, due, &boot_id, applied).await?;
                }
                Some(controller_message::Message::Config(config)) => applied.config_version = config.version,
                // It says that it applied them, so that it keeps its lease.
                Some(controller_message::Message::Revocations(set)) => applied.revocation_version = set.version,
                Some(controller_message::Message::Certificate(certificate)) => {
                    keep(&options.out, &certificate, &keys)?;
                    certificates += 1;
                    if certificates == keys.len() {
                        crate::tell(&Event::Ready { directory: options.out.display().to_string() })?;
                    }
                }
                Some(controller_message::Message::Sever(sever)) => bail!("severed: {}", sever.reason),
                _ => {}
            }
        }
    }
}

/// Completes when standard input has ended.
fn spawn_end_of_input() -> tokio::task::JoinHandle<()> {
    tokio::task::spawn_blocking(|| {
        // An error is an end as well.
        drop(std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    })
}

async fn send(
    sender: &mpsc::Sender<NodeMessage>,
    actions: Vec<NodeAction>,
    boot_id: &str,
    applied: Acknowledgement,
) -> anyhow::Result<()> {
    for action in actions {
        let NodeAction::Send(heartbeat) = action else { continue };
        let heartbeat = control::Heartbeat {
            sequence: heartbeat.sequence,
            nonce: heartbeat.nonce.to_vec(),
            monotonic_raw_ns: heartbeat.clocks.monotonic_raw,
            boottime_ns: heartbeat.clocks.boottime,
            realtime_ns: heartbeat.clocks.realtime,
            granted_monotonic_raw_ns: heartbeat.granted,
            boot_id: boot_id.to_owned(),
            config_version: applied.config_version,
            revocation_version: applied.revocation_version,
            machine: Vec::new(),
            // It lies, as rogues do.
            health: Some(NodeHealth { firewall_applied: true, proxy_ready: true, ..NodeHealth::default() }),
        };
        sender.send(NodeMessage { message: Some(node_message::Message::Heartbeat(heartbeat)) }).await?;
    }
    Ok(())
}

fn keep(directory: &Path, certificate: &control::Certificate, keys: &[KeyPair]) -> anyhow::Result<()> {
    ensure!(certificate.refusal.is_empty(), "the controller refused a certificate: {}", certificate.refusal);
    let number = certificate.request_id as usize;
    let key = keys.get(number).context("an answer to another question")?;
    let blocks: Vec<_> = certificate.chain_der.iter().map(|der| pem::Pem::new("CERTIFICATE", der.clone())).collect();
    fs::write(directory.join(format!("{number}.chain.pem")), pem::encode_many(&blocks))?;
    fs::write(directory.join(format!("{number}.key.pem")), key.serialize_pem())?;
    Ok(())
}

fn node_config(enrolled: &EnrolResponse, key: &KeyPair) -> anyhow::Result<Arc<ClientConfig>> {
    let chain = enrolled.chain_der.iter().map(|der| CertificateDer::from(der.clone())).collect();
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| anyhow::anyhow!(error))?;
    let mut config = gullible_client(&crypto_provider())?.with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

async fn channel(address: SocketAddr, config: Arc<ClientConfig>) -> anyhow::Result<Channel> {
    let stream = TcpStream::connect(address).await?;
    let stream = TlsConnector::from(config).connect(ServerName::IpAddress(address.ip().into()), stream).await?;
    let mut only = Some(stream);
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let stream = only.take().ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected));
        async move { stream.map(TokioIo::new) }
    });
    Ok(Endpoint::from_static("http://controller.invalid").connect_with_connector(connector).await?)
}

fn clocks() -> Clocks {
    let read = |clock| {
        let time = clock_gettime(clock);
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    };
    Clocks {
        monotonic_raw: read(ClockId::MonotonicRaw),
        boottime: read(ClockId::Boottime),
        realtime: read(ClockId::Realtime),
    }
}

fn millis(milliseconds: u32) -> u64 {
    u64::from(milliseconds) * 1_000_000
}
