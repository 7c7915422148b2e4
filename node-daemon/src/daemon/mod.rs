//! `opencluster-node serve`: everything comes together here.

mod captures;
mod core;
mod life;
mod proxy;
mod queries;
mod requests;
mod resources;
mod severance;

use std::path::Path;
use std::time::Duration;

use opencluster_api::control;
use opencluster_identity::UnixTime;
use opencluster_identity::svid::SvidStore;
use opencluster_identity::tls::{self, ExpectedPeer, TlsError};
use opencluster_identity::trust::Trust;
use opencluster_policy::lease::NodeLease;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use self::captures::Captures;
use self::core::Core;
use self::life::Life;
use self::queries::answer_before_enrolment;
use self::requests::Requests;
use self::resources::Resources;
use crate::cgroup::{self, CgroupError, Tree};
use crate::clock;
use crate::config::Config;
use crate::congestion::CongestionError;
use crate::enrol::{self, EnrolError, Enrolled};
use crate::firewall::policy::{FIRST_CAPTURE_PORT, LAST_CAPTURE_PORT, Posture, Serving};
use crate::firewall::{Firewall, FirewallError};
use crate::heartbeat::host::HostIdentity;
use crate::heartbeat::{Session, SessionEvent, generation};
use crate::safety::{self, SafetyError};
use crate::supervise::ports::{self, PortsError};
use crate::supervise::{Settings, Supervisor};
use crate::transport;
use crate::workload::server::{self, ServerError};

/// Events of each kind that may wait.
const QUEUE: usize = 1024;

