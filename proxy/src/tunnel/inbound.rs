//! The receiving side: tunnels from other proxies. The peer is authenticated by the handshake; each flow is registered,
//! then decided about, then connected to the application.

use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Instant;

use opencluster_identity::SpiffeId;
use opencluster_policy::resource::Protocol;
use rustls::ServerConfig;
use socket2::{Domain, SockAddr, Socket as RawSocket, Type};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::info::{Party, TunnelInfo, wall_clock};
use super::link::{LinkError, Tunnel};
use super::oct::exchange::{Direction, Exchange, Role};
use super::oct::frame::{Continue, Event, Framing, Kind, Open, Refusal, RefusalCode};
use super::pool::Leased;
use super::shared::hub::{Happened, Hub};
use super::shared::stream::{Moving, Stream};
use super::tls::handshake::{self, HandshakeError};
use crate::admin::metrics::PairCounters;
use crate::authz;
use crate::relay::shared::{self, Moved, SharedRelay};
use crate::relay::socket::Socket;
use crate::relay::{Ending, Outcome, Relay};
use crate::shared::NotReady;
use crate::worker::registry::{Cut, Flow, FlowGuard, HeldGuard, Phase, Side};
use crate::worker::report::Verdict;
use crate::worker::{PeerSlot, Worker};

