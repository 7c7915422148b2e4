//! The real program, confined as in production, obeying a node daemon that is played by the test: two proxies in a
//! network namespace of their own, with a real redirect.
//!
//! Needs root, `unshare`, `setpriv`, `ip` and `nft`, like everything that touches namespaces in this tree.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use opencluster_api::control::{Certificate, ConfigUpdate, Document, DocumentKey, RevocationSet, Sever, TrustBundle};
use opencluster_api::local::{
    Channel, Drain, Identities, Inbox, Lease, Listener, Setup, Status, ToDaemon, ToProxy, listener, to_daemon, to_proxy,
};
use opencluster_identity::authority::{Issuer, Root};
use opencluster_identity::{SpiffeId, TrustDomain, UnixTime};
use opencluster_policy::resource::Resource;

const HOUR: Duration = Duration::from_hours(1);
const PATIENCE: Duration = Duration::from_secs(10);
const TUNNEL_PORT: u16 = 15_443;
const CAPTURE_PORT: u16 = 15_100;

const RESOURCES: &str = "
apiVersion: opencluster/v1
kind: Node
metadata: {name: a}
spec: {addresses: [10.9.0.1, 'fd09::1']}
---
apiVersion: opencluster/v1
kind: Node
metadata: {name: b}
spec: {addresses: [10.9.0.2, 'fd09::2']}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {name: a}
spec: {nodes: [a]}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {name: b}
spec: {nodes: [b]}
---
apiVersion: opencluster/v1
kind: Service
metadata: {name: echo}
spec: {ports: [{port: 9000}], workloads: [b]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo}
spec: {to: {service: echo}, from: [{workload: a}]}
";

const NAMESPACE: &str = "
ip link set lo up
ip addr add 10.9.0.1/32 dev lo
ip addr add 10.9.0.2/32 dev lo
ip addr add fd09::1/128 dev lo nodad
ip addr add fd09::2/128 dev lo nodad
nft -f - <<END
table inet capture {
  chain output {
    type nat hook output priority -100;
    meta skuid 0 tcp dport 9000 redirect to :15100
  }
}
END
exec \"$@\"
";

#[test]
fn r30_two_confined_processes_carry_redirected_connections() {
    let test = std::env::current_exe().expect("this test");
    let output = Command::new("unshare")
        .args(["--net", "--mount", "sh", "-ec", NAMESPACE, "sh"])
        .arg(test)
        .args(["--ignored", "--exact", "inside_a_namespace", "--nocapture"])
        .output()
        .expect("unshare");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{errors}");
}

#[test]
#[ignore = "run by r30_two_confined_processes_carry_redirected_connections in a network namespace"]
fn inside_a_namespace() {
    let cluster = Cluster::new();
    serve_echo();
    let a = Proxy::start(&cluster, "a", &["10.9.0.1", "fd09::1"], true);
    let b = Proxy::start(&cluster, "b", &["10.9.0.2", "fd09::2"], false);

    for (proxy, held) in [(&a, "spiffe://test.example/ns/default/sa/a"), (&b, "spiffe://test.example/ns/default/sa/b")]
    {
        let status = proxy.wait("ready with a certificate", |status| status.ready && status.identities_ready == [held]);
        assert_eq!((status.config_version, status.revocation_version), (1, 1));
        for measure in ["no_capabilities", "no_new_privs", "not_dumpable", "seccomp:worker", "seccomp:control"] {
            assert!(status.sandbox.iter().any(|applied| applied == measure), "{measure}: {:?}", status.sandbox);
        }
    }

    for target in ["10.9.0.2:9000", "[fd09::2]:9000"] {
        echo(target.parse().expect("address"), b"through two processes");
        large_transfer(target.parse().expect("address"));
    }
    let log = a.log_line(|line| line["bytes_sent"] == 21 && line["reason"] == "finished");
    assert_eq!(log["source"], "spiffe://test.example/ns/default/sa/a");
    assert_eq!(log["destination"], "spiffe://test.example/ns/default/sa/b");
    assert_eq!(log["tls"], "TLSv1.3");
    assert_eq!(log["verdict"], "allowed");
    assert_eq!(log["policy"], "default/a-to-echo");

    assert!(a.get("/metrics").contains("opencluster_proxy_flows_total{direction=\"outbound\""));
    assert!(a.get("/healthz").contains("200 OK"));
    assert!(a.get("/flows").contains("[]"));

    // A delta without the policy cuts a live flow.
    let mut live = connect("10.9.0.2:9000".parse().expect("address"));
    live.write_all(b"x").expect("write");
    live.read_exact(&mut [0]).expect("read");
    let key = DocumentKey { kind: "Policy".into(), namespace: "default".into(), name: "a-to-echo".into() };
    let update = ConfigUpdate { version: 2, base_version: 1, upserts: Vec::new(), deletes: vec![key] };
    b.send(to_proxy::Message::Config(update), &[]);
    b.wait("the delta", |status| status.config_version == 2);
    assert!(matches!(live.read(&mut [0]), Ok(0) | Err(_)));

    // Draining ends the process; severing makes it useless for good.
    a.send(to_proxy::Message::Drain(Drain { deadline_ms: 1000 }), &[]);
    a.ends();
    b.send(to_proxy::Message::Sever(Sever { reason: "test".into() }), &[]);
    let status = b.wait("severed", |status| status.severed);
    assert!(status.identities_ready.is_empty() && !status.ready);
}

