//! The session with the controller: one gRPC stream, whichever controller answers, for as long as the node lives.

pub(crate) mod finding;
pub(crate) mod generation;
pub(crate) mod host;
pub(crate) mod message;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use opencluster_api::control::control_client::ControlClient;
use opencluster_api::control::{ControllerMessage, NodeMessage};
use opencluster_policy::lease::Timing;
use rand::Rng;
use rustls::ClientConfig;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use self::finding::Untold;
use crate::transport::{self, TransportError};

/// A snapshot of a large cluster fits.
const MAX_MESSAGE: usize = opencluster_api::local::MAX_FRAME;

/// Messages to the controller that may wait for the network: many certificate requests at start.
const QUEUE: usize = 1024;

/// What happens to the session.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    /// There is a controller.
    Connected(Controller),
    /// It said something.
    Message(Box<ControllerMessage>),
    /// It is gone; another is being tried.
    Lost(String),
    /// What [`Session::report`] came to: the controller's answer.
    Told(Result<String, Untold>),
}

/// The controller that the session is with.
#[derive(Debug)]
pub(crate) struct Controller {
    pub(crate) address: SocketAddr,
    /// Into the session.
    pub(crate) sender: mpsc::Sender<NodeMessage>,
    /// Beside the session, on its connection.
    pub(crate) client: ControlClient<Channel>,
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("controller {address}: {}: {}", status.code(), status.message())]
    Call { address: SocketAddr, status: Box<tonic::Status> },
    #[error("controller {0} ended the session")]
    Ended(SocketAddr),
    #[error("controller {address} was silent for {} ms", silence.as_millis())]
    Silent { address: SocketAddr, silence: Duration },
    #[error("connecting anew on purpose")]
    Renewed,
}

/// The task that keeps a session up. Dropping it ends the session.
#[derive(Debug)]
pub(crate) struct Session {
    task: JoinHandle<()>,
    renew: Arc<Notify>,
    controllers: Vec<SocketAddr>,
    tls: Arc<ClientConfig>,
    events: mpsc::Sender<SessionEvent>,
}

impl Session {
    /// Connects, to one after the other.
    pub(crate) fn start(
        controllers: Vec<SocketAddr>,
        tls: Arc<ClientConfig>,
        timing: &Timing,
        events: mpsc::Sender<SessionEvent>,
    ) -> Self {
        // A controller answers every heartbeat: three without an answer, and another one is tried.
        let silence = Duration::from_nanos((timing.heartbeat * 3).min(timing.lease / 2));
        let renew = Arc::new(Notify::new());
        let keeper = Keeper { tls: Arc::clone(&tls), silence, events: events.clone(), renew: Arc::clone(&renew) };
        Self { task: tokio::spawn(keeper.run(controllers.clone())), renew, controllers, tls, events }
    }

    /// Connects anew: to show a new certificate, or to get a snapshot of the configuration.
    pub(crate) fn renew(&self) {
        self.renew.notify_one();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Keeper {
    tls: Arc<ClientConfig>,
    silence: Duration,
    events: mpsc::Sender<SessionEvent>,
    renew: Arc<Notify>,
}

impl Keeper {
    async fn run(self, controllers: Vec<SocketAddr>) {
        // A lease lasts a few seconds: pauses are short, and get longer only while all controllers are away.
        const FIRST_PAUSE: Duration = Duration::from_millis(20);
        const LONGEST_PAUSE: Duration = Duration::from_secs(2);
        let mut pause = FIRST_PAUSE;
        for address in controllers.iter().cycle() {
            let mut served = false;
            let error = loop {
                let Err(error) = self.serve(*address, &mut served).await;
                match error {
                    // On purpose, and to the same controller: it knows us.
                    SessionError::Renewed => tracing::info!(%address, "controller: {error}"),
                    error => break error,
                }
            };
            if self.events.send(SessionEvent::Lost(error.to_string())).await.is_err() {
                return;
            }
            pause = if served { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            let jitter = rand::rng().random_range(0.5..1.0);
            tokio::time::sleep(pause.mul_f64(jitter)).await;
        }
    }

    async fn serve(&self, address: SocketAddr, served: &mut bool) -> Result<std::convert::Infallible, SessionError> {
        let call = |status| SessionError::Call { address, status: Box::new(status) };
        let stream = transport::connect(address, Arc::clone(&self.tls), self.silence).await?;
        let channel = transport::channel(address, stream).await?;
        let mut client = ControlClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let (sender, outgoing) = mpsc::channel(QUEUE);
        let gone = |_| SessionError::Ended(address);
        // The controller may wait for the first heartbeat before it answers.
        let controller = Controller { address, sender, client: client.clone() };
        self.events.send(SessionEvent::Connected(controller)).await.map_err(gone)?;
        let silent = |_| SessionError::Silent { address, silence: self.silence };
        let mut incoming = tokio::time::timeout(self.silence, client.session(ReceiverStream::new(outgoing)))
            .await
            .map_err(silent)?
            .map_err(call)?
            .into_inner();
        loop {
            let message = tokio::select! {
                message = tokio::time::timeout(self.silence, incoming.message()) => message.map_err(silent)?.map_err(call)?,
                () = self.renew.notified() => return Err(SessionError::Renewed),
            };
            let message = message.ok_or(SessionError::Ended(address))?;
            *served = true;
            self.events.send(SessionEvent::Message(Box::new(message))).await.map_err(gone)?;
        }
    }
}
