//! What resources say of each other: every contradiction is found and put down to the document that brought it about.

use opencluster_policy::resource::{Fault, Key, Kind, Resource};
use opencluster_policy::snapshot::Snapshot;

const CLUSTER: &str = "
apiVersion: opencluster/v1
kind: Node
metadata: {name: a}
spec: {addresses: [10.0.0.1, fd00::1]}
---
apiVersion: opencluster/v1
kind: Node
metadata: {name: b}
spec: {addresses: [10.0.0.2]}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {name: web}
spec: {nodes: [a, b]}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {name: db, namespace: data}
spec: {nodes: [b]}
---
apiVersion: opencluster/v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80}, {port: 53, protocol: udp}], workloads: [web]}
---
apiVersion: opencluster/v1
kind: Service
metadata: {name: db}
spec: {ports: [{port: 5432}], workloads: [data/db]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: web-to-db}
spec: {to: {service: db, ports: [5432]}, from: [{workload: web}, {service: web, node: a}]}
";

/// The cluster after these documents were applied and these resources deleted.
fn check(documents: &str, deleted: &[(Kind, &str, &str)]) -> Result<(), Vec<Fault>> {
    let changed = Resource::parse_documents(documents).unwrap();
    let deleted = deleted.iter().map(|&(kind, namespace, name)| Key {
        kind,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    });
    let keys: Vec<Key> = changed.iter().map(Resource::key).chain(deleted.clone()).collect();
    let all = Resource::parse_documents(CLUSTER).unwrap().into_iter().chain(changed);
    let snapshot = Snapshot::new(1, all);
    let difference = opencluster_policy::snapshot::Difference { upserts: Vec::new(), deletes: deleted.collect() };
    snapshot.apply(&difference, 2).check(&keys).map_err(|faults| faults.0)
}

fn fault(documents: &str, deleted: &[(Kind, &str, &str)]) -> String {
    let faults = check(documents, deleted).expect_err("it contradicts itself");
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults[0].to_string()
}

fn document(kind: &str, name: &str, spec: &str) -> String {
    format!("---\napiVersion: opencluster/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n")
}

#[test]
fn a_consistent_cluster_passes() {
    check("", &[]).unwrap();
    // Several services over the same workload and port, and a workload's port on a node that another does not run on.
    check(&document("Service", "also-web", "{ports: [{port: 80}], workloads: [web]}"), &[]).unwrap();
    check(&document("Service", "web-tcp-53", "{ports: [{port: 53}], workloads: [data/db]}"), &[]).unwrap();
    check("", &[(Kind::Policy, "default", "web-to-db")]).unwrap();
}

#[test]
fn what_is_missing_is_named() {
    assert_eq!(
        fault(&document("Workload", "x", "{nodes: [a, c]}"), &[]),
        "document 1, spec.nodes[1]: Workload default/x refers to Node c, which does not exist"
    );
    assert_eq!(
        fault(&document("Service", "x", "{ports: [{port: 1}], workloads: [db]}"), &[]),
        "document 1, spec.workloads[0]: Service default/x refers to Workload default/db, which does not exist"
    );
    let policy = "{to: {service: data/db}, from: [{workload: data/web}, {service: x}, {node: z}, {namespace: any}, \
                  {identity: \"spiffe://other/a\"}, {cidr: 10.0.0.0/8}]}";
    let faults = check(&document("Policy", "x", policy), &[]).unwrap_err();
    let fields: Vec<&str> = faults.iter().map(|fault| fault.field.as_str()).collect();
    assert_eq!(fields, ["spec.to.service", "spec.from[0].workload", "spec.from[1].service", "spec.from[2].node"]);
    assert_eq!(
        fault(&document("Policy", "x", "{to: {service: db, ports: [5433]}, from: [{workload: web}]}"), &[]),
        "document 1, spec.to.ports[0]: Policy default/x: Service default/db has no port 5433 (it has 5432/tcp)"
    );
}

#[test]
fn a_deletion_is_blamed_for_what_it_leaves_behind() {
    let new = document("Node", "c", "{addresses: [10.0.0.3]}");
    assert_eq!(
        fault(&new, &[(Kind::Workload, "data", "db")]),
        "document 2: Service default/db still refers to Workload data/db"
    );
    // A change takes a port away from under a policy that did not change.
    assert_eq!(
        fault(&document("Service", "db", "{ports: [{port: 5433}], workloads: [data/db]}"), &[]),
        "document 1: Policy default/web-to-db: Service default/db has no port 5432 (it has 5433/tcp)"
    );
}

#[test]
fn an_address_belongs_to_one_node() {
    assert_eq!(
        fault(&document("Node", "c", "{addresses: [10.0.0.3, \"fd00::1\"]}"), &[]),
        "document 1, spec.addresses[1]: Node c: fd00::1 is already an address of Node a"
    );
    // The one that changed is to blame, also if its name comes first.
    assert_eq!(
        fault(&document("Node", "a", "{addresses: [10.0.0.2]}"), &[]),
        "document 1: Node b: 10.0.0.2 is already an address of Node a"
    );
}

#[test]
fn a_port_of_a_node_belongs_to_one_workload() {
    assert_eq!(
        fault(&document("Service", "x", "{ports: [{port: 81}, {port: 80}], workloads: [data/db]}"), &[]),
        "document 1, spec.ports[1].port: Service default/x: port 80/tcp of node b cannot be Workload data/db's: it is already \
         Workload default/web's, through Service default/web"
    );
    // A workload that moves takes its ports with it.
    let moved = format!(
        "{}{}",
        document("Workload", "other", "{nodes: [a]}"),
        document("Service", "z", "{ports: [{port: 53, protocol: udp}], workloads: [other]}")
    );
    assert!(fault(&moved, &[]).contains("port 53/udp of node a"));
    let tunnel = fault(&document("Service", "x", "{ports: [{port: 15443}], workloads: [data/db]}"), &[]);
    assert!(tunnel.contains("port 15443 is the tunnel port of node b"), "{tunnel}");
    let twice = fault(&document("Service", "x", "{ports: [{port: 1}], workloads: [web, default/web]}"), &[]);
    assert_eq!(twice, "document 1, spec.workloads[1]: Service default/x: the workload `default/web` is listed twice");
}
