//! The gRPC service of enrolled nodes, and the clock that ends leases.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use opencluster_api::control::control_server::Control;
use opencluster_api::control::{ControllerMessage, Finding, NodeMessage, Sever};
use opencluster_identity::Subject;
use opencluster_identity::verify::PeerVerified;
use opencluster_policy::lease::Reason;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::clocks;
use super::ends::HeldUp;
use super::registry::Registry;
use super::session::{Session, cut, severed};
use crate::ca::Authority;
use crate::grpc::HangUp;
use crate::listen::{Peer, shutting_down};
use crate::state::State;

/// Messages that wait for a node's connection to take them. More would only delay the finding that it is too slow.
const DOWN_QUEUE: usize = 16;

/// See the module.
#[derive(Clone, Debug)]
pub struct ControlService {
    /// The state.
    pub state: Arc<State>,
    /// Signs.
    pub authority: Arc<Authority>,
    /// The nodes.
    pub registry: Arc<Registry>,
    /// The validity of certificates.
    pub svid_ttl: Duration,
    /// Becomes true when the controller ends.
    pub shutdown: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl Control for ControlService {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<ControllerMessage, Status>> + Send>>;

    async fn session(&self, request: Request<Streaming<NodeMessage>>) -> Result<Response<Self::SessionStream>, Status> {
        let hang_up = request.extensions().get::<HangUp>().cloned().unwrap_or_default();
        let identity = verified(&request)?;
        let name = node(&identity)?;
        let (id, enrolment, ended) = self.registry.open_session(name, identity.spki_sha256()).map_err(|refused| {
            tracing::warn!(event = "session.refused", node = name, reason = %refused, "a session was refused");
            Status::permission_denied(refused.to_string())
        })?;
        let (down, queue) = mpsc::channel(DOWN_QUEUE);
        let session = Session {
            service: self.clone(),
            node: name.to_owned(),
            id,
            enrolment,
            key: *identity.spki_sha256(),
            not_after: identity.not_after(),
            down,
            hang_up,
        };
        tokio::spawn(session.run(request.into_inner(), ended));
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }

    async fn report(&self, request: Request<Finding>) -> Result<Response<Sever>, Status> {
        let identity = verified(&request)?;
        let name = node(&identity)?;
        let Finding { code, detail } = request.into_inner();
        let reason = Reason::from_code(&code, &detail).unwrap_or_else(|| {
            // It is newer than this controller: what it says of itself counts all the same.
            Reason::Revoked(format!("the node reported {}: {}", cut(&code), cut(&detail)))
        });
        let found = self.registry.found(name, identity.spki_sha256(), reason, clocks()).map_err(|refused| {
            tracing::warn!(event = "report.refused", node = name, reason = %refused, "what a node found was refused");
            Status::permission_denied(refused.to_string())
        })?;
        let reason = match found {
            Ok((ended, recorded)) => {
                severed(&ended);
                // Stored before it is answered. What cannot be stored now is tried again; the node is out in any case.
                recorded.await.map_err(|_| Status::internal("see the controller's log"))?;
                ended.reason.to_string()
            }
            Err(before) => before.to_string(),
        };
        Ok(Response::new(Sever { reason }))
    }
}

/// Whose certificate the connection showed.
fn verified<T>(request: &Request<T>) -> Result<PeerVerified, Status> {
    let identity = request.extensions().get::<Peer>().and_then(|peer| peer.identity.clone());
    identity.ok_or_else(|| Status::unauthenticated("this needs the node's certificate"))
}

/// Its name, if it is a node.
fn node(identity: &PeerVerified) -> Result<&str, Status> {
    match identity.id().subject() {
        Subject::Node { name } => Ok(name),
        _ => Err(Status::permission_denied(format!("{} is not a node", identity.id()))),
    }
}

/// Ends leases when their time comes, until the controller ends. Nothing here waits for the store.
pub async fn watch_leases(service: ControlService) {
    let mut shutdown = service.shutdown.clone();
    let mut revocations = service.state.watch_revocations();
    let period = Duration::from_millis(u64::from(service.registry.timing().heartbeat_ms() / 10).clamp(5, 100));
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut held_up = HeldUp::default();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            changed = revocations.changed() => {
                if changed.is_err() {
                    return;
                }
                let version = revocations.borrow_and_update().version;
                service.registry.announced(version, clocks());
            }
            () = shutting_down(&mut shutdown) => return,
        }
        service.registry.tick(clocks()).iter().for_each(severed);
        held_up.look(&service.registry);
    }
}
