//! Enrolment: from a one-time token to the node's identity.

mod entropy;
pub(crate) mod token;

use std::fs;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use opencluster_api::control;
use opencluster_api::control::enrolment_client::EnrolmentClient;
use opencluster_identity::bundle::TrustBundle;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::svid::Svid;
use opencluster_identity::tls;
use opencluster_identity::{CertificateDer, SpiffeId, TrustDomain, UnixTime};
use opencluster_policy::lease::{Nonce, Timing};
use opencluster_policy::lifetime::Age;
use rand::Rng;
use zeroize::Zeroizing;

use crate::config::Config;
use crate::heartbeat::host::{HostIdentity, Measured};
use crate::transport::{self, TransportError};
use token::Token;
pub(crate) use token::TokenError;

/// What a controller gets to answer in.
const LIMIT: Duration = Duration::from_secs(5);

/// Why the node could not enrol.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnrolError {
    #[error(
        "cannot read the enrolment token {}: {source}. A node keeps no identity across a restart: make a new token with \
         `opencluster node token {node}` and put it there", path.display()
    )]
    TokenFile { node: String, path: PathBuf, source: io::Error },
    #[error("the enrolment token in {}: {source}", path.display())]
    Token { path: PathBuf, source: TokenError },
    #[error("the enrolment token is for node {token:?}, but this node is {configured:?}: make one for this node")]
    OtherNode { token: String, configured: String },
    #[error("cannot read this boot's ID: {0}")]
    BootId(io::Error),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("controller {address} refused the enrolment: {reason}")]
    Refused { address: SocketAddr, reason: String },
    #[error("controller {address}: call failed: {reason}")]
    Call { address: SocketAddr, reason: String },
    #[error("controller {address} belongs to trust domain {actual}, but the configuration says {configured}")]
    OtherTrustDomain { address: SocketAddr, configured: String, actual: String },
    #[error("controller {address} sent an answer that does not hold: {fault}")]
    Answer { address: SocketAddr, fault: String },
    #[error("{0}")]
    Key(String),
}

impl EnrolError {
    /// Whether asking again (or another controller) may help.
    fn may_pass(&self) -> bool {
        matches!(self, Self::Transport(_) | Self::Call { .. })
    }
}

/// What a node gets.
#[derive(Debug)]
pub(crate) struct Enrolled {
    pub(crate) id: SpiffeId,
    pub(crate) svid: Svid,
    pub(crate) bundle: TrustBundle,
    pub(crate) timing: Timing,
    /// For the first heartbeat.
    pub(crate) nonce: Nonce,
    /// Where: what the controller expects in every heartbeat.
    pub(crate) measured: Measured,
    /// How old the enrolment may get, where the controller says so.
    pub(crate) max_age: Option<Age>,
    /// How long before its end the node takes no new flows.
    pub(crate) drain: Duration,
}

/// Reads the token and deletes it: it counts once, and who reads the disk later shall not find it.
pub(crate) fn take_token(config: &Config) -> Result<Token, EnrolError> {
    let path = &config.token_file;
    let text = read_token(path).map_err(|source| EnrolError::TokenFile {
        node: config.node.clone(),
        path: path.clone(),
        source,
    })?;
    let token = Token::parse(&text).map_err(|source| EnrolError::Token { path: path.clone(), source })?;
    if token.node != config.node {
        return Err(EnrolError::OtherNode { token: token.node, configured: config.node.clone() });
    }
    if let Err(error) = fs::remove_file(path) {
        // A systemd credential or a read-only medium cannot be deleted. The token is used up in a moment anyway.
        tracing::warn!(path = %path.display(), %error, "the enrolment token could not be deleted");
    }
    Ok(token)
}

