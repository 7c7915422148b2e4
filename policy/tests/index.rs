//! The compiled index against an evaluator that reads policies one by one.

use std::net::{IpAddr, SocketAddr};

use opencluster_policy::index::{Decision, Flow, Index, RuleId};
use opencluster_policy::resource::{
    Effect, From, Metadata, NodeSpec, Object, PolicySpec, Protocol, Reference, Resource, ServicePort, ServiceSpec, To,
    WorkloadSpec,
};
use opencluster_policy::snapshot::Snapshot;
use opencluster_policy::spiffe::{SpiffeId, TrustDomain};
use proptest::prelude::*;
use proptest::sample::{Index as Pick, select, subsequence};

fn domain() -> TrustDomain {
    TrustDomain::parse("rig.test").unwrap()
}

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

fn metadata(namespace: &str, name: impl Into<String>) -> Metadata {
    Metadata { name: name.into(), namespace: namespace.to_owned(), labels: [].into(), resource_version: None }
}

// A world so small that its parts meet often.
const NAMESPACES: [&str; 2] = ["default", "other"];
const NAMES: [&str; 3] = ["x", "y", "z"];
const PORTS: [u16; 3] = [80, 81, 82];
const IDENTITIES: [&str; 12] = [
    "spiffe://rig.test/ns/default/sa/x",
    "spiffe://rig.test/ns/default/sa/y",
    "spiffe://rig.test/ns/default/sa/z",
    "spiffe://rig.test/ns/other/sa/x",
    "spiffe://rig.test/ns/other/sa/y",
    "spiffe://rig.test/ns/other/sa/unknown",
    "spiffe://rig.test/ns/elsewhere/sa/x",
    "spiffe://rig.test/node/n0",
    "spiffe://rig.test/odd",
    "spiffe://foreign.test/ns/default/sa/x",
    "spiffe://foreign.test/ns/other/sa/y",
    "spiffe://foreign.test",
];
const ADDRESSES: [&str; 9] =
    ["10.0.0.1", "10.0.0.2", "10.0.1.3", "10.1.0.9", "192.0.2.1", "fd88::1", "fd88::2", "fd99::1", "::ffff:10.0.0.1"];
const RANGES: [&str; 12] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.0.0.0/16",
    "10.0.0.0/24",
    "10.0.0.1/32",
    "10.0.1.0/24",
    "10.0.0.2/32",
    "::/0",
    "fd88::/16",
    "fd88::/64",
    "fd88::1/128",
    "8000::/1",
];
const NODES: [(&str, &[&str]); 3] =
    [("n0", &["10.0.0.1", "fd88::1"]), ("n1", &["10.0.0.2", "10.1.0.9", "fd88::2"]), ("n2", &["10.0.1.3"])];

/// `name` or `namespace/name`, now and then of something that does not exist.
fn reference() -> impl Strategy<Value = String> {
    let name = select(["x", "y", "z", "x", "y", "z", "missing"].as_slice());
    (proptest::option::of(select(&NAMESPACES[..])), name)
        .prop_map(|(namespace, name)| namespace.map_or(name.to_owned(), |namespace| format!("{namespace}/{name}")))
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![3 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp)]
}

fn from() -> impl Strategy<Value = From> {
    let sometimes = |strategy| proptest::option::weighted(0.3, strategy);
    (
        sometimes(reference().boxed()),
        sometimes(select(&IDENTITIES[..]).prop_map(str::to_owned).boxed()),
        sometimes(reference().boxed()),
        sometimes(select(["default", "other", "elsewhere"].as_slice()).prop_map(str::to_owned).boxed()),
        sometimes(select(["n0", "n1", "n2", "missing"].as_slice()).prop_map(str::to_owned).boxed()),
        proptest::option::weighted(0.4, select(&RANGES[..]).prop_map(|range| range.parse().unwrap())),
    )
        .prop_map(|(workload, identity, service, namespace, node, cidr)| From {
            workload,
            identity,
            service,
            namespace,
            node,
            cidr,
        })
        .prop_filter("a source says who", |from| *from != From::default())
}