struct Cluster {
    domain: TrustDomain,
    root: Root,
    issuer: Issuer,
}

fn now() -> UnixTime {
    UnixTime::since_unix_epoch(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("clock"))
}

impl Cluster {
    fn new() -> Arc<Self> {
        let domain = TrustDomain::parse("test.example").expect("domain");
        let root = Root::create(&domain, 24 * HOUR, now()).expect("root");
        let issuer = root.create_issuer(12 * HOUR, now()).expect("issuer");
        Arc::new(Self { domain, root, issuer })
    }

    fn config() -> ConfigUpdate {
        let documents = Resource::parse_documents(RESOURCES).expect("resources").into_iter().map(|resource| {
            let key = resource.key();
            Document {
                key: Some(DocumentKey { kind: key.kind.name().into(), namespace: key.namespace, name: key.name }),
                json: serde_json::to_vec(&resource.to_json()).expect("JSON"),
            }
        });
        ConfigUpdate { version: 1, base_version: 0, upserts: documents.collect(), deletes: Vec::new() }
    }
}

struct Proxy {
    child: std::sync::Mutex<Child>,
    runtime: tokio::runtime::Runtime,
    channel: Arc<Channel>,
    statuses: std::sync::Mutex<Receiver<Status>>,
    log: std::sync::Mutex<Receiver<serde_json::Value>>,
    admin: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Proxy {
    fn start(cluster: &Arc<Cluster>, name: &str, addresses: &[&str], capture: bool) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).expect("inheritable");
        let mut child = Command::new("setpriv")
            .args(["--reuid=65533", "--regid=65533", "--clear-groups", "--no-new-privs"])
            .args(["--inh-caps=-all", "--bounding-set=-all"])
            .arg(env!("CARGO_BIN_EXE_opencluster-proxy"))
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the proxy");
        drop(theirs);

        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (lines, log) = sync_channel(1000);
        thread::spawn(move || {
            for line in stdout.lines() {
                let line = serde_json::from_str(&line.expect("a line")).expect("JSON");
                if lines.send(line).is_err() {
                    return;
                }
            }
        });

        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
        let channel = Arc::new(runtime.block_on(async { Channel::new(ours) }).expect("channel"));
        let (sender, statuses) = sync_channel(1000);
        runtime.spawn(answer(Arc::clone(&channel), Arc::clone(cluster), sender));
        let directory = tempfile::tempdir().expect("directory");
        let admin = directory.path().join("admin.sock");
        let child = std::sync::Mutex::new(child);
        let (statuses, log) = (std::sync::Mutex::new(statuses), std::sync::Mutex::new(log));
        let proxy = Self { child, runtime, channel, statuses, log, admin, _directory: directory };
        proxy.set_up(cluster, name, addresses, capture);
        proxy
    }

    fn set_up(&self, cluster: &Cluster, name: &str, addresses: &[&str], capture: bool) {
        use to_proxy::Message;
        let setup = Setup {
            trust_domain: cluster.domain.to_string(),
            node: name.into(),
            addresses: addresses.iter().map(ToString::to_string).collect(),
            tunnel_port: TUNNEL_PORT.into(),
            workers: 2,
            leased_tunnels_only: false,
            busy_poll_us: 150,
        };
        self.send(Message::Setup(setup), &[]);
        let listen = |kind: listener::Kind, bound: Vec<TcpListener>, workers: Vec<u32>| {
            let message = Listener {
                kind: kind.into(),
                workload_namespace: "default".into(),
                workload_name: name.into(),
                descriptors: bound.len() as u32,
                workers,
            };
            self.send(Message::Listener(message), &bound.iter().map(AsFd::as_fd).collect::<Vec<_>>());
        };
        let (mut tunnels, mut workers) = (Vec::new(), Vec::new());
        for address in addresses {
            for worker in 0..2 {
                tunnels.push(bind(SocketAddr::new(address.parse().expect("address"), TUNNEL_PORT)));
                workers.push(worker);
            }
        }
        listen(listener::Kind::Tunnel, tunnels, workers.clone());
        if capture {
            let captures = ["127.0.0.1", "127.0.0.1", "::1", "::1"];
            let bound = captures.iter().map(|ip| bind(SocketAddr::new(ip.parse().expect("IP"), CAPTURE_PORT)));
            listen(listener::Kind::Capture, bound.collect(), workers);
        }
        let admin = UnixListener::bind(&self.admin).expect("admin socket");
        let message = Listener { kind: listener::Kind::Admin.into(), descriptors: 1, ..Listener::default() };
        self.send(Message::Listener(message), &[admin.as_fd()]);

        let roots_der = vec![cluster.root.certificate().to_vec()];
        self.send(Message::TrustBundle(TrustBundle { version: 1, roots_der }), &[]);
        self.send(Message::Revocations(RevocationSet { version: 1, entries: Vec::new() }), &[]);
        self.send(Message::Config(Cluster::config()), &[]);
        let id = SpiffeId::workload(&cluster.domain, "default", name).expect("id");
        self.send(Message::Identities(Identities { spiffe_ids: vec![id.to_string()] }), &[]);
        let deadline_boottime_ns = opencluster_proxy::shared::boottime() + 60_000_000_000;
        self.send(Message::Lease(Lease { deadline_boottime_ns }), &[]);
    }

    fn send(&self, message: to_proxy::Message, descriptors: &[std::os::fd::BorrowedFd<'_>]) {
        let message = ToProxy { message: Some(message) };
        self.runtime.block_on(self.channel.send(&message, descriptors)).expect("send");
    }

    fn wait(&self, what: &str, condition: impl Fn(&Status) -> bool) -> Status {
        let statuses = self.statuses.lock().expect("lock");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let status = statuses.recv_timeout(left).unwrap_or_else(|_| panic!("not {what}"));
            if condition(&status) {
                return status;
            }
        }
    }

    fn log_line(&self, condition: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        let log = self.log.lock().expect("lock");
        loop {
            let line = log.recv_timeout(PATIENCE).expect("a log line");
            if condition(&line) {
                return line;
            }
        }
    }

    fn get(&self, path: &str) -> String {
        let mut stream = UnixStream::connect(&self.admin).expect("admin socket");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n").expect("request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        answer
    }

    fn ends(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.lock().expect("lock").try_wait().expect("wait") {
                assert!(status.success(), "{status}");
                return;
            }
            assert!(Instant::now() < deadline, "the proxy did not end");
            thread::park_timeout(Duration::from_millis(10));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut child = self.child.lock().expect("lock");
        if child.try_wait().expect("wait").is_none() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }
}

