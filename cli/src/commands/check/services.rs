//! Has each service somebody who answers?

use opencluster_api::rest::NodeStatus;
use opencluster_policy::resource::{Object, Reference, Resource, ServiceSpec};

use super::nodes::workload_id;
use super::report::{Check, Group};

pub(super) fn group(trust_domain: &str, resources: &[Resource], nodes: &[NodeStatus]) -> Group {
    let mut group = Group::new("services");
    for resource in resources {
        if let Resource::Service(service) = resource {
            group.push(ready(trust_domain, service, nodes));
        }
    }
    if group.checks.is_empty() {
        group.push(Check::ok("services have ready backends", "there are no services"));
    }
    group
}

fn ready(trust_domain: &str, service: &Object<ServiceSpec>, nodes: &[NodeStatus]) -> Check {
    let namespace = &service.metadata.namespace;
    let name = format!("service {namespace}/{} has ready backends", service.metadata.name);
    let serves = |id: &String| {
        nodes.iter().any(|node| node.state == "active" && node.proxy_ready && node.workloads_ready.contains(id))
    };
    let ids = service.spec.workloads.iter().map(|workload| {
        let workload = Reference::resolve(workload, namespace);
        workload_id(trust_domain, workload.namespace, workload.name)
    });
    let (ready, missing): (Vec<_>, Vec<_>) = ids.partition(serves);
    let detail = format!("{} of {}", ready.len(), ready.len() + missing.len());
    let hint = "its workloads' nodes must be active and hold their identities: see the nodes above";
    if ready.is_empty() {
        Check::failed(name, detail, hint)
    } else if missing.is_empty() {
        Check::ok(name, detail)
    } else {
        Check::warning(name, format!("{detail}; not ready: {}", missing.join(", ")), hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::check::report::Outcome;
    use crate::commands::node::tests::healthy;

    fn outcome(workloads: &str, nodes: &[NodeStatus]) -> Outcome {
        let text = format!(
            "{{apiVersion: opencluster/v1, kind: Service, metadata: {{name: echo}}, spec: {{ports: [{{port: 1}}], workloads: {workloads}}}}}"
        );
        let resources = Resource::parse_documents(&text).expect("a service");
        group("rig.test", &resources, nodes).checks[0].result
    }

    #[test]
    fn backends_count_when_their_node_serves() {
        assert_eq!(outcome("[a, b]", &[healthy("a"), healthy("b")]), Outcome::Ok);
        assert_eq!(outcome("[a, b]", &[healthy("a")]), Outcome::Warning);
        assert_eq!(outcome("[b]", &[healthy("a")]), Outcome::Failed);
        assert_eq!(outcome("[other/a]", &[healthy("a")]), Outcome::Failed, "another namespace's");
        let lost = NodeStatus { state: "lost".into(), ..healthy("a") };
        assert_eq!(outcome("[a]", &[lost]), Outcome::Failed);
        let waiting = NodeStatus { proxy_ready: false, ..healthy("a") };
        assert_eq!(outcome("[a]", &[waiting]), Outcome::Failed);
    }
}