fn policy() -> impl Strategy<Value = PolicySpec> {
    let to = (reference(), subsequence(&PORTS[..], 0..=2)).prop_map(|(service, ports)| To { service, ports });
    let effect = prop_oneof![3 => Just(Effect::Allow), 1 => Just(Effect::Deny)];
    (to, proptest::collection::vec(from(), 1..4), effect, proptest::bool::weighted(0.25))
        .prop_map(|(to, from, action, dry_run)| PolicySpec { to, from, action, dry_run })
}

fn service() -> impl Strategy<Value = ServiceSpec> {
    let ports = proptest::collection::vec((select(&PORTS[..]), protocol()), 1..3);
    (ports, proptest::collection::vec(reference(), 1..4)).prop_map(|(ports, workloads)| ServiceSpec {
        ports: ports.into_iter().map(|(port, protocol)| ServicePort { port, name: None, protocol }).collect(),
        workloads,
    })
}

fn snapshot() -> impl Strategy<Value = Snapshot> {
    let keys: Vec<(&str, &str)> =
        NAMESPACES.iter().flat_map(|namespace| NAMES.iter().map(move |name| (*namespace, *name))).collect();
    let workloads = subsequence(keys.clone(), 3..=6).prop_flat_map(|keys| {
        let nodes = proptest::collection::vec(subsequence(vec!["n0", "n1", "n2"], 1..=2), keys.len());
        (Just(keys), nodes)
    });
    let services = proptest::collection::vec((select(keys), service()), 1..6);
    let policies = proptest::collection::vec((select(&NAMESPACES[..]), policy()), 0..10);
    (workloads, services, policies).prop_map(|((workloads, nodes), services, policies)| {
        let mut resources: Vec<Resource> = Vec::new();
        for (name, addresses) in NODES {
            let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
            resources.push(Resource::Node(Object {
                metadata: metadata("", name),
                spec: NodeSpec { addresses, tunnel_port: 15443, max_age: None },
            }));
        }
        for ((namespace, name), nodes) in workloads.into_iter().zip(nodes) {
            let nodes = nodes.into_iter().map(str::to_owned).collect();
            let spec = WorkloadSpec { nodes, ports: Vec::new() };
            resources.push(Resource::Workload(Object { metadata: metadata(namespace, name), spec }));
        }
        for ((namespace, name), spec) in services {
            resources.push(Resource::Service(Object { metadata: metadata(namespace, name), spec }));
        }
        for (number, (namespace, spec)) in policies.into_iter().enumerate() {
            resources.push(Resource::Policy(Object { metadata: metadata(namespace, format!("p{number}")), spec }));
        }
        Snapshot::new(1, resources)
    })
}

#[derive(Clone, Debug)]
struct OwnedFlow {
    source: SpiffeId,
    source_address: IpAddr,
    destination: SpiffeId,
    port: u16,
    protocol: Protocol,
}

impl OwnedFlow {
    fn flow(&self) -> Flow<'_> {
        let Self { source, source_address, destination, port, protocol } = self;
        Flow { source, source_address: *source_address, destination, port: *port, protocol: *protocol }
    }
}

fn flow() -> impl Strategy<Value = OwnedFlow> {
    (
        select(&IDENTITIES[..]),
        select(&ADDRESSES[..]),
        select(&IDENTITIES[..6]),
        select([80, 81, 82, 83].as_slice()),
        protocol(),
    )
        .prop_map(|(source, address, destination, port, protocol)| OwnedFlow {
            source: id(source),
            source_address: address.parse().unwrap(),
            destination: id(destination),
            port,
            protocol,
        })
}

/// The meaning of policies, written down as plainly as possible.
mod naive {
    use super::*;

    /// The numbers of the first rules that deny and that allow.
    #[derive(Default)]
    pub(super) struct Matches {
        deny: Option<u32>,
        allow: Option<u32>,
    }

    pub(super) fn decide(snapshot: &Snapshot, flow: &OwnedFlow) -> Decision {
        decision(&matches(snapshot, flow, false))
    }

    pub(super) fn decide_dry_run(snapshot: &Snapshot, flow: &OwnedFlow) -> Option<Decision> {
        let (enforced, dry_run) = (matches(snapshot, flow, false), matches(snapshot, flow, true));
        let first = |a: Option<u32>, b: Option<u32>| a.into_iter().chain(b).min();
        let both = Matches { deny: first(enforced.deny, dry_run.deny), allow: first(enforced.allow, dry_run.allow) };
        let (now, then) = (decision(&enforced), decision(&both));
        (now.allowed() != then.allowed()).then_some(then)
    }

