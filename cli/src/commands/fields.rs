//! `opencluster explain KIND`: the fields of a kind, and a document to begin with.

use opencluster_policy::resource::Kind;
use serde::Serialize;

use super::Context;
use crate::error::CliError;
use crate::output::style::Style;
use crate::output::table::Table;

/// What a kind is for, its fields, and a document that can be applied.
#[derive(Clone, Copy, Serialize)]
struct Explanation {
    kind: &'static str,
    about: &'static str,
    fields: &'static [Field],
    example: &'static str,
}

/// One field: `[]` stands for each item of a list.
#[derive(Clone, Copy, Serialize)]
struct Field {
    #[serde(rename = "field")]
    path: &'static str,
    #[serde(rename = "type")]
    kind: &'static str,
    required: bool,
    about: &'static str,
}

pub(super) fn run(context: &mut Context<'_>, kind: Kind) -> Result<(), CliError> {
    Ok(context.printer.print(&explanation(kind), |explanation, style| text(*explanation, style))?)
}

fn text(explanation: Explanation, style: Style) -> String {
    let mut table = Table::new(&["FIELD", "TYPE", "REQUIRED", "MEANING"]);
    for field in explanation.fields {
        table.row([field.path, field.kind, if field.required { "yes" } else { "no" }, field.about]);
    }
    let heading = style.bold(explanation.kind);
    format!(
        "{heading}\n{}\n\n{}\n{}\n{}",
        explanation.about,
        table.render(),
        style.bold("Example"),
        explanation.example
    )
}

fn explanation(kind: Kind) -> Explanation {
    let (about, fields, example) = match kind {
        Kind::Node => ("A host that runs workloads.", NODE, NODE_EXAMPLE),
        Kind::Workload => {
            ("What runs, and its identity: spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/NAME.", WORKLOAD, WORKLOAD_EXAMPLE)
        }
        Kind::Service => (
            "What clients connect to: a connection to the address of a node that runs one of its workloads, on one of its\n\
             ports, is a connection to this service.",
            SERVICE,
            SERVICE_EXAMPLE,
        ),
        Kind::Policy => (
            "Who may connect to what. Without any policy everything is denied; a deny beats every allow.",
            POLICY,
            POLICY_EXAMPLE,
        ),
    };
    Explanation { kind: kind.name(), about, fields, example }
}

const fn required(path: &'static str, kind: &'static str, about: &'static str) -> Field {
    Field { path, kind, required: true, about }
}

const fn optional(path: &'static str, kind: &'static str, about: &'static str) -> Field {
    Field { path, kind, required: false, about }
}

const NAME: Field = required("metadata.name", "label", "1 to 63 of a-z, 0-9 and -, not at the ends");
const NAMESPACE: Field = optional("metadata.namespace", "label", "'default' when absent");
const LABELS: Field = optional("metadata.labels", "text by text", "free for people and tools");
const VERSION: Field =
    optional("metadata.resourceVersion", "number", "set by the controller; sent back, it makes a change conditional");

const NODE: &[Field] = &[
    NAME,
    LABELS,
    VERSION,
    required("spec.addresses[]", "IP address", "at least one; no other node's"),
    optional("spec.tunnelPort", "port", "where its proxy takes tunnels; 15443 when absent"),
    optional("spec.maxAge", "age", "how old an enrolment may get, as 12h; the controller's node_max_age_s when absent"),
];

const WORKLOAD: &[Field] = &[
    NAME,
    NAMESPACE,
    LABELS,
    VERSION,
    required("spec.nodes[]", "label", "the nodes that may run it, and hold its identity"),
    optional("spec.ports[]", "port", "ports that it listens on, for people; services name their own"),
];

const SERVICE: &[Field] = &[
    NAME,
    NAMESPACE,
    LABELS,
    VERSION,
    required("spec.ports[].port", "port", "that clients connect to and the workload listens on"),
    optional("spec.ports[].name", "label", "for people"),
    optional("spec.ports[].protocol", "tcp or udp", "tcp when absent; udp is not carried yet"),
    required("spec.workloads[]", "reference", "the workloads that back it: NAME (same namespace) or NAMESPACE/NAME"),
];

