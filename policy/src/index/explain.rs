//! Verdicts in words. Reads policies as they were written, one by one: slow, and independent of the compiled tables.

use std::sync::Arc;

use super::{Decision, Explanation, Flow, Index, Rule, RuleId};
use crate::resource::{Effect, From, Key, Kind, PolicySpec, Reference, Resource, ServiceSpec};
use crate::snapshot::ports;
use crate::spiffe::{SpiffeId, Subject};

pub(super) fn explain(index: &Index, flow: &Flow<'_>) -> Explanation {
    let decision = index.decide(flow);
    let mut reasons = match decision {
        Decision::Allow(rule) => vec![Rules { index, flow }.matched(rule)],
        Decision::Deny(rule) => Rules { index, flow }.denied(rule),
        Decision::DefaultDeny => vec![Rules { index, flow }.nothing_allows()],
    };
    reasons.extend(Rules { index, flow }.dry_run(decision));
    let rule = decision.rule().and_then(|rule| index.rule(rule)).map(|(policy, from)| (policy.clone(), from));
    Explanation { decision, rule, reasons }
}

pub(super) fn missing(index: &Index, namespace: &str, service: &str, port: u16) -> Option<Explanation> {
    let key = Reference { namespace, name: service }.key(Kind::Service);
    let reason = match service_spec(index, &key) {
        None => format!("there is no {key}"),
        Some(spec) if spec.ports.iter().all(|known| known.port != port) => {
            format!("{key} has no port {port} (it has {})", ports(spec))
        }
        Some(_) if backends(index, namespace, service, port).is_empty() => format!("no workload backs {key}"),
        Some(_) => return None,
    };
    Some(Explanation { decision: Decision::DefaultDeny, rule: None, reasons: vec![reason] })
}

pub(super) fn backends(index: &Index, namespace: &str, service: &str, port: u16) -> Vec<Arc<SpiffeId>> {
    let key = Reference { namespace, name: service }.key(Kind::Service);
    let Some(spec) = service_spec(index, &key).filter(|spec| spec.ports.iter().any(|known| known.port == port)) else {
        return Vec::new();
    };
    let mut ids: Vec<Arc<SpiffeId>> = spec
        .workloads
        .iter()
        .map(|text| Reference::resolve(text, namespace).key(Kind::Workload))
        .filter(|workload| index.snapshot.resources.contains_key(workload))
        .filter_map(|workload| SpiffeId::workload(index.identities.domain(), &workload.namespace, &workload.name).ok())
        .map(Arc::new)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn service_spec<'i>(index: &'i Index, key: &Key) -> Option<&'i ServiceSpec> {
    match index.snapshot.resources.get(key).map(|resource| &**resource) {
        Some(Resource::Service(object)) => Some(&object.spec),
        _ => None,
    }
}

/// All rules, before the eyes of one flow.
struct Rules<'i> {
    index: &'i Index,
    flow: &'i Flow<'i>,
}

/// A rule as it was written.
struct Written<'i> {
    id: RuleId,
    policy: &'i Key,
    spec: &'i PolicySpec,
    from: &'i From,
}

/// What keeps a rule from matching.
struct Lack {
    /// How far the flow is from being meant: another service is further away than another source.
    distance: u32,
    text: String,
}

impl<'i> Rules<'i> {
    fn matched(&self, rule: RuleId) -> String {
        self.written(rule).map(|written| written.sentence("")).unwrap_or_default()
    }

    fn denied(&self, rule: RuleId) -> Vec<String> {
        let mut reasons = vec![self.matched(rule)];
        let allows = |written: &Written<'_>| !written.spec.dry_run && written.spec.action == Effect::Allow;
        if let Some(other) = self.all().find(|written| allows(written) && self.lacks(written).is_empty()) {
            reasons.push(format!("{}, but a deny beats every allow", other.sentence("")));
        }
        reasons
    }

    /// What dry-run policies would do.
    fn dry_run(&self, decision: Decision) -> Vec<String> {
        let matching: Vec<Written<'_>> =
            self.all().filter(|written| written.spec.dry_run && self.lacks(written).is_empty()).collect();
        let mut reasons = Vec::new();
        for effect in [Effect::Deny, Effect::Allow] {
            if let Some(written) = matching.iter().find(|written| written.spec.action == effect) {
                reasons.push(written.sentence("dry-run "));
            }
        }
        if let Some(other) = self.index.decide_dry_run(self.flow) {
            let (now, then) = if other.allowed() { ("denied", "allowed") } else { ("allowed", "denied") };
            reasons.push(format!("this flow is {now}; if dry-run policies counted it would be {then}"));
        } else if !reasons.is_empty() {
            let verdict = if decision.allowed() { "allowed" } else { "denied" };
            reasons.push(format!("if dry-run policies counted, this flow would still be {verdict}"));
        }
        reasons
    }

