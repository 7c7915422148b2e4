//! From a snapshot to an [`Index`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use ipnet::IpNet;

use super::identities::{Identities, Identity};
use super::table::{TableBuilder, Who};
use super::topology::Topology;
use super::{Destination, FastMap, Index, NONE, Rule};
use crate::resource::{From, Key, Kind, PolicySpec, Reference, Resource, ServiceSpec};
use crate::snapshot::Snapshot;
use crate::spiffe::{SpiffeId, Subject, TrustDomain};

pub(super) fn compile(domain: &TrustDomain, snapshot: &Snapshot) -> Index {
    let view = View::new(domain, snapshot);
    let topology = Topology::new(domain, snapshot);
    let destinations = Destinations::new(&view);
    let mut sources = Sources::new(&view);

    let mut rules = Vec::new();
    let (mut enforced, mut dry_run) = (TableBuilder::default(), TableBuilder::default());
    for (number, &(key, spec)) in view.policies.iter().enumerate() {
        let policy = Arc::new(key.clone());
        let table = if spec.dry_run { &mut dry_run } else { &mut enforced };
        let no_scopes = Vec::new();
        let scopes = destinations.scopes_of_policy.get(&(number as u32)).unwrap_or(&no_scopes);
        for (position, from) in spec.from.iter().enumerate() {
            let rule = rules.len() as u32;
            rules.push(Rule { policy: Arc::clone(&policy), from: position });
            let ranges = ranges(from, &topology);
            for who in sources.of(key, from) {
                for &scope in scopes {
                    table.add(scope, who, ranges.as_deref(), rule, spec.action);
                }
            }
        }
    }
    let mut scopes = FastMap::default();
    for (at, scope) in destinations.scopes {
        let (workload, port, protocol) = at;
        match sources.identities.get_mut(&view.ids[workload as usize]) {
            Some(identity) if identity.scope == NONE => *identity = Identity { scope, port, protocol, ..*identity },
            _ => {
                scopes.insert(at, scope);
            }
        }
    }
    Index {
        snapshot: snapshot.clone(),
        identities: sources.identities,
        namespaces: sources.namespaces,
        scopes,
        enforced: enforced.build(destinations.scope_count),
        dry_run: dry_run.build(destinations.scope_count),
        rules,
        topology,
    }
}

/// The addresses that a source asks for: `None` if it does not.
fn ranges(from: &From, topology: &Topology) -> Option<Vec<IpNet>> {
    let Some(node) = &from.node else { return from.cidr.map(|cidr| vec![cidr.trunc()]) };
    let on_node =
        topology.addresses_of(node).iter().filter(|address| from.cidr.is_none_or(|cidr| cidr.contains(*address)));
    Some(on_node.map(|address| IpNet::from(*address)).collect())
}

/// The snapshot by kind, with everything that is named often numbered.
struct View<'a> {
    domain: &'a TrustDomain,
    /// The workloads' numbers are those of their identities.
    workloads: BTreeMap<&'a Key, u32>,
    ids: Vec<SpiffeId>,
    services: Vec<(&'a Key, &'a ServiceSpec)>,
    service_numbers: HashMap<&'a Key, u32>,
    policies: Vec<(&'a Key, &'a PolicySpec)>,
}

impl<'a> View<'a> {
    fn new(domain: &'a TrustDomain, snapshot: &'a Snapshot) -> Self {
        let mut view = Self {
            domain,
            workloads: BTreeMap::new(),
            ids: Vec::new(),
            services: Vec::new(),
            service_numbers: HashMap::new(),
            policies: Vec::new(),
        };
        for (key, resource) in snapshot.resources.iter() {
            match &**resource {
                Resource::Workload(_) => {
                    if let Ok(id) = SpiffeId::workload(domain, &key.namespace, &key.name) {
                        view.workloads.insert(key, view.ids.len() as u32);
                        view.ids.push(id);
                    }
                }
                Resource::Service(object) => {
                    view.service_numbers.insert(key, view.services.len() as u32);
                    view.services.push((key, &object.spec));
                }
                Resource::Policy(object) => view.policies.push((key, &object.spec)),
                Resource::Node(_) => {}
            }
        }
        view
    }

    fn service(&self, text: &str, namespace: &str) -> Option<u32> {
        self.service_numbers.get(&Reference::resolve(text, namespace).key(Kind::Service)).copied()
    }

