//! A consistent set of resources, changes to it, and the difference between two of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::resource::fault::{Path, Position, Sink};
use crate::resource::{
    Faults, Key, Kind, NodeSpec, PolicySpec, Protocol, Reference, Resource, ServiceSpec, WorkloadSpec,
};

/// Resources at one version. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Grows by one with each change.
    pub version: u64,
    /// By key.
    pub resources: Arc<BTreeMap<Key, Arc<Resource>>>,
}

/// What separates two snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// New or changed.
    pub upserts: Vec<Arc<Resource>>,
    /// Gone.
    pub deletes: Vec<Key>,
}

impl Difference {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.deletes.is_empty()
    }
}

impl Snapshot {
    /// A snapshot of these resources. Of two with the same key the later one counts.
    pub fn new(version: u64, resources: impl IntoIterator<Item = Resource>) -> Self {
        let resources = resources.into_iter().map(|resource| (resource.key(), Arc::new(resource))).collect();
        Self { version, resources: Arc::new(resources) }
    }

    /// The resource with this key.
    pub fn get(&self, key: &Key) -> Option<&Arc<Resource>> {
        self.resources.get(key)
    }

    /// What turns `self` into `newer`.
    pub fn difference(&self, newer: &Self) -> Difference {
        let changed = |(key, resource): &(&Key, &Arc<Resource>)| {
            self.resources.get(*key).is_none_or(|old| !Arc::ptr_eq(old, resource) && old != *resource)
        };
        Difference {
            upserts: newer.resources.iter().filter(changed).map(|(_, resource)| Arc::clone(resource)).collect(),
            deletes: self.resources.keys().filter(|key| !newer.resources.contains_key(key)).cloned().collect(),
        }
    }

    /// `self` after `difference`, at `version`. Checks nothing: see [`Snapshot::check`].
    #[must_use]
    pub fn apply(&self, difference: &Difference, version: u64) -> Self {
        if difference.is_empty() {
            return Self { version, resources: Arc::clone(&self.resources) };
        }
        let mut resources = BTreeMap::clone(&self.resources);
        for key in &difference.deletes {
            resources.remove(key);
        }
        resources.extend(difference.upserts.iter().map(|resource| (resource.key(), Arc::clone(resource))));
        Self { version, resources: Arc::new(resources) }
    }

    /// Checks what resources say of each other: references exist, addresses belong to one node, no two workloads claim
    /// the same port of the same node through services.
    ///
    /// `changed` are the documents (or deletions) that led here: `Fault::document` is the position in it of the one that
    /// caused the fault, and 0 where none did. Each message names the resource that it is about.
    pub fn check(&self, changed: &[Key]) -> Result<(), Faults> {
        let mut checker = Checker {
            snapshot: self,
            changed: changed.iter().enumerate().map(|(index, key)| (key, index)).collect(),
            sink: Sink::default(),
            addresses: HashMap::new(),
            claims: HashMap::new(),
        };
        for (key, resource) in self.resources.iter() {
            match &**resource {
                Resource::Node(object) => checker.node(key, &object.spec),
                Resource::Workload(object) => checker.workload(key, &object.spec),
                Resource::Service(object) => checker.service(key, &object.spec),
                Resource::Policy(object) => checker.policy(key, &object.spec),
            }
        }
        checker.sink.finish(Some(()))
    }
}

/// A workload's claim to a port of a node.
struct Claim<'a> {
    workload: &'a Key,
    service: &'a Key,
}

struct Checker<'a> {
    snapshot: &'a Snapshot,
    changed: HashMap<&'a Key, usize>,
    sink: Sink,
    addresses: HashMap<IpAddr, &'a Key>,
    claims: HashMap<(&'a str, u16, Protocol), Claim<'a>>,
}

impl<'a> Checker<'a> {
    fn node(&mut self, key: &'a Key, spec: &NodeSpec) {
        for (index, address) in spec.addresses.iter().enumerate() {
            if let Some(&other) = self.addresses.get(address) {
                let message = format!("{key}: {address} is already an address of {other}");
                self.fault(&[key, other], &format!("spec.addresses[{index}]"), message);
            } else {
                self.addresses.insert(*address, key);
            }
        }
    }

    fn workload(&mut self, key: &'a Key, spec: &WorkloadSpec) {
        for (index, node) in spec.nodes.iter().enumerate() {
            self.exists(key, node_key(node), &format!("spec.nodes[{index}]"));
        }
    }

    fn service(&mut self, key: &'a Key, spec: &'a ServiceSpec) {
        let mut seen = BTreeSet::new();
        for (index, text) in spec.workloads.iter().enumerate() {
            let field = format!("spec.workloads[{index}]");
            let reference = Reference::resolve(text, &key.namespace);
            if !seen.insert(reference) {
                self.fault(&[key], &field, format!("{key}: the workload `{text}` is listed twice"));
            } else if let Some((workload, Resource::Workload(object))) =
                self.exists(key, reference.key(Kind::Workload), &field)
            {
                self.claim(key, spec, workload, &object.spec);
            }
        }
    }