    fn decision(matches: &Matches) -> Decision {
        match (matches.deny, matches.allow) {
            (Some(rule), _) => Decision::Deny(RuleId(rule)),
            (None, Some(rule)) => Decision::Allow(RuleId(rule)),
            (None, None) => Decision::DefaultDeny,
        }
    }

    fn matches(snapshot: &Snapshot, flow: &OwnedFlow, dry_run: bool) -> Matches {
        let mut matches = Matches::default();
        let mut number = 0;
        for resource in snapshot.resources.values() {
            let Resource::Policy(policy) = &**resource else { continue };
            for from in &policy.spec.from {
                let namespace = &policy.metadata.namespace;
                if policy.spec.dry_run == dry_run
                    && to(snapshot, namespace, &policy.spec.to, flow)
                    && source(snapshot, namespace, from, flow)
                {
                    let first = match policy.spec.action {
                        Effect::Allow => &mut matches.allow,
                        Effect::Deny => &mut matches.deny,
                    };
                    first.get_or_insert(number);
                }
                number += 1;
            }
        }
        matches
    }

    fn to(snapshot: &Snapshot, namespace: &str, to: &To, flow: &OwnedFlow) -> bool {
        (to.ports.is_empty() || to.ports.contains(&flow.port))
            && backs(snapshot, namespace, &to.service, &flow.destination)
            && find_service(snapshot, namespace, &to.service).is_some_and(|(_, service)| {
                service.ports.iter().any(|port| port.port == flow.port && port.protocol == flow.protocol)
            })
    }

    fn source(snapshot: &Snapshot, namespace: &str, from: &From, flow: &OwnedFlow) -> bool {
        let own_namespace = workload(&flow.source).map(|(namespace, _)| namespace);
        let address = flow.source_address.to_canonical();
        // Who is no workload of ours must be named.
        (own_namespace.is_some() || from.identity.is_some())
            && from.workload.as_ref().is_none_or(|text| {
                let wanted = Reference::resolve(text, namespace);
                workload(&flow.source) == Some((wanted.namespace, wanted.name)) && exists(snapshot, &flow.source)
            })
            && from.identity.as_ref().is_none_or(|text| text == flow.source.as_str())
            && from.service.as_ref().is_none_or(|text| backs(snapshot, namespace, text, &flow.source))
            && from.namespace.as_ref().is_none_or(|wanted| own_namespace == Some(wanted))
            && from.node.as_ref().is_none_or(|node| addresses(snapshot, node).contains(&address))
            && from.cidr.is_none_or(|range| range.contains(&address))
    }

    /// Namespace and name, if it is of our trust domain.
    fn workload(id: &SpiffeId) -> Option<(&str, &str)> {
        id.as_str().strip_prefix("spiffe://rig.test/ns/")?.split_once("/sa/")
    }

    fn exists(snapshot: &Snapshot, id: &SpiffeId) -> bool {
        snapshot.resources.values().any(|resource| match &**resource {
            Resource::Workload(object) => workload(id) == Some((&object.metadata.namespace, &object.metadata.name)),
            _ => false,
        })
    }

