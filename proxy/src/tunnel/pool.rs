//! Tunnels of one worker, by source identity, destination identity and address: shared ones, and warm ones that are leased
//! to one flow and come back when both of its directions have ended.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::ready;
use std::time::{Duration, Instant};

use opencluster_identity::SpiffeId;
use opencluster_identity::tls::{ExpectedPeer, TlsError, client_config, server_name};
use opencluster_identity::verify::VerifyError;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::info::{Party, TunnelInfo, wall_clock};
use super::link::{LinkError, Tunnel};
use super::oct;
use super::oct::exchange::Role;
use super::oct::frame::{Continue, Event, Kind};
use super::shared::hub::Hub;
use super::tls::handshake::{self, Established, HandshakeError};
use crate::admin::metrics::PairCounters;
use crate::relay::socket::Socket;
use crate::shared::Shared;
use crate::worker::registry::{Cut, Side};

/// A pair that has not been used for this long gets no warm tunnels.
const ACTIVE: Duration = Duration::from_secs(30);

/// Why there is no tunnel.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// The destination's proxy could not be reached.
    #[error("the proxy at {address} cannot be reached: {source}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: Arc<std::io::Error>,
    },
    /// It did not answer in time.
    #[error("the proxy at {0} did not complete the connection in time")]
    Timeout(SocketAddr),
    /// The handshake failed.
    #[error("tunnel to {address}: {source}")]
    Handshake {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: Arc<HandshakeError>,
    },
    /// The peer is not who it should be.
    #[error("tunnel to {address}: {source}")]
    Peer {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: Box<VerifyError>,
    },
    /// Our own side is not there.
    #[error("this proxy holds no certificate for {0} (not issued yet, or removed)")]
    NoIdentity(Arc<SpiffeId>),
    /// The configuration cannot be made.
    #[error("{0}")]
    Configuration(Arc<TlsError>),
    /// Too many flows wait for this destination.
    #[error("too many flows wait for a tunnel to {0}")]
    Busy(SocketAddr),
    /// The peer sent data behind its handshake, where none may be.
    #[error("the proxy at {0} sent more than a handshake")]
    Unexpected(SocketAddr),
    /// The tunnel broke before the flow was on it.
    #[error("tunnel: {0}")]
    Link(Rc<LinkError>),
    /// The destination does not take a flow over.
    #[error("the proxy at {0} does not take the flow over: {1}")]
    Refused(SocketAddr, String),
    /// The pool went away: the worker is ending.
    #[error("the proxy is shutting down")]
    Ending,
}

/// A tunnel on lease.
#[derive(Debug)]
pub struct Leased {
    /// The tunnel.
    pub tunnel: Box<Tunnel>,
    /// Who is at its ends.
    pub info: Rc<TunnelInfo>,
    /// Others used it before.
    pub reused: bool,
    /// Acceptor: where it goes when the flow that moved to it has ended. (The opener's go back to the pool.)
    pub home: Option<oneshot::Sender<Box<Tunnel>>>,
}

#[derive(Debug)]
struct Idle {
    leased: Leased,
    since: Instant,
}

/// The tunnels between two identities.
#[derive(Debug)]
pub struct Pair {
    source: Arc<SpiffeId>,
    destination: Arc<SpiffeId>,
    address: SocketAddr,
    shared: Arc<Shared>,
    config: Arc<ClientConfig>,
    shared_config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
    /// What its flows are counted in.
    pub counters: PairCounters,
    idle: RefCell<VecDeque<Idle>>,
    waiting: RefCell<VecDeque<oneshot::Sender<Result<Leased, OpenError>>>>,
    opening: Cell<usize>,
    hubs: RefCell<Vec<Rc<Hub>>>,
    /// Flows that wait for the shared tunnel that is being opened; `None`: none is.
    waiting_for_hub: RefCell<Option<Vec<HubWaiter>>>,
    last_used: Cell<Instant>,
}

type HubWaiter = oneshot::Sender<Result<Rc<Hub>, OpenError>>;

type Key = (Arc<SpiffeId>, Arc<SpiffeId>, SocketAddr);

