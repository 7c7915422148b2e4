//! Is each node well?

use std::collections::BTreeSet;

use opencluster_api::rest::{ClusterStatus, NodeStatus, WorkloadStatus};
use opencluster_policy::resource::Resource;

use super::report::{Check, Group};
use crate::commands::node::{milliseconds, state};

/// Heartbeats that may be missing before it is worth a look.
const LATE_HEARTBEATS: u64 = 3;

/// A cluster without nodes is in order, but carries nothing.
pub(super) fn none(nodes: &[NodeStatus]) -> Option<Group> {
    nodes.is_empty().then(|| {
        let mut group = Group::new("nodes");
        group.push(Check::warning("there are nodes", "none", "apply a Node, then: opencluster node token NAME"));
        group
    })
}

pub(super) fn group(
    node: &NodeStatus,
    cluster: &ClusterStatus,
    resources: &[Resource],
    workloads: &[WorkloadStatus],
) -> Group {
    let mut group = Group::new(format!("node {}", node.name));
    match node.state.as_str() {
        "active" if node.cordoned => group.push(Check::warning(
            "is active",
            format!("it is cordoned: {} of its life are left", milliseconds(node.age_left_ms.unwrap_or(0))),
            format!("wipe and restart the host, then enrol it again: opencluster node token {}", node.name),
        )),
        "active" => group.extend(active(node, cluster, resources, workloads)),
        "new" => group.push(Check::warning(
            "is active",
            "it never enrolled",
            format!("opencluster node token {} makes the token that its host needs", node.name),
        )),
        "retired" => group.push(Check::ok("is retired", "it carries nothing")),
        "enrolling" => group.push(Check::failed(
            "is active",
            "it has enrolled, but no heartbeat came yet",
            "if this stays: look at the node's log, and whether it reaches the controller's node port",
        )),
        // A terminal state: the only way back is a new enrolment.
        _ => group.push(Check::failed(
            "is active",
            state(node),
            format!("wipe and restart the host, then enrol it again: opencluster node token {}", node.name),
        )),
    }
    group
}

fn active(
    node: &NodeStatus,
    cluster: &ClusterStatus,
    resources: &[Resource],
    workloads: &[WorkloadStatus],
) -> Vec<Check> {
    let log = "look at the node's log (journalctl -u opencluster-node)";
    let mut checks = vec![
        Check::require(
            "is active",
            node.lease_left_ms > 0,
            format!("lease left {}", milliseconds(node.lease_left_ms)),
            log,
        ),
        heartbeat(node, cluster),
        Check::require("firewall is applied", node.firewall_applied, "", log),
        Check::require(
            "proxy is ready",
            node.proxy_ready,
            flows(node),
            "look at the node's log: it says what the proxy waits for",
        ),
        version("configuration is current", node.config_version, cluster.config_version),
        version("revocations are current", node.revocation_version, cluster.revocation_version),
        identities(node, &cluster.trust_domain, resources, workloads),
    ];
    if node.firewall_repairs > 0 {
        let detail = format!("{} repairs since it started", node.firewall_repairs);
        checks.push(Check::warning(
            "nobody touched its firewall",
            detail,
            "somebody on that host changes the packet filter: the node's log says when",
        ));
    }
    if !node.generation_watched {
        checks.push(Check::warning(
            "copies of its machine are seen by their generation",
            "the kernel's log is not followed: clocks and nonces must do alone",
            "look at the node's log: it says why /dev/kmsg cannot be read",
        ));
    }
    if node.proxy_restarts > 0 {
        let detail = format!("{} restarts since it started", node.proxy_restarts);
        checks.push(Check::warning("proxy did not restart", detail, log));
    }
    checks
}

fn heartbeat(node: &NodeStatus, cluster: &ClusterStatus) -> Check {
    let name = "heartbeats arrive";
    match node.heartbeat_age_ms {
        None => Check::failed(name, "none arrived yet", "look at the node's log"),
        Some(age) => {
            let detail = format!("the last one {} ago", milliseconds(age));
            if age > u64::from(cluster.heartbeat_ms).saturating_mul(LATE_HEARTBEATS) {
                Check::warning(name, detail, "the network or one of the two hosts is slow: the lease may run out")
            } else {
                Check::ok(name, detail)
            }
        }
    }
}

fn flows(node: &NodeStatus) -> String {
    if node.proxy_ready { format!("{} live flows", node.flows) } else { String::new() }
}

fn version(name: &str, applied: u64, wanted: u64) -> Check {
    let detail = format!("version {applied}");
    let lacking = format!("the node has applied version {applied}, the controller has {wanted}");
    if applied == wanted {
        Check::ok(name, detail)
    } else {
        Check::failed(name, lacking, "try again in a second; if it stays: look at the node's log")
    }
}

