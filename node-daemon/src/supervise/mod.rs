//! The proxy's life: started, fed, watched, restarted. While it is down nothing passes: its listeners have gone with it.

pub(crate) mod exec;
pub(crate) mod listeners;
pub(crate) mod ports;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use opencluster_api::control::CertificateRequest;
use opencluster_api::local::{Channel, Inbox, Status, ToDaemon, ToProxy, to_daemon, to_proxy};
use rand::Rng;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::cgroup::{self, CgroupError};

/// Messages that may wait for the proxy. A proxy that does not read for so long hangs.
const QUEUE: usize = 4096;

/// What the proxy's process needs.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) program: PathBuf,
    pub(crate) user: u32,
    pub(crate) cgroup: PathBuf,
    /// A file, or `stderr`.
    pub(crate) access_log: PathBuf,
}

/// What the proxy says, and what becomes of it. Each with the generation of the process that it is about.
#[derive(Debug)]
pub(crate) enum ProxyEvent {
    Request(u64, CertificateRequest),
    Status(u64, Status),
    Exited(u64, String),
}

/// Why the proxy could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SuperviseError {
    #[error("proxy: cannot make its control socket: {0}")]
    Socket(io::Error),
    #[error("proxy: cannot open its access log {}: {source}", path.display())]
    AccessLog { path: PathBuf, source: io::Error },
    #[error("proxy: cannot start it: {0}")]
    Start(io::Error),
}

/// Keeps at most one proxy.
#[derive(Debug)]
pub(crate) struct Supervisor {
    settings: Settings,
    events: mpsc::Sender<ProxyEvent>,
    generation: u64,
    running: Option<Running>,
    restart_at: Option<Instant>,
    pause: Duration,
    restarts: u64,
}

#[derive(Debug)]
struct Running {
    outbox: mpsc::Sender<Outgoing>,
    since: Instant,
}

struct Outgoing {
    message: ToProxy,
    descriptors: Vec<OwnedFd>,
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A proxy that ran for so long was not broken from the start.
const STABLE: Duration = Duration::from_secs(30);

impl Supervisor {
    pub(crate) fn new(settings: Settings, events: mpsc::Sender<ProxyEvent>) -> Self {
        let pause = FIRST_PAUSE;
        Self { settings, events, generation: 0, running: None, restart_at: None, pause, restarts: 0 }
    }

    /// The process that messages go to. Grows with every start.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub(crate) fn restarts(&self) -> u64 {
        self.restarts
    }

    /// When [`Supervisor::start`] is due, if it is.
    pub(crate) fn restart_at(&self) -> Option<Instant> {
        self.restart_at
    }

    /// Starts a process. Must be called on the main thread: when the thread that started it ends, the kernel kills it.
    pub(crate) fn start(&mut self) -> Result<(), SuperviseError> {
        self.restart_at = None;
        let started = self.spawn();
        if started.is_err() {
            self.schedule_restart();
        }
        started
    }

    fn spawn(&mut self) -> Result<(), SuperviseError> {
        let (ours, theirs) = UnixStream::pair().map_err(SuperviseError::Socket)?;
        let child = Command::new("/proc/self/exe")
            .arg("exec-proxy")
            .arg("--cgroup")
            .arg(&self.settings.cgroup)
            .args(["--user", &self.settings.user.to_string()])
            .args(["--parent", &std::process::id().to_string()])
            .arg("--program")
            .arg(&self.settings.program)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(self.access_log()?)
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(SuperviseError::Start)?;
        let channel = Arc::new(Channel::new(ours).map_err(SuperviseError::Socket)?);
        self.generation += 1;
        let (outbox, outgoing) = mpsc::channel(QUEUE);
        self.running = Some(Running { outbox, since: Instant::now() });
        tokio::spawn(write(Arc::clone(&channel), outgoing));
        tokio::spawn(watch(self.generation, child, channel, self.settings.cgroup.clone(), self.events.clone()));
        Ok(())
    }

    fn access_log(&self) -> Result<Stdio, SuperviseError> {
        let path = &self.settings.access_log;
        let failed = |source| SuperviseError::AccessLog { path: path.clone(), source };
        if path.as_os_str() == "stderr" {
            return Ok(io::stderr().as_fd().try_clone_to_owned().map_err(failed)?.into());
        }
        Ok(OpenOptions::new().append(true).create(true).mode(0o640).open(path).map_err(failed)?.into())
    }

    /// Sends, if there is a proxy. One that does not take it is killed, and starts anew with the current state.
    pub(crate) fn send(&mut self, message: to_proxy::Message, descriptors: Vec<OwnedFd>) -> Result<(), CgroupError> {
        let Some(running) = &self.running else { return Ok(()) };
        let outgoing = Outgoing { message: ToProxy { message: Some(message) }, descriptors };
        match running.outbox.try_send(outgoing) {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::error!(%error, "proxy: it does not take messages: killing it");
                self.kill()
            }
        }
    }

    /// Kills the process, whatever it is doing. Its end is reported like any other.
    pub(crate) fn kill(&mut self) -> Result<(), CgroupError> {
        cgroup::kill_all(&self.settings.cgroup)
    }

    /// Takes note of an [`ProxyEvent::Exited`] and schedules the next start. `false`: an old process, no matter.
    pub(crate) fn exited(&mut self, generation: u64) -> bool {
        if generation != self.generation {
            return false;
        }
        if self.running.take().is_some_and(|running| running.since.elapsed() > STABLE) {
            self.pause = FIRST_PAUSE;
        }
        self.schedule_restart();
        true
    }

    /// No restart any more.
    pub(crate) fn retire(&mut self) {
        self.restart_at = None;
        self.running = None;
    }

    fn schedule_restart(&mut self) {
        let jitter = rand::rng().random_range(0.5..1.0);
        self.restart_at = Some(Instant::now() + self.pause.mul_f64(jitter));
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.restarts += 1;
    }
}

async fn write(channel: Arc<Channel>, mut outgoing: mpsc::Receiver<Outgoing>) {
    while let Some(Outgoing { message, descriptors }) = outgoing.recv().await {
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        if let Err(error) = channel.send(&message, &borrowed).await {
            // The watching task sees the process end, or ends it.
            tracing::warn!(%error, "proxy: cannot send");
            return;
        }
    }
}

/// Passes on what the proxy says until it ends; a proxy that breaks the protocol is ended.
async fn watch(
    generation: u64,
    mut child: Child,
    channel: Arc<Channel>,
    cgroup: PathBuf,
    events: mpsc::Sender<ProxyEvent>,
) {
    let mut inbox = Inbox::default();
    let broken = loop {
        match channel.receive::<ToDaemon>(&mut inbox).await {
            Ok(message) => {
                let event = match message.message {
                    Some(to_daemon::Message::CertificateRequest(request)) => ProxyEvent::Request(generation, request),
                    Some(to_daemon::Message::Status(status)) => ProxyEvent::Status(generation, status),
                    None => continue,
                };
                if events.send(event).await.is_err() {
                    return;
                }
            }
            Err(error) => break error,
        }
    };
    if let Err(error) = cgroup::kill_all(&cgroup) {
        tracing::error!(%error, "proxy: cannot kill it");
    }
    let end = match child.wait().await {
        Ok(status) => format!("{status} ({broken})"),
        Err(error) => format!("its end could not be observed: {error}"),
    };
    if events.send(ProxyEvent::Exited(generation, end)).await.is_err() {
        tracing::debug!("proxy: ended together with the daemon");
    }
}
