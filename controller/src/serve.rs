//! `serve`: everything together, from start to end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use opencluster_identity::svid::SvidStore;
use opencluster_identity::tls::{ClientAuth, ServerIdentity, TlsError, server_config};
use opencluster_identity::trust::Trust;
use opencluster_identity::{SpiffeId, UnixTime};
use opencluster_policy::spiffe::TrustDomain;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::api;
use crate::attest::limit::FailureLimit;
use crate::attest::service::EnrolmentService;
use crate::ca::{Authority, CaError};
use crate::config::{Config, ConfigError};
use crate::grpc;
use crate::lease::end_enrolments_of_the_last_run;
use crate::lease::ends::record_ends;
use crate::lease::registry::{ClusterTiming, Registry};
use crate::lease::service::{ControlService, watch_leases};
use crate::lifetime::watch_lifetimes;
use crate::listen::{self, ListenError, Listener, Rules, Strangers, shutting_down};
use crate::state::{State, StateError};
use crate::store::{EmbeddedStore, Store, StoreError, StoreKeyError};

/// Connections that nodes may have open together: sessions, and enrolments in between.
const NODE_CONNECTIONS: usize = 4096;

/// Connections that operators may have open together.
const API_CONNECTIONS: usize = 512;

/// Connections that one address may have open together without having shown a certificate.
const STRANGERS: usize = 128;

/// How long a connection without a certificate lasts at the nodes' port: enough to enrol.
const ENROLMENT_LIFE: Duration = Duration::from_secs(30);

/// How often what has no effect any more is removed from the store.
const PRUNE: Duration = Duration::from_mins(1);

/// How long everything has to end.
const GRACE: Duration = Duration::from_secs(5);