const POLICY: &[Field] = &[
    NAME,
    NAMESPACE,
    LABELS,
    VERSION,
    required("spec.to.service", "reference", "the destination: NAME (same namespace) or NAMESPACE/NAME"),
    optional("spec.to.ports[]", "port", "some of its ports; all when absent"),
    optional("spec.from[].workload", "reference", "NAME (same namespace) or NAMESPACE/NAME"),
    optional("spec.from[].identity", "SPIFFE ID", "exactly this identity"),
    optional("spec.from[].service", "reference", "every workload that backs this service"),
    optional("spec.from[].namespace", "label", "every workload of this namespace"),
    optional("spec.from[].node", "label", "every workload on this node, by the address that its tunnel comes from"),
    optional("spec.from[].cidr", "network", "addresses that the tunnel comes from"),
    optional("spec.action", "allow or deny", "allow when absent"),
    optional("spec.dryRun", "true or false", "decides nothing, but is logged and explained as if it did"),
];

const NODE_EXAMPLE: &str = "\
apiVersion: opencluster/v1
kind: Node
metadata: {name: a}
spec: {addresses: [10.88.0.11, 'fd88::11']}
";

const WORKLOAD_EXAMPLE: &str = "\
apiVersion: opencluster/v1
kind: Workload
metadata: {name: web, namespace: default}
spec: {nodes: [a]}
";

const SERVICE_EXAMPLE: &str = "\
apiVersion: opencluster/v1
kind: Service
metadata: {name: web, namespace: default}
spec: {ports: [{port: 443, name: https}], workloads: [web]}
";

const POLICY_EXAMPLE: &str = "\
# Each item of `from` is one kind of source: everything in it must match. Any item is enough.
apiVersion: opencluster/v1
kind: Policy
metadata: {name: shop-to-web, namespace: default}
spec:
  to: {service: web, ports: [443]}
  from:
    - workload: shop
    - namespace: monitoring
      node: b
";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use opencluster_policy::resource::Resource;
    use serde_json::Value;

    use super::*;

    /// Documents with every field that there is, except for `resourceVersion`.
    const FULL: &str = "
{apiVersion: opencluster/v1, kind: Node, metadata: {name: a, labels: {x: y}}, spec: {addresses: [10.0.0.1], tunnelPort: 1, maxAge: 12h}}
---
{apiVersion: opencluster/v1, kind: Workload, metadata: {name: a, labels: {x: y}}, spec: {nodes: [a], ports: [1]}}
---
{apiVersion: opencluster/v1, kind: Service, metadata: {name: a, labels: {x: y}}, spec: {ports: [{port: 1, name: n, protocol: tcp}], workloads: [a]}}
---
{apiVersion: opencluster/v1, kind: Policy, metadata: {name: a, labels: {x: y}}, spec: {to: {service: a, ports: [1]}, action: deny, dryRun: true,
  from: [{workload: a, identity: 'spiffe://td/ns/default/sa/a', service: a, namespace: default, node: a, cidr: 10.0.0.0/8}]}}
";

    #[test]
    fn the_table_has_exactly_the_fields_of_the_resources() {
        for resource in Resource::parse_documents(FULL).expect("complete documents") {
            let mut resource = resource;
            resource.metadata_mut().resource_version = Some(1);
            let mut found = BTreeSet::new();
            let json = resource.to_json();
            for part in ["metadata", "spec"] {
                collect(part, &json[part], &mut found);
            }
            let listed = explanation(resource.kind()).fields.iter().map(|field| field.path.to_owned()).collect();
            assert_eq!(found, listed, "{}", resource.kind());
        }
    }

    fn collect(path: &str, value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) if path != "metadata.labels" => {
                fields.iter().for_each(|(name, value)| collect(&format!("{path}.{name}"), value, found));
            }
            Value::Array(items) => items.iter().for_each(|item| collect(&format!("{path}[]"), item, found)),
            _ => drop(found.insert(path.to_owned())),
        }
    }

    #[test]
    fn the_examples_can_be_applied() {
        for kind in Kind::ALL {
            let resources = Resource::parse_documents(explanation(kind).example).expect("a valid example");
            assert_eq!(resources[0].kind(), kind);
        }
    }
}
