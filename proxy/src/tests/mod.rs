//! Pairs of real proxies over loopback: real TLS, real policies, real workers. Only the packet filter and the node
//! daemon are missing: listeners are bound here, and the destination of a captured connection is fixed.

mod allocations;
mod counting;
mod enforcement;
mod flows;
mod hostile;
mod pool;
mod resources;
mod shared;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use opencluster_identity::authority::{Issuer, Root};
use opencluster_identity::key::PrivateKey;
use opencluster_identity::revocation::RevocationSet;
use opencluster_identity::svid::Svid;
use opencluster_identity::{SpiffeId, TrustDomain};
use opencluster_policy::index::Index;
use opencluster_policy::resource::{Metadata, NodeSpec, Object, Resource};
use opencluster_policy::snapshot::Snapshot;

use crate::access_log::{self, AccessLog};
use crate::capture::Destination;
use crate::limits::Limits;
use crate::shared::{Node, Shared, boottime};
use crate::tunnel::info::wall_clock;
use crate::worker::listen::Purpose;
use crate::worker::{self, Command, Handle};

pub(crate) const HOUR: Duration = Duration::from_hours(1);
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "did not happen in time: {what}");
        thread::park_timeout(Duration::from_millis(5));
    }
}

/// Two nodes, `a` and `b`, with a workload of the same name each; a service `echo` on b.
pub(crate) struct World {
    pub(crate) domain: TrustDomain,
    pub(crate) issuer: Issuer,
    pub(crate) root: Root,
    pub(crate) a: Site,
    pub(crate) b: Site,
    /// Where the service's application listens.
    pub(crate) target: SocketAddr,
    version: AtomicU64,
}

/// One node's proxy.
pub(crate) struct Site {
    pub(crate) shared: Arc<Shared>,
    pub(crate) workers: Vec<Handle>,
    pub(crate) address: IpAddr,
    pub(crate) tunnel: SocketAddr,
    /// Where captured connections would be redirected to.
    pub(crate) capture: SocketAddr,
    pub(crate) workload: SpiffeId,
}

pub(crate) const ALLOW: &str = "
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo}
spec: {to: {service: echo}, from: [{workload: a}]}
";

pub(crate) const NO_POLICY: &str = "";

impl World {
    /// Everything allowed, one worker each; the application is `app`, a thread for each connection.
    pub(crate) fn new(app: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        Self::with(app, &Limits::default(), 1)
    }

    pub(crate) fn with(app: impl Fn(TcpStream) + Send + Sync + 'static, limits: &Limits, workers: usize) -> Self {
        let world = Self::without_app(limits, workers);
        serve(TcpListener::bind(world.target).expect("the application's port"), app);
        world
    }

    /// Nobody listens on the service's port.
    pub(crate) fn without_app(limits: &Limits, workers: usize) -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        // Each world has addresses of its own, so that tests run side by side.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let address = |host: u8| IpAddr::V4(Ipv4Addr::new(127, 77, number, host));
        let (log, writer) = access_log::channel();
        thread::spawn(move || writer.run(io::sink()));

        let domain = TrustDomain::parse("test.example").expect("domain");
        let root = Root::create(&domain, 24 * HOUR, wall_clock()).expect("root");
        let issuer = root.create_issuer(12 * HOUR, wall_clock()).expect("issuer");
        let target = free_port(address(12));
        let a = Site::start(&domain, "a", address(11), limits, workers, target, log.clone());
        let b = Site::start(&domain, "b", address(12), limits, workers, target, log);
        let world = Self { domain, issuer, root, a, b, target, version: AtomicU64::new(0) };
        for site in [&world.a, &world.b] {
            world.install(site, HOUR);
            site.shared.trust.replace_bundle(world.root.bundle().expect("bundle")).expect("bundle");
            site.shared.trust.replace_revocations(RevocationSet::new(1));
            site.shared.set_lease(boottime() + 3600 * 1_000_000_000);
        }
        world.apply(ALLOW);
        world
    }

    /// Issues and installs a site's certificate.
    pub(crate) fn install(&self, site: &Site, ttl: Duration) {
        let svid = self.svid(&site.workload, ttl);
        site.shared.svids.install(svid);
    }

    pub(crate) fn svid(&self, id: &SpiffeId, ttl: Duration) -> Svid {
        let key = PrivateKey::generate().expect("key");
        let csr = key.csr_der(id).expect("CSR");
        let issued = self.issuer.issue(&csr, id, ttl, wall_clock()).expect("issued");
        Svid::new(id, issued.chain, key).expect("SVID")
    }

    /// Puts nodes, workloads, the service and these policies in force everywhere.
    pub(crate) fn apply(&self, policies: &str) {
        let index = self.index(policies);
        self.a.shared.set_index(Arc::clone(&index));
        self.b.shared.set_index(index);
    }

    pub(crate) fn index(&self, policies: &str) -> Arc<Index> {
        let text = format!(
            "
apiVersion: opencluster/v1
kind: Workload
metadata: {{name: a}}
spec: {{nodes: [a]}}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {{name: b}}
spec: {{nodes: [b]}}
---
apiVersion: opencluster/v1
kind: Service
metadata: {{name: echo}}
spec: {{ports: [{{port: {}}}], workloads: [b]}}
{policies}",
            self.target.port(),
        );
        let mut resources = Resource::parse_documents(&text).expect("valid resources");
        // Written by hand, because no operator may give a node a loopback address.
        for (name, site) in [("a", &self.a), ("b", &self.b)] {
            let metadata = Metadata {
                name: name.to_owned(),
                namespace: String::new(),
                labels: std::collections::BTreeMap::new(),
                resource_version: None,
            };
            let spec = NodeSpec { addresses: vec![site.address], tunnel_port: site.tunnel.port(), max_age: None };
            resources.push(Resource::Node(Object { metadata, spec }));
        }
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        Arc::new(Index::compile(&self.domain, &Snapshot::new(version, resources)))
    }

    /// A connection of workload a to the service, as the packet filter would redirect it.
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.a.capture).expect("the capture listener");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream.set_nodelay(true).expect("nodelay");
        stream
    }

    /// One round trip through everything.
    pub(crate) fn echo(stream: &mut TcpStream) {
        stream.write_all(b"marco").expect("write");
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).expect("read");
        assert_eq!(&answer, b"marco");
    }

    pub(crate) fn metrics(site: &Site) -> String {
        site.shared.metrics.encode().expect("metrics")
    }
}