    fn nothing_allows(&self) -> String {
        let Flow { destination, port, protocol, .. } = *self.flow;
        let Some(key) = self.workload_key(destination) else {
            return format!("the destination {destination} is no workload of this cluster's configuration");
        };
        let exposing: Vec<String> =
            self.services_of(&key).map(|(service, spec)| format!("{service} on {}", ports(spec))).collect();
        let exposed = self
            .services_of(&key)
            .any(|(_, spec)| spec.ports.iter().any(|known| (known.port, known.protocol) == (port, protocol)));
        if exposing.is_empty() {
            return format!("no service is backed by {key}, so nothing can be allowed to reach it");
        }
        if !exposed {
            return format!("no service has port {port}/{protocol} of {key} (it backs {})", exposing.join("; "));
        }
        let allow_rules = self.all().filter(|written| !written.spec.dry_run && written.spec.action == Effect::Allow);
        let nearest = allow_rules
            .map(|written| (self.lacks(&written), written))
            .min_by_key(|(lacks, written)| (lacks.iter().map(|lack| lack.distance).sum::<u32>(), written.id));
        match nearest {
            None => "no policy allows anything: without policies everything is denied".to_owned(),
            Some((lacks, _)) if lacks.iter().any(|lack| lack.distance >= OTHER_DESTINATION) => {
                format!("no policy allows anyone to reach {key} (it backs {})", exposing.join("; "))
            }
            Some((lacks, written)) => {
                let lacks: Vec<&str> = lacks.iter().map(|lack| lack.text.as_str()).collect();
                format!("the nearest rule: {}, but {}", written.sentence(""), lacks.join(", and "))
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = Written<'i>> {
        (0..self.index.rules.len() as u32).filter_map(|number| self.written(RuleId(number)))
    }

    fn written(&self, id: RuleId) -> Option<Written<'i>> {
        let Rule { policy, from } = self.index.rules.get(id.0 as usize)?;
        match self.index.snapshot.resources.get(policy).map(|resource| &**resource) {
            Some(Resource::Policy(object)) => {
                Some(Written { id, policy, spec: &object.spec, from: object.spec.from.get(*from)? })
            }
            _ => None,
        }
    }

    /// Everything that keeps a rule from matching the flow.
    fn lacks(&self, rule: &Written<'_>) -> Vec<Lack> {
        let mut lacks = self.destination_lacks(rule);
        lacks.extend(self.source_lacks(rule).into_iter().map(|text| Lack { distance: OTHER_SOURCE, text }));
        lacks
    }

    fn destination_lacks(&self, rule: &Written<'_>) -> Vec<Lack> {
        let Flow { destination, port, protocol, .. } = *self.flow;
        let key = Reference::resolve(&rule.spec.to.service, &rule.policy.namespace).key(Kind::Service);
        let shown = who(destination, self.index.identities.domain(), &rule.policy.namespace);
        let Some(spec) = service_spec(self.index, &key).filter(|spec| self.backs(destination, &key, spec)) else {
            let text = format!("{shown}, where this flow goes, does not back that service");
            return vec![Lack { distance: OTHER_DESTINATION, text }];
        };
        let exposed = spec.ports.iter().any(|known| (known.port, known.protocol) == (port, protocol));
        let meant = rule.spec.to.ports.is_empty() || rule.spec.to.ports.contains(&port);
        if exposed && meant {
            return Vec::new();
        }
        vec![Lack { distance: OTHER_PORT, text: format!("this flow goes to port {port}/{protocol}") }]
    }

    fn source_lacks(&self, rule: &Written<'_>) -> Vec<String> {
        let Flow { source, source_address, .. } = *self.flow;
        let Written { from, policy, .. } = rule;
        let mut lacks = Vec::new();
        let shown = who(source, self.index.identities.domain(), &policy.namespace);
        let own = source.is_of(self.index.identities.domain());
        let namespace = match source.subject() {
            Subject::Workload { namespace, .. } if own => Some(namespace),
            _ => None,
        };
        let key = self.workload_key(source);
        let mut named = true;
        if let Some(text) = &from.workload {
            let wanted = Reference::resolve(text, &policy.namespace).key(Kind::Workload);
            named &= key.as_ref() == Some(&wanted);
        }
        if let Some(text) = &from.identity {
            named &= source.as_str() == text;
        }
        if !named {
            lacks.push(format!("this flow's source is {shown}"));
        } else if namespace.is_none() && from.identity.is_none() {
            let what = if own { "no workload" } else { "of a foreign trust domain" };
            lacks.push(format!("this flow's source {source} is {what}: only `identity` can name it"));
        }
        if let Some(text) = &from.service {
            let wanted = Reference::resolve(text, &policy.namespace).key(Kind::Service);
            if !service_spec(self.index, &wanted).is_some_and(|spec| self.backs(source, &wanted, spec)) {
                lacks.push(format!("this flow's source {shown} does not back service {text}"));
            }
        }
        if let Some(wanted) = from.namespace.as_deref().filter(|wanted| namespace != Some(*wanted)) {
            let found = namespace.map_or_else(|| "in none".to_owned(), |namespace| format!("in {namespace}"));
            lacks.push(format!("this flow's source {shown} is not in namespace {wanted} but {found}"));
        }
        if let Some(wanted) = from.node.as_deref().filter(|wanted| self.index.node_of(source_address) != Some(*wanted))
        {
            let whose = match self.index.node_of(source_address) {
                Some(node) => format!("node {node}'s"),
                None => "no node's".to_owned(),
            };
            lacks.push(format!("this flow comes from {source_address}, which is {whose} and not node {wanted}'s"));
        }
        if let Some(cidr) = from.cidr.filter(|cidr| !cidr.contains(&source_address.to_canonical())) {
            lacks.push(format!("this flow comes from {source_address}, which is not in {cidr}"));
        }
        lacks
    }

    /// The configured workload that an identity is.
    fn workload_key(&self, id: &SpiffeId) -> Option<Key> {
        let Subject::Workload { namespace, name } = id.subject() else { return None };
        let key = Reference { namespace, name }.key(Kind::Workload);
        (id.is_of(self.index.identities.domain()) && self.index.snapshot.resources.contains_key(&key)).then_some(key)
    }

    fn services_of(&self, workload: &Key) -> impl Iterator<Item = (&'i Key, &'i ServiceSpec)> {
        let backed = move |key: &Key, spec: &ServiceSpec| {
            spec.workloads.iter().any(|text| {
                let reference = Reference::resolve(text, &key.namespace);
                (reference.namespace, reference.name) == (&*workload.namespace, &*workload.name)
            })
        };
        self.index.snapshot.resources.iter().filter_map(move |(key, resource)| match &**resource {
            Resource::Service(object) if backed(key, &object.spec) => Some((key, &object.spec)),
            _ => None,
        })
    }

    fn backs(&self, id: &SpiffeId, service: &Key, spec: &ServiceSpec) -> bool {
        self.workload_key(id).is_some_and(|workload| {
            spec.workloads.iter().any(|text| {
                let reference = Reference::resolve(text, &service.namespace);
                (reference.namespace, reference.name) == (&*workload.namespace, &*workload.name)
            })
        })
    }
}

const OTHER_SOURCE: u32 = 1;
const OTHER_PORT: u32 = 2;
const OTHER_DESTINATION: u32 = 100;

impl Written<'_> {
    /// `policy default/a-to-echo allows workload a on port 9000 of service echo`
    fn sentence(&self, kind: &str) -> String {
        let verb = match (self.spec.action, self.spec.dry_run) {
            (Effect::Allow, false) => "allows",
            (Effect::Deny, false) => "denies",
            (Effect::Allow, true) => "would allow",
            (Effect::Deny, true) => "would deny",
        };
        let ports: Vec<String> = self.spec.to.ports.iter().map(ToString::to_string).collect();
        let on = match ports.as_slice() {
            [] => "on every port".to_owned(),
            [port] => format!("on port {port}"),
            ports => format!("on ports {}", ports.join(", ")),
        };
        let Key { namespace, name, .. } = self.policy;
        let service = &self.spec.to.service;
        format!("{kind}policy {namespace}/{name} {verb} {} {on} of service {service}", described(self.from))
    }
}