/// Why the daemon could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    #[error(transparent)]
    Safety(#[from] SafetyError),
    #[error("controllers: {0}")]
    Controllers(String),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Congestion(#[from] CongestionError),
    #[error("the network stays as it is: {0}")]
    Firewall(#[from] FirewallError),
    #[error(transparent)]
    Ports(#[from] PortsError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    #[error("TLS to the controllers: {0}")]
    Tls(#[from] TlsError),
    #[error("cannot receive signals: {0}")]
    Signals(std::io::Error),
}

/// Closes the network and leaves it closed: for early boot, before there is anything else.
pub(crate) fn block(config: &Config) -> Result<(), DaemonError> {
    safety::check(config)?;
    let runtime = runtime()?;
    runtime.block_on(async {
        let (events, _) = mpsc::channel(1);
        Firewall::start(Posture::Closed, config.interfaces.clone(), events)?;
        Ok(())
    })
}

/// Runs until SIGTERM or SIGINT.
pub(crate) fn run(config: Config) -> Result<(), DaemonError> {
    safety::check(&config)?;
    // The future runs on this thread, which lives as long as the daemon: the proxy's life is tied to it.
    runtime()?.block_on(serve(config))
}

fn runtime() -> Result<tokio::runtime::Runtime, DaemonError> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(DaemonError::Signals)
}

async fn serve(config: Config) -> Result<(), DaemonError> {
    let mut stop = Stop::new()?;
    let controllers = config.controller_addresses().map_err(DaemonError::Controllers)?;
    config.congestion_control.apply()?;
    let tree = Tree::new(&config.cgroup)?;
    // Before any socket is made: sockets belong to the cgroup that they were made in.
    let daemon = tree.create(&tree.daemon())?;
    cgroup::enter(&tree.daemon(), std::process::id())?;
    let proxy = tree.create(&tree.proxy())?;
    cgroup::kill_all(&tree.proxy())?;

    let base = Serving {
        daemon,
        proxy,
        controllers: controllers.iter().copied().collect(),
        tunnel_port: None,
        captures: std::collections::BTreeMap::new(),
    };
    let (firewall_sender, mut firewall_events) = mpsc::channel(QUEUE);
    let firewall = Firewall::start(Posture::Serving(base.clone()), config.interfaces.clone(), firewall_sender)?;
    tracing::info!("packet filter: everything is closed but the way to the controllers");

    ports::reserve(&(FIRST_CAPTURE_PORT..=LAST_CAPTURE_PORT))?;

    let (query_sender, mut queries) = mpsc::channel(QUEUE);
    let socket = server::bind(&config.run_dir.join("node.sock"))?;
    tokio::spawn(server::serve(socket, query_sender));

    let host = HostIdentity::new();
    let (generation_sender, mut generations) = mpsc::channel(1);
    let watching = generation::watch(generation_sender);
    let token = enrol::take_token(&config)?;
    let enrolled = {
        let enrolment = enrol::enrol(&config, &token, &controllers, &host);
        tokio::pin!(enrolment);
        loop {
            tokio::select! {
                enrolled = &mut enrolment => break enrolled?,
                Some(query) = queries.recv() => answer_before_enrolment(query, &config),
                () = stop.requested() => return Ok(()),
            }
        }
    };
    drop(token);
    tracing::info!(id = %enrolled.id, "enrolled");

    let (session_sender, mut session_events) = mpsc::channel(QUEUE);
    let (proxy_sender, mut proxy_events) = mpsc::channel(QUEUE);
    let settings = Settings {
        program: config.proxy.clone(),
        user: config.proxy_user,
        cgroup: tree.proxy(),
        access_log: config.access_log.clone(),
    };
    let supervisor = Supervisor::new(settings, proxy_sender);
    let mut core =
        assemble(config, host, watching, enrolled, controllers, firewall, base, tree, supervisor, session_sender)?;
    tracing::info!("serving");

    // Asked to end, the daemon goes on earning its lease until the proxy's flows have finished, or their time is over.
    let mut stopping = None;
    loop {
        let due = stopping.map_or(core.due(), |end| core.due().min(end));
        tokio::select! {
            // The lease first, whatever else is waiting.
            biased;
            () = stop.requested() => match stopping {
                None => stopping = Some(core.drain_proxy()),
                // Whoever asks twice is in a hurry.
                Some(_) => break,
            },
            Some(why) = generations.recv() => core.generation_changed(&why).await,
            Some(event) = session_events.recv() => core.session_event(event).await,
            Some(event) = firewall_events.recv() => core.firewall_event(event).await,
            () = sleep_until(due) => core.tick().await,
            Some(event) = proxy_events.recv() => core.proxy_event(event),
            Some(query) = queries.recv() => core.query(query),
        }
        if stopping.is_some_and(|end| end <= Instant::now() || !core.supervisor.is_running()) {
            break;
        }
        // Under a flood of events time still passes.
        if core.due() <= Instant::now() {
            core.tick().await;
        }
    }

    // The tables stay, without a lease: closed until the next daemon enrols.
    tracing::info!("stopping: everything is dropped");
    core.stop().await;
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "each is a part that is made once, here")]
fn assemble(
    config: Config,
    host: HostIdentity,
    watching: generation::Watching,
    enrolled: Enrolled,
    controllers: Vec<std::net::SocketAddr>,
    firewall: Firewall,
    base: Serving,
    tree: Tree,
    supervisor: Supervisor,
    session_events: mpsc::Sender<SessionEvent>,
) -> Result<Core, DaemonError> {
    let Enrolled { id, svid, bundle, timing, nonce, measured, max_age, drain } = enrolled;
    let roots_der = bundle.roots().iter().map(|root| root.to_vec()).collect();
    let trust = Trust::with_bundle(bundle);
    let svids = SvidStore::new();
    let rotate_at = Instant::now() + svid.rotate_in(UnixTime::now());
    svids.install(svid);
    let tls = tls::client_config(&svids, &id, &trust, ExpectedPeer::AnyController, transport::ALPN)?;
    Ok(Core {
        lease: NodeLease::enrolled(nonce, timing, measured.host(), clock::now()),
        lease_span: Duration::from_nanos(timing.lease),
        session: Some(Session::start(controllers, tls, &timing, session_events)),
        controller: None,
        resources: Resources::new(&config.node, trust.domain()),
        captures: Captures::new(tree),
        requests: Requests::default(),
        proxy: None,
        bundle: control::TrustBundle { version: 0, roots_der },
        revocations: None,
        outstanding: None,
        acknowledged: (0, 0),
        firewall_applied: true,
        firewall_retry: None,
        firewall_repairs: 0,
        unsent: std::collections::VecDeque::new(),
        kill_proxy_at: None,
        finding: None,
        reporting: None,
        life: Life::begin(max_age, drain),
        severed: None,
        config,
        host,
        watching,
        measured,
        id,
        svids,
        trust,
        firewall,
        base,
        supervisor,
        rotate_at,
    })
}

/// SIGTERM or SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> Result<Self, DaemonError> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(DaemonError::Signals)?,
            interrupt: signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?,
        })
    }

    async fn requested(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

impl Core {
    /// An orderly end: what is in force is 'nothing'.
    async fn stop(&mut self) {
        self.session = None;
        self.reporting = None;
        self.supervisor.retire();
        if let Err(error) = self.firewall.renew(0).await {
            tracing::error!(%error, "the lease could not be ended at once: it ends by itself");
        }
        self.kill_proxy();
        self.svids.clear();
        remove_sockets(&self.config.run_dir);
    }
}

fn remove_sockets(run_dir: &Path) {
    for name in ["node.sock", "proxy.sock"] {
        match std::fs::remove_file(run_dir.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(%error, name, "a socket could not be removed");
            }
            _ => {}
        }
    }
}