impl Site {
    fn start(
        domain: &TrustDomain,
        name: &str,
        address: IpAddr,
        limits: &Limits,
        workers: usize,
        target: SocketAddr,
        log: AccessLog,
    ) -> Self {
        let node = Node { trust_domain: domain.clone(), name: name.to_owned(), addresses: vec![address] };
        let shared = Arc::new(Shared::new(node, limits.clone(), workers, log));
        let workload = SpiffeId::workload(domain, "default", name).expect("id");
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        let workers = runtime.block_on(worker::start(&shared, workers, false)).expect("workers");
        let tunnel = listen(&workers, address, &Purpose::Tunnel);
        let capture = Purpose::Capture(Arc::new(workload.clone()), Destination::Fixed(target));
        let capture = listen(&workers, IpAddr::V4(Ipv4Addr::LOCALHOST), &capture);
        Self { shared, workers, address, tunnel, capture, workload }
    }
}

/// Binds one listener for each worker to the same port.
fn listen(workers: &[Handle], address: IpAddr, purpose: &Purpose) -> SocketAddr {
    let mut bound = SocketAddr::new(address, 0);
    for worker in workers {
        let socket =
            socket2::Socket::new(socket2::Domain::for_address(bound), socket2::Type::STREAM, None).expect("socket");
        socket.set_reuse_port(true).expect("reuse port");
        socket.bind(&bound.into()).expect("bind");
        socket.listen(1024).expect("listen");
        socket.set_nonblocking(true).expect("nonblocking");
        bound = socket.local_addr().expect("address").as_socket().expect("IP");
        let command = worker.pass(&TcpListener::from(socket), purpose.clone()).expect("pass");
        worker.commands.blocking_send(command).expect("worker");
    }
    bound
}

fn free_port(address: IpAddr) -> SocketAddr {
    TcpListener::bind((address, 0)).expect("bind").local_addr().expect("address")
}

/// Serves each connection on a thread of its own.
pub(crate) fn serve(listener: TcpListener, app: impl Fn(TcpStream) + Send + Sync + 'static) {
    let app = Arc::new(app);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let app = Arc::clone(&app);
            let Ok(stream) = stream else {
                // Descriptors are scarce: some tests see to it.
                thread::park_timeout(Duration::from_millis(10));
                continue;
            };
            stream.set_nodelay(true).expect("nodelay");
            thread::spawn(move || app(stream));
        }
    });
}

/// Sends back what arrives, until the end or an error.
pub(crate) fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) if stream.write_all(&buffer[..read]).is_ok() => {}
            _ => return,
        }
    }
    // The other side may have gone meanwhile: then there is nothing to end.
    if let Err(error) = stream.shutdown(Shutdown::Write) {
        assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    }
}

/// Whether the connection is dead: reset, or ended without a byte.
pub(crate) fn is_cut(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0; 16]), Ok(0))
        || matches!(stream.take_error(), Ok(Some(_)))
        || matches!(stream.write(b"x"), Err(error) if error.kind() != io::ErrorKind::WouldBlock)
}

/// (received, sent) of every live flow of a site.
pub(crate) fn live_flows(site: &Site) -> Vec<(u64, u64)> {
    site.workers
        .iter()
        .flat_map(|worker| {
            let (reply, answer) = tokio::sync::oneshot::channel();
            worker.commands.blocking_send(Command::Flows(reply)).expect("worker");
            answer.blocking_recv().expect("flows")
        })
        .map(|flow| {
            let flow = serde_json::to_value(flow).expect("JSON");
            (flow["bytes_received"].as_u64().expect("number"), flow["bytes_sent"].as_u64().expect("number"))
        })
        .collect()
}
