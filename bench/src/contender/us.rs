//! Opencluster itself: a rig of two nodes and a controller, with the daemons as they are installed.
//!
//! Clients and server run in the nodes' workloads and know nothing of it: their connections are captured, carried by
//! tunnels of mutual TLS, and decided by the policy below.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use super::{Kind, Processes, write};
use crate::error::BenchError;
use crate::process;

/// Node b of every rig.
pub(super) const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 88, 0, 12));

/// Bringing a rig up or down takes a few seconds on a quiet machine.
const STEP: Duration = Duration::from_secs(90);

/// The service that is measured, and the one policy that lets its client in.
const RESOURCES: &str = "\
apiVersion: opencluster/v1
kind: Service
metadata: {name: bench, namespace: default}
spec: {ports: [{port: 9000}, {port: 9001}, {port: 9002}], workloads: [b]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-bench, namespace: default}
spec: {to: {service: bench, ports: [9000, 9001, 9002]}, from: [{workload: a}]}
";

/// Brings the rig `name` up; one of the same name that is still there is replaced.
pub(super) async fn up(name: &str, folder: &Path) -> Result<(), BenchError> {
    let resources = folder.join("us.yaml");
    write(&resources, RESOURCES)?;
    let mut command = Command::new(rig()?);
    command.args(["up", "--name", name, "--nodes", "a,b", "--apply"]).arg(resources);
    process::finished(command, STEP).await.map(|_| ())
}

/// Removes the rig `name`, also what a killed run left of it.
pub(super) async fn down(name: &str) -> Result<(), BenchError> {
    let mut command = Command::new(rig()?);
    command.args(["down", "--name", name]);
    process::finished(command, STEP).await.map(|_| ())
}

/// A command that runs `program` on `node` as its workload.
pub(super) fn exec(name: &str, node: &str, program: PathBuf) -> Result<Command, BenchError> {
    let mut command = Command::new(rig()?);
    command.args(["exec", "--name", name, node, "--as", node, "--"]).arg(program);
    command.kill_on_drop(true);
    Ok(command)
}

/// The program that makes rigs, built beside this one.
pub(super) fn rig() -> Result<PathBuf, BenchError> {
    let path = process::own_program()?.with_file_name("opencluster-rig");
    if path.exists() {
        return Ok(path);
    }
    let reason = format!("{} is not there: build the whole workspace (make build)", path.display());
    Err(Kind::Us.failed(reason))
}

/// The proxies of both nodes, whose memory counts; and with the node daemons those whose CPU time counts.
///
/// They are found by their network namespace and program, so that a proxy that was started anew is found too.
pub(super) fn processes(name: &str) -> Result<Processes, BenchError> {
    let mut found = Processes::default();
    let namespaces = ["a", "b"]
        .map(|node| inode(&PathBuf::from(format!("/run/netns/{name}-{node}"))))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    for entry in fs::read_dir("/proc").map_err(BenchError::file("listing", "/proc"))? {
        let path = entry.map_err(BenchError::file("listing", "/proc"))?.path();
        let Some(pid) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok()) else { continue };
        // A process that ended since the listing has neither, and is not one of ours.
        let (Ok(namespace), Ok(program)) = (inode(&path.join("ns/net")), fs::read_link(path.join("exe"))) else {
            continue;
        };
        if !namespaces.contains(&namespace) {
            continue;
        }
        match program.file_name().and_then(|n| n.to_str()) {
            Some("opencluster-proxy") => {
                found.memory.push(pid);
                found.cpu.push(pid);
            }
            Some("opencluster-node") => found.cpu.push(pid),
            _ => {}
        }
    }
    if found.memory.len() == 2 {
        return Ok(found);
    }
    let reason = format!("{} proxies are running in the rig {name}, there should be 2", found.memory.len());
    Err(Kind::Us.failed(reason))
}

fn inode(path: &Path) -> Result<(u64, u64), BenchError> {
    fs::metadata(path).map(|m| (m.dev(), m.ino())).map_err(BenchError::file("looking at", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contender::Service;

    #[test]
    fn the_policy_covers_every_service() {
        for service in Service::ALL {
            let port = service.port().to_string();
            assert_eq!(RESOURCES.matches(&port).count(), 2, "{port}: once in the service, once in the policy");
        }
    }
}
