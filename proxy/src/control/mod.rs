//! The control thread: obeys the node daemon, which is this process's only source of configuration, sockets and leave to
//! carry traffic. It touches no flow.

pub mod apply;
pub mod identities;
pub mod inherited;

use std::collections::BTreeSet;
use std::net::{IpAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opencluster_api::local::{
    Channel, ChannelError, Drain, Identities as WantedIdentities, Inbox, Listener, MAX_BUSY_POLL_US, Setup, Status,
    ToDaemon, ToProxy, listener, to_daemon, to_proxy,
};
use opencluster_identity::{SpiffeError, SpiffeId, TrustDomain};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use self::identities::Identities;
use crate::access_log::AccessLog;
use crate::admin;
use crate::capture::Destination;
use crate::limits::Limits;
use crate::sandbox::{self, Applied, SandboxError};
use crate::shared::{Node, NotReady, Shared};
use crate::tunnel::tls::aead::Library;
use crate::worker::listen::Purpose;
use crate::worker::{self, Command, Handle, WorkerError};

/// Workers at most: more than any machine has use for.
const MAX_WORKERS: u32 = 256;

/// The proxy takes the lease for over so much before the kernel does: its resets, to applications and to other proxies, are
/// packets like others, and would not pass any more.
const HEAD_START_NS: u64 = 50_000_000;

/// What a severed proxy gets to say that it is, and to reset its flows.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// How long draining may take when SIGTERM gives no deadline.
const DRAIN: Duration = Duration::from_secs(20);

/// Why the proxy ends.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The daemon is gone, or speaks nonsense. Without it there is no lease, so there is nothing to wait for.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The first message was something else.
    #[error("the node daemon sent {0} before Setup")]
    NotSetUp(&'static str),
    /// Setup cannot be used.
    #[error("Setup: {0}")]
    Setup(String),
    /// A message that cannot be obeyed.
    #[error("{0}")]
    Message(String),
    /// A worker.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A signal handler or the runtime.
    #[error("control thread: {0}")]
    Io(#[from] std::io::Error),
}

impl From<SpiffeError> for ControlError {
    fn from(error: SpiffeError) -> Self {
        Self::Setup(error.to_string())
    }
}

/// The control thread's state.
struct Control {
    shared: Arc<Shared>,
    workers: Vec<Handle>,
    identities: Identities,
    outgoing: mpsc::Sender<ToDaemon>,
    applied: Applied,
    tunnel_listeners: u32,
    captured: BTreeSet<SpiffeId>,
    draining: Option<Instant>,
}

/// Runs until the daemon goes away, or draining is over.
///
/// `process` is what is in force for the whole process already; `None` leaves the threads unconfined, which only tests
/// do.
pub async fn run(channel: Channel, log: AccessLog, process: Option<Applied>) -> Result<(), ControlError> {
    let sandboxed = process.is_some();
    let channel = Arc::new(channel);
    let mut inbox = Inbox::default();
    let first: ToProxy = channel.receive(&mut inbox).await?;
    let setup = match first.message {
        Some(to_proxy::Message::Setup(setup)) => setup,
        other => return Err(ControlError::NotSetUp(message_name(other.as_ref()))),
    };
    let (shared, count) = set_up(&setup, log)?;
    let workers = worker::start(&shared, count, sandboxed).await?;
    // Last, because the workers need calls that this thread does not.
    let mut applied = process.unwrap_or_default();
    if sandboxed {
        applied.merge(&sandbox::confine_control()?);
    }
    if let Some(worker) = workers.first() {
        applied.merge(&worker.applied);
    }

    let (outgoing, queue) = mpsc::channel(64);
    let sender = tokio::spawn(send_all(Arc::clone(&channel), queue));
    let (incoming, mut received) = mpsc::channel(16);
    let receiver = tokio::spawn(receive_all(channel, inbox, incoming));
    let mut control = Control {
        shared,
        workers,
        identities: Identities::default(),
        outgoing,
        applied,
        tunnel_listeners: 0,
        captured: BTreeSet::new(),
        draining: None,
    };
    let result = control.serve(&mut received).await;
    receiver.abort();
    control.shared.sever();
    let Control { workers, outgoing, .. } = control;
    drop(outgoing);
    finish(workers).await;
    if let Ok(sent) = tokio::time::timeout(LAST_WORDS, sender).await {
        sent.map_err(std::io::Error::other)??;
    } else {
        tracing::warn!("the node daemon did not take the last messages");
    }
    result
}

/// Workers end when their command channel does; each gets the time to send its resets and its log.
async fn finish(workers: Vec<Handle>) {
    for Handle { commands, thread, .. } in workers {
        drop(commands);
        let name = thread.thread().name().unwrap_or_default().to_owned();
        // Not by a blocking task: the sandbox lets no further thread start.
        while !thread.is_finished() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if thread.join().is_err() {
            tracing::error!(worker = name, "a worker ended in a panic");
        }
    }
}

fn set_up(setup: &Setup, log: AccessLog) -> Result<(Arc<Shared>, usize), ControlError> {
    if setup.workers == 0 || setup.workers > MAX_WORKERS {
        return Err(ControlError::Setup(format!("{} workers: 1 to {MAX_WORKERS} are possible", setup.workers)));
    }
    let addresses = setup
        .addresses
        .iter()
        .map(|text| text.parse::<IpAddr>().map_err(|_| ControlError::Setup(format!("`{text}` is not an IP address"))))
        .collect::<Result<Vec<_>, _>>()?;
    let node = Node { trust_domain: TrustDomain::parse(&setup.trust_domain)?, name: setup.node.clone(), addresses };
    let workers = setup.workers as usize;
    if setup.busy_poll_us > MAX_BUSY_POLL_US {
        let asked = setup.busy_poll_us;
        return Err(ControlError::Setup(format!("polling for {asked} µs: {MAX_BUSY_POLL_US} at most are possible")));
    }
    let busy_poll = Duration::from_micros(setup.busy_poll_us.into());
    let sealing = Library::fastest();
    tracing::info!(node = node.name, domain = %node.trust_domain, workers, %sealing, "set up");
    let limits = Limits { sharing: !setup.leased_tunnels_only, busy_poll, ..Limits::default() };
    Ok((Arc::new(Shared::new(node, limits, workers, log)), workers))
}

async fn send_all(channel: Arc<Channel>, mut queue: mpsc::Receiver<ToDaemon>) -> Result<(), ControlError> {
    while let Some(message) = queue.recv().await {
        channel.send(&message, &[]).await?;
    }
    Ok(())
}

type Received = Result<(ToProxy, Vec<std::os::fd::OwnedFd>), ChannelError>;

async fn receive_all(channel: Arc<Channel>, mut inbox: Inbox, incoming: mpsc::Sender<Received>) {
    loop {
        let received = channel.receive::<ToProxy>(&mut inbox).await.map(|message| {
            let announced = match &message.message {
                Some(to_proxy::Message::Listener(listener)) => listener.descriptors as usize,
                _ => 0,
            };
            let descriptors = (0..announced).map_while(|_| inbox.take_descriptor()).collect();
            (message, descriptors)
        });
        let last = received.is_err();
        if incoming.send(received).await.is_err() || last {
            return;
        }
    }
}

impl Control {
    async fn serve(&mut self, received: &mut mpsc::Receiver<Received>) -> Result<(), ControlError> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let shared = Arc::clone(&self.shared);
        loop {
            tokio::select! {
                message = received.recv() => {
                    let (message, descriptors) = message.unwrap_or(Err(ChannelError::Closed))?;
                    self.obey(message, descriptors).await?;
                    self.ask_for_certificates().await?;
                    self.report().await?;
                }
                () = shared.status_changed() => self.report().await?,
                _ = tick.tick() => {
                    self.ask_for_certificates().await?;
                    self.report().await?;
                }
                _ = terminate.recv() => self.drain(DRAIN).await,
            }
            // The workers see the end of the lease as well; this does not depend on any of them.
            if shared.alive() == Err(NotReady::LeaseExpired) {
                tracing::error!("the controller's lease has run out");
                shared.sever();
            }
            if shared.is_severed() {
                return self.last_words().await;
            }
            if self.draining.is_some() && self.workers.iter().all(|worker| worker.thread.is_finished()) {
                tracing::info!("drained");
                self.report().await?;
                return Ok(());
            }
        }
    }

    /// Severed is for good, so this process ends, and with it everything that was ever in its memory: keys, traffic
    /// secrets, data. The workers get the time to reset their flows. Nothing here waits for a daemon that hangs.
    async fn last_words(&mut self) -> Result<(), ControlError> {
        self.identities.clear();
        if tokio::time::timeout(LAST_WORDS, self.report()).await.is_err() {
            tracing::warn!("the node daemon does not listen");
        }
        tokio::time::sleep(LAST_WORDS).await;
        for worker in &self.workers {
            tell(worker, Command::Drain(Instant::now())).await;
        }
        tracing::error!("severed: this process ends, and its memory with it");
        Ok(())
    }

    async fn obey(&mut self, message: ToProxy, descriptors: Vec<std::os::fd::OwnedFd>) -> Result<(), ControlError> {
        use to_proxy::Message;
        let name = message_name(message.message.as_ref());
        let applied = match message.message {
            Some(Message::Listener(listener)) => return self.listen(&listener, descriptors).await,
            Some(Message::Config(update)) => apply::config(&self.shared, &update),
            Some(Message::Revocations(set)) => apply::revocations(&self.shared, set),
            Some(Message::TrustBundle(bundle)) => apply::trust_bundle(&self.shared, bundle),
            Some(Message::Certificate(certificate)) => {
                match self.identities.answered(&self.shared, certificate) {
                    Ok(id) => tracing::info!(identity = %id, "certificate installed"),
                    Err(error) => tracing::warn!(%error, "no certificate"),
                }
                Ok(())
            }
            Some(Message::Lease(lease)) => {
                self.shared.set_lease(lease.deadline_boottime_ns.saturating_sub(HEAD_START_NS));
                Ok(())
            }
            Some(Message::Identities(wanted)) => return self.want(&wanted).await,
            Some(Message::Drain(Drain { deadline_ms })) => {
                self.drain(Duration::from_millis(u64::from(deadline_ms))).await;
                Ok(())
            }
            Some(Message::Sever(sever)) => {
                tracing::error!(reason = sever.reason, "severed by the controller");
                self.shared.sever();
                self.identities.clear();
                Ok(())
            }
            Some(Message::Setup(_)) => return Err(ControlError::Message("a second Setup arrived".to_owned())),
            // A newer daemon may know more than we do; what we do not know, we cannot have been relied on for.
            None => {
                tracing::warn!("the node daemon sent a message of an unknown kind");
                Ok(())
            }
        };
        if let Err(error) = applied {
            // What was in force stays in force; the daemon sees by the version in Status that this was not applied.
            tracing::error!(%error, message = name, "not applied");
        }
        Ok(())
    }

    async fn want(&mut self, wanted: &WantedIdentities) -> Result<(), ControlError> {
        let wanted = wanted
            .spiffe_ids
            .iter()
            .map(|text| SpiffeId::parse(text).map_err(|error| ControlError::Message(format!("Identities: {error}"))))
            .collect::<Result<BTreeSet<_>, _>>()?;
        let gone: Vec<_> = self.captured.difference(&wanted).cloned().collect();
        for id in gone {
            self.captured.remove(&id);
            let id = Arc::new(id);
            for worker in &self.workers {
                tell(worker, Command::Unlisten(Arc::clone(&id))).await;
            }
        }
        if !self.shared.is_severed() {
            self.identities.want(&self.shared, wanted);
        }
        Ok(())
    }

    async fn listen(
        &mut self,
        listener: &Listener,
        descriptors: Vec<std::os::fd::OwnedFd>,
    ) -> Result<(), ControlError> {
        if descriptors.len() != listener.descriptors as usize {
            return Err(ControlError::Message(format!(
                "Listener announced {} descriptors, {} arrived",
                listener.descriptors,
                descriptors.len()
            )));
        }
        let purpose = match listener.kind() {
            listener::Kind::Capture => {
                let domain = &self.shared.node.trust_domain;
                let id = SpiffeId::workload(domain, &listener.workload_namespace, &listener.workload_name)
                    .map_err(|error| ControlError::Message(format!("Listener: {error}")))?;
                self.captured.insert(id.clone());
                Purpose::Capture(Arc::new(id), Destination::Redirected)
            }
            listener::Kind::Tunnel => {
                self.tunnel_listeners += listener.descriptors;
                Purpose::Tunnel
            }
            listener::Kind::Admin => {
                for descriptor in descriptors {
                    let socket = UnixListener::from(descriptor);
                    let commands = self.workers.iter().map(|worker| worker.commands.clone()).collect();
                    admin::serve(socket, Arc::clone(&self.shared), commands)?;
                }
                return Ok(());
            }
            listener::Kind::Unspecified => {
                return Err(ControlError::Message("Listener without a kind".to_owned()));
            }
        };
        if listener.workers.len() != descriptors.len() {
            return Err(ControlError::Message("Listener does not say which worker serves which descriptor".to_owned()));
        }
        for (descriptor, number) in descriptors.into_iter().zip(&listener.workers) {
            let worker = self.workers.get(*number as usize).ok_or_else(|| {
                ControlError::Message(format!("Listener names worker {number} of {}", self.workers.len()))
            })?;
            let socket = TcpListener::from(descriptor);
            socket.set_nonblocking(true)?;
            tell(worker, worker.pass(&socket, purpose.clone())?).await;
        }
        Ok(())
    }

    async fn drain(&mut self, limit: Duration) {
        if self.draining.is_some() {
            return;
        }
        tracing::info!(?limit, "draining");
        let deadline = Instant::now() + limit;
        self.draining = Some(deadline);
        self.shared.drain();
        for worker in &self.workers {
            tell(worker, Command::Drain(deadline)).await;
        }
    }

    async fn ask_for_certificates(&mut self) -> Result<(), ControlError> {
        if self.shared.is_severed() {
            return Ok(());
        }
        let (requests, errors) = self.identities.due(&self.shared, Instant::now());
        for error in errors {
            tracing::error!(%error, "cannot ask for a certificate");
        }
        for request in requests {
            self.send(to_daemon::Message::CertificateRequest(request)).await?;
        }
        Ok(())
    }

    async fn report(&mut self) -> Result<(), ControlError> {
        let status = self.status();
        self.send(to_daemon::Message::Status(status)).await
    }

    fn status(&self) -> Status {
        let shared = &self.shared;
        let mut waiting_for = match shared.readiness() {
            Ok(()) if self.tunnel_listeners == 0 => "the listeners of the tunnel port".to_owned(),
            Ok(()) => String::new(),
            Err(reason) => reason.to_string(),
        };
        let ready = waiting_for.is_empty();
        let missing = self.identities.missing(shared);
        if ready && !missing.is_empty() {
            let missing: Vec<_> = missing.iter().map(ToString::to_string).collect();
            waiting_for = format!("certificates for {}", missing.join(", "));
        }
        Status {
            ready,
            config_version: shared.index().as_ref().map_or(0, |index| index.version()),
            revocation_version: shared.enforced_revocations(),
            flows: shared.metrics.flow_total(shared.workers()),
            identities_ready: shared.identities(),
            sandbox: self.applied.names(),
            severed: shared.is_severed(),
            waiting_for,
        }
    }

    async fn send(&self, message: to_daemon::Message) -> Result<(), ControlError> {
        let message = ToDaemon { message: Some(message) };
        self.outgoing.send(message).await.map_err(|_| ControlError::Channel(ChannelError::Closed))
    }
}

/// A worker that does not listen any more has ended on its own: there is nothing it would need to be told.
async fn tell(worker: &Handle, command: Command) {
    if worker.commands.send(command).await.is_err() {
        tracing::debug!("a worker has ended already");
    }
}

fn message_name(message: Option<&to_proxy::Message>) -> &'static str {
    use to_proxy::Message;
    match message {
        None => "nothing",
        Some(Message::Setup(_)) => "Setup",
        Some(Message::Listener(_)) => "Listener",
        Some(Message::Config(_)) => "ConfigUpdate",
        Some(Message::Certificate(_)) => "Certificate",
        Some(Message::Revocations(_)) => "RevocationSet",
        Some(Message::TrustBundle(_)) => "TrustBundle",
        Some(Message::Lease(_)) => "Lease",
        Some(Message::Identities(_)) => "Identities",
        Some(Message::Drain(_)) => "Drain",
        Some(Message::Sever(_)) => "Sever",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(change: impl FnOnce(&mut Setup)) -> Option<String> {
        let mut setup = Setup {
            trust_domain: "test.example".to_owned(),
            node: "a".to_owned(),
            addresses: vec!["192.0.2.1".to_owned()],
            workers: 1,
            busy_poll_us: MAX_BUSY_POLL_US,
            ..Setup::default()
        };
        change(&mut setup);
        set_up(&setup, crate::access_log::channel().0).err().map(|error| error.to_string())
    }

    #[test]
    fn setups_that_cannot_be_used_are_refused_and_say_why() {
        assert_eq!(refusal(|_| {}), None, "the control");
        let polls = refusal(|setup| setup.busy_poll_us = MAX_BUSY_POLL_US + 1);
        assert_eq!(polls.as_deref(), Some("Setup: polling for 1001 µs: 1000 at most are possible"));
        let none = refusal(|setup| setup.workers = 0);
        assert_eq!(none.as_deref(), Some("Setup: 0 workers: 1 to 256 are possible"));
        let many = refusal(|setup| setup.workers = MAX_WORKERS + 1);
        assert_eq!(many.as_deref(), Some("Setup: 257 workers: 1 to 256 are possible"));
        let address = refusal(|setup| setup.addresses.push("here".to_owned()));
        assert_eq!(address.as_deref(), Some("Setup: `here` is not an IP address"));
        assert!(refusal(|setup| setup.trust_domain = "No Domain".to_owned()).is_some());
    }
}
