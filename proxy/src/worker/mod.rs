//! Workers: threads (one for two cores), each with a runtime, listeners, pools and flows of its own. A flow stays on its
//! thread; what may cross, once, is a tunnel, to where the flow is that moves to it.

pub mod busy_poll;
pub mod descriptors;
pub mod doors;
pub mod listen;
pub mod registry;
pub mod report;
pub mod small_first;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::collections::hash_map::{Entry, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr, TcpListener};
use std::rc::Rc;
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use opencluster_identity::SpiffeId;
use opencluster_identity::tls::{ClientAuth, ServerIdentity, TlsError, server_config};
use rustls::ServerConfig;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, oneshot};

use self::doors::{Inside, Passage};
use self::listen::{Listening, Purpose};
use self::registry::{Cut, Flow, Registry};
use self::report::{Live, Verdict};
use crate::access_log::{self, BATCH};
use crate::authz;
use crate::relay::buffer;
use crate::relay::socket::Socket;
use crate::sandbox::{self, Applied, SandboxError};
use crate::shared::{NotReady, Shared, boottime};
use crate::tunnel::inbound;
use crate::tunnel::info::TunnelInfo;
use crate::tunnel::link::Tunnel;
use crate::tunnel::oct;
use crate::tunnel::oct::frame::Continue;
use crate::tunnel::pool::Pools;
use crate::tunnel::shared::stream::{Moving, Stream};

/// How often a worker hands over its log, accounts and sweeps.
const TICK: Duration = Duration::from_millis(250);

/// Polls of tasks between two looks at the sockets. Small, so that a bulk flow that always has work does not keep the
/// others from being noticed.
const EVENT_INTERVAL: u32 = 8;

/// Commands that may wait for a worker.
const COMMANDS: usize = 64;

/// Why a worker did not start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The thread or its runtime.
    #[error("worker {number} could not start: {source}")]
    Start {
        /// Which.
        number: usize,
        /// Why.
        source: io::Error,
    },
    /// Its TLS configuration.
    #[error("worker {number}: {source}")]
    Tls {
        /// Which.
        number: usize,
        /// Why.
        source: TlsError,
    },
    /// Its sandbox.
    #[error("worker {number}: {source}")]
    Sandbox {
        /// Which.
        number: usize,
        /// Why.
        source: SandboxError,
    },
    /// It ended before it was ready.
    #[error("worker {0} ended while it started")]
    Died(usize),
}

/// What a worker is told.
#[derive(Debug)]
pub enum Command {
    /// Serve the listener that has been passed ([`Handle::pass`]).
    Listen(Purpose),
    /// Stop listening for this workload's connections.
    Unlisten(Arc<SpiffeId>),
    /// Describe the flows.
    Flows(oneshot::Sender<Vec<Live>>),
    /// Stop listening; cut what is left at the deadline, then end.
    Drain(Instant),
}

/// A running worker, seen from the control thread.
#[derive(Debug)]
pub struct Handle {
    /// Where commands go.
    pub commands: mpsc::Sender<Command>,
    /// Its thread.
    pub thread: JoinHandle<()>,
    /// What its sandbox applied.
    pub applied: Applied,
    descriptors: descriptors::Sender,
}

impl Handle {
    /// Passes a listener to the worker's own table: the command that must follow, in the order of passing.
    pub fn pass(&self, listener: &TcpListener, purpose: Purpose) -> io::Result<Command> {
        self.descriptors.pass(listener)?;
        Ok(Command::Listen(purpose))
    }
}

/// A worker's own state. Only its thread sees it.
#[derive(Debug)]
pub struct Worker {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// Its flows and inbound tunnels.
    pub registry: Rc<Registry>,
    /// Its warm tunnels.
    pub pools: Pools,
    number: usize,
    handshakes: RefCell<Handshakes>,
    peers: RefCell<HashMap<Arc<SpiffeId>, usize>>,
    names: RefCell<HashSet<Arc<SpiffeId>>>,
    log: RefCell<Vec<access_log::Entry>>,
    next_flow: Cell<u64>,
    /// Accepted flows on shared tunnels of others, which may yet move to a tunnel of their own.
    movable: RefCell<HashMap<u64, Rc<Stream>>>,
    ticks: Cell<u64>,
}