fn identities(node: &NodeStatus, trust_domain: &str, resources: &[Resource], workloads: &[WorkloadStatus]) -> Check {
    let name = "workload identities are installed";
    // A revoked identity is held by nobody, and that is as it should be.
    let revoked = |id: &String| workloads.iter().any(|found| found.spiffe_id == *id && found.revoked.is_some());
    let expected: BTreeSet<String> = resources
        .iter()
        .filter_map(|resource| match resource {
            Resource::Workload(workload) if workload.spec.nodes.contains(&node.name) => {
                Some(workload_id(trust_domain, &workload.metadata.namespace, &workload.metadata.name))
            }
            _ => None,
        })
        .filter(|id| !revoked(id))
        .collect();
    let missing: Vec<_> =
        expected.iter().filter(|&id| !node.workloads_ready.contains(id)).map(String::as_str).collect();
    let detail = format!("{} of {}", expected.len() - missing.len(), expected.len());
    if missing.is_empty() {
        Check::ok(name, detail)
    } else {
        let detail = format!("{detail}; missing: {}", missing.join(", "));
        Check::failed(name, detail, "look at the node's log and the audit trail: a refused certificate says why")
    }
}

/// As in SVIDs and in [`NodeStatus::workloads_ready`].
pub(in crate::commands) fn workload_id(trust_domain: &str, namespace: &str, name: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::check::report::Outcome;
    use crate::commands::node::tests::healthy;
    use crate::commands::status::tests::healthy as cluster;
    use crate::commands::workload::tests::ready;

    fn workloads() -> Vec<Resource> {
        let text = "{apiVersion: opencluster/v1, kind: Workload, metadata: {name: a}, spec: {nodes: [a]}}";
        Resource::parse_documents(text).expect("a workload")
    }

    fn outcomes(node: &NodeStatus) -> Vec<Outcome> {
        group(node, &cluster(), &workloads(), &[]).checks.iter().map(|check| check.result).collect()
    }

    #[test]
    fn a_healthy_node_passes() {
        assert_eq!(outcomes(&healthy("a")), [Outcome::Ok; 7]);
    }

    #[test]
    fn each_fault_of_a_node_is_found() {
        let finds = |index: usize, outcome, node: NodeStatus| {
            let mut expected = vec![Outcome::Ok; 7];
            if index == 7 {
                expected.push(outcome);
            } else {
                expected[index] = outcome;
            }
            assert_eq!(outcomes(&node), expected, "{node:?}");
        };
        finds(0, Outcome::Failed, NodeStatus { lease_left_ms: 0, ..healthy("a") });
        finds(1, Outcome::Warning, NodeStatus { heartbeat_age_ms: Some(1501), ..healthy("a") });
        finds(1, Outcome::Failed, NodeStatus { heartbeat_age_ms: None, ..healthy("a") });
        finds(2, Outcome::Failed, NodeStatus { firewall_applied: false, ..healthy("a") });
        finds(3, Outcome::Failed, NodeStatus { proxy_ready: false, ..healthy("a") });
        finds(4, Outcome::Failed, NodeStatus { config_version: 16, ..healthy("a") });
        finds(5, Outcome::Failed, NodeStatus { revocation_version: 1, ..healthy("a") });
        finds(6, Outcome::Failed, NodeStatus { workloads_ready: Vec::new(), ..healthy("a") });
        let mut revoked = ready("a");
        revoked.revoked = Some("a test".into());
        let without = NodeStatus { workloads_ready: Vec::new(), ..healthy("a") };
        let checks = group(&without, &cluster(), &workloads(), &[revoked]).checks;
        assert!(checks.iter().all(|check| check.result == Outcome::Ok), "nobody is to hold a revoked identity");
        let cordoned = NodeStatus { cordoned: true, age_left_ms: Some(1000), ..healthy("a") };
        assert_eq!(outcomes(&cordoned), [Outcome::Warning]);
        finds(7, Outcome::Warning, NodeStatus { generation_watched: false, ..healthy("a") });
        finds(7, Outcome::Warning, NodeStatus { firewall_repairs: 1, ..healthy("a") });
        finds(7, Outcome::Warning, NodeStatus { proxy_restarts: 1, ..healthy("a") });
    }

    #[test]
    fn states_that_carry_nothing() {
        for (state, outcome) in [
            ("new", Outcome::Warning),
            ("enrolling", Outcome::Failed),
            ("lost", Outcome::Failed),
            ("compromised", Outcome::Failed),
            ("retired", Outcome::Ok),
            ("a-state-of-the-future", Outcome::Failed),
        ] {
            assert_eq!(outcomes(&NodeStatus { state: state.into(), ..healthy("a") }), [outcome], "{state}");
        }
    }
}
