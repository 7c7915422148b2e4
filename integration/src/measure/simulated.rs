//! Many nodes of which only the session with the controller is real: enrolment, TLS, heartbeats, acknowledgements.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context, bail, ensure};
use hyper_util::rt::TokioIo;
use opencluster_api::control::control_client::ControlClient;
use opencluster_api::control::controller_message::Message as Down;
use opencluster_api::control::enrolment_client::EnrolmentClient;
use opencluster_api::control::node_message::Message as Up;
use opencluster_api::control::{Acknowledgement, EnrolRequest, EnrolResponse, Heartbeat, NodeHealth, NodeMessage};
use opencluster_identity::bundle::TrustBundle;
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::svid::{Svid, SvidStore};
use opencluster_identity::tls::{ExpectedPeer, client_config, enrolment_client_config};
use opencluster_identity::trust::Trust;
use opencluster_identity::{CertificateDer, SpiffeId};
use opencluster_integration::binaries::Binaries;
use opencluster_integration::figures::distribution;
use opencluster_integration::poll;
use opencluster_integration::state::StateDir;
use rustix::time::{ClockId, clock_gettime};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant as Moment;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use super::api::Api;

const DOMAIN: &str = "simulation.test";
const PATIENCE: Duration = Duration::from_mins(1);
/// Enrolments at the same time: the controller lets one address have no more connections without a certificate.
const AT_ONCE: usize = 32;

/// When a node got which revocation set.
type Arrivals = Arc<Mutex<Vec<(u64, Instant)>>>;

/// Measures with so many nodes.
pub(crate) fn measure(nodes: usize, rounds: usize) -> anyhow::Result<Value> {
    ensure!(nodes > rounds / 4, "{nodes} nodes are too few to revoke {} of them", rounds / 4);
    let controller = Controller::start()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let figures = runtime.block_on(run(&controller, nodes, rounds));
    runtime.shutdown_background();
    figures
}

async fn run(controller: &Controller, nodes: usize, rounds: usize) -> anyhow::Result<Value> {
    let root = fs::read_to_string(&controller.root)?;
    let token = fs::read_to_string(&controller.token)?;
    let mut api = Api::connect(&controller.socket, &root, &token).await?;
    eprintln!("simulation: {nodes} nodes enrol");
    api.call("POST", "/v1/apply", &documents(nodes)).await?;
    let arrivals = Arrivals::default();
    let trust = Trust::with_bundle(TrustBundle::from_pem(root.as_bytes())?);
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let mut enrolling = JoinSet::new();
    for number in 0..nodes {
        let answer = api.call("POST", &format!("/v1/nodes/{}/token", name(number)), "{}").await?;
        let token = answer["token"].as_str().context("a token")?.to_owned();
        let (trust, arrivals, permits) = (trust.clone(), Arc::clone(&arrivals), Arc::clone(&permits));
        let address = controller.nodes;
        enrolling.spawn(async move {
            let permit = permits.acquire().await?;
            let node = Node::enrol(&name(number), &token, address, &trust).await?;
            drop(permit);
            tokio::spawn(node.live(arrivals));
            anyhow::Ok(())
        });
    }
    while let Some(enrolled) = enrolling.join_next().await {
        enrolled??;
    }
    until_active(&mut api, nodes).await?;

    eprintln!("simulation: {rounds} revocations of workloads");
    let mut workload = Trials::default();
    for round in 0..rounds {
        let path = format!("/v1/workloads/default/w{}/revoke", round % nodes);
        workload.revoke(&mut api, &path, nodes, &arrivals).await?;
        api.call("DELETE", &format!("{path}?reason=measured"), "").await?;
    }
    // A node that is revoked stays so: fewer of them.
    let gone = (rounds / 4).max(1);
    eprintln!("simulation: {gone} revocations of nodes");
    let mut node = Trials::default();
    for round in 0..gone {
        let path = format!("/v1/nodes/{}/revoke", name(nodes - 1 - round));
        node.revoke(&mut api, &path, nodes - 1 - round, &arrivals).await?;
    }
    let lost = nodes - gone - active(&mut api).await?;
    ensure!(lost == 0, "{lost} healthy nodes were lost while it was measured");
    Ok(json!({"nodes": nodes, "workload": workload.figures(), "node": node.figures()}))
}

#[derive(Default)]
struct Trials {
    acknowledged: Vec<Duration>,
    last_arrivals: Vec<Duration>,
    arrivals: Vec<Duration>,
}