fn read_token(path: &Path) -> io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(token::MAX_BYTES + 1));
    fs::File::open(path)?.take(token::MAX_BYTES as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// Tries the controllers in turn until one grants or refuses.
pub(crate) async fn enrol(
    config: &Config,
    token: &Token,
    controllers: &[SocketAddr],
    host: &HostIdentity,
) -> Result<Enrolled, EnrolError> {
    const FIRST_PAUSE: Duration = Duration::from_millis(100);
    const LONGEST_PAUSE: Duration = Duration::from_secs(10);
    let measured = host.measure().map_err(EnrolError::BootId)?;
    let mut pause = FIRST_PAUSE;
    loop {
        for address in controllers {
            match enrol_with(config, token, *address, &measured).await {
                Err(error) if error.may_pass() => tracing::warn!(%error, "enrolment: trying again"),
                result => return result,
            }
        }
        // Many nodes that start together shall not come back together.
        let jitter = rand::rng().random_range(0.5..1.0);
        tokio::time::sleep(pause.mul_f64(jitter)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn enrol_with(
    config: &Config,
    token: &Token,
    address: SocketAddr,
    measured: &Measured,
) -> Result<Enrolled, EnrolError> {
    let answer_fault = |fault: String| EnrolError::Answer { address, fault };
    let key_fault = |error: &dyn std::fmt::Display| EnrolError::Key(error.to_string());

    let tls = tls::enrolment_client_config(token.root, transport::ALPN).map_err(|error| key_fault(&error))?;
    let stream = transport::connect(address, tls, LIMIT).await?;
    let peer = tls::enrolment_peer(stream.get_ref().1, token.root, UnixTime::now())
        .map_err(|error| answer_fault(error.to_string()))?;
    let bundle = peer.bundle().clone();
    let domain: TrustDomain = bundle.domain().clone();
    if let Some(configured) = config.trust_domain.as_ref().filter(|configured| *configured != domain.as_str()) {
        let (configured, actual) = (configured.clone(), domain.to_string());
        return Err(EnrolError::OtherTrustDomain { address, configured, actual });
    }

    let shared = stream
        .get_ref()
        .1
        .export_keying_material(Zeroizing::new([0_u8; 32]), b"EXPORTER-opencluster-entropy", None)
        .map_err(|error| key_fault(&error))?;
    if let Err(error) = entropy::mix(shared.as_ref()) {
        tracing::warn!(%error, "the controller's entropy could not be mixed into the kernel's pool");
    }
    let key = PrivateKey::generate().map_err(|error| key_fault(&error))?;
    let id = SpiffeId::node(&domain, &config.node).map_err(|error| key_fault(&error))?;
    let request = control::EnrolRequest {
        node: config.node.clone(),
        token: token.secret.to_string(),
        csr_der: key.csr_der(&id).map_err(|error| key_fault(&error))?,
        boot_id: measured.boot_id.clone(),
        machine: measured.machine.to_vec(),
    };

    let mut client = EnrolmentClient::new(transport::channel(address, stream).await?);
    let call = tokio::time::timeout(LIMIT, client.enrol(request)).await;
    let answer = match call {
        Err(_) => return Err(TransportError::Timeout { address, limit: LIMIT }.into()),
        Ok(Err(status)) => return Err(refusal(address, &config.node, &status)),
        Ok(Ok(answer)) => answer.into_inner(),
    };
    accept(id, key, bundle, answer, measured).map_err(answer_fault)
}

fn refusal(address: SocketAddr, node: &str, status: &tonic::Status) -> EnrolError {
    let reason = status.message();
    match status.code() {
        tonic::Code::Unauthenticated | tonic::Code::PermissionDenied => EnrolError::Refused {
            address,
            reason: format!(
                "{reason} (the token is unknown, used, expired or for another node: make a new one with \
                 `opencluster node token {node}`)"
            ),
        },
        tonic::Code::InvalidArgument | tonic::Code::FailedPrecondition | tonic::Code::NotFound => {
            EnrolError::Refused { address, reason: reason.to_owned() }
        }
        code => EnrolError::Call { address, reason: format!("{code}: {reason}") },
    }
}

fn accept(
    id: SpiffeId,
    key: PrivateKey,
    pinned: TrustBundle,
    answer: control::EnrolResponse,
    measured: &Measured,
) -> Result<Enrolled, String> {
    let bundle = if answer.roots_der.is_empty() {
        pinned
    } else {
        let bundle = TrustBundle::from_der(answer.roots_der.into_iter().map(CertificateDer::from))
            .map_err(|error| format!("its roots: {error}"))?;
        if bundle.domain() != pinned.domain() {
            return Err(format!("its roots are of {}, its own is of {}", bundle.domain(), pinned.domain()));
        }
        bundle
    };
    let chain = answer.chain_der.into_iter().map(CertificateDer::from).collect();
    let svid = Svid::new(&id, chain, key).map_err(|error| format!("its certificate: {error}"))?;
    let nonce = answer.nonce.as_slice().try_into().map_err(|_| "its nonce has not 16 bytes".to_owned())?;
    let timing = Timing::new(u64::from(answer.lease_ms) * 1_000_000, u64::from(answer.heartbeat_ms) * 1_000_000);
    if timing.heartbeat == 0 || timing.lease <= timing.heartbeat {
        return Err(format!("a lease of {} ms with a heartbeat of {} ms", answer.lease_ms, answer.heartbeat_ms));
    }
    let max_age = match answer.max_age_s {
        0 => None,
        seconds => Some(Age::from_seconds(seconds).map_err(|error| format!("a life of {seconds} s: {error}"))?),
    };
    let drain = Duration::from_secs(answer.drain_s);
    Ok(Enrolled { id, svid, bundle, timing, nonce, measured: measured.clone(), max_age, drain })
}