    fn find_service<'s>(snapshot: &'s Snapshot, namespace: &str, text: &str) -> Option<(&'s str, &'s ServiceSpec)> {
        let wanted = Reference::resolve(text, namespace);
        snapshot.resources.values().find_map(|resource| match &**resource {
            Resource::Service(object)
                if object.metadata.namespace == wanted.namespace && object.metadata.name == wanted.name =>
            {
                Some((object.metadata.namespace.as_str(), &object.spec))
            }
            _ => None,
        })
    }

    fn backs(snapshot: &Snapshot, namespace: &str, service: &str, id: &SpiffeId) -> bool {
        let Some((service_namespace, spec)) = find_service(snapshot, namespace, service) else { return false };
        exists(snapshot, id)
            && spec.workloads.iter().any(|text| {
                let reference = Reference::resolve(text, service_namespace);
                workload(id) == Some((reference.namespace, reference.name))
            })
    }

    fn addresses(snapshot: &Snapshot, node: &str) -> Vec<IpAddr> {
        let found = snapshot.resources.values().find_map(|resource| match &**resource {
            Resource::Node(object) if object.metadata.name == node => Some(object.spec.addresses.clone()),
            _ => None,
        });
        found.unwrap_or_default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// 2,000 worlds and 40 flows in each: the same verdict, by the same rule.
    #[test]
    fn r08_the_index_decides_like_the_naive_evaluator(
        snapshot in snapshot(),
        flows in proptest::collection::vec(flow(), 40),
    ) {
        let index = Index::compile(&domain(), &snapshot);
        for flow in &flows {
            let expected = naive::decide(&snapshot, flow);
            prop_assert_eq!(index.decide(&flow.flow()), expected, "{:?}", flow);
            prop_assert_eq!(index.decide_dry_run(&flow.flow()), naive::decide_dry_run(&snapshot, flow), "dry run {:?}", flow);
        }
    }

    /// Whatever is decided, the explanation agrees and says why.
    #[test]
    fn explanations_agree_with_decisions(
        snapshot in snapshot(),
        flows in proptest::collection::vec(flow(), 10),
    ) {
        let index = Index::compile(&domain(), &snapshot);
        for flow in &flows {
            let explanation = index.explain(&flow.flow());
            prop_assert_eq!(explanation.decision, index.decide(&flow.flow()));
            prop_assert_eq!(explanation.rule.is_some(), explanation.decision.rule().is_some());
            prop_assert!(explanation.reasons.iter().all(|reason| !reason.is_empty()) && !explanation.reasons.is_empty());
            let dry_run = explanation.reasons.iter().any(|reason| reason.contains("counted it would be"));
            prop_assert_eq!(dry_run, index.decide_dry_run(&flow.flow()).is_some());
        }
    }

    /// A route leads to a workload that runs on the node with that address, through a service with that port.
    #[test]
    fn routes_lead_where_the_configuration_says(snapshot in snapshot(), address in select(&ADDRESSES[..]), port in select(&[80_u16, 81, 82, 83][..])) {
        let index = Index::compile(&domain(), &snapshot);
        let target = SocketAddr::new(address.parse().unwrap(), port);
        let node = index.node_of(target.ip());
        let expected = snapshot.resources.values().any(|resource| match &**resource {
            Resource::Service(object) => object.spec.ports.iter().any(|known| (known.port, known.protocol) == (port, Protocol::Tcp))
                && index.backends(&object.metadata.namespace, &object.metadata.name, port).iter().any(|id| {
                    node.is_some_and(|node| index.node_may_hold(node, id))
                }),
            _ => false,
        });
        let route = index.route(target, Protocol::Tcp);
        prop_assert_eq!(route.is_some(), expected);
        if let Some(route) = route {
            let node = node.unwrap();
            prop_assert!(index.workloads_on(node).any(|id| *id == route.workload));
            prop_assert_eq!(route.tunnel, SocketAddr::new(target.ip().to_canonical(), 15443));
            prop_assert_eq!(route.target, SocketAddr::new(target.ip().to_canonical(), port));
            prop_assert!(index.backends(&route.service.namespace, &route.service.name, port).contains(&route.workload));
        }
    }

    /// Applying a difference gives the snapshot that it was taken from.
    #[test]
    fn differences_round_trip(old in snapshot(), new in snapshot(), gone in proptest::collection::vec(any::<Pick>(), 0..4)) {
        // Deletions of every kind: the generator makes the same nodes each time.
        let mut resources = (*new.resources).clone();
        for pick in gone {
            if let Some(key) = (!resources.is_empty()).then(|| resources.keys().nth(pick.index(resources.len())).unwrap().clone()) {
                resources.remove(&key);
            }
        }
        let new = Snapshot { version: 2, resources: resources.into() };
        let difference = old.difference(&new);
        prop_assert_eq!(old.apply(&difference, 2), new.clone());
        prop_assert!(new.difference(&new).is_empty());
        // Nothing that stayed the same is in it.
        for upsert in &difference.upserts {
            prop_assert_ne!(old.get(&upsert.key()), Some(upsert));
        }
    }
}