    /// The numbers of the workloads that back a service.
    fn backends(&self, key: &Key, spec: &ServiceSpec) -> impl Iterator<Item = u32> {
        spec.workloads.iter().filter_map(|text| {
            self.workloads.get(&Reference::resolve(text, &key.namespace).key(Kind::Workload)).copied()
        })
    }
}

/// Scopes: which policies are about which destinations.
struct Destinations {
    /// Sorted.
    scopes: Vec<(Destination, u32)>,
    scope_count: usize,
    scopes_of_policy: HashMap<u32, Vec<u32>>,
}

impl Destinations {
    fn new(view: &View<'_>) -> Self {
        // The policies about each service, and of those the ones about each of its ports.
        let mut about: HashMap<u32, Vec<u32>> = HashMap::new();
        for (number, (key, spec)) in view.policies.iter().enumerate() {
            if let Some(service) = view.service(&spec.to.service, &key.namespace) {
                about.entry(service).or_default().push(number as u32);
            }
        }
        let mut port_sets = Numbering::default();
        let mut services_at: FastMap<Destination, BTreeSet<u32>> = FastMap::default();
        for (service, (key, spec)) in view.services.iter().enumerate() {
            let about = about.get(&(service as u32)).map_or(&[][..], Vec::as_slice);
            for port in &spec.ports {
                let policies: Vec<u32> = about
                    .iter()
                    .copied()
                    .filter(|policy| {
                        let ports = &view.policies[*policy as usize].1.to.ports;
                        ports.is_empty() || ports.contains(&port.port)
                    })
                    .collect();
                if policies.is_empty() {
                    continue;
                }
                let set = port_sets.number(policies);
                for workload in view.backends(key, spec) {
                    let destination = (workload, port.port, port.protocol);
                    services_at.entry(destination).or_default().insert(set);
                }
            }
        }
        // A destination behind several services: what any of them says.
        let mut scope_sets = Numbering::default();
        let mut services_at: Vec<_> = services_at.into_iter().collect();
        services_at.sort_unstable_by_key(|(at, _)| *at);
        let scopes = services_at.into_iter().map(|(at, sets)| (at, scope_sets.number(sets))).collect();
        let mut scopes_of_policy: HashMap<u32, Vec<u32>> = HashMap::new();
        for (scope, sets) in scope_sets.values.iter().enumerate() {
            let policies: BTreeSet<u32> =
                sets.iter().flat_map(|set| &port_sets.values[*set as usize]).copied().collect();
            for policy in policies {
                scopes_of_policy.entry(policy).or_default().push(scope as u32);
            }
        }
        Self { scopes, scope_count: scope_sets.values.len(), scopes_of_policy }
    }
}

/// Whom sources name, in numbers.
struct Sources<'v, 'a> {
    view: &'v View<'a>,
    identities: Identities,
    namespaces: FastMap<String, u32>,
    /// Namespace and services of each group.
    groups: Vec<(String, BTreeSet<u32>)>,
    groups_of_service: HashMap<u32, Vec<u32>>,
}

impl<'v, 'a> Sources<'v, 'a> {
    fn new(view: &'v View<'a>) -> Self {
        let mut namespaces: FastMap<String, u32> = FastMap::default();
        let mut named_services: BTreeSet<u32> = BTreeSet::new();
        let mut named_ids: BTreeSet<SpiffeId> = BTreeSet::new();
        for (key, from) in view.policies.iter().flat_map(|(key, spec)| spec.from.iter().map(|from| (*key, from))) {
            if let Some(namespace) = &from.namespace {
                let next = namespaces.len() as u32;
                namespaces.entry(namespace.clone()).or_insert(next);
            }
            named_services.extend(from.service.as_ref().and_then(|text| view.service(text, &key.namespace)));
            named_ids.extend(from.identity.as_ref().and_then(|text| SpiffeId::parse(text).ok()));
        }

        // Workloads of one namespace that back the same of the services that policies name are one group.
        let mut services_of: Vec<BTreeSet<u32>> = vec![BTreeSet::new(); view.ids.len()];
        for &service in &named_services {
            let (key, spec) = view.services[service as usize];
            for workload in view.backends(key, spec) {
                services_of[workload as usize].insert(service);
            }
        }
        let mut groups = Numbering::default();
        let mut sources = Self {
            view,
            identities: Identities::new(view.domain),
            namespaces,
            groups: Vec::new(),
            groups_of_service: HashMap::new(),
        };
        for (key, &number) in &view.workloads {
            let services = std::mem::take(&mut services_of[number as usize]);
            let group = if services.is_empty() { NONE } else { groups.number((key.namespace.clone(), services)) };
            sources.add_identity(&view.ids[number as usize], number, group);
        }
        for id in named_ids {
            let next = sources.identities.len() as u32;
            if sources.identities.get(&id).is_none() {
                sources.add_identity(&id, next, NONE);
            }
        }
        for (group, (_, services)) in groups.values.iter().enumerate() {
            for service in services {
                sources.groups_of_service.entry(*service).or_default().push(group as u32);
            }
        }
        sources.groups = groups.values;
        sources
    }