impl Trials {
    async fn revoke(&mut self, api: &mut Api, path: &str, expected: usize, arrivals: &Arrivals) -> anyhow::Result<()> {
        // Not in step with the heartbeats.
        tokio::time::sleep(Duration::from_millis(137)).await;
        arrivals.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let command = Instant::now();
        let answer = api.call("POST", path, r#"{"reason": "measured"}"#).await?;
        let took = command.elapsed();
        ensure!(answer["pending"] == json!([]), "{path}: {answer}");
        let acknowledged = answer["acknowledged"].as_array().map_or(0, Vec::len);
        ensure!(acknowledged == expected, "{path}: {acknowledged} of {expected} nodes acknowledged");
        let version = answer["version"].as_u64().context("a version")?;
        let all = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        let times: Vec<_> =
            all.iter().filter(|(of, _)| *of == version).map(|(_, at)| at.saturating_duration_since(command)).collect();
        self.acknowledged.push(took);
        self.last_arrivals.extend(times.iter().max());
        self.arrivals.extend(times);
        Ok(())
    }

    fn figures(&self) -> Value {
        json!({
            "last_acknowledgement_ms": distribution(&self.acknowledged),
            "last_arrival_ms": distribution(&self.last_arrivals),
            "arrival_ms": distribution(&self.arrivals),
        })
    }
}

fn name(number: usize) -> String {
    format!("n{number}")
}

fn documents(nodes: usize) -> String {
    let documents = (0..nodes).map(|number| {
        let node = json!({"apiVersion": "opencluster/v1", "kind": "Node", "metadata": {"name": name(number)},
            "spec": {"addresses": [format!("10.{}.{}.1", number / 250, number % 250)]}});
        let workload = json!({"apiVersion": "opencluster/v1", "kind": "Workload",
            "metadata": {"name": format!("w{number}")}, "spec": {"nodes": [name(number)]}});
        format!("{node}\n---\n{workload}")
    });
    documents.collect::<Vec<_>>().join("\n---\n")
}

async fn active(api: &mut Api) -> anyhow::Result<usize> {
    let status = api.call("GET", "/v1/node-status", "").await?;
    let nodes = status["nodes"].as_array().context("nodes")?;
    Ok(nodes.iter().filter(|node| node["state"] == "active").count())
}

async fn until_active(api: &mut Api, nodes: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let active = active(api).await?;
        if active == nodes {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{active} of {nodes} nodes are active");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A controller of its own, on loopback. Dropped, it is gone.
struct Controller {
    process: Child,
    directory: PathBuf,
    nodes: SocketAddr,
    socket: PathBuf,
    root: PathBuf,
    token: PathBuf,
}

impl Controller {
    fn start() -> anyhow::Result<Self> {
        let binaries = Binaries::locate()?;
        let directory = binaries.target().join("simulation");
        remove(&directory)?;
        fs::create_dir_all(&directory)?;
        let key = directory.join("store.key");
        StateDir::write(&key, &"5a".repeat(32))?;
        let nodes = free_address()?;
        let (socket, root, token) = (directory.join("api.sock"), directory.join("ca.pem"), directory.join("token"));
        let config = json!({
            "trust_domain": DOMAIN, "name": "ctl", "state": directory.join("store.redb"), "store_key": {"file": key},
            "node_listen": [nodes], "api_listen": [], "api_socket": socket, "log": {"json": true},
        });
        let file = directory.join("controller.yaml");
        fs::write(&file, config.to_string())?;
        let program = binaries.path("opencluster-controller")?;
        let init = Command::new(&program)
            .args(["init", "--config"])
            .arg(&file)
            .arg("--admin-token-file")
            .arg(&token)
            .arg("--ca-file")
            .arg(&root)
            .output()?;
        ensure!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
        let log = fs::File::create(directory.join("log"))?;
        let process = Command::new(&program)
            .args(["serve", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let controller = Self { process, directory, nodes, socket, root, token };
        ensure!(poll::until_true(PATIENCE, || controller.socket.exists()), "the controller did not start");
        Ok(controller)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("the controller of the simulation could not be ended: {error}");
        }
        if let Err(error) = remove(&self.directory) {
            eprintln!("{} could not be removed: {error}", self.directory.display());
        }
    }
}

fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// One that nobody has at the moment.
fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// A simulated node, enrolled, with its session's connection.
struct Node {
    channel: Channel,
    nonce: Vec<u8>,
    heartbeat: Duration,
    granted: u64,
}

impl Node {
    async fn enrol(name: &str, token: &str, address: SocketAddr, trust: &Trust) -> anyhow::Result<Self> {
        let parts: Vec<&str> = token.split('.').collect();
        let [_, _, secret, root] = parts[..] else { bail!("not a token") };
        let config = enrolment_client_config(Sha256Digest::from_hex(root)?, &[b"h2"])?;
        let key = PrivateKey::generate()?;
        let id = SpiffeId::parse(&format!("spiffe://{DOMAIN}/node/{name}"))?;
        let request = EnrolRequest {
            node: name.to_owned(),
            token: secret.to_owned(),
            csr_der: key.csr_der(&id)?,
            boot_id: "51".to_owned(),
            machine: Vec::new(),
        };
        let mut client = EnrolmentClient::new(channel(address, config).await?);
        let EnrolResponse { chain_der, nonce, heartbeat_ms, .. } = client.enrol(request).await?.into_inner();
        let granted = nanos(ClockId::MonotonicRaw);
        let svids = SvidStore::new();
        svids.install(Svid::new(&id, chain_der.into_iter().map(CertificateDer::from).collect(), key)?);
        let config = client_config(&svids, &id, trust, ExpectedPeer::AnyController, &[b"h2"])?;
        let channel = channel(address, config).await?;
        Ok(Self { channel, nonce, heartbeat: Duration::from_millis(heartbeat_ms.into()), granted })
    }

    /// Beats and acknowledges until its session ends.
    async fn live(mut self, arrivals: Arrivals) -> anyhow::Result<()> {
        let (up, queue) = mpsc::channel(16);
        let mut client = ControlClient::new(self.channel.clone()).max_decoding_message_size(64 << 20);
        let (mut sequence, mut applied) = (1, (0, 0));
        self.beat(&up, sequence, applied).await?;
        let mut down = client.session(ReceiverStream::new(queue)).await?.into_inner();
        let mut next: Option<Moment> = None;
        loop {
            let due = next.unwrap_or_else(|| Moment::now() + PATIENCE);
            tokio::select! {
                () = tokio::time::sleep_until(due) => {
                    next = None;
                    self.beat(&up, sequence, applied).await?;
                }
                message = down.message() => match message?.context("the session ended")?.message {
                    Some(Down::Grant(grant)) => {
                        (self.nonce, self.granted) = (grant.nonce, nanos(ClockId::MonotonicRaw));
                        sequence = grant.sequence + 1;
                        next = Some(Moment::now() + self.heartbeat);
                    }
                    Some(Down::Revocations(set)) => {
                        arrivals.lock().unwrap_or_else(PoisonError::into_inner).push((set.version, Instant::now()));
                        applied.1 = set.version;
                        send(&up, acknowledgement(applied)).await?;
                    }
                    Some(Down::Config(update)) => {
                        applied.0 = update.version;
                        send(&up, acknowledgement(applied)).await?;
                    }
                    Some(Down::Sever(_)) => return Ok(()),
                    _ => {}
                }
            }
        }
    }

    async fn beat(&self, up: &mpsc::Sender<NodeMessage>, sequence: u64, applied: (u64, u64)) -> anyhow::Result<()> {
        let heartbeat = Heartbeat {
            sequence,
            nonce: self.nonce.clone(),
            monotonic_raw_ns: nanos(ClockId::MonotonicRaw),
            boottime_ns: nanos(ClockId::Boottime),
            realtime_ns: nanos(ClockId::Realtime),
            boot_id: "51".to_owned(),
            machine: Vec::new(),
            config_version: applied.0,
            revocation_version: applied.1,
            health: Some(NodeHealth { firewall_applied: true, proxy_ready: true, ..NodeHealth::default() }),
            granted_monotonic_raw_ns: self.granted,
        };
        send(up, Up::Heartbeat(heartbeat)).await
    }
}

fn acknowledgement((config_version, revocation_version): (u64, u64)) -> Up {
    Up::Acknowledgement(Acknowledgement { config_version, revocation_version })
}

async fn send(up: &mpsc::Sender<NodeMessage>, message: Up) -> anyhow::Result<()> {
    up.send(NodeMessage { message: Some(message) }).await.context("the session ended")
}

fn nanos(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

async fn channel(address: SocketAddr, config: Arc<ClientConfig>) -> anyhow::Result<Channel> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let stream = TlsConnector::from(config).connect(ServerName::IpAddress(address.ip().into()), stream).await?;
    let mut only = Some(stream);
    let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
        let stream = only.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { stream.map(TokioIo::new) }
    });
    Ok(Endpoint::from_static("http://controller.invalid").connect_with_connector(connector).await?)
}
