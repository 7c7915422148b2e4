//! One QEMU.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::error::{VmError, io_error};
use super::network::Link;
use super::qmp::Monitor;
use super::shell::{Done, Shell};
use crate::cgroup::Cgroups;
use crate::layout::{self, SWITCH};
use crate::netns;
use crate::process::ProcessId;
use crate::rig::Rig;

/// What a QEMU is made of.
#[derive(Clone, Debug)]
pub(super) struct Hardware {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) kernel_arguments: String,
    /// A model of `-cpu`.
    pub(super) cpu: String,
    pub(super) uuid: String,
    pub(super) mac: String,
    /// The VM generation ID device.
    pub(super) generation_id: bool,
    /// An empty disk, for snapshots inside the process.
    pub(super) disk: bool,
}

/// What a machine begins with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Begins<'a> {
    /// It boots.
    Booting,
    /// It goes on from a state that comes from there.
    From(&'a str),
    /// The same, when it is told to.
    HeldFrom(&'a str),
}

/// A running QEMU. Dropped, it is killed.
#[derive(Debug)]
pub struct Machine {
    name: String,
    directory: PathBuf,
    child: Child,
    process: ProcessId,
    monitor: Monitor,
    /// Connected when it is needed: a copy's is its own.
    shell: Option<Shell>,
    link: Link,
}

impl Machine {
    /// Starts one in the switch's namespace, and in the rig's cgroup, so that it goes with the rig. It does what `begins` says.
    pub(super) fn start(rig: &Rig, name: &str, hardware: &Hardware, begins: Begins<'_>) -> Result<Self, VmError> {
        let directory = rig.state.host(name)?;
        let switch = layout::netns(rig.name(), SWITCH);
        let link = Link::create(&switch, &format!("tap-{name}"))?;
        let disk = directory.join("disk.qcow2");
        if hardware.disk {
            super::run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("16M"))?;
        }
        let cgroup = Cgroups::find()?.path(&format!("{}/tools", layout::rig_cgroup(rig.name())));
        let log = directory.join("qemu.log");
        let log = File::create(&log).map_err(io_error("create", &log))?;
        let mut command = Command::new("sh");
        // The cgroup first: what is started belongs to it from its beginning.
        command.args(["-c", "echo 0 >\"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"]).arg(&cgroup);
        command.arg("nsenter").arg(format!("--net={}", netns::path(&switch).display()));
        command.args(arguments(hardware, &directory, link.tap()));
        match begins {
            Begins::Booting => {}
            Begins::From(state) => drop(command.args(["-incoming", state])),
            Begins::HeldFrom(state) => drop(command.args(["-S", "-incoming", state])),
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(io_error("share", &directory))?).stderr(log);
        let start = |source| VmError::Start { program: "qemu-system-x86_64".to_owned(), source };
        let mut child = command.spawn().map_err(start)?;
        match Self::connect(&directory, child.id()) {
            Ok((process, monitor)) => {
                Ok(Self { name: name.to_owned(), directory, child, process, monitor, shell: None, link })
            }
            Err(error) => {
                // A child that has not been waited for can always be killed.
                drop(child.kill());
                drop(child.wait());
                let said = fs::read_to_string(directory.join("qemu.log")).unwrap_or_default();
                Err(VmError::Failed { program: "qemu-system-x86_64".to_owned(), message: format!("{error}; {said}") })
            }
        }
    }

    fn connect(directory: &Path, pid: u32) -> Result<(ProcessId, Monitor), VmError> {
        Ok((ProcessId::of(pid.cast_signed())?, Monitor::connect(&directory.join("qmp.sock"))?))
    }

    /// Its name: the node's, or that of a copy of it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// QEMU's monitor.
    pub fn monitor(&mut self) -> &mut Monitor {
        &mut self.monitor
    }

    /// Its link to the switch.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Where its files are.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Stops its processor: the guest's clocks stand still with it.
    pub fn stop(&mut self) -> Result<(), VmError> {
        self.monitor.execute("stop", &serde_json::json!({})).map(drop)
    }

    /// Lets it run again.
    pub fn resume(&mut self) -> Result<(), VmError> {
        self.monitor.execute("cont", &serde_json::json!({})).map(drop)
    }

    /// Sends QEMU itself a signal.
    pub fn signal(&self, signal: Signal) -> Result<(), VmError> {
        Ok(self.process.signal(signal)?)
    }

    /// Ends it, as if the power had failed. Its link is left.
    pub fn kill(&mut self) -> Result<(), VmError> {
        let ended = self.child.kill().and_then(|()| self.child.wait());
        ended.map(drop).map_err(io_error("end", Path::new("qemu-system-x86_64")))
    }

    /// Waits until the guest's first program says that it is ready.
    pub(super) fn wait_for_boot(&mut self, limit: Duration) -> Result<(), VmError> {
        if self.connected()?.wait(limit).is_some() {
            return Ok(());
        }
        Err(self.not_ready("it did not boot"))
    }

    fn connected(&mut self) -> Result<&mut Shell, VmError> {
        let shell = match self.shell.take() {
            Some(shell) => shell,
            None => Shell::connect(&self.directory.join("shell.sock"))?,
        };
        Ok(self.shell.insert(shell))
    }

    /// Runs a command line in the guest; a failure of it is no error.
    pub fn shell(&mut self, command: &str) -> Result<Done, VmError> {
        match self.connected()?.run(command, Duration::from_secs(30))? {
            Some(done) => Ok(done),
            None => Err(self.not_ready(&format!("no answer from its shell to: {command}"))),
        }
    }

    /// Runs a command line in the guest, which must succeed: what it printed.
    pub fn must(&mut self, command: &str) -> Result<String, VmError> {
        let Done { output, code } = self.shell(command)?;
        if code == 0 {
            return Ok(output);
        }
        Err(VmError::Command { guest: self.name.clone(), command: command.to_owned(), code, output })
    }

    /// What the guest's kernel and daemon have written to the console.
    pub fn console(&self) -> String {
        fs::read(self.directory.join("console")).map_or_else(
            |error| format!("(no console: {error})"),
            |bytes| String::from_utf8_lossy(&bytes).replace('\r', ""),
        )
    }

    pub(super) fn not_ready(&self, what: &str) -> VmError {
        const LINES: usize = 25;
        let console = self.console();
        let lines: Vec<_> = console.lines().collect();
        let console = lines[lines.len().saturating_sub(LINES)..].join("\n");
        VmError::NotReady { guest: self.name.clone(), what: what.to_owned(), console }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // A child of ours that has not been waited for can always be killed.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// QEMU and its arguments: nothing that is not named here.
fn arguments(hardware: &Hardware, directory: &Path, tap: &str) -> Vec<String> {
    let file = |name: &str| directory.join(name).display().to_string();
    let Hardware { kernel, initramfs, kernel_arguments, cpu, uuid, mac, generation_id, disk } = hardware;
    let mut arguments: Vec<String> = [
        "qemu-system-x86_64",
        "-no-user-config",
        "-nodefaults",
        "-no-reboot",
        "-display",
        "none",
        "-sandbox",
        // Migrations to and from files are done by a child: cat.
        "on,spawn=allow",
        "-machine",
        "pc",
        "-accel",
        "tcg",
        "-smp",
        "1",
        "-m",
        "512",
        "-object",
        "rng-random,id=entropy,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=entropy",
    ]
    .map(str::to_owned)
    .into();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    add("-cpu", cpu.clone());
    add("-uuid", uuid.clone());
    add("-kernel", kernel.display().to_string());
    add("-initrd", initramfs.display().to_string());
    add("-append", kernel_arguments.clone());
    add("-serial", format!("file:{}", file("console")));
    add("-chardev", format!("socket,id=shell,path={},server=on,wait=off", file("shell.sock")));
    add("-device", "virtio-serial-pci,id=ports".to_owned());
    add("-device", "virtserialport,bus=ports.0,nr=1,chardev=shell,name=shell".to_owned());
    add("-qmp", format!("unix:{},server=on,wait=off", file("qmp.sock")));
    add("-netdev", format!("tap,id=net,ifname={tap},script=no,downscript=no"));
    add("-device", format!("virtio-net-pci,netdev=net,mac={mac},romfile="));
    if *generation_id {
        add("-device", "vmgenid,guid=auto".to_owned());
    }
    if *disk {
        add("-drive", format!("if=virtio,format=qcow2,file={}", file("disk.qcow2")));
    }
    arguments
}