/// Why an inbound tunnel was not served, or ended.
#[derive(Debug, thiserror::Error)]
pub enum InboundError {
    /// The node carries nothing at the moment.
    #[error(transparent)]
    NotReady(#[from] NotReady),
    /// A limit is reached.
    #[error("limit reached: {0}")]
    Limit(&'static str),
    /// The handshake failed.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// It took too long.
    #[error("the peer did not complete the TLS handshake in time")]
    Timeout,
    /// The peer's identity is not accepted.
    #[error(transparent)]
    Peer(#[from] opencluster_identity::verify::VerifyError),
    /// The peer asked for an identity that is not held any more.
    #[error("the peer asked for an identity that this node does not hold")]
    NoIdentity,
    /// The tunnel broke.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The socket.
    #[error("tunnel socket: {0}")]
    Io(#[from] io::Error),
    /// A shared tunnel ended.
    #[error("{0}")]
    Ended(String),
    /// It was cut.
    #[error("the tunnel was cut: {0}")]
    Cut(Cut),
}

/// Serves one accepted connection to its end.
pub async fn serve(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr, config: Arc<ServerConfig>) {
    // Boxed: a handshake is large, and the tunnel lives on long after it.
    let result = match Box::pin(handshake(&worker, stream, peer, config)).await {
        Ok((Carrier::Leased(tunnel), info)) => serve_tunnel(&worker, tunnel, info, peer).await,
        Ok((Carrier::Shared(hub), info)) => serve_hub(&worker, &hub, info, peer).await,
        Err(error) => {
            worker.shared.metrics.handshake_failures.inc();
            tracing::info!(%peer, %error, "inbound tunnel refused");
            return;
        }
    };
    match result {
        Ok(()) | Err(InboundError::Link(LinkError::CloseNotify)) => {}
        Err(error) => tracing::debug!(%peer, %error, "inbound tunnel ended"),
    }
}

/// A tunnel of either kind.
enum Carrier {
    Leased(Box<Tunnel>),
    Shared(Rc<Hub>),
}

async fn handshake(
    worker: &Worker,
    mut stream: TcpStream,
    peer: SocketAddr,
    config: Arc<ServerConfig>,
) -> Result<(Carrier, Rc<TunnelInfo>), InboundError> {
    let shared = &worker.shared;
    shared.carry()?;
    let _slot = worker.handshake_slot(peer.ip()).ok_or(InboundError::Limit("TLS handshakes at once"))?;
    super::tune(&stream)?;
    let established = tokio::time::timeout(shared.limits.handshake_timeout, handshake::accept(&mut stream, config))
        .await
        .map_err(|_| InboundError::Timeout)??;
    let remote = shared.trust.verify(&established.agreed.chain, wall_clock())?;
    let name = established.agreed.server_name.as_deref().ok_or(InboundError::NoIdentity)?;
    let svid = shared.svids.by_server_name(name).ok_or(InboundError::NoIdentity)?;
    let local = Party::local(&worker.intern(svid.id()), &svid);
    let info = Rc::new(TunnelInfo::new(local, &remote, peer, &established.agreed));
    if established.agreed.framing == Framing::Leased {
        super::tune_leased(&stream)?;
    }
    let socket = Socket::new(stream)?;
    let carrier = match established.agreed.framing {
        Framing::Leased => Tunnel::from_handshake(socket, established).map(|tunnel| Carrier::Leased(Box::new(tunnel))),
        Framing::Shared => Hub::new(Role::Acceptor, socket, established, Rc::clone(&info)).map(Carrier::Shared),
    };
    shared.metrics.handshakes.inc();
    Ok((carrier.ok_or(InboundError::Limit("data behind the handshake"))?, info))
}

/// Registers a tunnel, within the limits.
fn hold(worker: &Rc<Worker>, info: &Rc<TunnelInfo>) -> Result<(HeldGuard, PeerSlot), InboundError> {
    let slot = worker.peer_slot(&info.remote.id).ok_or(InboundError::Limit("tunnels of one identity"))?;
    if worker.registry.held_count() >= worker.shared.limits.tunnels {
        return Err(InboundError::Limit("inbound tunnels"));
    }
    let held = worker.registry.add_held(Rc::clone(info));
    // Registered first, checked second: a revocation in between is seen by one of the two.
    match info.revoked(&worker.shared.trust) {
        Some(reason) => Err(InboundError::Cut(Cut::Identity(reason))),
        None => Ok((held, slot)),
    }
}

// --- shared tunnels -------------------------------------------------------------------------------------------------

async fn serve_hub(
    worker: &Rc<Worker>,
    hub: &Rc<Hub>,
    info: Rc<TunnelInfo>,
    peer: SocketAddr,
) -> Result<(), InboundError> {
    let (held, _slot) = hold(worker, &info)?;
    let counters = Rc::new(worker.shared.metrics.pair(Side::Inbound, &info.remote.id, &info.local.id));
    let result = loop {
        let happened = poll_fn(|context| {
            if let Poll::Ready(cut) = held.watch.poll_cut(context) {
                return Poll::Ready(Err(LinkError::Cut(cut)));
            }
            let happened = hub.poll(context);
            held.phase.set(match (hub.idle_since(), held.phase.get()) {
                (None, _) => Phase::Busy,
                (Some(_), opening @ Phase::Opening(_)) if hub.is_mid_frame() => opening,
                (Some(_), _) if hub.is_mid_frame() => Phase::Opening(Instant::now()),
                (Some(since), _) => Phase::Idle(since),
            });
            happened
        });
        let (id, open) = match happened.await {
            Ok(Happened::Opened(id, open)) => (id, open),
            Ok(Happened::Closed) => {
                hub.close();
                return Ok(());
            }
            Err(error) => break error,
        };
        let source = Arc::clone(&info.remote.id);
        let flow = Flow::new(Side::Inbound, open.flow, open.trace, peer, open.target, source);
        let flow = worker.registry.add_flow(flow);
        match hub.adopt(id, flow.shared()) {
            Ok(stream) => {
                let (worker, hub, counters) = (Rc::clone(worker), Rc::clone(hub), Rc::clone(&counters));
                tokio::task::spawn_local(serve_stream(worker, hub, stream, flow, counters));
            }
            Err(error) => break error,
        }
    };
    let told = InboundError::Ended(result.to_string());
    let closed = matches!(result, LinkError::CloseNotify);
    hub.end_all(result);
    if closed { Ok(()) } else { Err(told) }
}

/// One flow of a shared tunnel, from OPEN to its end.
pub(crate) async fn serve_stream(
    worker: Rc<Worker>,
    hub: Rc<Hub>,
    stream: Rc<Stream>,
    flow: FlowGuard,
    counters: Rc<PairCounters>,
) {
    *flow.tunnel.borrow_mut() = Some(Rc::clone(&hub.info));
    let (answered, refusal) = match admit(&worker, &flow, &hub.info, flow.peer).await {
        Ok(app) => {
            *stream.app.borrow_mut() = Some(app);
            flow.accepted();
            counters.flows.inc();
            (hub.accept(&stream, worker.number()), None)
        }
        Err(refusal) => {
            stream.drop_data();
            flow.ends();
            worker.shared.metrics.refused(Side::Inbound, refusal.code.name());
            (hub.refuse(&stream, &refusal), Some(refusal))
        }
    };
    if let Err(error) = answered {
        tracing::debug!(%error, "a flow could not be answered");
        hub.watch.cut(Cut::Tunnel(error.to_string()));
    }
    let _known = refusal.is_none().then(|| worker.know_stream(&stream));
    let relay = SharedRelay { hub: &hub, stream: &stream, flow: &flow, replay: Vec::new(), keep: false };
    let ending = match relay.run(|| {}).await {
        shared::Outcome::Ended(ending) => ending,
        shared::Outcome::Moved(moved) => Box::pin(serve_moved(&flow, *moved)).await,
    };
    let (sent, received) = flow.take_unreported();
    counters.sent.inc_by(sent);
    counters.received.inc_by(received);
    match refusal {
        Some(refusal) => worker.report(&flow, &Verdict::refused_here(&refusal)),
        None => worker.report(&flow, &Verdict::ended(&ending)),
    }
}

/// A flow that goes on over a tunnel of its own.
async fn serve_moved(flow: &FlowGuard, moved: Moved) -> Ending {
    let Moved { app, mut leased, exchange } = moved;
    *flow.tunnel.borrow_mut() = Some(Rc::clone(&leased.info));
    let relay = Relay { app: Some(app), tunnel: &mut leased.tunnel, exchange, flow, replay: Vec::new(), keep: false };
    let Outcome { ending, reusable } = relay.run().await;
    // The tunnel's own task waits for it, unless it was cut meanwhile.
    match leased.home {
        Some(home) if reusable => {
            if let Err(tunnel) = home.send(leased.tunnel) {
                tunnel.reset();
            }
        }
        _ => leased.tunnel.reset(),
    }
    ending
}

// --- leased tunnels -------------------------------------------------------------------------------------------------

async fn serve_tunnel(
    worker: &Rc<Worker>,
    mut tunnel: Box<Tunnel>,
    info: Rc<TunnelInfo>,
    peer: SocketAddr,
) -> Result<(), InboundError> {
    let (held, _slot) = hold(worker, &info)?;
    let counters = worker.shared.metrics.pair(Side::Inbound, &info.remote.id, &info.local.id);
    loop {
        let next = next_flow(&mut tunnel, &held).await?;
        held.phase.set(Phase::Busy);
        let after = match next {
            Next::Open(open) => Box::pin(serve_flow(worker, &mut tunnel, &info, &counters, peer, open)).await,
            Next::Continue(of) => match continue_flow(worker, tunnel, &info, &held, of).await? {
                Some(back) => {
                    tunnel = back;
                    After::Reusable
                }
                None => return Ok(()),
            },
        };
        held.phase.set(Phase::Idle(Instant::now()));
        match after {
            After::Broken => tunnel.reset(),
            After::Reusable if !worker.shared.is_draining() && info.is_current(wall_clock()) => continue,
            After::Reusable | After::InTheWay => tunnel.close(),
        }
        return Ok(());
    }
}

/// What a tunnel is used for next.
enum Next {
    Open(Open),
    Continue(Continue),
}

/// Waits for the next OPEN or CONTINUE. The worker's sweep cuts tunnels that take too long; there is no timer for each.
async fn next_flow(tunnel: &mut Tunnel, held: &HeldGuard) -> Result<Next, InboundError> {
    let event = poll_fn(|context| {
        if let Poll::Ready(cut) = held.watch.poll_cut(context) {
            return Poll::Ready(Err(InboundError::Cut(cut)));
        }
        match tunnel.poll_event(context) {
            Poll::Ready(event) => Poll::Ready(event.map_err(InboundError::from)),
            Poll::Pending => {
                if tunnel.is_mid_frame() && matches!(held.phase.get(), Phase::Idle(_)) {
                    held.phase.set(Phase::Opening(Instant::now()));
                }
                Poll::Pending
            }
        }
    })
    .await?;
    match event {
        Event::Open(open) => Ok(Next::Open(open)),
        Event::Continue(of) => Ok(Next::Continue(of)),
        other => {
            let direction = Exchange::new(Role::Acceptor).remote();
            Err(LinkError::from(super::oct::exchange::Violation { kind: other.kind(), direction }).into())
        }
    }
}

/// Lends the tunnel to a flow that was on a shared one; returns it when it is free again.
async fn continue_flow(
    worker: &Rc<Worker>,
    mut tunnel: Box<Tunnel>,
    info: &Rc<TunnelInfo>,
    held: &HeldGuard,
    of: Continue,
) -> Result<Option<Box<Tunnel>>, InboundError> {
    if of.worker != worker.number() {
        return match worker.pass_tunnel(tunnel, info, of) {
            Ok(()) => Ok(None),
            Err(tunnel) => refuse_to_continue(tunnel, held, "its worker does not take it").await.map(Some),
        };
    }
    let Some(stream) = worker.movable_stream(of.flow, info) else {
        return refuse_to_continue(tunnel, held, "there is no such flow").await.map(Some);
    };
    tunnel.queue(Kind::Accept);
    poll_fn(|context| tunnel.poll_flush(context)).await?;
    let (home, back) = oneshot::channel();
    let leased = Leased { tunnel, info: Rc::clone(info), reused: true, home: Some(home) };
    *stream.moving.borrow_mut() = Moving::Ready(Box::new(leased));
    stream.flow.watch.wake();
    drop(stream);
    // Dropped with the flow if the flow ends in another way.
    Ok(back.await.ok())
}

async fn refuse_to_continue(
    mut tunnel: Box<Tunnel>,
    held: &HeldGuard,
    why: &'static str,
) -> Result<Box<Tunnel>, InboundError> {
    tunnel.queue_refusal(&Refusal::new(RefusalCode::Cancelled, why));
    held.phase.set(Phase::Opening(Instant::now()));
    let event = poll_fn(|context| {
        if let Poll::Ready(cut) = held.watch.poll_cut(context) {
            return Poll::Ready(Err(LinkError::Cut(cut)));
        }
        ready!(tunnel.poll_flush(context))?;
        tunnel.poll_event(context)
    });
    match event.await? {
        Event::Reset => Ok(tunnel),
        other => {
            let violation = super::oct::exchange::Violation { kind: other.kind(), direction: Direction::Running };
            Err(LinkError::from(violation).into())
        }
    }
}

/// A tunnel that another worker passed, for a flow that is here.
pub async fn serve_passed(worker: Rc<Worker>, tunnel: Box<Tunnel>, info: Rc<TunnelInfo>, of: Continue) {
    let peer = info.address;
    let result = serve_continued(&worker, tunnel, info, of).await;
    if let Err(error) = result {
        tracing::debug!(%peer, %error, "inbound tunnel ended");
    }
}

async fn serve_continued(
    worker: &Rc<Worker>,
    tunnel: Box<Tunnel>,
    info: Rc<TunnelInfo>,
    of: Continue,
) -> Result<(), InboundError> {
    let back = {
        let (held, _slot) = hold(worker, &info)?;
        held.phase.set(Phase::Busy);
        continue_flow(worker, tunnel, &info, &held, of).await?
    };
    match back {
        Some(tunnel) if !worker.shared.is_draining() && info.is_current(wall_clock()) => {
            let peer = info.address;
            Box::pin(serve_tunnel(worker, tunnel, info, peer)).await
        }
        Some(tunnel) => {
            tunnel.close();
            Ok(())
        }
        None => Ok(()),
    }
}

/// What a tunnel is good for when its flow has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// The next flow.
    Reusable,
    /// Its descriptor is more useful elsewhere: this process has run out of them, and idle tunnels would keep it so.
    InTheWay,
    /// Nothing.
    Broken,
}

/// One flow from OPEN to its end.
async fn serve_flow(
    worker: &Rc<Worker>,
    tunnel: &mut Tunnel,
    info: &Rc<TunnelInfo>,
    counters: &PairCounters,
    peer: SocketAddr,
    open: Open,
) -> After {
    let flow = worker.registry.add_flow(Flow::new(
        Side::Inbound,
        open.flow,
        open.trace,
        peer,
        open.target,
        Arc::clone(&info.remote.id),
    ));
    *flow.tunnel.borrow_mut() = Some(Rc::clone(info));
    let mut exchange = Exchange::new(Role::Acceptor);
    // The exchange is new: OPEN is what it waits for.
    if exchange.received(Kind::Open).is_err() {
        return After::Broken;
    }
    let (app, refusal) = match admit(worker, &flow, info, peer).await {
        Ok(app) => {
            tunnel.queue(Kind::Accept);
            exchange.sent(Kind::Accept);
            flow.accepted();
            counters.flows.inc();
            (Some(app), None)
        }
        Err(refusal) => {
            tunnel.queue_refusal(&refusal);
            exchange.sent(Kind::Refuse);
            worker.shared.metrics.refused(Side::Inbound, refusal.code.name());
            (None, Some(refusal))
        }
    };
    let relay = Relay { app, tunnel, exchange, flow: &flow, replay: Vec::new(), keep: false };
    let Outcome { ending, reusable } = relay.run().await;
    let (sent, received) = flow.take_unreported();
    counters.sent.inc_by(sent);
    counters.received.inc_by(received);
    let overloaded = refusal.as_ref().is_some_and(|refusal| refusal.code == RefusalCode::Overloaded);
    match refusal {
        Some(refusal) => worker.report(&flow, &Verdict::refused_here(&refusal)),
        None => worker.report(&flow, &Verdict::ended(&ending)),
    }
    match (reusable && !matches!(ending, Ending::Broken(_)), overloaded) {
        (false, _) => After::Broken,
        (true, true) => After::InTheWay,
        (true, false) => After::Reusable,
    }
}

/// Decides, then connects to the application.
async fn admit(worker: &Worker, flow: &FlowGuard, info: &TunnelInfo, peer: SocketAddr) -> Result<Socket, Refusal> {
    authorize(worker, flow, &info.local.id, peer)?;
    let app = connect(flow.target, worker.shared.limits.connect_timeout).await?;
    // While it connected, the verdict may have changed.
    match flow.watch.reason() {
        Some(cut) => Err(Refusal::new(RefusalCode::Denied, cut.to_string())),
        None => Ok(app),
    }
}

fn authorize(worker: &Worker, flow: &FlowGuard, local: &Arc<SpiffeId>, peer: SocketAddr) -> Result<(), Refusal> {
    let shared = &worker.shared;
    let index = shared.carry().map_err(|reason| {
        let code = if reason == NotReady::Draining { RefusalCode::Draining } else { RefusalCode::NotReady };
        Refusal::new(code, reason.to_string())
    })?;
    let Some(index) = index.as_ref() else {
        return Err(Refusal::new(RefusalCode::NotReady, NotReady::Configuration.to_string()));
    };
    if worker.registry.flow_count() > shared.limits.flows {
        return Err(Refusal::new(RefusalCode::Overloaded, "too many flows on the destination's node"));
    }
    let ours = shared.node.addresses.contains(&flow.target.ip());
    let route = index.route(flow.target, Protocol::Tcp).filter(|route| ours && route.workload == *local);
    if route.is_none() {
        let text = format!("{} is not an address and port of {local} on this node", flow.target);
        return Err(Refusal::new(RefusalCode::WrongDestination, text));
    }
    if flow.destination.set(Arc::clone(local)).is_err() {
        return Err(Refusal::new(RefusalCode::WrongDestination, "the flow has a destination already"));
    }
    flow.source_address.set(Some(peer.ip()));
    let port = flow.target.port();
    let verdict = authz::decide(index, &flow.source, peer.ip(), local, port);
    flow.decision.set(Some(verdict.decision));
    flow.dry_run.set(verdict.dry_run);
    if !verdict.decision.allowed() {
        let text = authz::denial(index, verdict.decision, &flow.source, local, port);
        return Err(Refusal::new(RefusalCode::Denied, text));
    }
    if let Some(cut) = flow.watch.reason() {
        return Err(Refusal::new(RefusalCode::Revoked, cut.to_string()));
    }
    Ok(())
}

/// Connects to the application, without waiting where the kernel does not (loopback completes at once).
async fn connect(target: SocketAddr, limit: std::time::Duration) -> Result<Socket, Refusal> {
    let refused = |error: io::Error| {
        let code = match error.kind() {
            io::ErrorKind::ConnectionRefused => RefusalCode::ConnectRefused,
            io::ErrorKind::TimedOut => RefusalCode::ConnectTimeout,
            _ if error.raw_os_error() == Some(libc::EMFILE) => RefusalCode::Overloaded,
            _ => RefusalCode::Unreachable,
        };
        Refusal::new(code, format!("{target}: {error}"))
    };
    let stream = start_connect(target).map_err(refused)?;
    if stream.peer_addr().is_err() {
        match tokio::time::timeout(limit, stream.writable()).await {
            Ok(ready) => ready.map_err(refused)?,
            Err(_) => {
                return Err(Refusal::new(RefusalCode::ConnectTimeout, format!("{target} did not answer in time")));
            }
        }
        if let Some(error) = stream.take_error().map_err(refused)? {
            return Err(refused(error));
        }
    }
    Socket::of_application(stream).map_err(refused)
}

fn start_connect(target: SocketAddr) -> io::Result<TcpStream> {
    let socket = RawSocket::new(Domain::for_address(target), Type::STREAM.nonblocking(), None)?;
    match socket.connect(&SockAddr::from(target)) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    TcpStream::from_std(StdTcpStream::from(socket))
}
