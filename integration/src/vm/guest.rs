//! A node in a machine, and the copies that can be made of it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::error::{VmError, io_error};
use super::image::{Image, PROGRAM_DIRECTORY};
use super::machine::{Begins, Hardware, Machine};
use crate::layout::{self, Host, INTERFACE, NODE_PORT};
use crate::poll;
use crate::rig::Rig;
use crate::up::{self, PROXY_USER, TRUST_DOMAIN};

/// An emulated guest on a busy machine boots in well under this.
const BOOT: Duration = Duration::from_mins(2);

/// How long enrolment, the first configuration and the proxy's start may take.
const ENROLMENT: Duration = Duration::from_mins(1);

/// The processor that guests see unless a test wants another one. `max` is everything that QEMU emulates.
const CPU: &str = "max";

const CONFIG: &str = "/etc/opencluster/node.yaml";
const TOKEN: &str = "/etc/opencluster/token";

/// What kind of guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// The node's name.
    pub name: String,
    /// Which guest of its rig this is, from 0: it makes its addresses.
    pub index: u8,
    /// Whether the machine has a VM generation ID.
    pub generation_id: bool,
    /// Whether snapshots can be taken inside the QEMU process.
    pub snapshots: bool,
}

/// What is different about a copy's machine.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Another processor (of `-cpu`).
    pub cpu: Option<String>,
}

/// A node in a machine.
#[derive(Debug)]
pub struct Guest {
    /// The machine.
    pub machine: Machine,
    rig: Rig,
    host: Host,
    hardware: Hardware,
    copies: Arc<std::sync::atomic::AtomicU32>,
}

impl Guest {
    /// Boots a machine that is to be a node of the rig; its daemon does not run yet. The node's resources are applied, and
    /// those of the workload that is named like it.
    pub fn boot(rig: &Rig, image: &Image, options: &Options) -> Result<Self, VmError> {
        let host = layout::guest(rig.name(), &options.name, options.index);
        rig.operator().apply(&up::node_documents(&host))?;
        let token = rig.operator().token(&host.name)?;
        let directory = rig.state.host(&host.name)?;
        let initramfs = directory.join("initramfs");
        let config = format!("{:#}\n", configuration(rig, &host));
        image.write_initramfs(&initramfs, &[(&CONFIG[1..], config), (&TOKEN[1..], token.token)])?;
        let hardware = Hardware {
            kernel: image.kernel.clone(),
            initramfs,
            kernel_arguments: format!(
                "console=ttyS0 quiet panic=-1 opencluster.vm=1 OC_V4={}/24 OC_V6={}/64",
                host.v4, host.v6
            ),
            cpu: CPU.to_owned(),
            uuid: format!("0c0c0c0c-0000-4000-8000-0000000000{:02x}", options.index),
            mac: format!("52:54:00:0c:00:{:02x}", options.index),
            generation_id: options.generation_id,
            disk: options.snapshots,
        };
        let mut machine = Machine::start(rig, &host.name, &hardware, Begins::Booting)?;
        machine.wait_for_boot(BOOT)?;
        Ok(Self { machine, rig: rig.clone(), host, hardware, copies: Arc::default() })
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.host.name
    }

    /// Whether the machine has a VM generation ID.
    pub fn generation_id(&self) -> bool {
        self.hardware.generation_id
    }

