//! What the fields of each kind may hold, and what an object says of itself. What resources say of each other is checked by
//! [`crate::snapshot::Snapshot::check`].

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::decode::{self, Fields};
use super::fault::{Path, Sink};
use super::tree::{Node, Value, excerpt};
use super::{
    API_VERSION, DEFAULT_NAMESPACE, Effect, From, Key, Kind, Metadata, NodeSpec, Object, PolicySpec, Protocol,
    Resource, ServicePort, ServiceSpec, To, WorkloadSpec, default_tunnel_port, is_reference,
};
use crate::spiffe::{SpiffeId, is_dns_label, is_reserved_namespace};

// What one resource may hold: generous for people, and small enough that a product of two of them fits into memory.
const MAX_ADDRESSES: usize = 64;
const MAX_PORTS: usize = 256;
const MAX_REFERENCES: usize = 4096;
const MAX_SOURCES: usize = 4096;
const MAX_LABELS: usize = 64;
const MAX_LABEL_KEY: usize = 128;
const MAX_LABEL_VALUE: usize = 1024;

/// Every document's resource; documents that define the same one are faults.
pub(super) fn resources(documents: &[Option<Node>], sink: &mut Sink) -> Vec<Resource> {
    let mut resources = Vec::with_capacity(documents.len());
    let mut defined: HashMap<Key, usize> = HashMap::new();
    for (index, node) in documents.iter().enumerate() {
        sink.enter_document(index);
        let Some(node) = node else { continue };
        let Some(resource) = resource(node, sink) else { continue };
        let key = resource.key();
        if let Some(first) = defined.get(&key) {
            let message = format!("{key} is already defined by document {}", first + 1);
            sink.fault(&Path::Root.field("metadata"), node.at, message);
        } else {
            defined.insert(key, index);
        }
        resources.push(resource);
    }
    resources
}

/// One document's resource.
pub(super) fn resource(node: &Node, sink: &mut Sink) -> Option<Resource> {
    let root = Path::Root;
    let fields = Fields::open(node, &root, &["apiVersion", "kind", "metadata", "spec"], sink)?;
    let version = fields.required("apiVersion", sink, api_version);
    let kind = fields.required("kind", sink, kind);
    let metadata = fields.required("metadata", sink, |node, path, sink| metadata(node, path, kind, sink));
    // Without a kind there is no saying what the specification should hold.
    let kind = kind?;
    let resource = fields.required("spec", sink, |node, path, sink| match kind {
        Kind::Node => object(metadata, node_spec(node, path, sink)).map(Resource::Node),
        Kind::Service => object(metadata, service_spec(node, path, sink)).map(Resource::Service),
        Kind::Workload => object(metadata, workload_spec(node, path, sink)).map(Resource::Workload),
        Kind::Policy => object(metadata, policy_spec(node, path, sink)).map(Resource::Policy),
    });
    version.and(resource)
}

fn object<Spec>(metadata: Option<Metadata>, spec: Option<Spec>) -> Option<Object<Spec>> {
    Some(Object { metadata: metadata?, spec: spec? })
}

