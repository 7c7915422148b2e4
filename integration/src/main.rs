//! `opencluster-rig`: whole clusters on one machine.

#![forbid(unsafe_code)]

mod cli;
mod demo;
mod measure;

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Parser;
use nix::sched::{CloneFlags, setns};
use opencluster_integration::binaries::Binaries;
use opencluster_integration::cgroup::Cgroups;
use opencluster_integration::layout::{self, SWITCH};
use opencluster_integration::process::ProcessId;
use opencluster_integration::rig::Rig;
use opencluster_integration::state::{Lock, StateDir};
use opencluster_integration::up::{self, Options};
use opencluster_integration::{down, host, netns};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Arguments, Command};

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("opencluster-rig: {}", whole_story(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes; most errors tell their cause themselves, and it is not told twice.
fn whole_story(error: &anyhow::Error) -> String {
    let mut story = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !story.contains(&cause) {
            story.push_str(": ");
            story.push_str(&cause);
        }
    }
    story
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Up(options) => bring_up(&options.into()),
        Command::Exec { node, workload, namespace, host, name, command } => {
            let rig = Rig::load(&name.name)?;
            let inside = if host {
                rig.on_host(&node)?
            } else {
                rig.as_workload(&node, &namespace, workload.as_deref().unwrap_or(&node))?
            };
            execute(inside, &command)
        }
        Command::Down { name } => bring_down(&name.name),
        Command::Status { name } => status(&name.name),
        Command::Capture { host, out, name } => capture(&Rig::load(&name.name)?, &host, &out),
        Command::Demo { keep, name } => {
            if demo::run(&name.name, keep, &watch_for_interruption()?)? {
                Ok(())
            } else {
                bail!("not everything was observed")
            }
        }
        Command::MeasureRevocation(options) => measure::revocation(&options),
        Command::Logs { host, name } => logs(&Rig::load(&name.name)?, &host),
        Command::Hold { netns, cgroup, hosts } => match host::hold(&netns, &cgroup, &hosts)? {},
        Command::Enter { netns, holder, cgroup, detach, command } => enter(&netns, holder, &cgroup, detach, &command),
    }
}

fn bring_up(options: &Options) -> anyhow::Result<()> {
    let started = Instant::now();
    let interrupted = watch_for_interruption()?;
    let rig = up::up(options, &interrupted, &mut |step| {
        eprintln!("[{:5.2} s] {step}", started.elapsed().as_secs_f64());
    })?;
    eprintln!("[{:5.2} s] ready", started.elapsed().as_secs_f64());
    let mut out = io::stdout().lock();
    for host in &rig.record.layout.hosts {
        writeln!(out, "{:<8} {:<12} {:<16} {}", host.name, host.netns, host.v4, host.v6)?;
    }
    let which = rig.option();
    writeln!(out, "\nrun something:  opencluster-rig exec{which} a -- curl http://10.88.0.12:8080/")?;
    writeln!(out, "operate it:     . {} && opencluster check", rig.state.env().display())?;
    writeln!(out, "remove it:      opencluster-rig down{which}")?;
    Ok(())
}

/// Ctrl-C, a closed terminal or a polite kill while the rig comes up: it is taken down again instead of being left half up.
fn watch_for_interruption() -> anyhow::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let guard = runtime.enter();
    let mut signals = Vec::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        signals.push(signal(kind).context("cannot watch for signals")?);
    }
    drop(guard);
    thread::spawn(move || {
        runtime.block_on(std::future::poll_fn(|context| {
            if signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready()) {
                flag.store(true, Ordering::Relaxed);
            }
            std::task::Poll::<()>::Pending
        }));
    });
    Ok(interrupted)
}

/// Replaces this program: standard streams, signals and the exit code are the command's own.
fn execute(mut inside: std::process::Command, command: &[OsString]) -> anyhow::Result<()> {
    const DIRECTORIES: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let path = env::var("PATH").map_or_else(|_| DIRECTORIES.to_owned(), |path| format!("{path}:{DIRECTORIES}"));
    inside.env("PATH", path);
    if env::var_os("HOME").is_none() {
        inside.env("HOME", "/root");
    }
    Err(inside.args(command).exec()).context("cannot enter the host")
}

fn enter(netns: &str, holder: ProcessId, cgroup: &str, detach: bool, command: &[OsString]) -> anyhow::Result<()> {
    let (program, arguments) = command.split_first().context("no command")?;
    Cgroups::find()?.join(cgroup)?;
    if detach {
        nix::unistd::setsid().context("cannot begin a session")?;
    }
    host::enter(netns, holder)?;
    Err(host::replace_by(program, arguments).into())
}

fn bring_down(name: &str) -> anyhow::Result<()> {
    layout::check_rig_name(name)?;
    if !nix::unistd::geteuid().is_root() {
        bail!("the rig's processes are root's: run it as root");
    }
    let state = StateDir::of(Binaries::locate()?.target(), name);
    let _lock = Lock::take(name)?;
    let removed = down::down(name, Some(&state))?;
    eprintln!("removed {} processes and {} namespaces of the rig {name}", removed.processes, removed.namespaces);
    Ok(())
}

fn status(name: &str) -> anyhow::Result<()> {
    let rig = Rig::load(name)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{:<8} {:<12} {:<11} {:<16} {:<10} daemon", "HOST", "NAMESPACE", "ROLE", "ADDRESS", "HOLDER")?;
    let mut whole = true;
    for host in &rig.record.layout.hosts {
        let show = |process: Option<&ProcessId>| match process {
            None => "-".to_owned(),
            Some(process) if process.is_alive() => process.pid.to_string(),
            Some(_) => "dead".to_owned(),
        };
        let (holder, daemon) = (show(rig.record.holders.get(&host.name)), show(rig.record.daemons.get(&host.name)));
        whole &= holder != "dead" && daemon != "dead";
        let role = format!("{:?}", host.role).to_lowercase();
        let address = host.v4.to_string();
        writeln!(out, "{:<8} {:<12} {role:<11} {address:<16} {holder:<10} {daemon}", host.name, host.netns)?;
    }
    writeln!(out)?;
    out.flush()?;
    drop(out);
    let nodes = rig.operator().command()?.args(["node", "list"]).status()?;
    if !whole || !nodes.success() {
        bail!("the rig {name} is not whole");
    }
    Ok(())
}

fn capture(rig: &Rig, host: &str, out: &Path) -> anyhow::Result<()> {
    let port = &rig.record.layout.host(host)?.port;
    let switch = netns::path(&layout::netns(rig.name(), SWITCH));
    Cgroups::find()?.join(&layout::cgroup(rig.name(), "tools"))?;
    let switch = File::open(&switch).with_context(|| format!("cannot open {}", switch.display()))?;
    setns(switch, CloneFlags::CLONE_NEWNET).context("cannot enter the switch's namespace")?;
    // Unbuffered, and no change of user: the file is readable at any moment and may be anywhere.
    let error = std::process::Command::new("tcpdump")
        .args(["-i", port, "-U", "--immediate-mode", "-B", "65536", "-Z", "root", "-w"])
        .arg(out)
        .exec();
    Err(error).context("cannot run tcpdump (Debian package tcpdump)")
}

fn logs(rig: &Rig, host: &str) -> anyhow::Result<()> {
    rig.record.layout.host(host)?;
    let path = rig.state.log(host);
    let mut log = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    io::copy(&mut log, &mut io::stdout().lock())?;
    Ok(())
}