    /// Where a service of the node's own workload listens.
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.host.v4.into(), port)
    }

    /// Starts the daemon, and waits until the node carries traffic: active, its filter applied, its proxy ready with the
    /// workload's identity.
    pub fn enrol(&mut self) -> Result<(), VmError> {
        self.machine
            .must(&format!("{PROGRAM_DIRECTORY}/opencluster-node serve --config {CONFIG} >/dev/console 2>&1 &"))?;
        let id = format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/{}", self.host.name);
        let mut lacks = String::new();
        let ready = poll::until_true(ENROLMENT, || match self.seen_by_controller() {
            Ok(Some(node)) => {
                lacks = format!("{node:?}");
                node.state == "active"
                    && node.firewall_applied
                    && node.proxy_ready
                    && node.workloads_ready.contains(&id)
            }
            Ok(None) => false,
            Err(error) => {
                lacks = error.to_string();
                false
            }
        });
        if ready { Ok(()) } else { Err(self.machine.not_ready(&format!("it does not get ready: {lacks}"))) }
    }

    fn seen_by_controller(&self) -> Result<Option<opencluster_api::rest::NodeStatus>, VmError> {
        Ok(self.rig.operator().nodes()?.nodes.into_iter().find(|node| node.name == self.host.name))
    }

    /// How many of its heartbeats the controller has granted.
    pub fn heartbeats(&self) -> Result<u64, VmError> {
        match self.seen_by_controller()? {
            Some(node) => Ok(node.heartbeats),
            None => Err(self.machine.not_ready("the controller does not know it")),
        }
    }

    /// The node's state as its own daemon tells it.
    pub fn own_status(&mut self) -> Result<Value, VmError> {
        let text = self.machine.must(&format!("{PROGRAM_DIRECTORY}/opencluster-node status --json"))?;
        serde_json::from_str(&text).map_err(|error| self.machine.not_ready(&format!("its status: {error}: {text}")))
    }

    /// Starts a probe as the node's own workload, for as long as the machine lives.
    pub fn start_probe(&mut self, arguments: &str) -> Result<(), VmError> {
        let name = &self.host.name;
        self.machine
            .must(&format!(
                "setsid {PROGRAM_DIRECTORY}/opencluster-node run --workload {name} -- \
                 {PROGRAM_DIRECTORY}/opencluster-probe {arguments} >/tmp/probe 2>&1 &"
            ))
            .map(drop)
    }

    /// A file for this guest's state, on its way to a copy.
    fn state_file(&self) -> PathBuf {
        self.machine.directory().join("state")
    }

    /// Writes the whole machine to a file, as a provider's snapshot or cold migration does. It stands still after that.
    pub fn save(&mut self) -> Result<PathBuf, VmError> {
        let file = self.state_file();
        self.machine.monitor().migrate(&format!("exec:cat >'{}'", file.display()))?;
        Ok(file)
    }

    /// Writes the whole machine to a file while it goes on: QEMU notes what a page was before the guest changes it.
    pub fn save_live(&mut self) -> Result<PathBuf, VmError> {
        let file = self.state_file();
        let background = |on: bool| json!({"capabilities": [{"capability": "background-snapshot", "state": on}]});
        let monitor = self.machine.monitor();
        monitor.execute("migrate-set-capabilities", &background(true))?;
        monitor.migrate(&format!("exec:cat >'{}'", file.display()))?;
        monitor.execute("migrate-set-capabilities", &background(false))?;
        Ok(file)
    }

    /// Starts a machine from such a file: the same node, on a link of its own. It runs once its state is read.
    pub fn restore(&self, file: &std::path::Path, changes: &Changes) -> Result<Self, VmError> {
        let mut copy = self.copy(Begins::From(&format!("exec:cat '{}'", file.display())), changes)?;
        copy.wait_until_it_is("running")?;
        Ok(copy)
    }

    /// The same, but it does not run yet: `resume` lets it, and costs no time.
    pub fn restore_held(&self, file: &std::path::Path) -> Result<Self, VmError> {
        let mut copy = self.copy(Begins::HeldFrom(&format!("exec:cat '{}'", file.display())), &Changes::default())?;
        copy.wait_until_it_is("paused")?;
        Ok(copy)
    }

    /// Moves the running machine into another QEMU: the old one stands still, the new one runs. Returns for how long neither
    /// did, too.
    pub fn migrate(&mut self, changes: &Changes) -> Result<(Self, Duration), VmError> {
        let socket = self.machine.directory().join("migrate.sock");
        let mut moved = self.copy(Begins::From(&format!("unix:{}", socket.display())), changes)?;
        let stood = self.machine.monitor().migrate(&format!("unix:{}", socket.display()))?;
        moved.wait_until_it_is("running")?;
        Ok((moved, stood))
    }

    fn copy(&self, begins: Begins<'_>, changes: &Changes) -> Result<Self, VmError> {
        let number = self.copies.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
        let mut hardware = self.hardware.clone();
        if let Some(cpu) = &changes.cpu {
            hardware.cpu.clone_from(cpu);
        }
        let name = format!("{}-{number}", self.host.name);
        let machine = Machine::start(&self.rig, &name, &hardware, begins)?;
        Ok(Self { machine, rig: self.rig.clone(), host: self.host.clone(), hardware, copies: Arc::clone(&self.copies) })
    }

    fn wait_until_it_is(&mut self, state: &str) -> Result<(), VmError> {
        let monitor = self.machine.monitor();
        let mut last = String::new();
        let runs = poll::until_true(BOOT, || match monitor.execute("query-status", &json!({})) {
            Ok(status) => {
                last = status.to_string();
                status["status"] == state
            }
            Err(error) => {
                last = error.to_string();
                false
            }
        });
        if runs { Ok(()) } else { Err(self.machine.not_ready(&format!("it is not {state}: {last}"))) }
    }
}

fn configuration(rig: &Rig, host: &Host) -> Value {
    let controllers = rig.record.layout.controller().addresses();
    json!({
        "node": host.name,
        "trust_domain": TRUST_DOMAIN,
        "controllers": controllers.map(|address| SocketAddr::new(address, NODE_PORT).to_string()),
        "token_file": TOKEN,
        "proxy": format!("{PROGRAM_DIRECTORY}/opencluster-proxy"),
        "proxy_user": PROXY_USER,
        "interfaces": [INTERFACE],
        "access_log": "/tmp/access.log",
    })
}

/// Writes a copy of a guest's console where a failed test is looked into.
pub fn keep_console(guest: &Guest, directory: &std::path::Path) -> Result<(), VmError> {
    std::fs::create_dir_all(directory).map_err(io_error("create", directory))?;
    let file = directory.join(format!("{}.console", guest.machine.name()));
    std::fs::write(&file, guest.machine.console()).map_err(io_error("write", &file))
}
