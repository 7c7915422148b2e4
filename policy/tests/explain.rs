//! What `explain` says of a flow, and where routes lead, in one small cluster.

use std::net::{IpAddr, SocketAddr};

use opencluster_policy::index::{Flow, Index};
use opencluster_policy::resource::{Protocol, Resource};
use opencluster_policy::snapshot::Snapshot;
use opencluster_policy::spiffe::{SpiffeId, TrustDomain};

fn domain() -> TrustDomain {
    TrustDomain::parse("rig.test").unwrap()
}

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

const CLUSTER: &str = "
apiVersion: opencluster/v1
kind: Node
metadata: {name: a}
spec: {addresses: [10.88.0.11, fd88::11]}
---
apiVersion: opencluster/v1
kind: Node
metadata: {name: b}
spec: {addresses: [10.88.0.12, fd88::12], tunnelPort: 15444}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {name: a}
spec: {nodes: [a]}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {name: b}
spec: {nodes: [b]}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {name: c}
spec: {nodes: [a]}
---
apiVersion: opencluster/v1
kind: Service
metadata: {name: echo}
spec: {ports: [{port: 9000}, {port: 53, protocol: udp}], workloads: [b]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo}
spec: {to: {service: echo, ports: [9000]}, from: [{workload: a}]}
";

fn cluster(more: &str) -> Index {
    let resources = Resource::parse_documents(&format!("{CLUSTER}{more}")).unwrap();
    let snapshot = Snapshot::new(7, resources);
    snapshot.check(&[]).unwrap();
    Index::compile(&domain(), &snapshot)
}

fn explain(index: &Index, source: &str, address: &str, destination: &str, port: u16) -> (bool, String) {
    let (source, destination) = (id(source), id(destination));
    let flow = Flow {
        source: &source,
        source_address: address.parse().unwrap(),
        destination: &destination,
        port,
        protocol: Protocol::Tcp,
    };
    let explanation = index.explain(&flow);
    (explanation.decision.allowed(), explanation.reasons.join("; "))
}

const A: &str = "spiffe://rig.test/ns/default/sa/a";
const B: &str = "spiffe://rig.test/ns/default/sa/b";
const C: &str = "spiffe://rig.test/ns/default/sa/c";

#[test]
fn explain_names_the_rule_or_what_the_nearest_one_lacked() {
    let index = cluster("");
    let on_a = "10.88.0.11";
    assert_eq!(
        explain(&index, A, on_a, B, 9000),
        (true, "policy default/a-to-echo allows workload a on port 9000 of service echo".to_owned())
    );
    for (source, destination, port, reason) in [
        (
            C,
            B,
            9000,
            "the nearest rule: policy default/a-to-echo allows workload a on port 9000 of service echo, but this flow's \
             source is workload c",
        ),
        (
            A,
            B,
            9001,
            "no service has port 9001/tcp of Workload default/b (it backs Service default/echo on 9000/tcp, 53/udp)",
        ),
        (A, C, 9000, "no service is backed by Workload default/c, so nothing can be allowed to reach it"),
        (
            A,
            "spiffe://rig.test/ns/default/sa/nobody",
            9000,
            "the destination spiffe://rig.test/ns/default/sa/nobody is no workload of this cluster's configuration",
        ),
        (
            "spiffe://foreign.test/ns/default/sa/a",
            B,
            9000,
            "the nearest rule: policy default/a-to-echo allows workload a on port 9000 of service echo, but this flow's \
             source is spiffe://foreign.test/ns/default/sa/a",
        ),
    ] {
        assert_eq!(explain(&index, source, on_a, destination, port), (false, reason.to_owned()));
    }
}

#[test]
fn explain_tells_of_denies_and_dry_runs() {
    let index = cluster(
        "
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: no-a}
spec: {to: {service: echo}, from: [{node: a, namespace: default}], action: deny}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: perhaps-c}
spec: {to: {service: echo}, from: [{workload: c}], dryRun: true}
",
    );
    let (allowed, reasons) = explain(&index, A, "10.88.0.11", B, 9000);
    assert!(!allowed);
    assert_eq!(
        reasons,
        "policy default/no-a denies namespace default with node a on every port of service echo; policy default/a-to-echo \
         allows workload a on port 9000 of service echo, but a deny beats every allow"
    );
    let (allowed, reasons) = explain(&index, C, "10.88.0.12", B, 9000);
    assert!(!allowed);
    assert!(
        reasons.contains("policy default/perhaps-c would allow workload c on every port of service echo"),
        "{reasons}"
    );
    assert!(reasons.contains("this flow is denied; if dry-run policies counted it would be allowed"), "{reasons}");
}

#[test]
fn explain_missing_tells_a_wrong_service_from_a_wrong_port() {
    let index = cluster("");
    let reason = |service, port| index.explain_missing("default", service, port).map(|e| e.reasons.join("; "));
    assert_eq!(reason("echo", 9000), None);
    assert_eq!(reason("echo", 1).unwrap(), "Service default/echo has no port 1 (it has 9000/tcp, 53/udp)");
    assert_eq!(reason("ecko", 9000).unwrap(), "there is no Service default/ecko");
}

#[test]
fn routes_take_the_family_and_the_tunnel_port_of_the_node() {
    let index = cluster("");
    assert_eq!(index.version(), 7);
    for address in ["10.88.0.12", "fd88::12"] {
        let address: IpAddr = address.parse().unwrap();
        let route = index.route(SocketAddr::new(address, 9000), Protocol::Tcp).unwrap();
        assert_eq!(route.tunnel, SocketAddr::new(address, 15444));
        assert_eq!(route.workload.as_str(), B);
        assert_eq!(route.service.to_string(), "Service default/echo");
    }
    assert!(index.route("10.88.0.12:9000".parse().unwrap(), Protocol::Udp).is_none());
    assert!(index.route("10.88.0.12:9001".parse().unwrap(), Protocol::Tcp).is_none());
    assert!(index.route("10.88.0.11:9000".parse().unwrap(), Protocol::Tcp).is_none());
    assert_eq!(index.node_of("10.88.0.12".parse().unwrap()), Some("b"));
    assert!(index.node_may_hold("b", &id(B)) && !index.node_may_hold("b", &id(A)) && !index.node_may_hold("?", &id(B)));
    assert!(
        !index.node_may_hold("b", &id("spiffe://rig.test/node/b")),
        "a workload's key must never speak for the node"
    );
}
