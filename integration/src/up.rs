//! Bringing a rig up: namespaces, controller, resources, tokens, nodes, and the wait until all of it is ready.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use opencluster_api::rest::NodeStatus;
use serde_json::json;

use crate::binaries::{Binaries, BinariesError};
use crate::cgroup::{CgroupError, Cgroups};
use crate::down::{self, DownError};
use crate::host::{Holder, HostError};
use crate::layout::{self, API_PORT, CONTROLLER, Host, INTERFACE, Layout, LayoutError, NODE_PORT};
use crate::netns::{self, NetnsError};
use crate::operator::OperatorError;
use crate::poll;
use crate::process::ProcessId;
use crate::rig::{Rig, RigError};
use crate::state::{Lock, Record, StateDir, StateError};

/// The trust domain of every rig.
pub const TRUST_DOMAIN: &str = "rig.test";

/// The user that proxies run as.
pub(crate) const PROXY_USER: u32 = 65533;

/// How long each step of the start may take: far more than it needs, so that a slow machine is not taken for a fault.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Options {
    /// The rig's name.
    pub name: String,
    /// The nodes' names.
    pub nodes: Vec<String>,
    /// Hosts on the same switch without Opencluster.
    pub bare: Vec<String>,
    /// Files of resources to apply.
    pub apply: Vec<PathBuf>,
    /// How long a grant lasts.
    pub lease_ms: u32,
    /// How often nodes send heartbeats.
    pub heartbeat_ms: u32,
    /// How many controllers.
    pub controllers: usize,
    /// Threads of each proxy; one for two cores when absent.
    pub workers: Option<u32>,
    /// How nodes carry flows: `shared` or `leased`.
    pub tunnels: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: layout::DEFAULT_RIG.to_owned(),
            nodes: vec!["a".to_owned(), "b".to_owned()],
            bare: Vec::new(),
            apply: Vec::new(),
            lease_ms: 3000,
            heartbeat_ms: 500,
            controllers: 1,
            workers: None,
            tunnels: "shared".to_owned(),
        }
    }
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum UpError {
    /// Not root.
    #[error("the rig makes network namespaces and cgroups: run it as root")]
    NotRoot,
    /// More than one controller.
    #[error(
        "--controllers {0}: replicated controllers need a shared store, which is not there yet; only 1 is possible"
    )]
    Controllers(usize),
    /// Names that cannot be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A program is not built.
    #[error(transparent)]
    Binaries(#[from] BinariesError),
    /// A rig of that name could not be removed.
    #[error("the rig that was there before cannot be removed: {0}")]
    Stale(#[from] DownError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// Cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Namespaces and links.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A host's holder.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Starting a daemon.
    #[error(transparent)]
    Rig(#[from] RigError),
    /// The API.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// A file of resources.
    #[error("cannot read {path}: {source}")]
    Apply {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The machine gives no randomness.
    #[error("cannot read /dev/urandom: {0}")]
    Random(#[source] io::Error),
    /// `opencluster-controller init` failed.
    #[error("opencluster-controller init failed: {0}")]
    Init(String),
    /// A daemon ended or did not get ready.
    #[error("{what}\n--- last lines of {log} ---\n{tail}")]
    NotReady {
        /// Who, and what is missing.
        what: String,
        /// The log.
        log: PathBuf,
        /// Its end.
        tail: String,
    },
    /// Somebody pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

/// Brings a rig up; whatever is left of one with the same name is removed first. When anything fails, or `interrupted`
/// becomes true, everything but the logs is removed again. `progress` is told what is being done.
pub fn up(options: &Options, interrupted: &AtomicBool, progress: &mut dyn FnMut(&str)) -> Result<Rig, UpError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(UpError::NotRoot);
    }
    if options.controllers != 1 {
        return Err(UpError::Controllers(options.controllers));
    }
    let layout = Layout::new(&options.name, &options.nodes, &options.bare)?;
    let binaries = Binaries::locate()?;
    for program in ["opencluster", "opencluster-controller", "opencluster-node", "opencluster-proxy", "opencluster-rig"]
    {
        binaries.path(program)?;
    }
    let documents = options.apply.iter().map(|path| read_documents(path)).collect::<Result<Vec<_>, _>>()?;

    let _lock = Lock::take(&options.name)?;
    let state = StateDir::of(binaries.target(), &options.name);
    if down::is_there(&options.name)? {
        progress(&format!("removing the rig {} that is already there", options.name));
    }
    down::down(&options.name, Some(&state))?;
    state.create()?;

    let record =
        Record { layout, holders: BTreeMap::new(), daemons: BTreeMap::new(), trust_domain: TRUST_DOMAIN.to_owned() };
    let mut start = Start { rig: Rig { binaries, state, record }, options, interrupted, progress };
    match start.all(&documents) {
        Ok(()) => Ok(start.rig),
        Err(error) => {
            // The logs stay: they are what one needs now. The next `up` or `down` removes them.
            down::down(&options.name, None)?;
            Err(error)
        }
    }
}

fn read_documents(path: &Path) -> Result<String, UpError> {
    fs::read_to_string(path).map_err(|source| UpError::Apply { path: path.to_owned(), source })
}

struct Start<'a> {
    rig: Rig,
    options: &'a Options,
    interrupted: &'a AtomicBool,
    progress: &'a mut dyn FnMut(&str),
}

impl Start<'_> {
    fn all(&mut self, documents: &[String]) -> Result<(), UpError> {
        (self.progress)("hosts: namespaces, switch, links");
        self.make_hosts()?;
        (self.progress)("controller: store, certificate authority, API");
        self.start_controller()?;
        self.wait_for_controller()?;
        (self.progress)("resources and enrolment tokens");
        self.apply(documents)?;
        (self.progress)("nodes: enrolment, firewall, proxy");
        let names: Vec<String> = self.rig.record.layout.nodes().map(|host| host.name.clone()).collect();
        for name in &names {
            self.start_node(name)?;
        }
        self.wait_for_nodes()?;
        let state = &self.rig.state;
        Ok(StateDir::write(&state.env(), &environment(&self.rig))?)
    }

    fn make_hosts(&mut self) -> Result<(), UpError> {
        let Rig { binaries, state, record } = &mut self.rig;
        let layout = &record.layout;
        let cgroups = Cgroups::find()?;
        cgroups.create(&layout::cgroup(&layout.rig, "tools"))?;
        for host in &layout.hosts {
            for part in ["holder", "host"] {
                cgroups.create(&format!("{}/{part}", layout::cgroup(&layout.rig, &host.name)))?;
            }
            state.host(&host.name)?;
        }
        StateDir::write(&state.hosts(), &hosts_file(layout))?;
        netns::create(layout)?;
        let program = binaries.path("opencluster-rig")?;
        for host in &layout.hosts {
            let cgroup = format!("{}/holder", layout::cgroup(&layout.rig, &host.name));
            let holder =
                Holder { rig: &program, netns: &host.netns, cgroup: &cgroup, hosts: &state.hosts() }.start()?;
            record.holders.insert(host.name.clone(), holder);
        }
        netns::link(&record.layout)?;
        state.save(record)?;
        Ok(())
    }

    fn start_controller(&mut self) -> Result<(), UpError> {
        let state = &self.rig.state;
        let key_file = state.host(CONTROLLER)?.join("store.key");
        StateDir::write(&key_file, &random_hex()?)?;
        let controller = self.rig.record.layout.controller();
        let listen =
            |port: u16| controller.addresses().map(|address| std::net::SocketAddr::new(address, port).to_string());
        let config = json!({
            "trust_domain": TRUST_DOMAIN,
            "name": CONTROLLER,
            "state": state.host(CONTROLLER)?.join("store.redb"),
            "store_key": {"file": key_file},
            "node_listen": listen(NODE_PORT),
            "api_listen": listen(API_PORT),
            "api_socket": state.api_socket(),
            "lease_ms": self.options.lease_ms,
            "heartbeat_ms": self.options.heartbeat_ms,
            "svid_ttl_s": 3600,
            // A rig's hosts share this machine's kernel, and with it its boot.
            "require_new_boot": false,
            "log": {"json": true},
        });
        self.write_config(CONTROLLER, &config)?;
        let output = Command::new(self.rig.binaries.path("opencluster-controller")?)
            .args(["init", "--config"])
            .arg(self.rig.config(CONTROLLER)?)
            .arg("--admin-token-file")
            .arg(self.rig.state.admin_token())
            .arg("--ca-file")
            .arg(self.rig.state.ca())
            .output()
            .map_err(|error| UpError::Init(error.to_string()))?;
        if !output.status.success() {
            return Err(UpError::Init(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        self.rig.start_daemon(CONTROLLER)?;
        Ok(())
    }

    fn wait_for_controller(&mut self) -> Result<(), UpError> {
        let operator = self.rig.operator();
        let socket = self.rig.state.api_socket();
        let mut last = String::from("no socket yet");
        self.wait(CONTROLLER, &mut || {
            if !socket.exists() {
                return Err(last.clone());
            }
            operator.status().map(|_| ()).map_err(|error| {
                last = error.to_string();
                last.clone()
            })
        })
    }

    fn apply(&mut self, documents: &[String]) -> Result<(), UpError> {
        let mut all: Vec<String> = self.rig.record.layout.nodes().map(node_documents).collect();
        all.extend_from_slice(documents);
        Ok(self.rig.operator().apply(&all.join("\n---\n"))?)
    }

    fn start_node(&mut self, name: &str) -> Result<(), UpError> {
        let token = self.rig.operator().token(name)?;
        let token_file = self.rig.give_token(name, &token.token)?;
        let controller = self.rig.record.layout.controller();
        let config = json!({
            "node": name,
            "trust_domain": TRUST_DOMAIN,
            "controllers": controller.addresses().map(|address| std::net::SocketAddr::new(address, NODE_PORT).to_string()),
            "token_file": token_file,
            "proxy": self.rig.binaries.path("opencluster-proxy")?,
            "proxy_user": PROXY_USER,
            "run_dir": "/run/opencluster",
            "cgroup": layout::cgroup(self.rig.name(), name),
            "interfaces": [INTERFACE],
            "access_log": self.rig.state.access_log(name),
            "workers": self.options.workers,
            "tunnels": self.options.tunnels,
        });
        self.write_config(name, &config)?;
        self.rig.start_daemon(name)?;
        Ok(())
    }

    fn wait_for_nodes(&mut self) -> Result<(), UpError> {
        let operator = self.rig.operator();
        let names: Vec<String> = self.rig.record.layout.nodes().map(|host| host.name.clone()).collect();
        let wanted = workloads_by_node(&operator.workloads()?.items);
        for name in &names {
            let nothing = Vec::new();
            let workloads = wanted.get(name).unwrap_or(&nothing);
            self.wait(name, &mut || {
                let version = operator.status().map_err(|error| error.to_string())?.config_version;
                let list = operator.nodes().map_err(|error| error.to_string())?;
                let node = list.nodes.iter().find(|node| node.name == *name);
                missing(node.ok_or("the controller does not know it")?, version, workloads)
            })?;
        }
        Ok(())
    }

    /// Waits until `ready` no longer says what is missing. Gives up at once when the host's daemon ends.
    fn wait(&self, host: &str, ready: &mut dyn FnMut() -> Result<(), String>) -> Result<(), UpError> {
        let daemon: ProcessId = self.rig.daemon(host)?;
        let started = Instant::now();
        let mut lacks = String::new();
        let outcome = poll::until(PATIENCE, || {
            if self.interrupted.load(Ordering::Relaxed) {
                return Some(Err(UpError::Interrupted));
            }
            match ready() {
                Ok(()) => return Some(Ok(())),
                Err(missing) => lacks = missing,
            }
            (!daemon.is_alive()).then(|| Err(self.not_ready(host, "its daemon ended")))
        });
        let waited = started.elapsed().as_secs();
        outcome.unwrap_or_else(|| Err(self.not_ready(host, &format!("after {waited} s: {lacks}"))))
    }

    fn not_ready(&self, host: &str, what: &str) -> UpError {
        let what = format!("the host {host} did not get ready: {what}");
        UpError::NotReady { what, log: self.rig.state.log(host), tail: self.rig.log_tail(host, 25) }
    }

    /// JSON is YAML.
    fn write_config(&self, host: &str, config: &serde_json::Value) -> Result<(), UpError> {
        Ok(StateDir::write(&self.rig.config(host)?, &format!("{config:#}\n"))?)
    }
}

/// What a node's state still lacks.
fn missing(node: &NodeStatus, config_version: u64, workloads: &[String]) -> Result<(), String> {
    if node.state != "active" {
        return Err(format!("its state is {} {}", node.state, node.reason));
    }
    if !node.firewall_applied {
        return Err("its firewall is not applied".to_owned());
    }
    if !node.proxy_ready {
        return Err("its proxy is not ready".to_owned());
    }
    if node.config_version < config_version {
        return Err(format!("it has configuration {} of {config_version}", node.config_version));
    }
    let absent: Vec<_> = workloads.iter().filter(|wanted| !node.workloads_ready.contains(wanted)).collect();
    if absent.is_empty() { Ok(()) } else { Err(format!("no certificate yet for {absent:?}")) }
}

/// The SPIFFE IDs of the workloads that each node may run.
fn workloads_by_node(items: &[serde_json::Value]) -> BTreeMap<String, Vec<String>> {
    let mut by_node = BTreeMap::<String, Vec<String>>::new();
    for item in items {
        let text = |pointer: &str| item.pointer(pointer).and_then(serde_json::Value::as_str).unwrap_or_default();
        let id = format!("spiffe://{TRUST_DOMAIN}/ns/{}/sa/{}", text("/metadata/namespace"), text("/metadata/name"));
        let nodes = item.pointer("/spec/nodes").and_then(serde_json::Value::as_array).into_iter().flatten();
        for node in nodes.filter_map(serde_json::Value::as_str) {
            by_node.entry(node.to_owned()).or_default().push(id.clone());
        }
    }
    by_node
}

/// A node's own resource and that of the workload which is named like it.
pub(crate) fn node_documents(host: &Host) -> String {
    let Host { name, v4, v6, .. } = host;
    let node = json!({"apiVersion": "opencluster/v1", "kind": "Node", "metadata": {"name": name},
        "spec": {"addresses": [v4, v6]}});
    let workload = json!({"apiVersion": "opencluster/v1", "kind": "Workload",
        "metadata": {"name": name, "namespace": "default"}, "spec": {"nodes": [name]}});
    format!("{node}\n---\n{workload}")
}

fn hosts_file(layout: &Layout) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost\n");
    for host in &layout.hosts {
        for address in host.addresses() {
            text.extend([&address.to_string(), " ", &host.name, "\n"]);
        }
    }
    text
}

/// What `target/rig/env` says.
fn environment(rig: &Rig) -> String {
    let quote = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let state = &rig.state;
    format!(
        "# Points `opencluster` at this rig's controller: source it.\n\
         export OPENCLUSTER_SERVER=unix:{}\n\
         export OPENCLUSTER_CA={}\n\
         export OPENCLUSTER_TOKEN_FILE={}\n\
         export PATH={}:\"$PATH\"\n",
        quote(&state.api_socket()),
        quote(&state.ca()),
        quote(&state.admin_token()),
        quote(rig.binaries.directory()),
    )
}

fn random_hex() -> Result<String, UpError> {
    let mut bytes = [0_u8; 32];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).map_err(UpError::Random)?;
    Ok(hex::encode(bytes))
}