/// A source in words, as it was written.
fn described(from: &From) -> String {
    let mut words = Vec::new();
    words.extend(from.workload.as_ref().map(|text| format!("workload {text}")));
    words.extend(from.identity.as_ref().map(|text| format!("identity {text}")));
    words.extend(from.service.as_ref().map(|text| format!("workloads of service {text}")));
    words.extend(from.namespace.as_ref().map(|text| format!("namespace {text}")));
    words.extend(from.node.as_ref().map(|text| format!("node {text}")));
    words.extend(from.cidr.as_ref().map(|cidr| format!("addresses in {cidr}")));
    words.join(" with ")
}

/// An identity in words, as a policy of this namespace would write it.
fn who(id: &SpiffeId, domain: &crate::spiffe::TrustDomain, own_namespace: &str) -> String {
    match id.subject() {
        _ if !id.is_of(domain) => id.to_string(),
        Subject::Workload { namespace, name } if namespace == own_namespace => format!("workload {name}"),
        Subject::Workload { namespace, name } => format!("workload {namespace}/{name}"),
        Subject::Node { name } => format!("node {name} itself"),
        Subject::Controller { name } => format!("controller {name}"),
        Subject::Operator { name } => format!("operator {name}"),
        Subject::Other => id.to_string(),
    }
}
