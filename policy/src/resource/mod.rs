//! The resources that operators write: `apiVersion: opencluster/v1`, `kind`, `metadata`, `spec`.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::lifetime::Age;
pub use fault::{Fault, Faults};
pub use reference::{Reference, is_reference};

mod decode;
pub(crate) mod fault;
mod locate;
mod reference;
mod schema;
mod suggest;
mod tree;
mod yaml;

/// The only `apiVersion` there is.
pub const API_VERSION: &str = "opencluster/v1";

/// The namespace of resources that name none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Any resource. In JSON and YAML: `{"apiVersion", "kind", "metadata", "spec"}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A host.
    Node(Object<NodeSpec>),
    /// What clients connect to.
    Service(Object<ServiceSpec>),
    /// What runs, and its identity.
    Workload(Object<WorkloadSpec>),
    /// Who may connect to what.
    Policy(Object<PolicySpec>),
}

/// Metadata and specification of one resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object<Spec> {
    /// Name, namespace, version.
    pub metadata: Metadata,
    /// What is wanted.
    pub spec: Spec,
}

/// What every resource has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Metadata {
    /// A DNS label (RFC 1123): 1–63 of `a-z 0-9 -`, not at the ends.
    pub name: String,
    /// A DNS label; `default` when absent. Nodes have none (it is empty).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Free for people and tools.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Set by the controller. Sent back with a change, it makes the change conditional on nobody having been faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_version: Option<u64>,
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NodeSpec {
    /// At least one; no other node's.
    pub addresses: Vec<IpAddr>,
    /// Where its proxy takes tunnels.
    #[serde(default = "default_tunnel_port")]
    pub tunnel_port: u16,
    /// How old an enrolment may get; what the controller's configuration says when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Age>,
}

fn default_tunnel_port() -> u16 {
    15443
}

/// What clients connect to: a connection to the address of a node that runs one of the workloads, on one of the ports,
/// is a connection to this service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServiceSpec {
    /// At least one.
    pub ports: Vec<ServicePort>,
    /// The workloads that back it: `name` (same namespace) or `namespace/name`.
    pub workloads: Vec<String>,
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServicePort {
    /// 1–65535. The port that clients connect to and that the workload listens on.
    pub port: u16,
    /// A DNS label, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// tcp (the default).
    #[serde(default)]
    pub protocol: Protocol,
}

/// The transport of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// What runs: its identity is `spiffe://<trust-domain>/ns/<namespace>/sa/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct WorkloadSpec {
    /// The nodes that may run it (names).
    pub nodes: Vec<String>,
    /// Ports that it listens on, for people; services name their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
}

/// Who may connect to what. Without any policy everything is denied; a deny beats every allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PolicySpec {
    /// The destination.
    pub to: To,
    /// The sources: any of them. At least one.
    pub from: Vec<From>,
    /// allow (the default) or deny.
    #[serde(default)]
    pub action: Effect,
    /// Decides nothing, but is logged and explained as if it did.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// The destination of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct To {
    /// A service: `name` (same namespace) or `namespace/name`.
    pub service: String,
    /// Some of its ports; all when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
}

/// One source: everything that is given must match. At least one field.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct From {
    /// `name` (same namespace) or `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    /// A SPIFFE ID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// Every workload that backs this service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Every workload of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Every workload on this node: judged by the address that the tunnel comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Addresses that the tunnel comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cidr: Option<IpNet>,
}

/// What a policy does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// The flow may pass.
    #[default]
    Allow,
    /// The flow may not pass, whatever else allows it.
    Deny,
}

/// Which resource: kind, namespace (empty for nodes), name. Sorted by kind first.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// The kind.
    pub kind: Kind,
    /// Empty for kinds without one.
    pub namespace: String,
    /// The name.
    pub name: String,
}

/// The kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// [`NodeSpec`]
    Node,
    /// [`ServiceSpec`]
    Service,
    /// [`WorkloadSpec`]
    Workload,
    /// [`PolicySpec`]
    Policy,
}

