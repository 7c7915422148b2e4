//! The gRPC service that nodes without an identity call.

use std::sync::Arc;
use std::time::{Duration, Instant};

use opencluster_api::control::enrolment_server::Enrolment;
use opencluster_api::control::{EnrolRequest, EnrolResponse};
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use super::limit::FailureLimit;
use super::{Application, EnrolError};
use crate::ca::Authority;
use crate::lease::registry::{Enrolment as InForce, Registry};
use crate::lease::{clocks, host};
use crate::lifetime::LifetimePolicy;
use crate::listen::Peer;
use crate::state::State;

/// See the module.
#[derive(Clone, Debug)]
pub struct EnrolmentService {
    /// The state.
    pub state: Arc<State>,
    /// Signs.
    pub authority: Arc<Authority>,
    /// The nodes.
    pub registry: Arc<Registry>,
    /// How long enrolments last.
    pub lifetime: LifetimePolicy,
    /// Whether a host must have been restarted before it enrols again.
    pub require_new_boot: bool,
    /// The validity of the nodes' certificates.
    pub svid_ttl: Duration,
    /// Failed attempts.
    pub failures: Arc<FailureLimit>,
}

#[tonic::async_trait]
impl Enrolment for EnrolmentService {
    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let address = peer.and_then(|peer| peer.address).ok_or_else(|| Status::internal("no peer address"))?;
        if !self.failures.permits(address.ip(), Instant::now()) {
            return Err(Status::resource_exhausted("too many failed attempts from this address: wait a minute"));
        }
        let request = request.into_inner();
        let node = request.node.clone();
        match self.enrol_node(request).await {
            Ok(response) => {
                tracing::info!(event = "node.enrolled", node, %address, "a node enrolled");
                Ok(Response::new(response))
            }
            Err(error) => {
                tracing::warn!(event = "node.enrol-refused", node, %address, reason = %error, "a node was not enrolled");
                if matches!(error, EnrolError::Token(_) | EnrolError::Invalid(_)) {
                    self.failures.failed(address.ip(), Instant::now());
                }
                Err(status_of(&error))
            }
        }
    }
}

impl EnrolmentService {
    async fn enrol_node(&self, request: EnrolRequest) -> Result<EnrolResponse, EnrolError> {
        let application = Application {
            node: request.node,
            secret: Zeroizing::new(request.token),
            csr_der: request.csr_der,
            boot_id: request.boot_id,
            require_new_boot: self.require_new_boot,
            machine: request.machine,
        };
        let mut nonce = [0; 16];
        aws_lc_rs::rand::fill(&mut nonce).map_err(|_| super::RandomError)?;
        let service = self.clone();
        let enrolled = self
            .state
            .run(move |state| {
                state.enrol(&service.authority, service.svid_ttl, &application, |enrolled| {
                    let key = enrolled.issued.spki_sha256;
                    let now = clocks();
                    let host = host(&application.boot_id, &application.machine);
                    let revocations = state.revocations().version;
                    let enrolment = InForce { id: enrolled.id.clone(), key, host, nonce, revocations };
                    service.registry.enrolled(&application.node, enrolment, now);
                })
            })
            .await?;
        let timing = self.registry.timing();
        let life = self.lifetime;
        Ok(EnrolResponse {
            chain_der: enrolled.issued.chain.iter().map(|certificate| certificate.to_vec()).collect(),
            roots_der: self.authority.bundle().roots().iter().map(|root| root.to_vec()).collect(),
            trust_domain: self.state.domain().to_string(),
            lease_ms: timing.lease_ms(),
            heartbeat_ms: timing.heartbeat_ms(),
            nonce: nonce.to_vec(),
            max_age_s: life.max_age.seconds(),
            drain_s: life.drain.as_secs(),
        })
    }
}

fn status_of(error: &EnrolError) -> Status {
    match error {
        EnrolError::Token(_) => {
            Status::unauthenticated("the token is unknown, used, expired or bound to another node: ask for a new one")
        }
        EnrolError::Invalid(reason) => Status::invalid_argument(reason.clone()),
        EnrolError::State(_) | EnrolError::Random(_) => Status::internal("see the controller's log"),
    }
}
