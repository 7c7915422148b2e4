//! The rig that the story is played on, and its actors' ways in.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use opencluster_integration::capture::Capture;
use opencluster_integration::harness::Probe;
use opencluster_integration::operator::Operator;
use opencluster_integration::poll;
use opencluster_integration::rig::Rig;
use opencluster_integration::state::Lock;
use opencluster_integration::{down, up};

use super::story::Story;

/// Where the demo's directory appears on the nodes: a path that every user may walk.
pub(crate) const HERE: &str = "/run/demo";

/// Workloads, services; no policy.
const RESOURCES: &str = include_str!("resources.yaml");

/// The policies of the applications.
pub(crate) const POLICIES: &str = include_str!("policies.yaml");

/// A rig that is up. Dropped, it is taken down.
pub(crate) struct Stage {
    pub(crate) rig: Rig,
    pub(crate) operator: Operator,
    directory: PathBuf,
    servers: Vec<(&'static str, Child)>,
    kept: bool,
}

impl Stage {
    /// Brings the rig up, with the policies if `allowed`.
    pub(crate) fn up(story: &mut Story, rig: &str, allowed: bool) -> anyhow::Result<Self> {
        let directory = story.directory().to_owned();
        let resources = directory.join("resources.yaml");
        fs::write(&resources, if allowed { [RESOURCES, POLICIES].join("---\n") } else { RESOURCES.to_owned() })?;
        let options = up::Options { apply: vec![resources], ..super::options(rig) };
        let started = Instant::now();
        let interruption = story.interruption();
        let rig = up::up(&options, &interruption, &mut |step| story.note(step))?;
        let took = started.elapsed();
        let stage = Self { operator: rig.operator(), rig, directory, servers: Vec::new(), kept: false };
        if !allowed {
            story.check("cluster-up", "The cluster is up", || Ok(format!("{:.1} s", took.as_secs_f64())))?;
        }
        for host in ["a", "b", "x", "y"] {
            stage.show_directory(host)?;
        }
        Ok(stage)
    }

    /// Makes the demo's directory appear at [`HERE`], in the host's own mount namespace.
    fn show_directory(&self, host: &str) -> anyhow::Result<()> {
        let directory = self.directory.display().to_string();
        let script = "mkdir -p \"$2\" && mount --bind \"$1\" \"$2\"";
        said(self.rig.on_host(host)?.args(["sh", "-c", script, "sh", &directory, HERE]))?;
        Ok(())
    }

    /// Who is where.
    pub(crate) fn describe(&self, story: &Story) {
        for host in &self.rig.record.layout.hosts {
            let role = format!("{:?}", host.role).to_lowercase();
            story.note(&format!("{:<4} {:<11} {:<12} {}", host.name, role, host.v4, host.v6));
        }
    }

    /// A file in the demo's directory, as the rig's machine sees it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A command of a workload of the namespace `shop`.
    pub(crate) fn workload(&self, node: &str, workload: &str, command: &[&str]) -> anyhow::Result<Command> {
        let mut whole = self.rig.as_workload(node, "shop", workload)?;
        whole.args(command);
        Ok(whole)
    }

    /// A command on a host, outside of every workload.
    pub(crate) fn host(&self, host: &str, command: &[&str]) -> anyhow::Result<Command> {
        let mut whole = self.rig.on_host(host)?;
        whole.args(command);
        Ok(whole)
    }

    /// A probe, as a workload of the namespace `shop`.
    pub(crate) fn probe(&self, node: &str, workload: &str, arguments: &[&str]) -> anyhow::Result<Probe> {
        let mut command = self.workload(node, workload, &[])?;
        command.arg(self.rig.binaries.path("opencluster-probe")?).args(arguments);
        Probe::start(command, format!("{workload} on {node}"))
    }

    /// A probe on a host, outside of every workload.
    pub(crate) fn host_probe(&self, host: &str, arguments: &[&str]) -> anyhow::Result<Probe> {
        let mut command = self.host(host, &[])?;
        command.arg(self.rig.binaries.path("opencluster-probe")?).args(arguments);
        Probe::start(command, host.to_owned())
    }

    /// Starts a server and waits until it listens on its port.
    pub(crate) fn serve(
        &mut self,
        name: &'static str,
        host: &str,
        port: u16,
        mut command: Command,
    ) -> anyhow::Result<()> {
        let log = File::create(self.path(&format!("{name}.log")))?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        self.servers.push((name, child));
        let listens = || {
            let filter = format!("sport = :{port}");
            let sockets = self.host(host, &["ss", "-Hltn", &filter]).and_then(|mut command| said(&mut command));
            sockets.is_ok_and(|sockets| !sockets.trim().is_empty())
        };
        if !poll::until_true(Duration::from_secs(20), listens) {
            let log = fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
            bail!("{name} does not listen on port {port}: {log}");
        }
        Ok(())
    }

    /// A capture at the switch's end of a host's link.
    pub(crate) fn capture(&self, host: &str, name: &str) -> anyhow::Result<Capture> {
        Ok(Capture::start(&self.rig, host, &self.path(&format!("{name}.pcap")))?)
    }

    /// Leaves the rig up, with a web server, and says how to play with it.
    pub(crate) fn keep(mut self, story: &mut Story) -> anyhow::Result<()> {
        super::applications::web(&mut self)?;
        super::applications::echo(&mut self)?;
        self.kept = true;
        let rig = self.rig.binaries.path("opencluster-rig")?;
        let rig = rig.display();
        let name = self.rig.option();
        story.chapter("A fresh cluster is up, with its policies, nginx and an echo server. Play with it:");
        for line in [
            format!(". {}", self.rig.state.env().display()),
            "opencluster check                                   # how is everything?".to_owned(),
            "opencluster get policy -A                           # who may talk to whom?".to_owned(),
            "opencluster explain flow --from shop/till --to shop/web:8080".to_owned(),
            format!("{rig} exec{name} a --namespace shop --as till -- curl -s http://b:8080/"),
            "opencluster delete policy shop/till-to-web          # and try the same again".to_owned(),
            format!("{rig} exec{name} x --host -- curl -m 3 http://b:8080/   # an intruder"),
            format!("{rig} capture{name} a --out a.pcap               # look at the wire"),
            format!("{rig} status{name}"),
            format!("{rig} down{name}"),
        ] {
            story.note(&line);
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let outcome = Lock::take(self.rig.name())
            .map_err(anyhow::Error::from)
            .and_then(|_lock| Ok(down::down(self.rig.name(), Some(&self.rig.state))?));
        if let Err(error) = outcome {
            eprintln!("the rig was not removed: {error:#}; run `opencluster-rig down`");
        }
        for (name, server) in &mut self.servers {
            // Killed with the rig: this only takes note of it.
            if let Err(error) = server.wait() {
                eprintln!("{name}: {error}");
            }
        }
    }
}

/// Runs a command to its end: what it printed on standard output.
pub(crate) fn said(command: &mut Command) -> anyhow::Result<String> {
    let shown = command.get_args().last().map(|last| last.to_string_lossy().into_owned()).unwrap_or_default();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run … {shown}"))?;
    if !output.status.success() {
        let story = [output.stderr, output.stdout].concat();
        let story = String::from_utf8_lossy(&story);
        let story = story.trim();
        bail!("… {shown}: {}: {}", output.status, story.lines().last().unwrap_or_default());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