/// Any JSON value as one YAML document in block style, without `---`, with a line break at its end.
pub fn yaml_of(value: &serde_json::Value) -> String {
    yaml::write(value)
}

impl Kind {
    /// All of them, in the order in which they depend on each other.
    pub const ALL: [Self; 4] = [Self::Node, Self::Workload, Self::Service, Self::Policy];

    /// `Node`, `Service`, …
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Service => "Service",
            Self::Workload => "Workload",
            Self::Policy => "Policy",
        }
    }

    /// `nodes`, `services`, `workloads`, `policies`
    pub fn plural(self) -> &'static str {
        match self {
            Self::Node => "nodes",
            Self::Service => "services",
            Self::Workload => "workloads",
            Self::Policy => "policies",
        }
    }

    /// Any of: name, plural, common short forms, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "node" | "nodes" | "no" => Some(Self::Node),
            "service" | "services" | "svc" => Some(Self::Service),
            "workload" | "workloads" | "wl" => Some(Self::Workload),
            "policy" | "policies" | "pol" => Some(Self::Policy),
            _ => None,
        }
    }

    /// Whether its resources live in a namespace.
    pub fn namespaced(self) -> bool {
        self != Self::Node
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `Service default/echo`, `Node a`
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl Resource {
    /// Its key.
    pub fn key(&self) -> Key {
        let metadata = self.metadata();
        Key { kind: self.kind(), namespace: metadata.namespace.clone(), name: metadata.name.clone() }
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Node(_) => Kind::Node,
            Self::Service(_) => Kind::Service,
            Self::Workload(_) => Kind::Workload,
            Self::Policy(_) => Kind::Policy,
        }
    }

    /// Its metadata.
    pub fn metadata(&self) -> &Metadata {
        match self {
            Self::Node(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::Workload(object) => &object.metadata,
            Self::Policy(object) => &object.metadata,
        }
    }

    /// Its metadata.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        match self {
            Self::Node(object) => &mut object.metadata,
            Self::Service(object) => &mut object.metadata,
            Self::Workload(object) => &mut object.metadata,
            Self::Policy(object) => &mut object.metadata,
        }
    }

    /// The canonical JSON: `apiVersion`, `kind`, `metadata`, `spec`; defaults filled in.
    pub fn to_json(&self) -> serde_json::Value {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Document<'a, Spec> {
            api_version: &'a str,
            kind: &'a str,
            #[serde(flatten)]
            object: &'a Object<Spec>,
        }
        fn document<Spec: Serialize>(kind: Kind, object: &Object<Spec>) -> serde_json::Value {
            serde_json::to_value(Document { api_version: API_VERSION, kind: kind.name(), object })
                .expect("structs with named fields and maps with text keys are always JSON")
        }
        match self {
            Self::Node(object) => document(Kind::Node, object),
            Self::Service(object) => document(Kind::Service, object),
            Self::Workload(object) => document(Kind::Workload, object),
            Self::Policy(object) => document(Kind::Policy, object),
        }
    }

    /// YAML of the same.
    pub fn to_yaml(&self) -> String {
        yaml::write(&self.to_json())
    }

    /// From canonical JSON (strict, validated on its own; references are checked by the snapshot).
    pub fn from_json(bytes: &[u8]) -> Result<Self, Faults> {
        let mut sink = fault::Sink::default();
        let resource = tree::from_json(bytes, &mut sink).and_then(|node| schema::resource(&node, &mut sink));
        sink.finish(resource)
    }

    /// From YAML or JSON documents separated by `---`: all faults of all documents, or all resources. Empty documents are
    /// passed over and not counted. Limits: 4 MiB, 10,000 documents, depth 64, no aliases.
    pub fn parse_documents(text: &str) -> Result<Vec<Self>, Faults> {
        let mut sink = fault::Sink::default();
        let documents = tree::from_yaml(text, &mut sink);
        let resources = schema::resources(&documents, &mut sink);
        sink.finish(Some(resources))
    }
}
