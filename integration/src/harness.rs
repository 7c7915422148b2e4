//! What the tests stand on: a cluster of its own for each test, probes on its hosts, and the teardown that always runs.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use opencluster_api::rest::NodeStatus;
use sha2::{Digest, Sha256};

use crate::binaries::Binaries;
use crate::capture::Capture;
use crate::operator::Operator;
use crate::poll;
use crate::report::Event;
use crate::rig::Rig;

/// Longer than anything takes that works.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Tests that load the machine run alone, so that they do not disturb what others measure.
static MACHINE: RwLock<()> = RwLock::new(());

type WithOthers = RwLockReadGuard<'static, ()>;
type Alone = RwLockWriteGuard<'static, ()>;

/// What a test wants.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Nodes.
    pub nodes: &'a [&'a str],
    /// Hosts without Opencluster.
    pub bare: &'a [&'a str],
    /// Resources.
    pub resources: &'a str,
    /// No other test at the same time.
    pub alone: bool,
    /// How nodes carry flows: `shared` or `leased`.
    pub tunnels: &'a str,
}

impl Default for Wanted<'_> {
    fn default() -> Self {
        Self { nodes: &["a", "b"], bare: &[], resources: "", alone: false, tunnels: "shared" }
    }
}

/// A service on `b`, ports 9000 to 9002, and a policy that lets `a` use it.
pub const A_TO_B: &str = "
apiVersion: opencluster/v1
kind: Service
metadata: {name: echo, namespace: default}
spec: {ports: [{port: 9000}, {port: 9001}, {port: 9002}], workloads: [b]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo, namespace: default}
spec: {to: {service: echo}, from: [{workload: a}]}
";