    /// Claims the service's ports for the workload on each of its nodes.
    fn claim(&mut self, service: &'a Key, spec: &ServiceSpec, workload: &'a Key, backend: &'a WorkloadSpec) {
        for node in &backend.nodes {
            let tunnel_port = match self.snapshot.resources.get(&node_key(node)).map(|resource| &**resource) {
                Some(Resource::Node(object)) => object.spec.tunnel_port,
                _ => continue,
            };
            for (index, port) in spec.ports.iter().enumerate() {
                let field = format!("spec.ports[{index}].port");
                let (number, protocol) = (port.port, port.protocol);
                // UDP counts too: QUIC tunnels take the same number.
                if number == tunnel_port {
                    let message = format!(
                        "{service}: port {number} is the tunnel port of node {node}, which runs {workload}: choose another \
                         for one of them"
                    );
                    self.fault(&[service, workload, &node_key(node)], &field, message);
                }
                let claim = Claim { workload, service };
                match self.claims.entry((node, number, protocol)) {
                    std::collections::hash_map::Entry::Vacant(free) => {
                        free.insert(claim);
                    }
                    std::collections::hash_map::Entry::Occupied(taken) if taken.get().workload != workload => {
                        let Claim { workload: other, service: through } = *taken.get();
                        let message = format!(
                            "{service}: port {number}/{protocol} of node {node} cannot be {workload}'s: it is already \
                             {other}'s, through {through}"
                        );
                        self.fault(&[service, workload, through, other, &node_key(node)], &field, message);
                    }
                    std::collections::hash_map::Entry::Occupied(_) => {}
                }
            }
        }
    }

    fn policy(&mut self, key: &'a Key, spec: &PolicySpec) {
        let service = Reference::resolve(&spec.to.service, &key.namespace).key(Kind::Service);
        if let Some((service, Resource::Service(object))) = self.exists(key, service, "spec.to.service") {
            for (index, wanted) in spec.to.ports.iter().enumerate() {
                if !object.spec.ports.iter().any(|port| port.port == *wanted) {
                    let message = format!("{key}: {service} has no port {wanted} (it has {})", ports(&object.spec));
                    self.fault(&[key, service], &format!("spec.to.ports[{index}]"), message);
                }
            }
        }
        for (index, from) in spec.from.iter().enumerate() {
            if let Some(workload) = &from.workload {
                let workload = Reference::resolve(workload, &key.namespace).key(Kind::Workload);
                self.exists(key, workload, &format!("spec.from[{index}].workload"));
            }
            if let Some(service) = &from.service {
                let service = Reference::resolve(service, &key.namespace).key(Kind::Service);
                self.exists(key, service, &format!("spec.from[{index}].service"));
            }
            if let Some(node) = &from.node {
                self.exists(key, node_key(node), &format!("spec.from[{index}].node"));
            }
        }
    }

    /// The resource that `holder` refers to; a fault if there is none.
    #[expect(clippy::needless_pass_by_value, reason = "callers make the key for this call")]
    fn exists(&mut self, holder: &Key, wanted: Key, field: &str) -> Option<(&'a Key, &'a Resource)> {
        if let Some((key, resource)) = self.snapshot.resources.get_key_value(&wanted) {
            return Some((key, resource));
        }
        let deleted_below = self.changed.contains_key(&wanted) && !self.changed.contains_key(holder);
        let message = if deleted_below {
            format!("{holder} still refers to {wanted}")
        } else {
            format!("{holder} refers to {wanted}, which does not exist")
        };
        self.fault(&[holder, &wanted], field, message);
        None
    }

    /// Reports a fault of the first of these resources that was changed.
    fn fault(&mut self, involved: &[&Key], field: &str, message: String) {
        let document = involved.iter().find_map(|key| self.changed.get(key).map(|index| (*key, *index)));
        self.sink.enter_document(document.map_or(0, |(_, index)| index));
        // The field is the first one's: it would mislead if another document brought the fault about.
        let own = document.is_none_or(|(key, _)| key == involved[0]);
        let path = if own { Path::Root.field(field) } else { Path::Root };
        self.sink.fault(&path, Position::default(), message);
    }
}

fn node_key(name: &str) -> Key {
    Key { kind: Kind::Node, namespace: String::new(), name: name.to_owned() }
}

/// `80/tcp, 53/udp`
pub(crate) fn ports(spec: &ServiceSpec) -> String {
    let ports: Vec<String> = spec.ports.iter().map(|port| format!("{}/{}", port.port, port.protocol)).collect();
    ports.join(", ")
}
