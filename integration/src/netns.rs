//! Network namespaces, the switch and the links, through `ip`: all of it inside the rig's own namespaces.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::{fs, io, thread};

use nix::sched::{CloneFlags, setns};

use crate::layout::{self, BRIDGE, Host, INTERFACE, Layout};

/// What can go wrong with namespaces and links.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// `ip` is not there or could not be started.
    #[error("cannot run ip (Debian package iproute2): {0}")]
    NoIp(#[source] io::Error),
    /// `ip` refused.
    #[error("`ip {command}` failed: {message}")]
    Refused {
        /// What was asked of it.
        command: String,
        /// What it said.
        message: String,
    },
    /// A kernel setting of a namespace could not be made.
    #[error("cannot set {setting} in the network namespace {netns}: {source}")]
    Setting {
        /// Whose.
        netns: String,
        /// Which.
        setting: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The list of namespaces cannot be read.
    #[error("cannot list {0}: {1}")]
    List(PathBuf, #[source] io::Error),
}

/// Where `ip netns` keeps the named namespaces.
const NAMED: &str = "/run/netns";

/// The file of a named namespace.
pub fn path(name: &str) -> PathBuf {
    Path::new(NAMED).join(name)
}

/// The named namespaces that belong to a rig. A rig's name holds no dash, so the first part of a namespace's name says
/// whose it is.
pub fn of_rig(rig: &str) -> Result<Vec<String>, NetnsError> {
    let entries = match fs::read_dir(NAMED) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(NetnsError::List(NAMED.into(), error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(|error| NetnsError::List(NAMED.into(), error))?.file_name();
        let name = name.to_string_lossy().into_owned();
        if name.split_once('-').is_some_and(|(owner, _)| owner == rig) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Deletes a named namespace.
pub fn delete(name: &str) -> Result<(), NetnsError> {
    ip(&["netns", "delete", name])
}

/// Makes the namespaces of a rig. Nothing is linked yet, so that kernel settings can precede the links.
pub fn create(layout: &Layout) -> Result<(), NetnsError> {
    let switch = layout::netns(&layout.rig, layout::SWITCH);
    let names = layout.hosts.iter().map(|host| host.netns.as_str()).chain([switch.as_str()]);
    batch(None, &names.map(|name| format!("netns add {name}")).collect::<Vec<_>>())
}

/// Settings of the switch, below /proc/sys/net: it carries frames as a switch does, and shows none of them to its own
/// packet filter, which would take every packet through the IP stack once more.
const SWITCH_SETTINGS: [&str; 3] =
    ["bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables", "bridge/bridge-nf-call-arptables"];

/// Makes the switch and every host's link to it, with addresses.
pub fn link(layout: &Layout) -> Result<(), NetnsError> {
    let switch = layout::netns(&layout.rig, layout::SWITCH);
    let inside = switch.clone();
    // /proc/sys/net shows the namespace of the thread that opens it: a thread of its own, which ends here.
    let set = thread::spawn(move || SWITCH_SETTINGS.iter().try_for_each(|setting| switch_off(&inside, setting)));
    set.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    // No spanning tree and no snooping: a link that is up carries frames at once, and floods as a plain switch does.
    let mut commands = vec![
        "link set lo up".to_owned(),
        format!("link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"),
        format!("link set {BRIDGE} up"),
    ];
    for Host { port, netns, .. } in &layout.hosts {
        commands.push(format!("link add {port} mtu 1500 type veth peer name {INTERFACE} mtu 1500 netns {netns}"));
        commands.push(format!("link set {port} master {BRIDGE} up"));
    }
    batch(Some(&switch), &commands)?;
    for host in &layout.hosts {
        batch(
            Some(&host.netns),
            &[
                "link set lo up".to_owned(),
                format!("addr add {}/24 dev {INTERFACE}", host.v4),
                format!("addr add {}/64 dev {INTERFACE} nodad", host.v6),
                format!("link set {INTERFACE} up"),
            ],
        )?;
    }
    Ok(())
}

/// Sets a kernel setting of a namespace to 0, and stays in that namespace. A kernel without it (it comes with the module
/// br_netfilter) does not do what it would switch off.
fn switch_off(netns: &str, setting: &'static str) -> Result<(), NetnsError> {
    let outcome = fs::File::open(path(netns))
        .and_then(|namespace| setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from))
        .and_then(|()| match fs::write(Path::new("/proc/sys/net").join(setting), "0") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome,
        });
    outcome.map_err(|source| NetnsError::Setting { netns: netns.to_owned(), setting, source })
}

/// Makes a tap device in a namespace and connects it to the bridge there.
pub fn add_tap(netns: &str, tap: &str, bridge: &str) -> Result<(), NetnsError> {
    batch(
        Some(netns),
        &[
            format!("tuntap add dev {tap} mode tap"),
            format!("link set {tap} master {bridge}"),
            format!("link set {tap} up"),
        ],
    )
}

/// Runs many commands by one `ip`.
fn batch(netns: Option<&str>, commands: &[String]) -> Result<(), NetnsError> {
    let mut arguments = Vec::new();
    if let Some(netns) = netns {
        arguments.extend(["-netns", netns]);
    }
    arguments.extend(["-batch", "-"]);
    let mut child = Command::new("ip")
        .args(&arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(NetnsError::NoIp)?;
    let script = commands.join("\n") + "\n";
    let fed = match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(script.as_bytes()),
        None => Ok(()),
    };
    let output = child.wait_with_output().map_err(NetnsError::NoIp)?;
    check(&format!("{} <<< {:?}", arguments.join(" "), commands), &output)?;
    fed.map_err(NetnsError::NoIp)
}

fn ip(arguments: &[&str]) -> Result<(), NetnsError> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().map_err(NetnsError::NoIp)?;
    check(&arguments.join(" "), &output)
}

fn check(command: &str, output: &Output) -> Result<(), NetnsError> {
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetnsError::Refused { command: command.to_owned(), message })
}