/// Who does something, and where.
#[derive(Clone, Copy, Debug)]
pub enum Who<'a> {
    /// The workload that is named like its node, there.
    Workload(&'a str),
    /// A workload of the default namespace, on a node.
    On(&'a str, &'a str),
    /// Root on a host, outside of every workload.
    Host(&'a str),
    /// Root on a node, taken for its proxy by the packet filter.
    Proxy(&'a str),
    /// Another user on a host, outside of every workload.
    User(&'a str, u32),
}

/// A cluster that is up. Dropped, it is gone.
#[derive(Debug)]
pub struct Cluster {
    /// The rig.
    pub rig: Rig,
    /// Its operator.
    pub operator: Operator,
    /// Where the test may put files; removed with the cluster.
    pub directory: PathBuf,
    test: String,
    _alone: Option<Alone>,
    _with_others: Option<WithOthers>,
}

impl Cluster {
    /// Brings one up for the test of that name.
    pub fn up(test: &str, wanted: &Wanted) -> anyhow::Result<Self> {
        let alone = wanted.alone.then(|| MACHINE.write().unwrap_or_else(PoisonError::into_inner));
        let with_others = (!wanted.alone).then(|| MACHINE.read().unwrap_or_else(PoisonError::into_inner));
        let binaries = Binaries::locate()?;
        let name = rig_name(test, &binaries);
        let resources = binaries.target().join(format!("{name}.yaml"));
        let mut up = Command::new(binaries.path("opencluster-rig")?);
        up.args(["up", "--name", &name, "--nodes", &wanted.nodes.join(",")]);
        up.args(["--tunnels", wanted.tunnels]);
        if !wanted.bare.is_empty() {
            up.args(["--bare", &wanted.bare.join(",")]);
        }
        if !wanted.resources.is_empty() {
            fs::write(&resources, wanted.resources)?;
            up.arg("--apply").arg(&resources);
        }
        let output = up.stdin(Stdio::null()).output()?;
        if !wanted.resources.is_empty() {
            fs::remove_file(&resources)?;
        }
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the rig {name} did not come up:\n{said}");
        let rig = Rig::load(&name)?;
        let directory = rig.state.path().join("test");
        fs::create_dir(&directory)?;
        Ok(Self {
            operator: rig.operator(),
            directory,
            rig,
            test: test.to_owned(),
            _alone: alone,
            _with_others: with_others,
        })
    }

    /// A command that runs as somebody. Give it the program and its arguments.
    pub fn command(&self, who: Who) -> anyhow::Result<Command> {
        Ok(match who {
            Who::Workload(name) => self.rig.as_workload(name, "default", name)?,
            Who::On(node, workload) => self.rig.as_workload(node, "default", workload)?,
            Who::Host(host) => self.rig.on_host(host)?,
            Who::Proxy(node) => self.rig.as_proxy(node)?,
            Who::User(host, user) => {
                let mut command = self.rig.on_host(host)?;
                command.args(["setpriv", "--clear-groups", "--inh-caps=-all"]);
                command.args([format!("--reuid={user}"), format!("--regid={user}")]);
                command
            }
        })
    }

    /// Runs a command as somebody, to its end.
    pub fn run(&self, who: Who, arguments: &[&str]) -> anyhow::Result<Output> {
        Ok(self.command(who)?.args(arguments).stdin(Stdio::null()).output()?)
    }

    /// Starts a probe as somebody.
    pub fn start(&self, who: Who, arguments: &[&str]) -> anyhow::Result<Probe> {
        let mut command = self.command(who)?;
        command.arg(self.rig.binaries.path("opencluster-probe")?).args(arguments);
        Probe::start(command, format!("{who:?} {}", arguments.join(" ")))
    }

    /// Starts a probe that serves: returns once it listens on as many sockets as it was told.
    pub fn serve(&self, who: Who, arguments: &[&str]) -> anyhow::Result<Probe> {
        let mut probe = self.start(who, arguments)?;
        for _ in arguments.iter().filter(|argument| **argument == "--listen") {
            let (_, event) = probe.event(PATIENCE)?;
            ensure!(matches!(event, Event::Listening { .. }), "{event:?}");
        }
        Ok(probe)
    }

    /// Runs a probe as somebody to its one result.
    pub fn probe(&self, who: Who, arguments: &[&str]) -> anyhow::Result<Event> {
        let mut probe = self.start(who, arguments)?;
        Ok(probe.event(Duration::from_mins(3))?.1)
    }

    /// Whether a TCP connection as somebody to `to` carries an echo of a marker. A process that its node does not let into
    /// the workload (exit code 125) reaches nothing.
    pub fn reaches(&self, who: Who, to: &str) -> anyhow::Result<bool> {
        let program = self.rig.binaries.path("opencluster-probe")?;
        let mut command = self.command(who)?;
        command.arg(program).args(["send", "tcp", "--times", "1", "--to", to, "--marker", "are-you-there"]);
        let output = command.stdin(Stdio::null()).output()?;
        if output.status.code() == Some(125) {
            return Ok(false);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{who:?} to {to}: {said}");
        match serde_json::from_slice(&output.stdout)? {
            Event::Attempted { connected, answer, .. } => Ok(connected && answer == "are-you-there"),
            event => bail!("{event:?}"),
        }
    }

    /// Waits until it does.
    pub fn comes_to_reach(&self, who: Who, to: &str) -> anyhow::Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.reaches(who, to)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Starts a capture at the switch's end of a host's link.
    pub fn capture(&self, host: &str) -> anyhow::Result<Capture> {
        Ok(Capture::start(&self.rig, host, &self.directory.join(format!("{host}.pcap")))?)
    }

    /// A node's state as the controller sees it.
    pub fn node(&self, name: &str) -> anyhow::Result<NodeStatus> {
        let list = self.operator.nodes()?;
        list.nodes.into_iter().find(|node| node.name == name).with_context(|| format!("no node {name}"))
    }

    /// A node's state as its own daemon tells it, JSON.
    pub fn own_status(&self, node: &str) -> anyhow::Result<serde_json::Value> {
        let program = self.rig.binaries.path("opencluster-node")?;
        let output = self.command(Who::Host(node))?.arg(program).args(["status", "--json"]).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// The value of a metric of a node's proxy, summed over its labels; 0 where it is not there (yet).
    pub fn metric(&self, node: &str, name: &str) -> anyhow::Result<f64> {
        let socket = "/run/opencluster/proxy.sock";
        let output = self.run(Who::Host(node), &["curl", "-sS", "--unix-socket", socket, "http://proxy/metrics"])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout);
        let samples =
            text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        Ok(samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// The addresses of a host, IPv4 first, with a port.
    pub fn addresses(&self, host: &str, port: u16) -> anyhow::Result<[String; 2]> {
        let addresses = self.rig.record.layout.host(host)?.addresses();
        Ok(addresses.map(|address| SocketAddr::new(address, port).to_string()))
    }

    /// The numbers of the processes of a node's proxy.
    pub fn proxy(&self, node: &str) -> anyhow::Result<Vec<i32>> {
        Ok(crate::cgroup::Cgroups::find()?.processes(&self.rig.cgroup(node, "proxy"))?)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.keep_logs() {
            eprintln!("the logs were not kept: {error:#}");
        }
        let name = self.rig.name().to_owned();
        let down = self
            .rig
            .binaries
            .path("opencluster-rig")
            .map(|program| Command::new(program).args(["down", "--name", &name]).stdin(Stdio::null()).output());
        match down {
            Ok(Ok(output)) if output.status.success() => {}
            other => eprintln!("the rig {name} was not removed: {other:?}"),
        }
    }
}

impl Cluster {
    /// Where logs are kept: target/integration/TEST.
    pub fn logs(&self) -> PathBuf {
        self.rig.binaries.target().join("integration").join(&self.test)
    }

    /// What a failed test is understood by: the daemons' logs.
    fn keep_logs(&self) -> anyhow::Result<()> {
        let kept = self.logs();
        fs::create_dir_all(&kept)?;
        for host in &self.rig.record.layout.hosts {
            for (log, what) in
                [(self.rig.state.log(&host.name), "log"), (self.rig.state.access_log(&host.name), "access")]
            {
                if log.is_file() {
                    fs::copy(log, kept.join(format!("{}.{what}", host.name)))?;
                }
            }
        }
        Ok(())
    }
}

/// The rig of a test: the same for the same test of the same checkout, so that a rig which a killed test left behind is
/// replaced by its next run, and two checkouts do not replace each other's.
pub fn rig_name(test: &str, binaries: &Binaries) -> String {
    let digest = Sha256::digest(format!("{test} {}", binaries.directory().display()));
    format!("t{}", hex::encode(&digest[..5]))
}

/// A running probe. Dropped, it is killed.
#[derive(Debug)]
pub struct Probe {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<(Instant, String)>,
    /// Lines that were read on the way to another one.
    passed_over: VecDeque<(Instant, String)>,
    what: String,
}

impl Probe {
    /// Starts a command that prints events; `what` is its name in messages.
    pub fn start(mut command: Command, what: String) -> anyhow::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("no stdout")?;
        let stderr = child.stderr.take().context("no stderr")?;
        let (sender, lines) = sync_channel(1024);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    break;
                }
            }
        });
        // Passed on line by line, so that it is shown with the test's own output.
        let who = what.clone();
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                eprintln!("[{who}] {line}");
            }
        });
        let stdin = child.stdin.take();
        Ok(Self { child, stdin, lines, passed_over: VecDeque::new(), what })
    }

    /// The next event, and when it was told.
    pub fn event(&mut self, limit: Duration) -> anyhow::Result<(Instant, Event)> {
        match self.passed_over.pop_front().map_or_else(|| self.lines.recv_timeout(limit), Ok) {
            Ok((at, line)) => Ok((at, parse(&line)?)),
            Err(RecvTimeoutError::Timeout) => bail!("{}: nothing within {limit:?}", self.what),
            Err(RecvTimeoutError::Disconnected) => {
                let status = poll::until(PATIENCE, || self.child.try_wait().transpose());
                bail!("{}: it ended ({status:?})", self.what)
            }
        }
    }

    /// No event for so long.
    pub fn is_quiet_for(&mut self, span: Duration) -> anyhow::Result<bool> {
        if !self.passed_over.is_empty() {
            return Ok(false);
        }
        match self.lines.recv_timeout(span) {
            Err(RecvTimeoutError::Timeout) => Ok(true),
            Ok(_) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => bail!("{}: it ended", self.what),
        }
    }

    /// The next event, which must be that a pulse lives: when it was told.
    pub fn expect_up(&mut self) -> anyhow::Result<Instant> {
        match self.event(PATIENCE)? {
            (at, Event::Up { .. }) => Ok(at),
            (_, event) => bail!("{}: not up but {event:?}", self.what),
        }
    }

    /// The next event, which must be that a pulse died: the time of its last echo, and how it ended.
    pub fn expect_down(&mut self, limit: Duration) -> anyhow::Result<(Instant, String)> {
        match self.event(limit)? {
            (at, Event::Down { how, since_last_echo_ms, .. }) => {
                Ok((at.checked_sub(Duration::from_millis(since_last_echo_ms)).unwrap_or(at), how))
            }
            (_, event) => bail!("{}: not down but {event:?}", self.what),
        }
    }

    /// Asks all flows for an echo: how many answered, and how many did not.
    pub fn round(&mut self) -> anyhow::Result<(usize, usize)> {
        let stdin = self.stdin.as_mut().context("no stdin")?;
        stdin.write_all(b"\n")?;
        match self.event(Duration::from_mins(2))? {
            (_, Event::Round { echoed, failed, .. }) => Ok((echoed, failed)),
            (_, event) => bail!("{event:?}"),
        }
    }

    /// Asks a pulse how many echoes have come back, on all of its connections together.
    pub fn echoes(&mut self) -> anyhow::Result<u64> {
        self.stdin.as_mut().context("no stdin")?.write_all(b"\n")?;
        loop {
            let (at, line) = self
                .lines
                .recv_timeout(PATIENCE)
                .with_context(|| format!("{}: it does not say how many echoes there were", self.what))?;
            match parse(&line)? {
                Event::Echoes { count } => return Ok(count),
                _ => self.passed_over.push_back((at, line)),
            }
        }
    }

    /// What was told and not read yet.
    pub fn told(&mut self) -> anyhow::Result<VecDeque<Event>> {
        self.passed_over.drain(..).chain(self.lines.try_iter()).map(|(_, line)| parse(&line)).collect()
    }

    /// Ends it.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

fn parse(line: &str) -> anyhow::Result<Event> {
    serde_json::from_str(line).with_context(|| format!("not an event: {line}"))
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // A child of ours that has not been waited for can always be killed.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}