/// All pairs of a worker.
#[derive(Debug)]
pub struct Pools {
    shared: Arc<Shared>,
    pairs: RefCell<HashMap<Key, Rc<Pair>>>,
}

impl Pools {
    /// Empty.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, pairs: RefCell::default() }
    }

    /// The pair of two identities at an address.
    pub fn pair(
        &self,
        source: &Arc<SpiffeId>,
        destination: &Arc<SpiffeId>,
        address: SocketAddr,
    ) -> Result<Rc<Pair>, OpenError> {
        let key = (Arc::clone(source), Arc::clone(destination), address);
        if let Some(pair) = self.pairs.borrow().get(&key) {
            return Ok(Rc::clone(pair));
        }
        let pair = Rc::new(Pair::new(Arc::clone(&self.shared), source, destination, address)?);
        self.pairs.borrow_mut().insert(key, Rc::clone(&pair));
        Ok(pair)
    }

    /// Drops idle tunnels that may not be used any more: revoked, expired, of identities that are not held.
    pub fn enforce(&self) {
        for pair in self.pairs.borrow().values() {
            let held = self.shared.holds(&pair.source);
            pair.idle.borrow_mut().retain(|idle| held && idle.leased.info.revoked(&self.shared.trust).is_none());
            for hub in pair.hubs.borrow().iter() {
                let gone = || format!("{} is not held by this node any more", pair.source);
                let reason = hub.info.revoked(&self.shared.trust).or_else(|| (!held).then(gone));
                if let Some(reason) = reason {
                    hub.watch.cut(Cut::Identity(reason));
                }
            }
        }
    }

    /// Drops everything at once.
    pub fn clear(&self, reason: &Cut) {
        for (_, pair) in self.pairs.borrow_mut().drain() {
            for hub in pair.hubs.borrow().iter() {
                hub.watch.cut(reason.clone());
            }
        }
    }

    /// Drops idle tunnels that the peer closed, that are too old or idle for too long, and pairs that nobody uses;
    /// returns how many idle tunnels are left.
    pub fn sweep(&self, now: Instant) -> usize {
        let wall = wall_clock();
        let limit = self.shared.limits.idle_timeout;
        let mut left = 0;
        self.pairs.borrow_mut().retain(|_, pair| {
            let mut idle = pair.idle.borrow_mut();
            // Each once, in place: this runs every second.
            for _ in 0..idle.len() {
                let Some(entry) = idle.pop_front() else { break };
                if entry.leased.tunnel.is_disturbed() {
                    continue;
                }
                if now.duration_since(entry.since) < limit && entry.leased.info.is_current(wall) {
                    idle.push_back(entry);
                } else {
                    entry.leased.tunnel.close();
                }
            }
            left += idle.len();
            for hub in pair.hubs.borrow().iter() {
                if !hub.info.is_current(wall) || hub.idle_since().is_some_and(|at| now.duration_since(at) > limit) {
                    hub.retire();
                }
            }
            // Retired ones stay in sight until their last flow has ended: they may have to be cut.
            pair.hubs.borrow_mut().retain(|hub| !hub.is_dead());
            let busy = pair.opening.get() > 0 || Rc::strong_count(pair) > 1 || !pair.hubs.borrow().is_empty();
            busy || !idle.is_empty() || now.duration_since(pair.last_used.get()) < limit
        });
        left
    }
}

impl Pair {
    fn new(
        shared: Arc<Shared>,
        source: &Arc<SpiffeId>,
        destination: &Arc<SpiffeId>,
        address: SocketAddr,
    ) -> Result<Self, OpenError> {
        let configuration = |error| OpenError::Configuration(Arc::new(error));
        let config_for = |protocol| {
            let config = client_config(&shared.svids, source, &shared.trust, ExpectedPeer::ServerName, &[protocol])
                .map_err(configuration)?;
            // The record layer takes over the traffic keys: see tls/record.rs.
            let mut config = Arc::unwrap_or_clone(config);
            config.enable_secret_extraction = true;
            Ok(Arc::new(config))
        };
        Ok(Self {
            config: config_for(oct::ALPN)?,
            shared_config: config_for(oct::SHARED_ALPN)?,
            server_name: server_name(destination).map_err(configuration)?,
            counters: shared.metrics.pair(Side::Outbound, source, destination),
            source: Arc::clone(source),
            destination: Arc::clone(destination),
            address,
            shared,
            idle: RefCell::default(),
            waiting: RefCell::default(),
            opening: Cell::new(0),
            hubs: RefCell::default(),
            waiting_for_hub: RefCell::default(),
            last_used: Cell::new(Instant::now()),
        })
    }