    fn add_identity(&mut self, id: &SpiffeId, number: u32, group: u32) {
        let mut identity = Identity { group, ..Identity::new(number) };
        if let Subject::Workload { namespace, .. } = id.subject()
            && id.is_of(self.view.domain)
        {
            identity.member = true;
            identity.namespace = self.namespaces.get(namespace).copied().unwrap_or(NONE);
        }
        self.identities.insert(id, identity);
    }

    /// Whom a source names, leaving addresses aside. Several keys: any of them. None: it can match nobody.
    fn of(&mut self, policy: &Key, from: &From) -> Vec<Who> {
        let namespace = from.namespace.as_ref().and_then(|name| self.namespaces.get(name)).copied();
        let service = match &from.service {
            None => None,
            Some(text) => match self.view.service(text, &policy.namespace) {
                Some(service) => Some(service),
                None => return Vec::new(),
            },
        };
        if from.workload.is_some() || from.identity.is_some() {
            return self
                .one(policy, from, service, namespace)
                .map(|number| vec![Who::Identity(number)])
                .unwrap_or_default();
        }
        match (service, namespace) {
            (Some(service), _) => {
                let groups = self.groups_of_service.get(&service).map_or(&[][..], Vec::as_slice);
                let wanted =
                    |group: &&u32| from.namespace.as_ref().is_none_or(|name| self.groups[**group as usize].0 == *name);
                groups.iter().filter(wanted).map(|group| Who::Group(*group)).collect()
            }
            (None, Some(namespace)) => vec![Who::Namespace(namespace)],
            (None, None) => vec![Who::Anyone],
        }
    }

    /// The one identity that `workload` and `identity` name, if all else that is asked for is true of it.
    fn one(&self, policy: &Key, from: &From, service: Option<u32>, namespace: Option<u32>) -> Option<u32> {
        let by_workload = from.workload.as_ref().map(|text| {
            let key = Reference::resolve(text, &policy.namespace).key(Kind::Workload);
            self.view.workloads.get(&key).map(|number| &self.view.ids[*number as usize])
        });
        let by_identity = from.identity.as_ref().map(|text| SpiffeId::parse(text).ok());
        let id = match (by_workload, &by_identity) {
            (Some(workload), Some(identity)) => workload.filter(|id| identity.as_ref() == Some(id))?,
            (Some(workload), None) => workload?,
            (None, Some(identity)) => identity.as_ref()?,
            (None, None) => return None,
        };
        let identity = self.identities.get(id)?;
        let of_service =
            |service: u32| identity.group != NONE && self.groups[identity.group as usize].1.contains(&service);
        let fits = service.is_none_or(of_service) && namespace.is_none_or(|namespace| identity.namespace == namespace);
        fits.then_some(identity.number)
    }
}

/// Gives equal values the same number.
struct Numbering<T> {
    numbers: HashMap<T, u32>,
    values: Vec<T>,
}

impl<T> Default for Numbering<T> {
    fn default() -> Self {
        Self { numbers: HashMap::new(), values: Vec::new() }
    }
}

impl<T: Eq + Hash + Clone> Numbering<T> {
    fn number(&mut self, value: T) -> u32 {
        let next = self.values.len() as u32;
        *self.numbers.entry(value).or_insert_with_key(|value| {
            self.values.push(value.clone());
            next
        })
    }
}
