//! A controller in this process, operators and nodes that talk to it.

mod node;

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use opencluster_api::control::control_client::ControlClient;
use opencluster_api::control::enrolment_client::EnrolmentClient;
use opencluster_api::control::{EnrolRequest, EnrolResponse, Finding, MAX_MESSAGE_TO_NODE};
use opencluster_controller::config::Config;
use opencluster_controller::init::init;
use opencluster_controller::serve::Controller;
use opencluster_controller::store::{EmbeddedStore, Store, StoreError};
use opencluster_identity::SpiffeId;
use opencluster_identity::bundle::TrustBundle;
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::tls::{self, ExpectedPeer};
use opencluster_identity::trust::Trust;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

pub(crate) use node::{Session, TestNode, svid};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const RESOURCES: &str = r#"
{"apiVersion": "opencluster/v1", "kind": "Node", "metadata": {"name": "a"}, "spec": {"addresses": ["10.88.0.11"]}}
---
{"apiVersion": "opencluster/v1", "kind": "Node", "metadata": {"name": "b"}, "spec": {"addresses": ["10.88.0.12"]}}
---
{"apiVersion": "opencluster/v1", "kind": "Workload", "metadata": {"name": "a", "namespace": "default"}, "spec": {"nodes": ["a"]}}
---
{"apiVersion": "opencluster/v1", "kind": "Workload", "metadata": {"name": "b", "namespace": "default"}, "spec": {"nodes": ["b"]}}
---
{"apiVersion": "opencluster/v1", "kind": "Service", "metadata": {"name": "echo", "namespace": "default"}, "spec": {"ports": [{"port": 9000}], "workloads": ["b"]}}
---
{"apiVersion": "opencluster/v1", "kind": "Policy", "metadata": {"name": "a-to-echo", "namespace": "default"}, "spec": {"to": {"service": "echo", "ports": [9000]}, "from": [{"workload": "a"}]}}
"#;

pub(crate) fn policy(name: &str, extra: &str) -> String {
    format!(
        r#"{{"apiVersion": "opencluster/v1", "kind": "Policy", "metadata": {{"name": "{name}", "namespace": "default"{extra}}},
            "spec": {{"to": {{"service": "echo"}}, "from": [{{"workload": "a"}}]}}}}"#
    )
}

/// A controller that runs.
pub(crate) struct Cluster {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) config: Config,
    pub(crate) admin: String,
    pub(crate) root_pem: String,
    running: Option<Running>,
}

struct Running {
    nodes: SocketAddr,
    api: SocketAddr,
    part: Part,
}

