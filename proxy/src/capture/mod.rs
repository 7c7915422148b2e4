//! Captured connections: the packet filter redirects what a workload sends to that workload's own listener, and the
//! kernel remembers where it wanted to go.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use opencluster_identity::SpiffeId;
use opencluster_policy::index::Decision;
use opencluster_policy::resource::Protocol;
use socket2::SockRef;
use tokio::net::TcpStream;

use crate::authz;
use crate::relay::shared::{self, Moved, SharedRelay};
use crate::relay::socket::Socket;
use crate::relay::{Ending, Outcome, Relay};
use crate::shared::NotReady;
use crate::tunnel::oct::exchange::{Exchange, Role};
use crate::tunnel::oct::frame::{Continue, Kind, Open};
use crate::tunnel::pool::{Leased, OpenError, Pair};
use crate::tunnel::shared::hub::Hub;
use crate::tunnel::shared::stream::{Moving, Stream};
use crate::worker::Worker;
use crate::worker::registry::{Cut, Flow, FlowGuard, Side};
use crate::worker::report::Verdict;

/// How the original destination of a captured connection is found.
#[derive(Clone, Copy, Debug)]
pub enum Destination {
    /// The kernel's connection tracking knows it.
    Redirected,
    /// Always this one: for tests, which have no packet filter.
    #[cfg(test)]
    Fixed(SocketAddr),
}

impl Destination {
    fn of(self, stream: &TcpStream) -> io::Result<SocketAddr> {
        match self {
            Self::Redirected => {
                let local = stream.local_addr()?;
                let socket = SockRef::from(stream);
                let original = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() }?;
                original.as_socket().filter(|original| *original != local).ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidInput, "a connection to the capture port itself")
                })
            }
            #[cfg(test)]
            Self::Fixed(target) => Ok(target),
        }
    }
}

/// Why a captured flow is not carried.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The node carries nothing at the moment.
    #[error(transparent)]
    NotReady(#[from] NotReady),
    /// A limit is reached.
    #[error("too many flows on this node")]
    TooManyFlows,
    /// Nothing that we know is there.
    #[error("{0} is not an address of any service")]
    NoRoute(SocketAddr),
    /// Denied by the policy as this node knows it. The destination decides again.
    #[error("{0}")]
    Denied(String),
    /// The node has no address that the destination could judge.
    #[error("this node has no address of the family of {0}")]
    NoAddress(SocketAddr),
    /// No tunnel.
    #[error(transparent)]
    Tunnel(#[from] OpenError),
    /// It was cut before it was connected.
    #[error("{0}")]
    Cut(Cut),
}

impl CaptureError {
    /// For metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NotReady(_) => "not_ready",
            Self::TooManyFlows => "overloaded",
            Self::NoRoute(_) => "no_route",
            Self::Denied(_) => "denied",
            Self::NoAddress(_) => "no_address",
            Self::Tunnel(_) => "tunnel",
            Self::Cut(cut) => cut.name(),
        }
    }
}

/// Carries one captured connection to its end.
pub async fn serve(
    worker: Rc<Worker>,
    stream: TcpStream,
    peer: SocketAddr,
    source: Arc<SpiffeId>,
    destination: Destination,
) {
    let (target, app) = match destination.of(&stream).and_then(|target| Ok((target, Socket::new(stream)?))) {
        Ok(found) => found,
        Err(error) => {
            worker.shared.metrics.refused(Side::Outbound, "no_destination");
            tracing::info!(%peer, workload = %source, %error, "captured connection without a destination");
            return;
        }
    };
    let (id, trace) = worker.new_ids();
    let flow = worker.registry.add_flow(Flow::new(Side::Outbound, id, trace, peer, target, source));
    let pair = match authorize(&worker, &flow) {
        Ok(pair) => pair,
        Err(error) => return refuse(&worker, &flow, app, &error),
    };
    let carried = if worker.shared.limits.sharing {
        share(&worker, &flow, &pair, app).await
    } else {
        lease(&worker, &flow, &pair, app).await
    };
    let ending = match carried {
        Ok(ending) => ending,
        Err((app, error)) => return refuse(&worker, &flow, app, &error),
    };
    let (sent, received) = flow.take_unreported();
    pair.counters.sent.inc_by(sent);
    pair.counters.received.inc_by(received);
    if flow.is_accepted() {
        pair.counters.flows.inc();
    }
    if let Ending::Refused(refusal) = &ending {
        worker.shared.metrics.refused(Side::Outbound, refusal.code.name());
    }
    worker.report(&flow, &Verdict::ended(&ending));
}

