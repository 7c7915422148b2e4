//! A WireGuard tunnel between the two hosts, run in user space by wireguard-go, as where the kernel has no WireGuard.
//!
//! It is no proxy: the client's connection goes through the tunnel, packet by packet, to the server's kernel. So it
//! decides nothing about a connection and knows no workload, only the host; and opening a connection costs it nothing.
//! Its cipher is ChaCha20-Poly1305, its packets hold what fits the wire: both are WireGuard's, not settings.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::process::Command;

use super::{Kind, Launch, Site};
use crate::error::BenchError;
use crate::process;
use crate::topology;

/// The server's address in the tunnel.
pub(super) const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 90, 0, 12));
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 90, 0, 11));

const PORT: u16 = 8120;
const STEP: Duration = Duration::from_secs(10);

/// One end of the tunnel.
struct End {
    side: &'static str,
    host: String,
    interface: String,
    inside: IpAddr,
    outside: IpAddr,
}

fn ends(site: &Site<'_>) -> [End; 2] {
    // The programs' control sockets are files on this machine, named after the interface: the run's name is in it.
    let interface = |side: char| format!("oc{}{side}", site.name);
    [
        End {
            side: "client",
            host: site.topology.client(),
            interface: interface('a'),
            inside: CLIENT,
            outside: topology::CLIENT,
        },
        End {
            side: "server",
            host: site.topology.server(),
            interface: interface('b'),
            inside: SERVER,
            outside: topology::SERVER,
        },
    ]
}

/// The programs of both ends, not yet connected.
pub(super) fn pair(site: &Site<'_>) -> Result<Vec<Launch>, BenchError> {
    ends(site)
        .into_iter()
        .map(|end| {
            let mut command = process::in_namespace(&end.host, "wireguard-go")?;
            // It warns that the kernel could do it better, and waits for no answer.
            command.arg("-f").arg(&end.interface).env("WG_PROCESS_FOREGROUND", "1").env("LOG_LEVEL", "error");
            Ok(Launch::counted(site.folder.join(format!("wireguard-{}.log", end.side)), command))
        })
        .collect()
}

/// Gives both ends their keys and addresses, as soon as their interfaces are there.
pub(super) async fn connect(site: &Site<'_>) -> Result<(), BenchError> {
    let ends = ends(site);
    let key_file = |end: &End| site.folder.join("pki").join(format!("wireguard-{}.key", end.side));
    let mut public = Vec::new();
    for end in &ends {
        public.push(make_key(&key_file(end)).await?);
        await_interface(end).await?;
    }
    for (own, peer) in [(0, 1), (1, 0)] {
        let (end, other) = (&ends[own], &ends[peer]);
        let mut wg = process::in_namespace(&end.host, "wg")?;
        wg.args(["set", &end.interface, "listen-port", &PORT.to_string(), "private-key"]).arg(key_file(end));
        wg.args(["peer", &public[peer], "allowed-ips", &format!("{}/32", other.inside)]);
        wg.args(["endpoint", &format!("{}:{PORT}", other.outside)]);
        process::finished(wg, STEP).await?;
        let address = format!("{}/24", end.inside);
        ip(end, &["addr", "add", &address, "dev", &end.interface]).await?;
        ip(end, &["link", "set", &end.interface, "up"]).await?;
    }
    Ok(())
}

/// A new private key in `file`; returns the public one.
async fn make_key(file: &Path) -> Result<String, BenchError> {
    let mut command = Command::new("sh");
    command.args(["-c", "umask 077; wg genkey >\"$1\" && wg pubkey <\"$1\"", "sh"]).arg(file);
    let output = process::finished(command, STEP).await?;
    let key = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if key.is_empty() { Err(Kind::Wireguard.failed("wg printed no public key".into())) } else { Ok(key) }
}

async fn await_interface(end: &End) -> Result<(), BenchError> {
    let socket = PathBuf::from(format!("/var/run/wireguard/{}.sock", end.interface));
    let deadline = Instant::now() + STEP;
    while !socket.exists() || ip(end, &["link", "show", &end.interface]).await.is_err() {
        if Instant::now() >= deadline {
            let reason = format!("{} did not appear on the {}'s host", end.interface, end.side);
            return Err(Kind::Wireguard.failed(reason));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn ip(end: &End, args: &[&str]) -> Result<(), BenchError> {
    let mut command = Command::new("ip");
    command.args(["-n", &end.host]).args(args);
    process::finished(command, STEP).await.map(|_| ())
}
