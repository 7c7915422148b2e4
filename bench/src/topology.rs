//! The peers' hosts: network namespaces of this run, joined by a bridge in a third one.
//!
//! Nothing of it touches the machine's own network: even the bridge has a namespace of its own. Everything is removed at
//! the end, and what a killed run left behind is removed at the next start.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::time::Duration;

use tokio::process::Command;

use crate::error::BenchError;
use crate::process;

/// Settings of the namespaces, as the rig's hosts have them. Without them a test of connection rates measures the kernel's search for a free port.
pub const SYSCTLS: [(&str, &str); 5] = [
    ("net/ipv4/ip_local_port_range", "16000 65535"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/ipv4/tcp_max_tw_buckets", "4096"),
    ("net/ipv4/tcp_max_syn_backlog", "16384"),
    ("net/core/somaxconn", "16384"),
];

/// Settings of the switch's namespace: as a switch does, it shows no frame to a packet filter of its own, which would take
/// every contender's packets through the IP stack once more.
const SWITCH: [(&str, &str); 3] = [
    ("net/bridge/bridge-nf-call-iptables", "0"),
    ("net/bridge/bridge-nf-call-ip6tables", "0"),
    ("net/bridge/bridge-nf-call-arptables", "0"),
];

/// New namespaces begin with what this one has.
const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

const STEP: Duration = Duration::from_secs(20);

/// The server's host.
pub const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 89, 0, 12));
/// The client's host.
pub const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 89, 0, 11));

/// The namespaces of one run, and the lock that keeps another run of the same name away.
#[derive(Debug)]
pub struct Topology {
    prefix: String,
    /// None for hosts beside those of a run: the run's lock covers them.
    _lock: Option<UnixListener>,
}

impl Topology {
    /// Takes the lock and builds the namespaces, after removing any of the same name.
    pub async fn up(name: &str) -> Result<Self, BenchError> {
        let prefix = prefix(name);
        let topology = Self { _lock: Some(lock(&prefix)?), prefix };
        remove_all(&topology.prefix).await?;
        topology.build().await?;
        Ok(topology)
    }

    /// Two more hosts of the same shape, with a bridge of their own, for a contender that changes its hosts.
    pub async fn beside(&self, contender: &str) -> Result<Self, BenchError> {
        // No run's name has a dot, so this is in no other run's way.
        let topology = Self { _lock: None, prefix: format!("{}.{contender}", self.prefix) };
        topology.remove().await?;
        topology.build().await?;
        Ok(topology)
    }

    async fn build(&self) -> Result<(), BenchError> {
        let (net, client, server) = (self.net(), self.client(), self.server());
        for namespace in [&net, &client, &server] {
            ip(&["netns", "add", namespace]).await?;
            ip(&["-n", namespace, "link", "set", "lo", "up"]).await?;
        }
        set(&net, &SWITCH)?;
        ip(&["-n", &net, "link", "add", "br0", "type", "bridge"]).await?;
        ip(&["-n", &net, "link", "set", "br0", "up"]).await?;
        for (host, port, address) in [(&client, "to-a", CLIENT), (&server, "to-b", SERVER)] {
            ip(&["-n", &net, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host]).await?;
            ip(&["-n", &net, "link", "set", port, "master", "br0", "up"]).await?;
            ip(&["-n", host, "addr", "add", &format!("{address}/24"), "dev", "eth0"]).await?;
            ip(&["-n", host, "link", "set", "eth0", "up"]).await?;
            tune(host)?;
        }
        Ok(())
    }

    /// Removes the namespaces that there are, and those beside them.
    pub async fn remove_all(&self) -> Result<(), BenchError> {
        remove_all(&self.prefix).await
    }

    /// Removes the namespaces that there are.
    pub async fn remove(&self) -> Result<(), BenchError> {
        remove(&self.prefix).await
    }

    /// The client's namespace.
    pub fn client(&self) -> String {
        format!("{}-a", self.prefix)
    }

    /// The server's namespace.
    pub fn server(&self) -> String {
        format!("{}-b", self.prefix)
    }

    fn net(&self) -> String {
        format!("{}-net", self.prefix)
    }
}

/// Removes what a run of this name left behind; refused while that run is alive.
pub async fn clean(name: &str) -> Result<(), BenchError> {
    let prefix = prefix(name);
    let _lock = lock(&prefix)?;
    remove_all(&prefix).await
}

/// Applies [`SYSCTLS`] in a network namespace under /run/netns, and what our node daemon does to the host that it runs on:
/// BBR, where it is the default, gives way to what does not pace loopback. Every contender is to gain by it.
pub fn tune(net: &str) -> Result<(), BenchError> {
    set(net, &SYSCTLS)?;
    if fs::read_to_string(CONGESTION_CONTROL).is_ok_and(|default| default.starts_with("bbr")) {
        set(net, &[("net/ipv4/tcp_congestion_control", "reno")])?;
    }
    Ok(())
}

fn set(net: &str, settings: &'static [(&str, &str)]) -> Result<(), BenchError> {
    let net = net.to_owned();
    // /proc/sys/net shows the namespace of the thread that opens it: a thread of its own, which ends here.
    let thread = std::thread::spawn(move || {
        process::join(&net)?;
        settings.iter().try_for_each(|(key, value)| {
            let path = PathBuf::from("/proc/sys").join(key);
            match fs::write(&path, value) {
                // What comes with the module br_netfilter is not there without it, and not needed then.
                Err(error) if error.kind() == ErrorKind::NotFound && key.starts_with("net/bridge/") => Ok(()),
                outcome => outcome.map_err(BenchError::file("setting", path)),
            }
        })
    });
    thread.join().unwrap_or_else(|_| Err(BenchError::Peer("the thread that sets the kernel's parameters died".into())))
}

fn prefix(name: &str) -> String {
    if name == "bench" { "ocbench".into() } else { format!("ocbench-{name}") }
}

/// An abstract socket is a lock that leaves nothing behind, however its holder ends.
fn lock(prefix: &str) -> Result<UnixListener, BenchError> {
    let address =
        SocketAddr::from_abstract_name(format!("{prefix}-lock")).map_err(BenchError::socket("naming a lock"))?;
    UnixListener::bind_addr(&address).map_err(|e| match e.kind() {
        ErrorKind::AddrInUse => BenchError::Peer(format!(
            "another benchmark named {prefix} is running: wait for it, or give this one another --name"
        )),
        _ => BenchError::socket(format!("taking the lock {prefix}-lock"))(e),
    })
}

/// Those of `prefix`, and all that are beside them.
async fn remove_all(prefix: &str) -> Result<(), BenchError> {
    let folder = PathBuf::from("/run/netns");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(BenchError::file("listing", folder)(e)),
    };
    let beside = format!("{prefix}.");
    for entry in entries {
        let name = entry.map_err(BenchError::file("listing", &folder))?.file_name();
        if let Some(name) = name.to_str().filter(|name| name.starts_with(&beside)) {
            ip(&["netns", "del", name]).await?;
        }
    }
    remove(prefix).await
}

async fn remove(prefix: &str) -> Result<(), BenchError> {
    for host in ["a", "b", "net"] {
        let namespace = format!("{prefix}-{host}");
        if PathBuf::from("/run/netns").join(&namespace).exists() {
            ip(&["netns", "del", &namespace]).await?;
        }
    }
    Ok(())
}

async fn ip(args: &[&str]) -> Result<(), BenchError> {
    let mut command = Command::new("ip");
    command.args(args);
    process::finished(command, STEP).await.map(|_| ())
}