/// Registered already; now: is it known, and allowed as far as this side can tell?
fn authorize(worker: &Worker, flow: &FlowGuard) -> Result<Rc<Pair>, CaptureError> {
    let shared = &worker.shared;
    let index = shared.carry()?;
    let index = index.as_ref().ok_or(NotReady::Configuration)?;
    if worker.registry.flow_count() > shared.limits.flows {
        return Err(CaptureError::TooManyFlows);
    }
    let route = index.route(flow.target, Protocol::Tcp).ok_or(CaptureError::NoRoute(flow.target))?;
    let address = shared.node.address_towards(route.tunnel).ok_or(CaptureError::NoAddress(route.tunnel))?;
    flow.source_address.set(Some(address));
    let destination = flow.destination.get_or_init(|| Arc::clone(&route.workload));
    let port = flow.target.port();
    let verdict = authz::decide(index, &flow.source, address, destination, port);
    flow.decision.set(Some(verdict.decision));
    flow.dry_run.set(verdict.dry_run);
    if !matches!(verdict.decision, Decision::Allow(_)) {
        let reason = authz::denial(index, verdict.decision, &flow.source, destination, port);
        return Err(CaptureError::Denied(reason));
    }
    if let Some(cut) = flow.watch.reason() {
        return Err(CaptureError::Cut(cut));
    }
    Ok(worker.pools.pair(&flow.source, destination, route.tunnel)?)
}

/// What a flow that is not carried leaves behind.
type NotCarried = (Socket, CaptureError);

/// Over a shared tunnel, as flows begin.
async fn share(worker: &Worker, flow: &FlowGuard, pair: &Rc<Pair>, app: Socket) -> Result<Ending, NotCarried> {
    // Gives the application's first bytes the time to arrive, so that they leave together with OPEN.
    tokio::task::yield_now().await;
    // From here to OPEN nobody else may run: the tunnel has a place for this flow *now*.
    let hub = match pair.hub().await {
        Ok(hub) => hub,
        Err(error) => return Err((app, error.into())),
    };
    if let Some(reason) = hub.info.revoked(&worker.shared.trust) {
        return Err((app, CaptureError::Cut(Cut::Identity(reason))));
    }
    match carry_shared(worker, flow, pair, &hub, app, Vec::new()).await {
        Ending::Stale { app, replay } => {
            worker.shared.metrics.stale_retries.inc();
            flow.forget_sent();
            // Boxed: a handshake is large, and this is rare.
            match Box::pin(pair.fresh_hub()).await {
                Ok(hub) => Ok(carry_shared(worker, flow, pair, &hub, app, replay).await),
                Err(error) => Err((app, error.into())),
            }
        }
        ending => Ok(ending),
    }
}