/// Why the controller does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store's key.
    #[error(transparent)]
    Key(#[from] StoreKeyError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The authority.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The state.
    #[error(transparent)]
    State(#[from] StateError),
    /// TLS.
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
    /// A listener.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A part that must run until the end has ended.
    #[error("{0} ended unexpectedly: the controller stops rather than serve without it")]
    Ended(&'static str),
}

/// A running controller.
#[derive(Debug)]
pub struct Controller {
    /// Where nodes connect to.
    pub node_addresses: Vec<SocketAddr>,
    /// Where operators connect to.
    pub api_addresses: Vec<SocketAddr>,
    state: Arc<State>,
    shutdown: watch::Sender<bool>,
    parts: Vec<(&'static str, JoinHandle<()>)>,
}

impl Controller {
    /// Opens the store, checks everything, and begins to serve.
    pub async fn start(config: &Config) -> Result<Self, ServeError> {
        let opened = config.clone();
        let store = tokio::task::spawn_blocking(move || {
            let key = opened.store_key.load()?;
            Ok::<_, ServeError>(EmbeddedStore::open(&opened.state, &key)?)
        });
        let store = store.await.map_err(|_| ServeError::Ended("opening the store"))??;
        Self::start_on(config, Arc::new(store)).await
    }

    /// The same on a store that is open, whatever `config` says of it.
    pub async fn start_on(config: &Config, store: Arc<dyn Store>) -> Result<Self, ServeError> {
        let (domain, id) = config.identity()?;
        let (state, authority) = load(domain.clone(), store).await?;

        let trust = Trust::with_bundle(authority.bundle().clone());
        trust.replace_revocations(state.revocations().to_set()?);
        let svids = SvidStore::new();
        svids.install(authority.own_svid(&id, UnixTime::now())?);
        let registry = Arc::new(Registry::new(ClusterTiming::new(config.lease_ms, config.heartbeat_ms)));
        let lifetime = config.lifetime()?;
        let (shutdown, ending) = watch::channel(false);

        let mut controller = Self {
            node_addresses: Vec::new(),
            api_addresses: Vec::new(),
            state: Arc::clone(&state),
            shutdown,
            parts: Vec::new(),
        };
        controller.spawn("verification", follow_revocations(Arc::clone(&state), trust.clone(), ending.clone()));
        controller
            .spawn("own certificate", renew_svid(Arc::clone(&authority), id.clone(), svids.clone(), ending.clone()));
        controller.spawn("pruning", prune(Arc::clone(&state), ending.clone()));

        let control = ControlService {
            state: Arc::clone(&state),
            authority: Arc::clone(&authority),
            registry: Arc::clone(&registry),
            svid_ttl: config.svid_ttl(),
            shutdown: ending.clone(),
        };
        controller.spawn("leases", watch_leases(control.clone()));
        controller.spawn("ends of enrolments", record_ends(control.clone()));
        controller
            .spawn("lifetimes", watch_lifetimes(Arc::clone(&state), Arc::clone(&registry), lifetime, ending.clone()));
        let enrolment = EnrolmentService {
            state: Arc::clone(&state),
            authority: Arc::clone(&authority),
            registry: Arc::clone(&registry),
            lifetime,
            require_new_boot: config.require_new_boot,
            svid_ttl: config.svid_ttl(),
            failures: Arc::new(FailureLimit::default()),
        };
        let identity = ServerIdentity::Fixed(svids, id);
        let node_rules = Rules {
            name: "nodes",
            tls: server_config(identity.clone(), &trust, ClientAuth::Optional, &[b"h2"])?,
            trust: trust.clone(),
            connections: Arc::new(Semaphore::new(NODE_CONNECTIONS)),
            strangers: Strangers::at_most(STRANGERS),
            anonymous_life: Some(ENROLMENT_LIFE),
        };
        let api_rules = Rules {
            name: "api",
            tls: server_config(identity, &trust, ClientAuth::Optional, &[b"http/1.1"])?,
            trust,
            connections: Arc::new(Semaphore::new(API_CONNECTIONS)),
            strangers: Strangers::at_most(STRANGERS),
            anonymous_life: None,
        };
        let context = api::Context {
            state,
            authority,
            registry,
            lifetime,
            failures: Arc::new(FailureLimit::default()),
            shutdown: ending.clone(),
        };
        tracing::debug!(%domain, "serving");
        controller.serve_nodes(config, node_rules, enrolment, control, &ending).await?;
        controller.serve_api(config, api_rules, context, &ending).await?;
        Ok(controller)
    }

    /// The state, for tests and for embedding.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// Serves until `stop` is ready, then ends in order.
    pub async fn run_until(mut self, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
        let ended = {
            let parts = futures_util::future::select_all(self.parts.iter_mut().map(|(name, part)| {
                Box::pin(async move {
                    let result = part.await;
                    (*name, result)
                })
            }));
            tokio::select! {
                () = stop => None,
                ((name, result), ..) = parts => {
                    tracing::error!(event = "controller.part-ended", part = name, ?result, "a part ended unexpectedly");
                    Some(name)
                }
            }
        };
        if let Some(name) = ended {
            self.parts.retain(|(part, _)| *part != name);
        }
        self.end().await;
        ended.map_or(Ok(()), |name| Err(ServeError::Ended(name)))
    }

    async fn end(mut self) {
        self.shutdown.send_replace(true);
        let deadline = tokio::time::Instant::now() + GRACE;
        for (name, mut part) in std::mem::take(&mut self.parts) {
            if tokio::time::timeout_at(deadline, &mut part).await.is_err() {
                tracing::warn!(event = "controller.part-aborted", part = name, "a part did not end in time");
                part.abort();
            }
        }
    }

    fn spawn(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        self.parts.push((name, tokio::spawn(part)));
    }

    async fn serve_nodes(
        &mut self,
        config: &Config,
        rules: Rules,
        enrolment: EnrolmentService,
        control: ControlService,
        ending: &watch::Receiver<bool>,
    ) -> Result<(), ServeError> {
        let services = grpc::Services::new(enrolment, control);
        for address in &config.node_listen {
            let listener = Listener::tcp(*address).await?;
            self.node_addresses.extend(listener.tcp_address());
            tracing::info!(event = "listen", listener = rules.name, address = listener.address(), "listening");
            let (services, stop) = (services.clone(), ending.clone());
            let serve = move |connection| grpc::serve(connection, services.clone(), stop.clone());
            self.spawn("node listener", listen::accept(listener, rules.clone(), ending.clone(), serve));
        }
        Ok(())
    }

    async fn serve_api(
        &mut self,
        config: &Config,
        rules: Rules,
        context: api::Context,
        ending: &watch::Receiver<bool>,
    ) -> Result<(), ServeError> {
        let router = api::router(context);
        let mut listeners = Vec::new();
        for address in &config.api_listen {
            listeners.push(Listener::tcp(*address).await?);
        }
        // Whoever takes all places at the network's ports does not keep the administrator of this machine out.
        let local = Rules { connections: Arc::new(Semaphore::new(API_CONNECTIONS)), ..rules.clone() };
        let mut listeners: Vec<_> = listeners.into_iter().map(|listener| (listener, rules.clone())).collect();
        if let Some(path) = &config.api_socket {
            listeners.push((Listener::unix(path).await?, local));
        }
        for (listener, rules) in listeners {
            self.api_addresses.extend(listener.tcp_address());
            tracing::info!(event = "listen", listener = rules.name, address = listener.address(), "listening");
            let (router, stop) = (router.clone(), ending.clone());
            let serve = move |connection| api::serve(connection, router.clone(), stop.clone());
            self.spawn("api listener", listen::accept(listener, rules, ending.clone(), serve));
        }
        Ok(())
    }
}

/// The audit trail verified, and the authority.
async fn load(domain: TrustDomain, store: Arc<dyn Store>) -> Result<(Arc<State>, Arc<Authority>), ServeError> {
    let loaded = tokio::task::spawn_blocking(move || {
        let authority = Authority::load(&*store, &domain, UnixTime::now())?;
        let state = State::load(domain, store)?;
        end_enrolments_of_the_last_run(&state)?;
        Ok::<_, ServeError>((Arc::new(state), Arc::new(authority)))
    });
    loaded.await.map_err(|_| ServeError::Ended("loading"))?
}

/// Our own verifiers refuse what nodes are told to refuse.
async fn follow_revocations(state: Arc<State>, trust: Trust, mut ending: watch::Receiver<bool>) {
    let mut revocations = state.watch_revocations();
    loop {
        let list = Arc::clone(&revocations.borrow_and_update());
        match list.to_set() {
            Ok(set) => trust.replace_revocations(set),
            Err(error) => {
                // Ending this part ends the controller: it does not verify peers by an old set.
                tracing::error!(event = "controller.revocations", %error, "the revocations cannot be used");
                return;
            }
        }
        tokio::select! {
            changed = revocations.changed() => if changed.is_err() { return },
            () = shutting_down(&mut ending) => return,
        }
    }
}

/// A new certificate for the controller at half the life of the old one.
async fn renew_svid(authority: Arc<Authority>, id: SpiffeId, svids: SvidStore, mut ending: watch::Receiver<bool>) {
    /// After a failure.
    const AGAIN: Duration = Duration::from_secs(30);
    loop {
        let wait = svids.get(&id).map_or(Duration::ZERO, |svid| svid.rotate_in(UnixTime::now()));
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutting_down(&mut ending) => return,
        }
        match authority.own_svid(&id, UnixTime::now()) {
            Ok(svid) => {
                tracing::info!(
                    event = "svid.renewed",
                    not_after = svid.not_after().as_secs(),
                    "renewed our certificate"
                );
                svids.install(svid);
            }
            Err(error) => {
                tracing::error!(event = "svid.not-renewed", %error, "our certificate could not be renewed");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn prune(state: Arc<State>, mut ending: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(PRUNE) => {}
            () = shutting_down(&mut ending) => return,
        }
        if let Err(error) = state.run(State::prune).await {
            tracing::warn!(event = "store.not-pruned", %error, "old records could not be removed: tried again later");
        }
    }
}