enum Part {
    Task { stop: oneshot::Sender<()>, task: JoinHandle<Result<(), opencluster_controller::serve::ServeError>> },
    Program(Child),
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Self::Program(child) = self {
            child.kill().and_then(|()| child.wait()).expect("it is ours");
        }
    }
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::with("").await
    }

    /// With more lines in the configuration.
    pub(crate) async fn with(lines: &str) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let config = configuration(&directory, lines);
        let made = init(&config, None, None).expect("init");
        let admin = made.admin_token.expect("not written to a file").to_string();
        let mut cluster = Self { directory, config, admin, root_pem: made.root_pem, running: None };
        cluster.serve().await;
        cluster
    }

    /// With the usual resources.
    pub(crate) async fn with_resources(lines: &str) -> Self {
        let cluster = Self::with(lines).await;
        let (status, answer) = cluster.post("/v1/apply", RESOURCES).await;
        assert_eq!(status, 200, "{answer}");
        cluster
    }

    pub(crate) async fn serve(&mut self) {
        let controller = Controller::start(&self.config).await.expect("start");
        self.run(controller);
    }

    /// On its own store, with something in between.
    pub(crate) async fn serve_through<S: Store + 'static>(&mut self, between: impl FnOnce(EmbeddedStore) -> Arc<S>) {
        let key = self.config.store_key.load().expect("key");
        let store = EmbeddedStore::open(&self.config.state, &key).expect("open");
        let controller = Controller::start_on(&self.config, between(store)).await.expect("start");
        self.run(controller);
    }

    fn run(&mut self, controller: Controller) {
        let (nodes, api) = (controller.node_addresses[0], controller.api_addresses[0]);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(controller.run_until(async move {
            drop(stopped.await);
        }));
        self.running = Some(Running { nodes, api, part: Part::Task { stop, task } });
    }

    /// As a program of its own, which takes a limit of its files for an error; its process ID.
    pub(crate) fn serve_as_program(&mut self) -> u32 {
        let mut child = Command::new("sh")
            .args([
                "-c",
                "trap '' XFSZ; exec \"$0\" serve --config \"$1\"",
                env!("CARGO_BIN_EXE_opencluster-controller"),
            ])
            .arg(self.directory.path().join("controller.yaml"))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("serve");
        let mut log = BufReader::new(child.stderr.take().expect("piped")).lines().map(|line| line.expect("UTF-8"));
        let mut said = Vec::new();
        let ready = log
            .find(|line| {
                said.push(line.clone());
                line.contains("\"event\":\"ready\"")
            })
            .unwrap_or_else(|| panic!("it ended before it was ready:\n{}", said.join("\n")));
        // A pipe that nobody reads would hold it up.
        std::thread::spawn(move || log.for_each(drop));
        let ready: Value = serde_json::from_str(&ready).expect("JSON");
        let address =
            |key: &str| ready[key].as_str().expect("addresses").trim_matches(['[', ']']).parse().expect("one");
        let id = child.id();
        self.running = Some(Running { nodes: address("nodes"), api: address("api"), part: Part::Program(child) });
        id
    }

    pub(crate) async fn stop(&mut self) {
        let mut running = self.running.take().expect("running");
        if let Part::Task { stop, task } = &mut running.part {
            drop(std::mem::replace(stop, oneshot::channel().0));
            task.await.expect("no panic").expect("an orderly end");
            self.until_released().await;
        }
    }

    /// The last request to a controller in this process may hold its store for a moment longer than the controller.
    async fn until_released(&self) {
        let key = self.config.store_key.load().expect("key");
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while let Err(StoreError::InUse(_)) = EmbeddedStore::open(&self.config.state, &key) {
            assert!(tokio::time::Instant::now() < deadline, "the store is still in use");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn api(&self) -> SocketAddr {
        self.running.as_ref().expect("running").api
    }

    pub(crate) fn nodes(&self) -> SocketAddr {
        self.running.as_ref().expect("running").nodes
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::with_bundle(TrustBundle::from_pem(self.root_pem.as_bytes()).expect("root certificate"))
    }

    pub(crate) fn store_path(&self) -> PathBuf {
        self.config.state.clone()
    }

    /// Calls the API as the administrator.
    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        self.call("GET", path, Some(&self.admin), "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> (u16, Value) {
        self.call("POST", path, Some(&self.admin), body).await
    }

    pub(crate) async fn delete(&self, path: &str) -> (u16, Value) {
        self.call("DELETE", path, Some(&self.admin), "").await
    }

    pub(crate) async fn call(&self, method: &str, path: &str, token: Option<&str>, body: &str) -> (u16, Value) {
        let config = tls::anonymous_client_config(&self.trust(), ExpectedPeer::AnyController, &[b"http/1.1"])
            .expect("client configuration");
        self.call_with(config, method, path, token, body).await
    }

    pub(crate) async fn call_with(
        &self,
        config: Arc<ClientConfig>,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: &str,
    ) -> (u16, Value) {
        let response = request(self.api(), config, method, path, token, body).await;
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.expect("body").to_bytes();
        let value = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        (status, value)
    }

    pub(crate) async fn operator(&self, name: &str, role: &str) -> String {
        let body = format!(r#"{{"name": "{name}", "role": "{role}"}}"#);
        let (status, answer) = self.post("/v1/operators", &body).await;
        assert_eq!(status, 200, "{answer}");
        answer["token"].as_str().expect("token").to_owned()
    }

    pub(crate) async fn token(&self, node: &str) -> String {
        let (status, answer) = self.post(&format!("/v1/nodes/{node}/token"), "{}").await;
        assert_eq!(status, 200, "{answer}");
        answer["token"].as_str().expect("token").to_owned()
    }

    pub(crate) async fn node_status(&self, node: &str) -> Value {
        let (status, answer) = self.get("/v1/node-status").await;
        assert_eq!(status, 200, "{answer}");
        let nodes = answer["nodes"].as_array().expect("nodes");
        nodes.iter().find(|status| status["name"] == node).expect("the node").clone()
    }

    pub(crate) async fn until_state(&self, node: &str, state: &str) -> Value {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let status = self.node_status(node).await;
            if status["state"] == state {
                return status;
            }
            assert!(tokio::time::Instant::now() < deadline, "{node} did not become {state}: {status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn audit(&self) -> Vec<Value> {
        let (status, answer) = self.get("/v1/audit?limit=1000").await;
        assert_eq!(status, 200, "{answer}");
        answer["events"].as_array().expect("events").clone()
    }

    /// Enrols a node with a new token.
    pub(crate) async fn enrol(&self, node: &str) -> TestNode {
        let token = self.token(node).await;
        let key = PrivateKey::generate().expect("key");
        let response = self.try_enrol(node, &token, &key).await.expect("enrolled");
        TestNode::new(node, key, response)
    }

    pub(crate) async fn try_enrol(&self, node: &str, token: &str, key: &PrivateKey) -> Result<EnrolResponse, Status> {
        let csr_der = key.csr_der(&node_id(node)).expect("csr");
        self.try_enrol_with(node, token, csr_der).await
    }

    pub(crate) async fn try_enrol_with(
        &self,
        node: &str,
        token: &str,
        csr_der: Vec<u8>,
    ) -> Result<EnrolResponse, Status> {
        self.try_enrol_in_boot(node, token, csr_der, "b0071d").await
    }

    pub(crate) async fn try_enrol_in_boot(
        &self,
        node: &str,
        token: &str,
        csr_der: Vec<u8>,
        boot_id: &str,
    ) -> Result<EnrolResponse, Status> {
        let parts: Vec<&str> = token.split('.').collect();
        let [_, _, secret, fingerprint] = parts[..] else { panic!("{token}") };
        let root = Sha256Digest::from_hex(fingerprint).expect("fingerprint");
        let config = tls::enrolment_client_config(root, &[b"h2"]).expect("client configuration");
        let channel = channel(self.nodes(), config).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let request = EnrolRequest {
            node: node.into(),
            token: secret.into(),
            csr_der,
            boot_id: boot_id.into(),
            machine: Vec::new(),
        };
        EnrolmentClient::new(channel).enrol(request).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn session(&self, node: &TestNode) -> Result<Session, Status> {
        open(self.channel(node).await?).await
    }

    /// A new connection with the node's certificate.
    pub(crate) async fn channel(&self, node: &TestNode) -> Result<Channel, Status> {
        let config = tls::client_config(&node.svids, &node.id, &self.trust(), ExpectedPeer::AnyController, &[b"h2"])
            .expect("client configuration");
        channel(self.nodes(), config).await.map_err(|error| Status::unavailable(error.to_string()))
    }
}

fn configuration(directory: &tempfile::TempDir, lines: &str) -> Config {
    use std::os::unix::fs::PermissionsExt as _;
    let key = directory.path().join("store.key");
    std::fs::write(&key, "5a".repeat(32)).expect("write");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    // All nodes of a test run in one boot of one machine.
    let boots = if lines.contains("require_new_boot") { "" } else { "require_new_boot: false\n" };
    let text = format!(
        "trust_domain: rig.test\nname: ctl\nstate: store.redb\nstore_key: {{file: {}}}\n\
         node_listen: [\"127.0.0.1:0\"]\napi_listen: [\"127.0.0.1:0\"]\nlog: {{json: true}}\n{boots}{lines}",
        key.display()
    );
    let file = directory.path().join("controller.yaml");
    std::fs::write(&file, &text).expect("write");
    Config::parse(&text, &file).expect("configuration")
}

pub(crate) fn node_id(name: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://rig.test/node/{name}")).expect("id")
}

pub(crate) fn workload_id(name: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://rig.test/ns/default/sa/{name}")).expect("id")
}

/// A verified TLS connection.
pub(crate) async fn connect(address: SocketAddr, config: Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(config).connect(ServerName::from(address.ip()), stream).await
}

pub(crate) async fn request(
    address: SocketAddr,
    config: Arc<ClientConfig>,
    method: &str,
    path: &str,
    token: Option<&str>,
    body: &str,
) -> hyper::Response<Incoming> {
    let stream = connect(address, config).await.expect("connected");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("http");
    tokio::spawn(connection);
    let mut request = hyper::Request::builder().method(method).uri(path).header("host", "controller");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let request = request.body(Full::new(Bytes::from(body.to_owned()))).expect("request");
    tokio::time::timeout(PATIENCE * 2, sender.send_request(request)).await.expect("in time").expect("answered")
}

async fn channel(address: SocketAddr, config: Arc<ClientConfig>) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_| {
        let config = Arc::clone(&config);
        async move { Ok::<_, std::io::Error>(TokioIo::new(connect(address, config).await?)) }
    });
    Endpoint::from_static("http://controller").connect_with_connector(connector).await
}

async fn open(channel: Channel) -> Result<Session, Status> {
    let (up, queue) = mpsc::channel(16);
    let mut client = ControlClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_TO_NODE);
    let down = client.session(ReceiverStream::new(queue)).await?.into_inner();
    Ok(Session { up, down, channel })
}

/// Says what a node found out about itself: the controller's answer.
pub(crate) async fn report(channel: Channel, finding: Finding) -> Result<String, Status> {
    Ok(ControlClient::new(channel).report(finding).await?.into_inner().reason)
}

/// A connection without a certificate.
pub(crate) async fn anonymous_channel(cluster: &Cluster) -> Channel {
    let config = tls::anonymous_client_config(&cluster.trust(), ExpectedPeer::AnyController, &[b"h2"])
        .expect("client configuration");
    channel(cluster.nodes(), config).await.expect("connected")
}

/// A session without a certificate.
pub(crate) async fn anonymous_session(cluster: &Cluster) -> Result<Session, Status> {
    open(anonymous_channel(cluster).await).await
}