fn api_version(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<()> {
    decode::choice(node, path, sink, "apiVersion", &[(API_VERSION, ())])
}

fn kind(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<Kind> {
    decode::choice(node, path, sink, "kind", &Kind::ALL.map(|kind| (kind.name(), kind)))
}

/// `kind` is `None` where it is unknown: then either form of a namespace will do.
fn metadata(node: &Node, path: &Path<'_>, kind: Option<Kind>, sink: &mut Sink) -> Option<Metadata> {
    let fields = Fields::open(node, path, &["name", "namespace", "labels", "resourceVersion"], sink)?;
    let name = fields.required("name", sink, |node, path, sink| label(node, path, "a name", sink));
    let absent = if kind == Some(Kind::Node) { "" } else { DEFAULT_NAMESPACE };
    let namespace = fields.optional("namespace", absent.to_owned(), sink, |node, path, sink| {
        if kind == Some(Kind::Node) {
            sink.fault(path, node.at, "nodes are in no namespace: leave this field out");
            return None;
        }
        namespace(node, path, sink)
    });
    let labels = fields.optional("labels", BTreeMap::new(), sink, labels);
    let resource_version = fields.optional("resourceVersion", None, sink, |node, path, sink| {
        decode::number(node, path, sink, 0..=u64::MAX).map(Some)
    });
    Some(Metadata { name: name?, namespace: namespace?, labels: labels?, resource_version: resource_version? })
}

fn labels(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<BTreeMap<String, String>> {
    let Value::Map(entries) = &node.value else {
        sink.fault(path, node.at, format!("expected a mapping of texts, found {}", node.value.describe()));
        return None;
    };
    if entries.len() > MAX_LABELS {
        sink.fault(path, node.at, format!("{} labels: at most {MAX_LABELS} are allowed", entries.len()));
        return None;
    }
    let mut labels = BTreeMap::new();
    for entry in entries {
        let path = path.field(&entry.name);
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'/' | b'-');
        let length = entry.name.len();
        if !(1..=MAX_LABEL_KEY).contains(&length) || !entry.name.bytes().all(allowed) {
            let message = format!("a label's key must be 1–{MAX_LABEL_KEY} of `a-z A-Z 0-9 . _ / -`");
            sink.fault(&path, entry.at, message);
            continue;
        }
        let value = decode::checked(&entry.value, &path, sink, |text| {
            if text.len() > MAX_LABEL_VALUE {
                return Err(format!("{} bytes: at most {MAX_LABEL_VALUE} are allowed", text.len()));
            }
            match text.chars().find(|c| c.is_control()) {
                Some(c) => Err(format!("control characters like {c:?} are not allowed")),
                None => Ok(()),
            }
        });
        if let Some(value) = value {
            labels.insert(entry.name.clone(), value.to_owned());
        }
    }
    (labels.len() == entries.len()).then_some(labels)
}

fn node_spec(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<NodeSpec> {
    let fields = Fields::open(node, path, &["addresses", "tunnelPort", "maxAge"], sink)?;
    let addresses = fields.required("addresses", sink, |node, path, sink| {
        decode::list(node, path, sink, MAX_ADDRESSES, |address| *address, host_address)
    });
    let tunnel_port = fields.optional("tunnelPort", default_tunnel_port(), sink, port);
    let max_age = fields.optional("maxAge", None, sink, |node, path, sink| {
        decode::parsed(node, path, sink, "an age such as `12h`: a number and s, m, h or d, from 10s to 366d").map(Some)
    });
    Some(NodeSpec { addresses: addresses?, tunnel_port: tunnel_port?, max_age: max_age? })
}

fn service_spec(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<ServiceSpec> {
    let fields = Fields::open(node, path, &["ports", "workloads"], sink)?;
    let ports = fields.required("ports", sink, |node, path, sink| {
        decode::list(node, path, sink, MAX_PORTS, |port: &ServicePort| (port.port, port.protocol), service_port)
    });
    let workloads = fields.required("workloads", sink, |node, path, sink| {
        decode::list(node, path, sink, MAX_REFERENCES, Clone::clone, reference)
    });
    Some(ServiceSpec { ports: ports?, workloads: workloads? })
}

fn service_port(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<ServicePort> {
    let fields = Fields::open(node, path, &["port", "name", "protocol"], sink)?;
    let port = fields.required("port", sink, port);
    let name = fields.optional("name", None, sink, |node, path, sink| label(node, path, "a name", sink).map(Some));
    let protocol = fields.optional("protocol", Protocol::default(), sink, |node, path, sink| {
        decode::choice(node, path, sink, "protocol", &[("tcp", Protocol::Tcp), ("udp", Protocol::Udp)])
    });
    Some(ServicePort { port: port?, name: name?, protocol: protocol? })
}

fn workload_spec(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<WorkloadSpec> {
    let fields = Fields::open(node, path, &["nodes", "ports"], sink)?;
    let nodes = fields.required("nodes", sink, |node, path, sink| {
        decode::list(node, path, sink, MAX_REFERENCES, Clone::clone, |node, path, sink| {
            label(node, path, "a node's name", sink)
        })
    });
    let ports = fields.optional("ports", Vec::new(), sink, ports);
    Some(WorkloadSpec { nodes: nodes?, ports: ports? })
}

fn policy_spec(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<PolicySpec> {
    let fields = Fields::open(node, path, &["to", "from", "action", "dryRun"], sink)?;
    let to = fields.required("to", sink, to);
    let from = fields
        .required("from", sink, |node, path, sink| decode::list(node, path, sink, MAX_SOURCES, Clone::clone, from));
    let action = fields.optional("action", Effect::default(), sink, |node, path, sink| {
        decode::choice(node, path, sink, "action", &[("allow", Effect::Allow), ("deny", Effect::Deny)])
    });
    let dry_run = fields.optional("dryRun", false, sink, decode::boolean);
    Some(PolicySpec { to: to?, from: from?, action: action?, dry_run: dry_run? })
}

fn to(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<To> {
    let fields = Fields::open(node, path, &["service", "ports"], sink)?;
    let service = fields.required("service", sink, reference);
    let ports = fields.optional("ports", Vec::new(), sink, ports);
    Some(To { service: service?, ports: ports? })
}

fn from(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<From> {
    let known = ["workload", "identity", "service", "namespace", "node", "cidr"];
    let fields = Fields::open(node, path, &known, sink)?;
    let workload = fields.optional("workload", None, sink, |node, path, sink| reference(node, path, sink).map(Some));
    let identity = fields.optional("identity", None, sink, |node, path, sink| identity(node, path, sink).map(Some));
    let service = fields.optional("service", None, sink, |node, path, sink| reference(node, path, sink).map(Some));
    let namespace = fields.optional("namespace", None, sink, |node, path, sink| namespace(node, path, sink).map(Some));
    let on_node =
        fields.optional("node", None, sink, |node, path, sink| label(node, path, "a node's name", sink).map(Some));
    let cidr = fields.optional("cidr", None, sink, |node, path, sink| cidr(node, path, sink).map(Some));
    let from = From {
        workload: workload?,
        identity: identity?,
        service: service?,
        namespace: namespace?,
        node: on_node?,
        cidr: cidr?,
    };
    if from == From::default() {
        // It would match everyone: nobody writes that without saying so.
        fields.fault(format!("a source must say who: give at least one of {}", known.join(", ")), sink);
        return None;
    }
    Some(from)
}

/// Ports of a list that may be left out, but not be empty: empty would read as 'none' and mean 'all'.
fn ports(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<Vec<u16>> {
    decode::list(node, path, sink, MAX_PORTS, |port| *port, port)
}

fn port(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<u16> {
    decode::number(node, path, sink, 1..=u64::from(u16::MAX)).and_then(|port| u16::try_from(port).ok())
}

fn label(node: &Node, path: &Path<'_>, what: &str, sink: &mut Sink) -> Option<String> {
    decode::checked(node, path, sink, |text| {
        if is_dns_label(text) {
            return Ok(());
        }
        Err(format!("`{}` is not {what}: 1–63 of `a-z 0-9 -`, no hyphen at either end", excerpt(text)))
    })
    .map(str::to_owned)
}

fn namespace(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<String> {
    let name = label(node, path, "a namespace", sink)?;
    if is_reserved_namespace(&name) {
        sink.fault(path, node.at, format!("the namespace `{name}` is reserved: its names in TLS would be a {name}'s"));
        return None;
    }
    Some(name)
}

fn reference(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<String> {
    decode::checked(node, path, sink, |text| {
        if is_reference(text) {
            return Ok(());
        }
        let form = "`name` (in the same namespace) or `namespace/name`, each 1–63 of `a-z 0-9 -`";
        Err(format!("`{}` names no resource: write {form}", excerpt(text)))
    })
    .map(str::to_owned)
}

fn identity(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<String> {
    decode::checked(node, path, sink, |text| match SpiffeId::parse(text) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    })
    .map(str::to_owned)
}

fn host_address(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<IpAddr> {
    let address: IpAddr = decode::parsed(node, path, sink, "an IPv4 or IPv6 address")?;
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    let wrong = if address.is_unspecified() || address.is_multicast() || broadcast {
        "not the address of one host"
    } else if address.is_loopback() {
        "the same address on every host"
    } else if address.to_canonical() != address {
        "an IPv4 address in IPv6 form: write it as IPv4"
    } else {
        return Some(address);
    };
    sink.fault(path, node.at, format!("`{address}` is {wrong}"));
    None
}

fn cidr(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<IpNet> {
    let net: IpNet = decode::parsed(node, path, sink, "a range of addresses such as `10.1.0.0/16` or `10.1.2.3/32`")?;
    let message = if net.trunc() != net {
        format!("`{net}` has bits set behind the prefix: write `{}`", net.trunc())
    } else if matches!(net, IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some() && v6.prefix_len() >= 96) {
        format!("`{net}` holds IPv4 addresses in IPv6 form, which no flow has: write the range as IPv4")
    } else {
        return Some(net);
    };
    sink.fault(path, node.at, message);
    None
}
