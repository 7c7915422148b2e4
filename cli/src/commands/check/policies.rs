//! Does each policy do something? One that names what is not there, or that nobody can match, is a mistake that the
//! default deny hides.

use std::collections::BTreeMap;

use opencluster_policy::resource::{
    From, Kind, NodeSpec, Object, PolicySpec, Reference, Resource, ServiceSpec, WorkloadSpec,
};

use super::nodes::workload_id;
use super::report::{Check, Group};

/// The resources by name.
struct Names<'a> {
    trust_domain: &'a str,
    nodes: BTreeMap<&'a str, &'a NodeSpec>,
    workloads: BTreeMap<Reference<'a>, &'a WorkloadSpec>,
    services: BTreeMap<Reference<'a>, &'a ServiceSpec>,
}

pub(super) fn group(trust_domain: &str, resources: &[Resource]) -> Group {
    let names = Names::of(trust_domain, resources);
    let mut group = Group::new("policies");
    let mut count = 0;
    for resource in resources {
        if let Resource::Policy(policy) = resource {
            count += 1;
            group.extend(names.faults(policy));
        }
    }
    if group.checks.is_empty() {
        group.push(Check::ok("policies refer to what is there, and can match", format!("{count} policies")));
    }
    group
}

impl<'a> Names<'a> {
    fn of(trust_domain: &'a str, resources: &'a [Resource]) -> Self {
        let mut names =
            Self { trust_domain, nodes: BTreeMap::new(), workloads: BTreeMap::new(), services: BTreeMap::new() };
        for resource in resources {
            let metadata = resource.metadata();
            let reference = Reference { namespace: &metadata.namespace, name: &metadata.name };
            match resource {
                Resource::Node(node) => drop(names.nodes.insert(&metadata.name, &node.spec)),
                Resource::Workload(workload) => drop(names.workloads.insert(reference, &workload.spec)),
                Resource::Service(service) => drop(names.services.insert(reference, &service.spec)),
                Resource::Policy(_) => {}
            }
        }
        names
    }

    fn faults(&self, policy: &Object<PolicySpec>) -> Vec<Check> {
        let namespace = policy.metadata.namespace.as_str();
        let subject = format!("policy {namespace}/{}", policy.metadata.name);
        let hint =
            format!("opencluster get policy {namespace}/{} -o yaml, correct it and apply it", policy.metadata.name);
        let mut checks = Vec::new();
        let to = Reference::resolve(&policy.spec.to.service, namespace);
        match self.services.get(&to) {
            None => checks.push(Check::failed(
                format!("{subject} refers to something"),
                format!("there is no {}", to.key(Kind::Service)),
                hint.clone(),
            )),
            Some(service) => {
                let has = |port: &&u16| service.ports.iter().any(|known| known.port == **port);
                for port in policy.spec.to.ports.iter().filter(|port| !has(port)) {
                    let detail = format!("{} has no port {port}", to.key(Kind::Service));
                    checks.push(Check::failed(format!("{subject} refers to something"), detail, hint.clone()));
                }
            }
        }
        for (position, from) in policy.spec.from.iter().enumerate() {
            if let Some(missing) = self.missing(from, namespace) {
                let name = format!("{subject}, from[{position}] refers to something");
                checks.push(Check::failed(name, format!("there is no {missing}"), hint.clone()));
            } else if !self.can_match(from, namespace) {
                let detail = "no workload fulfils all that it asks for";
                checks.push(Check::warning(format!("{subject}, from[{position}] can match"), detail, hint.clone()));
            }
        }
        checks
    }

    /// The first thing that a source names and that is not there.
    fn missing(&self, from: &From, namespace: &str) -> Option<String> {
        let workload = from.workload.as_deref().map(|name| Reference::resolve(name, namespace));
        let service = from.service.as_deref().map(|name| Reference::resolve(name, namespace));
        let node = from.node.as_deref();
        let workload = workload.filter(|name| !self.workloads.contains_key(name)).map(|name| name.key(Kind::Workload));
        let service = service.filter(|name| !self.services.contains_key(name)).map(|name| name.key(Kind::Service));
        let node = node.filter(|name| !self.nodes.contains_key(name)).map(|name| format!("Node {name}"));
        workload.or(service).map(|key| key.to_string()).or(node)
    }