/// One attempt on one shared tunnel, and on a tunnel of its own if it becomes bulk.
async fn carry_shared(
    worker: &Worker,
    flow: &FlowGuard,
    pair: &Rc<Pair>,
    hub: &Rc<Hub>,
    app: Socket,
    replay: Vec<u8>,
) -> Ending {
    *flow.tunnel.borrow_mut() = Some(Rc::clone(&hub.info));
    let keep = hub.is_used();
    let open = Open { target: flow.target, flow: flow.id, trace: flow.trace };
    let stream = hub.open(&open, flow.shared(), app);
    let relay = SharedRelay { hub, stream: &stream, flow, replay, keep };
    let moved = match relay.run(|| promote(worker, pair, &stream)).await {
        shared::Outcome::Ended(ending) => return ending,
        shared::Outcome::Moved(moved) => moved,
    };
    worker.shared.metrics.promotions.inc();
    let Moved { app, mut leased, exchange } = *moved;
    *flow.tunnel.borrow_mut() = Some(Rc::clone(&leased.info));
    let relay = Relay { app: Some(app), tunnel: &mut leased.tunnel, exchange, flow, replay: Vec::new(), keep: false };
    let Outcome { ending, reusable } = Box::pin(relay.run()).await;
    pair.take_back(leased, reusable);
    ending
}

/// Prepares a tunnel of its own for a flow that has become bulk. Until then, and if there is none, it goes on as it is.
fn promote(worker: &Worker, pair: &Rc<Pair>, stream: &Rc<Stream>) {
    let (pair, stream) = (Rc::clone(pair), Rc::clone(stream));
    let limit = worker.shared.limits.open_timeout;
    *stream.moving.borrow_mut() = Moving::Preparing;
    tokio::task::spawn_local(async move {
        let continued = Continue { flow: stream.flow.id, worker: stream.worker.get() };
        let prepared = tokio::time::timeout(limit, pair.lease_for(&continued)).await;
        *stream.moving.borrow_mut() = match prepared {
            Ok(Ok(leased)) => Moving::Ready(Box::new(leased)),
            Ok(Err(error)) => {
                tracing::debug!(flow = stream.flow.id, %error, "a bulk flow stays on its shared tunnel");
                Moving::Failed
            }
            Err(_) => Moving::Failed,
        };
        stream.flow.watch.wake();
    });
}

/// Over a tunnel of its own from the beginning.
async fn lease(worker: &Worker, flow: &FlowGuard, pair: &Rc<Pair>, app: Socket) -> Result<Ending, NotCarried> {
    let leased = match pair.lease().await {
        Ok(leased) => leased,
        Err(error) => return Err((app, error.into())),
    };
    tokio::task::yield_now().await;
    if let Some(reason) = leased.info.revoked(&worker.shared.trust) {
        return Err((app, CaptureError::Cut(Cut::Identity(reason))));
    }
    match carry(flow, pair, leased, app, Vec::new()).await {
        Ending::Stale { app, replay } => {
            worker.shared.metrics.stale_retries.inc();
            flow.forget_sent();
            match Box::pin(pair.lease_fresh()).await {
                Ok(leased) => Ok(carry(flow, pair, leased, app, replay).await),
                Err(error) => Err((app, error.into())),
            }
        }
        ending => Ok(ending),
    }
}

/// One attempt on one tunnel of its own.
async fn carry(flow: &FlowGuard, pair: &Rc<Pair>, mut leased: Leased, app: Socket, replay: Vec<u8>) -> Ending {
    *flow.tunnel.borrow_mut() = Some(Rc::clone(&leased.info));
    let mut exchange = Exchange::new(Role::Opener);
    leased.tunnel.queue_open(&Open { target: flow.target, flow: flow.id, trace: flow.trace });
    exchange.sent(Kind::Open);
    let keep = leased.reused;
    let relay = Relay { app: Some(app), tunnel: &mut leased.tunnel, exchange, flow, replay, keep };
    let Outcome { ending, reusable } = relay.run().await;
    pair.take_back(leased, reusable);
    ending
}

/// The application has been connected by the kernel already: a reset is the refusal that is left.
fn refuse(worker: &Worker, flow: &FlowGuard, app: Socket, error: &CaptureError) {
    app.reset();
    worker.shared.metrics.refused(Side::Outbound, error.name());
    worker.report(flow, &Verdict::refused(error));
}
