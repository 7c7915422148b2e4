//! The gRPC service of enrolled nodes, and the clock that ends leases.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use opencluster_api::control::control_server::Control;
use opencluster_api::control::{ControllerMessage, NodeMessage};
use opencluster_identity::Subject;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::clocks;
use super::ends::HeldUp;
use super::registry::Registry;
use super::session::{Session, severed};
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
        let identity = request.extensions().get::<Peer>().and_then(|peer| peer.identity.clone());
        let identity = identity.ok_or_else(|| Status::unauthenticated("a session needs the node's certificate"))?;
        let Subject::Node { name } = identity.id().subject() else {
            return Err(Status::permission_denied(format!("{} is not a node", identity.id())));
        };
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