/// The node daemon's part: certificates, and noting what is reported.
async fn answer(channel: Arc<Channel>, cluster: Arc<Cluster>, statuses: std::sync::mpsc::SyncSender<Status>) {
    let mut inbox = Inbox::default();
    let mut issued: HashMap<String, u32> = HashMap::new();
    while let Ok(message) = channel.receive::<ToDaemon>(&mut inbox).await {
        match message.message {
            Some(to_daemon::Message::CertificateRequest(request)) => {
                let id = SpiffeId::parse(&request.spiffe_id).expect("id");
                *issued.entry(request.spiffe_id).or_default() += 1;
                let chain = cluster.issuer.issue(&request.csr_der, &id, HOUR, now()).expect("issued").chain;
                let certificate = Certificate {
                    request_id: request.request_id,
                    chain_der: chain.iter().map(|certificate| certificate.to_vec()).collect(),
                    refusal: String::new(),
                };
                let message = ToProxy { message: Some(to_proxy::Message::Certificate(certificate)) };
                channel.send(&message, &[]).await.expect("send");
            }
            Some(to_daemon::Message::Status(status)) => {
                if statuses.send(status).is_err() {
                    return;
                }
            }
            None => panic!("an unknown message"),
        }
    }
}

fn bind(address: SocketAddr) -> TcpListener {
    let socket =
        socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None).expect("socket");
    if address.is_ipv6() {
        socket.set_only_v6(true).expect("v6 only");
    }
    socket.set_reuse_port(true).expect("reuse port");
    socket.bind(&address.into()).expect("bind");
    socket.listen(1024).expect("listen");
    TcpListener::from(socket)
}

fn serve_echo() {
    for ip in ["10.9.0.2", "fd09::2"] {
        let listener = TcpListener::bind((ip.parse::<IpAddr>().expect("IP"), 9000)).expect("bind");
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("accept");
                thread::spawn(move || {
                    let mut reader = stream.try_clone().expect("clone");
                    // The flow may be cut: that is what some of the test is about.
                    if std::io::copy(&mut reader, &mut stream).is_ok() {
                        stream.shutdown(Shutdown::Write).expect("shutdown");
                    }
                });
            }
        });
    }
}

fn connect(target: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(target).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

fn echo(target: SocketAddr, text: &[u8]) {
    let mut stream = connect(target);
    stream.write_all(text).expect("write");
    stream.shutdown(Shutdown::Write).expect("shutdown");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("read");
    assert_eq!(answer, text);
}

fn large_transfer(target: SocketAddr) {
    let stream = connect(target);
    let mut writer = stream.try_clone().expect("clone");
    let bytes: Vec<u8> = (0..8_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let sent = bytes.clone();
    let sending = thread::spawn(move || {
        writer.write_all(&sent).expect("write");
        writer.shutdown(Shutdown::Write).expect("shutdown");
    });
    let (mut stream, mut answer) = (stream, Vec::new());
    stream.read_to_end(&mut answer).expect("read");
    sending.join().expect("sent");
    assert!(answer == bytes, "{} of {} bytes", answer.len(), bytes.len());
}