    /// Leases a warm tunnel, or waits for the first that comes back or is opened.
    pub async fn lease(self: &Rc<Self>) -> Result<Leased, OpenError> {
        self.last_used.set(Instant::now());
        if let Some(leased) = self.take_idle() {
            self.shared.metrics.tunnels_reused.inc();
            self.keep_warm();
            return Ok(leased);
        }
        self.wait_for_new().await
    }

    /// A tunnel that nobody used before.
    pub async fn lease_fresh(self: &Rc<Self>) -> Result<Leased, OpenError> {
        // Whatever is idle was closed together with the one that just proved stale, or soon will be: let the sweep see.
        let leased = self.open().await?;
        Ok(leased)
    }

    /// A tunnel on which the destination has agreed to take over a flow of a shared one.
    pub async fn lease_for(self: &Rc<Self>, of: &Continue) -> Result<Leased, OpenError> {
        let leased = self.lease().await?;
        let reused = leased.reused;
        match self.ask_to_continue(leased, of).await {
            // The peer may have closed it while it was idle.
            Err(OpenError::Link(_)) if reused => self.ask_to_continue(self.lease_fresh().await?, of).await,
            answered => answered,
        }
    }

    async fn ask_to_continue(self: &Rc<Self>, mut leased: Leased, of: &Continue) -> Result<Leased, OpenError> {
        if let Some(reason) = leased.info.revoked(&self.shared.trust) {
            return Err(OpenError::Refused(self.address, reason));
        }
        let tunnel = &mut leased.tunnel;
        tunnel.queue_continue(of);
        let answer = poll_fn(|context| {
            ready!(tunnel.poll_flush(context))?;
            tunnel.poll_event(context)
        });
        let refused = match answer.await.map_err(|error| OpenError::Link(Rc::new(error)))? {
            Event::Accept(_) => return Ok(leased),
            Event::Refuse(refusal) => refusal.to_string(),
            other => {
                leased.tunnel.reset();
                return Err(OpenError::Refused(self.address, format!("it answered with {other:?}")));
            }
        };
        // REFUSE is answered with RESET: then the tunnel is free again.
        leased.tunnel.queue(Kind::Reset);
        let flushed = poll_fn(|context| leased.tunnel.poll_flush(context)).await.is_ok();
        self.take_back(leased, flushed);
        Err(OpenError::Refused(self.address, refused))
    }

    /// Takes a tunnel back for the next flow, or closes it with a reset.
    pub fn take_back(self: &Rc<Self>, leased: Leased, reusable: bool) {
        if reusable {
            self.give_back(leased);
        } else {
            leased.tunnel.reset();
        }
    }

    /// Takes a tunnel back.
    pub fn give_back(self: &Rc<Self>, mut leased: Leased) {
        leased.reused = true;
        let fit = leased.tunnel.is_idle()
            && leased.info.is_current(wall_clock())
            && leased.info.revoked(&self.shared.trust).is_none()
            && !self.shared.is_draining();
        if !fit {
            leased.tunnel.close();
            return;
        }
        self.offer(leased);
    }

    fn take_idle(&self) -> Option<Leased> {
        let wall = wall_clock();
        loop {
            // The one that was used last: its memory is warm, and the others get a chance to time out.
            let leased = self.idle.borrow_mut().pop_back()?.leased;
            if leased.tunnel.is_disturbed() {
                continue;
            }
            if leased.info.is_current(wall) {
                return Some(leased);
            }
            leased.tunnel.close();
        }
    }

