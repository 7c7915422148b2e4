//! Resources: what is accepted, and that everything wrong is said, with its place.

use opencluster_policy::resource::{Kind, Resource};

/// The smallest useful pair, as the contract has it.
const SMALLEST: &str = "\
apiVersion: opencluster/v1
kind: Service
metadata: {name: echo, namespace: default}
spec: {ports: [{port: 9000}], workloads: [b]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo, namespace: default}
spec: {to: {service: echo, ports: [9000]}, from: [{workload: a}]}
";

#[test]
fn the_smallest_pair_is_accepted() {
    let resources = Resource::parse_documents(SMALLEST).unwrap();
    let kinds: Vec<Kind> = resources.iter().map(Resource::kind).collect();
    assert_eq!(kinds, [Kind::Service, Kind::Policy]);
    for resource in resources {
        println!("{}", resource.to_yaml());
        assert_eq!(Resource::parse_documents(&resource.to_yaml()).unwrap(), [resource.clone()]);
        assert_eq!(Resource::from_json(resource.to_json().to_string().as_bytes()).unwrap(), resource);
    }
}
