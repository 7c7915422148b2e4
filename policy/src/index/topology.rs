//! Where things are: which addresses are whose, and what listens there.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{FastMap, Route};
use crate::resource::{Key, Kind, Protocol, Reference, Resource};
use crate::snapshot::Snapshot;
use crate::spiffe::{SpiffeId, TrustDomain};

#[derive(Debug, Default)]
pub(super) struct Topology {
    nodes: FastMap<String, Host>,
    addresses: FastMap<IpAddr, Arc<str>>,
    routes: FastMap<(IpAddr, u16, Protocol), Route>,
}

#[derive(Debug)]
struct Host {
    addresses: Vec<IpAddr>,
    tunnel_port: u16,
    /// Sorted.
    workloads: Vec<Arc<SpiffeId>>,
}

impl Topology {
    pub(super) fn new(domain: &TrustDomain, snapshot: &Snapshot) -> Self {
        let mut topology = Self::default();
        for (key, resource) in snapshot.resources.iter() {
            if let Resource::Node(object) = &**resource {
                topology.add_node(&key.name, &object.spec.addresses, object.spec.tunnel_port);
            }
        }
        for (key, resource) in snapshot.resources.iter() {
            if let Resource::Workload(object) = &**resource
                && let Ok(id) = SpiffeId::workload(domain, &key.namespace, &key.name)
            {
                let id = Arc::new(id);
                for node in &object.spec.nodes {
                    if let Some(host) = topology.nodes.get_mut(node) {
                        host.workloads.push(Arc::clone(&id));
                    }
                }
            }
        }
        for host in topology.nodes.values_mut() {
            host.workloads.sort_unstable();
            host.workloads.dedup();
        }
        topology.add_routes(domain, snapshot);
        topology
    }

    pub(super) fn route(&self, target: SocketAddr, protocol: Protocol) -> Option<&Route> {
        self.routes.get(&(target.ip().to_canonical(), target.port(), protocol))
    }

    pub(super) fn node_of(&self, address: IpAddr) -> Option<&str> {
        self.addresses.get(&address.to_canonical()).map(|name| &**name)
    }

    pub(super) fn addresses_of(&self, node: &str) -> &[IpAddr] {
        self.nodes.get(node).map_or(&[], |host| &host.addresses)
    }

    pub(super) fn workloads_on(&self, node: &str) -> &[Arc<SpiffeId>] {
        self.nodes.get(node).map_or(&[], |host| &host.workloads)
    }

    fn add_node(&mut self, name: &str, addresses: &[IpAddr], tunnel_port: u16) {
        let shared: Arc<str> = name.into();
        for address in addresses {
            self.addresses.insert(*address, Arc::clone(&shared));
        }
        let host = Host { addresses: addresses.to_vec(), tunnel_port, workloads: Vec::new() };
        self.nodes.insert(name.to_owned(), host);
    }

    fn add_routes(&mut self, domain: &TrustDomain, snapshot: &Snapshot) {
        for (key, resource) in snapshot.resources.iter() {
            let Resource::Service(object) = &**resource else { continue };
            let service = Arc::new(key.clone());
            for text in &object.spec.workloads {
                let reference = Reference::resolve(text, &key.namespace);
                let workload = snapshot.resources.get(&reference.key(Kind::Workload)).map(|resource| &**resource);
                let Some(Resource::Workload(backend)) = workload else { continue };
                let Ok(id) = SpiffeId::workload(domain, reference.namespace, reference.name) else { continue };
                let id = Arc::new(id);
                for node in &backend.spec.nodes {
                    for port in &object.spec.ports {
                        self.add_route(node, port.port, port.protocol, &id, &service);
                    }
                }
            }
        }
    }

    /// A node's addresses lead to the workload. Of several services over the same port the first is named; a snapshot that
    /// passed its check has no other workload there.
    fn add_route(&mut self, node: &str, port: u16, protocol: Protocol, workload: &Arc<SpiffeId>, service: &Arc<Key>) {
        let Some(host) = self.nodes.get(node) else { return };
        for &address in &host.addresses {
            self.routes.entry((address, port, protocol)).or_insert_with(|| Route {
                workload: Arc::clone(workload),
                // The tunnel takes the address that the client chose, and so its family and its path.
                tunnel: SocketAddr::new(address, host.tunnel_port),
                target: SocketAddr::new(address, port),
                service: Arc::clone(service),
            });
        }
    }
}