    /// To whoever has waited longest, or to the idle ones.
    fn offer(&self, leased: Leased) {
        let mut leased = leased;
        while let Some(waiter) = self.waiting.borrow_mut().pop_front() {
            match waiter.send(Ok(leased)) {
                Err(Ok(back)) => leased = back,
                // Taken. (What comes back is what was sent, never an error.)
                Ok(()) | Err(Err(_)) => return,
            }
        }
        let mut idle = self.idle.borrow_mut();
        if idle.len() < self.shared.limits.idle_tunnels {
            idle.push_back(Idle { leased, since: Instant::now() });
        } else {
            leased.tunnel.close();
        }
    }

    async fn wait_for_new(self: &Rc<Self>) -> Result<Leased, OpenError> {
        if self.waiting.borrow().len() >= self.shared.limits.waiting {
            return Err(OpenError::Busy(self.address));
        }
        let (sender, receiver) = oneshot::channel();
        self.waiting.borrow_mut().push_back(sender);
        self.open_for_waiting();
        receiver.await.unwrap_or(Err(OpenError::Ending))
    }

    /// Opens as many tunnels as flows wait, within the limit.
    fn open_for_waiting(self: &Rc<Self>) {
        while self.opening.get() < self.waiting.borrow().len().min(self.shared.limits.outbound_handshakes) {
            self.spawn_open();
        }
    }

    /// Opens ahead of need, for the next flow.
    fn keep_warm(self: &Rc<Self>) {
        let ready = self.idle.borrow().len() + self.opening.get();
        if ready < self.shared.limits.warm_tunnels && self.last_used.get().elapsed() < ACTIVE {
            self.spawn_open();
        }
    }