/// Starts so many workers and waits until their sandboxes are in force. An error ends the process.
pub async fn start(shared: &Arc<Shared>, count: usize, sandboxed: bool) -> Result<Vec<Handle>, WorkerError> {
    let everybody = Arc::new(Barrier::new(count));
    let mut starting = Vec::with_capacity(count);
    let mut doors = Vec::with_capacity(count);
    let mut insides = Vec::with_capacity(count);
    for number in 0..count {
        let (door, inside) = doors::door().map_err(|source| WorkerError::Start { number, source })?;
        doors.push(door);
        insides.push(inside);
    }
    shared.install_doors(doors);
    for (number, inside) in insides.into_iter().enumerate() {
        let failed = |source| WorkerError::Start { number, source };
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let (descriptors, passed) = descriptors::pair().map_err(failed)?;
        let (ready, started) = oneshot::channel();
        let start = Start { shared: Arc::clone(shared), number, sandboxed, everybody: Arc::clone(&everybody) };
        let thread = std::thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(move || run_thread(&start, Inbox { commands: inbox, listeners: passed, inside }, ready))
            .map_err(failed)?;
        starting.push((commands, descriptors, thread, started));
    }
    let mut workers = Vec::with_capacity(count);
    for (number, (commands, descriptors, thread, started)) in starting.into_iter().enumerate() {
        let applied = started.await.unwrap_or(Err(WorkerError::Died(number)))?;
        workers.push(Handle { commands, thread, applied, descriptors });
    }
    Ok(workers)
}

struct Start {
    shared: Arc<Shared>,
    number: usize,
    sandboxed: bool,
    /// All workers' threads.
    everybody: Arc<Barrier>,
}

fn run_thread(start: &Start, inbox: Inbox, ready: oneshot::Sender<Result<Applied, WorkerError>>) {
    let (runtime, config, applied) = match prepare(start) {
        Ok(prepared) => prepared,
        Err(error) => {
            if ready.send(Err(error)).is_err() {
                tracing::error!(worker = start.number, "a worker failed, and nobody asked");
            }
            return;
        }
    };
    if ready.send(Ok(applied)).is_err() {
        return;
    }
    let worker = Rc::new(Worker::new(Arc::clone(&start.shared), start.number));
    runtime.block_on(worker.run(inbox, config));
}

/// What comes to a worker from other threads.
struct Inbox {
    commands: mpsc::Receiver<Command>,
    listeners: descriptors::Receiver,
    inside: Inside,
}

type Prepared = (tokio::runtime::LocalRuntime, Arc<ServerConfig>, Applied);