    /// Whether any workload, on any of its nodes, is such a source.
    fn can_match(&self, from: &From, namespace: &str) -> bool {
        self.workloads.iter().any(|(&workload, spec)| {
            self.is_workload(from, namespace, workload) && spec.nodes.iter().any(|node| self.is_node(from, node))
        })
    }

    fn is_workload(&self, from: &From, namespace: &str, workload: Reference<'_>) -> bool {
        let named = |name: &String| Reference::resolve(name, namespace) == workload;
        let identified = |id: &String| *id == workload_id(self.trust_domain, workload.namespace, workload.name);
        let backs = |name: &String| {
            let service = Reference::resolve(name, namespace);
            let backends = self.services.get(&service).map(|service| service.workloads.as_slice()).unwrap_or_default();
            backends.iter().any(|backend| Reference::resolve(backend, service.namespace) == workload)
        };
        from.workload.as_ref().is_none_or(named)
            && from.identity.as_ref().is_none_or(identified)
            && from.service.as_ref().is_none_or(backs)
            && from.namespace.as_ref().is_none_or(|name| name == workload.namespace)
    }

    fn is_node(&self, from: &From, node: &String) -> bool {
        let addresses = self.nodes.get(node.as_str()).map(|spec| spec.addresses.as_slice()).unwrap_or_default();
        from.node.as_ref().is_none_or(|name| name == node)
            && from.cidr.is_none_or(|cidr| addresses.iter().any(|address| cidr.contains(address)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::check::report::Outcome;

    const CLUSTER: &str = "
{apiVersion: opencluster/v1, kind: Node, metadata: {name: a}, spec: {addresses: [10.88.0.11]}}
---
{apiVersion: opencluster/v1, kind: Node, metadata: {name: b}, spec: {addresses: [10.88.0.12]}}
---
{apiVersion: opencluster/v1, kind: Workload, metadata: {name: a}, spec: {nodes: [a]}}
---
{apiVersion: opencluster/v1, kind: Workload, metadata: {name: b}, spec: {nodes: [b]}}
---
{apiVersion: opencluster/v1, kind: Service, metadata: {name: echo}, spec: {ports: [{port: 9000}], workloads: [b]}}
---
";

    fn outcome(to: &str, from: &str) -> Outcome {
        let policy = format!(
            "{{apiVersion: opencluster/v1, kind: Policy, metadata: {{name: p}}, spec: {{to: {to}, from: [{from}]}}}}"
        );
        let resources = Resource::parse_documents(&format!("{CLUSTER}{policy}")).expect("documents");
        let checks = group("rig.test", &resources).checks;
        assert_eq!(checks.len(), 1, "{checks:?}");
        checks[0].result
    }

    #[test]
    fn policies_that_do_something_pass() {
        let to = "{service: echo, ports: [9000]}";
        for from in [
            "{workload: a}",
            "{workload: default/a, node: a}",
            "{identity: 'spiffe://rig.test/ns/default/sa/a'}",
            "{service: echo}",
            "{namespace: default}",
            "{cidr: 10.88.0.0/24}",
            "{node: b, service: echo, cidr: 10.88.0.12/32}",
        ] {
            assert_eq!(outcome(to, from), Outcome::Ok, "{from}");
        }
    }

    #[test]
    fn policies_that_refer_to_nothing_fail() {
        for (to, from) in [
            ("{service: gone}", "{workload: a}"),
            ("{service: prod/echo}", "{workload: a}"),
            ("{service: echo, ports: [9001]}", "{workload: a}"),
            ("{service: echo}", "{workload: gone}"),
            ("{service: echo}", "{service: gone}"),
            ("{service: echo}", "{node: gone}"),
        ] {
            assert_eq!(outcome(to, from), Outcome::Failed, "to {to} from {from}");
        }
    }

    #[test]
    fn policies_that_nobody_can_match_are_warned_of() {
        for from in [
            "{workload: a, node: b}",
            "{workload: a, service: echo}",
            "{identity: 'spiffe://rig.test/ns/default/sa/gone'}",
            "{identity: 'spiffe://other.test/ns/default/sa/a'}",
            "{namespace: gone}",
            "{cidr: 192.0.2.0/24}",
            "{workload: a, cidr: 10.88.0.12/32}",
        ] {
            assert_eq!(outcome("{service: echo}", from), Outcome::Warning, "{from}");
        }
    }
}
