//! Why a flow is allowed or denied.

use std::net::IpAddr;

use axum::Json;
use axum::extract::State;
use opencluster_api::rest::{ExplainRequest, ExplainResult, Problem};
use opencluster_identity::{SpiffeId, Subject, TrustDomain};
use opencluster_policy::index::Flow;
use opencluster_policy::resource::{Key, Kind, Protocol, Resource};
use opencluster_policy::snapshot::Snapshot;

use super::Context;
use super::auth::{Allowed, Reads};
use super::extract::JsonBody;
use super::problem::ApiError;
use crate::state::{describe, node_key};

/// Explains a flow: the same compiled policies decide it as at the nodes.
#[utoipa::path(
    post, path = "/v1/explain/flow", tag = "policy", request_body = ExplainRequest,
    responses(
        (status = 200, body = ExplainResult),
        (status = 401, body = Problem), (status = 404, body = Problem), (status = 422, body = Problem),
    )
)]
pub(super) async fn explain_flow(
    Allowed { .. }: Allowed<Reads>,
    State(context): State<Context>,
    JsonBody(request): JsonBody<ExplainRequest>,
) -> Result<Json<ExplainResult>, ApiError> {
    let configuration = context.state.configuration();
    let (snapshot, index) = (&configuration.snapshot, &configuration.index);
    let source = source(context.state.domain(), &request.from)?;
    let target = Target::parse(&request.to)?;
    let protocol = target.protocol_in(snapshot)?;
    let backends = index.backends(&target.namespace, &target.service, target.port);
    let mut result = ExplainResult {
        allowed: false,
        from: source.to_string(),
        to: format!("{}/{}:{}", target.namespace, target.service, target.port),
        backends: backends.iter().map(ToString::to_string).collect(),
        rule: String::new(),
        reasons: Vec::new(),
    };
    if backends.is_empty() {
        result.reasons.push("no workload backs this service: there is nothing to connect to".into());
        return Ok(Json(result));
    }
    let addresses = addresses_of(snapshot, &source);
    if addresses.is_empty() {
        result.reasons.push(format!(
            "no Workload resource places {source} on a node: it is judged as if it came from nowhere, so rules by node or address do not match it"
        ));
    }
    // Every combination that a real flow could have; the answer is about all of them.
    let unknown = [IpAddr::from([0_u16; 8])];
    let addresses = if addresses.is_empty() { &unknown[..] } else { &addresses };
    let (mut all, mut any) = (true, false);
    for destination in &backends {
        for &source_address in addresses {
            let flow = Flow { source: &source, source_address, destination, port: target.port, protocol };
            let explanation = index.explain(&flow);
            let allowed = explanation.decision.allowed();
            (all, any) = (all && allowed, any || allowed);
            if let Some((policy, position)) = explanation.rule
                && result.rule.is_empty()
            {
                result.rule = format!("{}/{}, from[{position}]", policy.namespace, policy.name);
            }
            for reason in explanation.reasons {
                if !result.reasons.contains(&reason) {
                    result.reasons.push(reason);
                }
            }
        }
    }
    if any && !all {
        let reason = "some of the service's workloads, or of the source's nodes, are allowed and others are not: the flow is not allowed in every case";
        result.reasons.push(reason.into());
    }
    result.allowed = all;
    Ok(Json(result))
}

fn source(domain: &TrustDomain, text: &str) -> Result<SpiffeId, ApiError> {
    let id = if text.contains("://") {
        SpiffeId::parse(text)
    } else {
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        SpiffeId::workload(domain, namespace, name)
    };
    id.map_err(|error| {
        ApiError::invalid("from", format!("{error}: give a workload (NAME or NAMESPACE/NAME) or a SPIFFE ID"))
    })
}

/// `SERVICE:PORT` or `NAMESPACE/SERVICE:PORT`
struct Target {
    namespace: String,
    service: String,
    port: u16,
}

impl Target {
    fn parse(text: &str) -> Result<Self, ApiError> {
        let wrong = || ApiError::invalid("to", format!("\"{text}\" is not SERVICE:PORT or NAMESPACE/SERVICE:PORT"));
        let (service, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
        let (namespace, service) = service.split_once('/').unwrap_or(("default", service));
        Ok(Self { namespace: namespace.to_owned(), service: service.to_owned(), port })
    }

    fn protocol_in(&self, snapshot: &Snapshot) -> Result<Protocol, ApiError> {
        let key = Key { kind: Kind::Service, namespace: self.namespace.clone(), name: self.service.clone() };
        let Some(Resource::Service(service)) = snapshot.resources.get(&key).map(|resource| &**resource) else {
            return Err(ApiError::not_found(format!("there is no {}", describe(&key))));
        };
        service.spec.ports.iter().find(|port| port.port == self.port).map(|port| port.protocol).ok_or_else(|| {
            let ports: Vec<String> = service.spec.ports.iter().map(|port| port.port.to_string()).collect();
            ApiError::not_found(format!("{} has no port {}: it has {}", describe(&key), self.port, ports.join(", ")))
        })
    }
}

/// The addresses of the nodes that may run a workload of ours.
fn addresses_of(snapshot: &Snapshot, id: &SpiffeId) -> Vec<IpAddr> {
    let Subject::Workload { namespace, name } = id.subject() else { return Vec::new() };
    let key = Key { kind: Kind::Workload, namespace: namespace.to_owned(), name: name.to_owned() };
    let Some(Resource::Workload(workload)) = snapshot.resources.get(&key).map(|resource| &**resource) else {
        return Vec::new();
    };
    workload
        .spec
        .nodes
        .iter()
        .filter_map(|node| match snapshot.resources.get(&node_key(node)).map(|resource| &**resource) {
            Some(Resource::Node(node)) => Some(node.spec.addresses.iter().copied()),
            _ => None,
        })
        .flatten()
        .collect()
}