fn prepare(start: &Start) -> Result<Prepared, WorkerError> {
    let Start { shared, number, sandboxed, everybody } = start;
    let number = *number;
    let failed = |source| WorkerError::Start { number, source };
    buffer::prepare();
    busy_poll::prepare(shared.limits.busy_poll);
    small_first::prepare();
    let runtime = Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .event_interval(EVENT_INTERVAL)
        .on_thread_park(busy_poll::before_park)
        .build_local(LocalOptions::default());
    // Every worker can wake every other: the descriptors for that are to be in all tables.
    everybody.wait();
    let runtime = runtime.map_err(failed)?;
    let identity = ServerIdentity::ByServerName(shared.svids.clone());
    let config = server_config(identity, &shared.trust, ClientAuth::Required, &[oct::SHARED_ALPN, oct::ALPN])
        .map_err(|source| WorkerError::Tls { number, source })?;
    // The record layer takes over the traffic keys: see tunnel/tls/record.rs.
    let mut config = Arc::unwrap_or_clone(config);
    config.enable_secret_extraction = true;
    let applied = if *sandboxed {
        descriptors::leave_common_table().map_err(failed)?;
        sandbox::confine_worker().map_err(|source| WorkerError::Sandbox { number, source })?
    } else {
        Applied::default()
    };
    Ok((runtime, Arc::new(config), applied))
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, number: usize) -> Self {
        Self {
            registry: Rc::default(),
            pools: Pools::new(Arc::clone(&shared)),
            number,
            handshakes: RefCell::default(),
            peers: RefCell::default(),
            names: RefCell::default(),
            log: RefCell::default(),
            // The upper half tells processes and workers apart, the lower half counts.
            next_flow: Cell::new(u64::from(rand::random::<u32>()) << 32),
            movable: RefCell::default(),
            ticks: Cell::new(0),
            shared,
        }
    }

    async fn run(self: Rc<Self>, inbox: Inbox, config: Arc<ServerConfig>) {
        let Inbox { mut commands, listeners, mut inside } = inbox;
        let mut listening = Listening::new(config);
        let mut deadline: Option<Instant> = None;
        tokio::task::spawn_local(busy_poll::lookout());
        tokio::task::spawn_local(small_first::warden());
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Listen(purpose)) => match listeners.take() {
                        // Taken in any case: one for each command.
                        Ok(_) if deadline.is_some() || self.shared.is_severed() => {}
                        Ok(listener) => listening.serve(&self, listener.into(), purpose),
                        Err(error) => tracing::error!(%error, "a listener did not arrive"),
                    },
                    Some(Command::Unlisten(workload)) => listening.stop_workload(&workload),
                    Some(Command::Flows(reply)) => {
                        let flows = self.registry.flows().iter().map(|flow| Live::of(flow)).collect();
                        if reply.send(flows).is_err() {
                            tracing::debug!("whoever asked for the flows has gone");
                        }
                    }
                    Some(Command::Drain(at)) => {
                        listening.stop();
                        deadline = Some(at);
                    }
                    // The control thread is gone: so is the reason to go on.
                    None => break,
                },
                Some((socket, passage)) = inside.next() => self.receive_tunnel(socket, passage),
                () = self.shared.changed(self.number) => self.enforce(&mut listening),
                () = self.lease_end() => self.enforce(&mut listening),
                _ = tick.tick() => self.tick(),
            }
            if let Some(at) = deadline {
                if self.registry.flow_count() == 0 {
                    break;
                }
                if Instant::now() >= at {
                    self.registry.cut_all(&Cut::Draining);
                    // One turn for the flows to end in, so that their resets and log lines leave.
                    tokio::task::yield_now().await;
                    break;
                }
            }
        }
        listening.stop();
        self.registry.cut_all(&Cut::Draining);
        self.pools.clear(&Cut::Draining);
        tokio::task::yield_now().await;
        self.shared.note_ended(self.number);
        self.flush_log();
    }

    /// Resolves when the lease that is known now has ended, without having been extended.
    async fn lease_end(&self) {
        loop {
            let Some(lease) = self.shared.lease() else { return std::future::pending().await };
            if self.shared.is_severed() {
                return std::future::pending().await;
            }
            let left = lease.saturating_sub(boottime());
            if left == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_nanos(left)).await;
        }
    }

    /// Something changed: policy, revocations, identities, lease. What may not go on ends now.
    fn enforce(&self, listening: &mut Listening) {
        let revocations = self.shared.trust.revocations().version();
        self.enforce_all(listening);
        self.shared.note_enforced(self.number, revocations);
    }

    fn enforce_all(&self, listening: &mut Listening) {
        if self.shared.alive() == Err(NotReady::LeaseExpired) {
            tracing::error!("the controller's lease has run out: cutting every flow and dropping every key");
            self.registry.cut_all(&Cut::LeaseExpired);
            self.shared.sever();
        }
        if self.shared.is_severed() {
            listening.stop();
            self.registry.cut_all(&Cut::Severed);
            self.pools.clear(&Cut::Severed);
            return;
        }
        for flow in self.registry.flows() {
            if let Err(cut) = authz::recheck(&self.shared, &flow) {
                flow.watch.cut(cut);
            }
        }
        for held in self.registry.held() {
            let gone = !self.shared.holds(&held.info.local.id);
            let reason = held.info.revoked(&self.shared.trust);
            if let Some(reason) = reason.or_else(|| gone.then(|| "its identity is not held any more".to_owned())) {
                held.watch.cut(Cut::Identity(reason));
            }
        }
        self.pools.enforce();
    }

    fn tick(&self) {
        self.flush_log();
        let ticks = self.ticks.get() + 1;
        self.ticks.set(ticks);
        let metrics = &self.shared.metrics;
        metrics.set_log_dropped(self.shared.log.dropped());
        metrics.polled(busy_poll::take_counts());
        metrics.bulk_rests.inc_by(small_first::take_count());
        let (flows, tunnels) = (self.registry.flow_count(), self.registry.held_count());
        let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
        metrics.note_worker(self.number, flows, tunnels, buffer::lent(), tasks);
        if ticks.is_multiple_of(4) {
            let now = Instant::now();
            let limits = &self.shared.limits;
            metrics.note_idle(self.number, self.pools.sweep(now));
            self.registry.cut_slow(now, limits.idle_timeout * 2, limits.open_timeout);
        }
    }

    /// Reports the end of a flow.
    pub fn report(&self, flow: &Flow, verdict: &Verdict) {
        self.shared.metrics.ended(flow.side, verdict.name);
        let mut log = self.log.borrow_mut();
        log.push(report::entry(&self.shared, flow, verdict));
        if log.len() >= BATCH {
            self.shared.log.submit(std::mem::take(&mut *log));
        }
    }

    fn flush_log(&self) {
        let batch = std::mem::take(&mut *self.log.borrow_mut());
        if !batch.is_empty() {
            self.shared.log.submit(batch);
        }
    }

    /// A flow ID and a trace ID.
    pub fn new_ids(&self) -> (u64, u128) {
        let id = self.next_flow.get();
        self.next_flow.set(id.wrapping_add(1));
        (id, rand::random())
    }

    /// Its place among the workers.
    pub fn number(&self) -> u16 {
        self.number as u16
    }

    // --- flows that move to a tunnel of their own -------------------------------------------------------------------

    /// Keeps an accepted flow of a shared tunnel findable until the answer is dropped.
    pub fn know_stream(self: &Rc<Self>, stream: &Rc<Stream>) -> KnownStream {
        self.movable.borrow_mut().insert(stream.flow.id, Rc::clone(stream));
        KnownStream { worker: Rc::clone(self), flow: stream.flow.id }
    }

    /// A flow that may move to a tunnel of these two identities.
    pub fn movable_stream(&self, flow: u64, info: &TunnelInfo) -> Option<Rc<Stream>> {
        let stream = self.movable.borrow().get(&flow).cloned()?;
        let same = {
            let tunnel = stream.flow.tunnel.borrow();
            tunnel.as_ref().is_some_and(|on| on.remote.id == info.remote.id && on.local.id == info.local.id)
        };
        let stays = matches!(*stream.moving.borrow(), Moving::No);
        (same && stays && !stream.exchange.borrow().is_over()).then_some(stream)
    }

    /// Passes a tunnel to the worker that has the flow; returns it if there is no such worker.
    pub fn pass_tunnel(&self, tunnel: Box<Tunnel>, info: &TunnelInfo, of: Continue) -> Result<(), Box<Tunnel>> {
        let Some(door) = self.shared.door(of.worker) else { return Err(tunnel) };
        let Some((socket, session)) = tunnel.into_parts() else { return Ok(()) };
        if let Err(error) = door.pass(&socket, Passage { session, info: info.clone(), of }) {
            tracing::debug!(%error, "a tunnel did not reach the worker of its flow");
        }
        Ok(())
    }

    fn receive_tunnel(self: &Rc<Self>, socket: io::Result<std::net::TcpStream>, passage: Passage) {
        let tunnel = socket.and_then(tokio::net::TcpStream::from_std).and_then(Socket::new);
        let Passage { session, info, of } = passage;
        match tunnel.map(|socket| Tunnel::new(socket, session, &[])) {
            Ok(Some(tunnel)) => {
                let task = inbound::serve_passed(Rc::clone(self), Box::new(tunnel), Rc::new(info), of);
                tokio::task::spawn_local(task);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "a tunnel that was passed is lost"),
        }
    }

    /// One shared copy of an identity.
    pub fn intern(&self, id: &SpiffeId) -> Arc<SpiffeId> {
        let mut names = self.names.borrow_mut();
        if let Some(known) = names.get(id) {
            return Arc::clone(known);
        }
        let id = Arc::new(id.clone());
        names.insert(Arc::clone(&id));
        id
    }

    /// Leave for one inbound handshake with this address, until it is dropped.
    pub fn handshake_slot(&self, address: IpAddr) -> Option<HandshakeSlot<'_>> {
        let mut handshakes = self.handshakes.borrow_mut();
        if handshakes.all >= self.shared.limits.inbound_handshakes {
            return None;
        }
        let network = network(address);
        let from_there = handshakes.by_network.entry(network).or_default();
        if *from_there >= self.shared.limits.inbound_handshakes_per_address {
            return None;
        }
        *from_there += 1;
        handshakes.all += 1;
        Some(HandshakeSlot { handshakes: &self.handshakes, network })
    }

    /// Leave for one inbound tunnel of this identity, until it is dropped.
    pub fn peer_slot(self: &Rc<Self>, peer: &Arc<SpiffeId>) -> Option<PeerSlot> {
        let mut peers = self.peers.borrow_mut();
        let count = peers.entry(Arc::clone(peer)).or_default();
        (*count < self.shared.limits.tunnels_per_peer).then(|| {
            *count += 1;
            PeerSlot { worker: Rc::clone(self), peer: Arc::clone(peer) }
        })
    }
}