    fn spawn_open(self: &Rc<Self>) {
        self.opening.set(self.opening.get() + 1);
        let pair = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let opened = pair.open().await;
            pair.opening.set(pair.opening.get() - 1);
            match opened {
                Ok(leased) => pair.offer(leased),
                Err(error) => pair.fail_one(error),
            }
            pair.open_for_waiting();
        });
    }

    /// A failure is one flow's: the others get their own attempt.
    fn fail_one(&self, error: OpenError) {
        let mut error = Err(error);
        loop {
            // Not in the condition: the list must not stay borrowed while a waiter is told.
            let Some(waiter) = self.waiting.borrow_mut().pop_front() else { break };
            match waiter.send(error) {
                Ok(()) => return,
                Err(back) => error = back,
            }
        }
        if let Err(error) = error {
            tracing::debug!(%error, "a tunnel that was to be kept warm could not be opened");
        }
    }

    // --- shared tunnels ---------------------------------------------------------------------------------------------

    /// A shared tunnel with a place for one more flow; opened if there is none.
    pub async fn hub(self: &Rc<Self>) -> Result<Rc<Hub>, OpenError> {
        self.last_used.set(Instant::now());
        loop {
            if let Some(hub) = self.usable_hub() {
                return Ok(hub);
            }
            let receiver = {
                let mut waiting = self.waiting_for_hub.borrow_mut();
                let (sender, receiver) = oneshot::channel();
                match &mut *waiting {
                    Some(waiting) if waiting.len() >= self.shared.limits.waiting => {
                        return Err(OpenError::Busy(self.address));
                    }
                    Some(waiting) => waiting.push(sender),
                    None => {
                        *waiting = Some(vec![sender]);
                        tokio::task::spawn_local(Rc::clone(self).open_hub());
                    }
                }
                receiver
            };
            let hub = receiver.await.unwrap_or(Err(OpenError::Ending))?;
            if hub.has_place() {
                return Ok(hub);
            }
        }
    }

    /// A shared tunnel that nobody used before, for a flow whose first one proved stale.
    pub async fn fresh_hub(self: &Rc<Self>) -> Result<Rc<Hub>, OpenError> {
        let hub = self.connect_hub().await?;
        self.keep_hub(&hub);
        Ok(hub)
    }

    fn usable_hub(&self) -> Option<Rc<Hub>> {
        let wall = wall_clock();
        let hubs = self.hubs.borrow();
        hubs.iter().rev().find(|hub| hub.has_place() && hub.info.is_current(wall)).cloned()
    }

    async fn open_hub(self: Rc<Self>) {
        let opened = self.connect_hub().await;
        if let Ok(hub) = &opened {
            self.keep_hub(hub);
        }
        for waiter in self.waiting_for_hub.take().unwrap_or_default() {
            // Whoever has gone meanwhile does not need it.
            if waiter.send(opened.clone()).is_err() {
                tracing::trace!("a flow that waited for a tunnel has ended");
            }
        }
    }

    fn keep_hub(&self, hub: &Rc<Hub>) {
        self.hubs.borrow_mut().push(Rc::clone(hub));
        let hub = Rc::clone(hub);
        tokio::task::spawn_local(async move {
            match poll_fn(|context| hub.poll(context)).await {
                Ok(_) => hub.close(),
                Err(error) => {
                    tracing::debug!(peer = %hub.info.address, %error, "shared tunnel ended");
                    hub.end_all(error);
                }
            }
        });
    }

    async fn connect_hub(&self) -> Result<Rc<Hub>, OpenError> {
        let opened = self.connect_and_shake_hands(&self.shared_config).await;
        self.count(opened.is_ok());
        let (socket, established, info) = opened?;
        Hub::new(Role::Opener, socket, established, info).ok_or(OpenError::Unexpected(self.address))
    }

    // --- connecting -------------------------------------------------------------------------------------------------

    fn count(&self, success: bool) {
        let metrics = &self.shared.metrics;
        if success {
            metrics.handshakes.inc()
        } else {
            metrics.handshake_failures.inc()
        };
    }

    async fn open(&self) -> Result<Leased, OpenError> {
        let opened = self.connect_and_shake_hands(&self.config).await;
        self.count(opened.is_ok());
        let (socket, established, info) = opened?;
        super::tune_leased(socket.stream())
            .map_err(|source| OpenError::Connect { address: self.address, source: Arc::new(source) })?;
        let tunnel = Tunnel::from_handshake(socket, established).ok_or(OpenError::Unexpected(self.address))?;
        Ok(Leased { tunnel: Box::new(tunnel), info, reused: false, home: None })
    }

    async fn connect_and_shake_hands(
        &self,
        config: &Arc<ClientConfig>,
    ) -> Result<(Socket, Established, Rc<TunnelInfo>), OpenError> {
        let address = self.address;
        let svid =
            self.shared.svids.get(&self.source).ok_or_else(|| OpenError::NoIdentity(Arc::clone(&self.source)))?;
        let local = Party::local(&self.source, &svid);
        drop(svid);
        let limit = self.shared.limits.handshake_timeout;
        let connect_failed = |source| OpenError::Connect { address, source: Arc::new(source) };
        let mut stream = tokio::time::timeout(limit, TcpStream::connect(address))
            .await
            .map_err(|_| OpenError::Timeout(address))?
            .map_err(connect_failed)?;
        super::tune(&stream).map_err(connect_failed)?;
        let shake = handshake::connect(&mut stream, Arc::clone(config), self.server_name.clone());
        let established = tokio::time::timeout(limit, shake)
            .await
            .map_err(|_| OpenError::Timeout(address))?
            .map_err(|source| OpenError::Handshake { address, source: Arc::new(source) })?;
        let peer = self
            .shared
            .trust
            .verify(&established.agreed.chain, wall_clock())
            .map_err(|source| OpenError::Peer { address, source: Box::new(source) })?;
        if *peer.id() != *self.destination {
            // The verifier has checked this already: the second lock.
            let expected = self.destination.to_string();
            let source = Box::new(VerifyError::UnexpectedPeer { found: peer.id().clone(), expected });
            return Err(OpenError::Peer { address, source });
        }
        let info = Rc::new(TunnelInfo::new(local, &peer, address, &established.agreed));
        let socket = Socket::new(stream).map_err(connect_failed)?;
        Ok((socket, established, info))
    }
}