/// Inbound handshakes that are under way.
#[derive(Debug, Default)]
struct Handshakes {
    all: usize,
    by_network: HashMap<IpAddr, usize>,
}

/// See [`Worker::handshake_slot`].
#[derive(Debug)]
pub struct HandshakeSlot<'a> {
    handshakes: &'a RefCell<Handshakes>,
    network: IpAddr,
}

impl Drop for HandshakeSlot<'_> {
    fn drop(&mut self) {
        let mut handshakes = self.handshakes.borrow_mut();
        handshakes.all -= 1;
        if let Entry::Occupied(mut from_there) = handshakes.by_network.entry(self.network) {
            *from_there.get_mut() -= 1;
            if *from_there.get() == 0 {
                from_there.remove();
            }
        }
    }
}

/// What counts as one address: a host has a whole /64 of IPv6 to itself.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// See [`Worker::know_stream`].
#[derive(Debug)]
pub struct KnownStream {
    worker: Rc<Worker>,
    flow: u64,
}

impl Drop for KnownStream {
    fn drop(&mut self) {
        self.worker.movable.borrow_mut().remove(&self.flow);
    }
}

/// See [`Worker::peer_slot`].
#[derive(Debug)]
pub struct PeerSlot {
    worker: Rc<Worker>,
    peer: Arc<SpiffeId>,
}

impl Drop for PeerSlot {
    fn drop(&mut self) {
        let mut peers = self.worker.peers.borrow_mut();
        if let Some(count) = peers.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.peer);
            }
        }
    }
}
