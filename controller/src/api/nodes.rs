//! Nodes: tokens, revocation, status.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use opencluster_api::rest::{
    NodeStatus, NodeStatusList, Problem, RevokeRequest, RevokeResult, TokenRequest, TokenResult,
};
use opencluster_identity::SpiffeId;
use opencluster_policy::lease::PeerState;
use opencluster_policy::resource::{Key, Kind, Resource};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Context;
use super::auth::{Allowed, Changes, Reads};
use super::extract::{JsonBody, Parameters};
use super::problem::ApiError;
use crate::lease::{clocks, describe};
use crate::state::record::{EnrolmentRecord, Standing};
use crate::state::revocation::Revoked;
use crate::state::{StateError, node_key, timestamp_of};
use crate::store::Table;

/// How long a revocation's answer waits for the nodes to have applied it.
const ACKNOWLEDGEMENTS: Duration = Duration::from_secs(2);

const DEFAULT_TOKEN_TTL: u64 = 900;
const MAX_TOKEN_TTL: u64 = 86_400;
const MAX_REASON: usize = 1024;

/// Makes a one-time enrolment token for a node.
#[utoipa::path(
    post, path = "/v1/nodes/{name}/token", tag = "nodes", params(("name" = String, Path)), request_body = TokenRequest,
    responses(
        (status = 200, body = TokenResult),
        (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 409, body = Problem, description = "too many unused tokens"), (status = 422, body = Problem),
    )
)]
pub(super) async fn token(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Path(node): Path<String>,
    JsonBody(request): JsonBody<TokenRequest>,
) -> Result<Json<TokenResult>, ApiError> {
    let ttl = ttl(request.ttl_s, DEFAULT_TOKEN_TTL, MAX_TOKEN_TTL)?;
    let root = context.authority.root_fingerprint();
    let name = node.clone();
    let token = context
        .state
        .run(move |state| state.create_token(&caller.name, &name, ttl, root).map_err(ApiError::from))
        .await?;
    tracing::info!(event = "token.created", node, "an enrolment token was made");
    Ok(Json(TokenResult { node, token: token.token.to_string(), expires: timestamp_of(token.expires) }))
}

pub(super) fn ttl(asked: Option<u64>, default: u64, most: u64) -> Result<Duration, ApiError> {
    let seconds = asked.unwrap_or(default);
    if (1..=most).contains(&seconds) {
        Ok(Duration::from_secs(seconds))
    } else {
        Err(ApiError::invalid("ttl_s", format!("{seconds} is not between 1 and {most}")))
    }
}

fn reason(text: String) -> Result<String, ApiError> {
    if text.trim().is_empty() || text.len() > MAX_REASON {
        return Err(ApiError::invalid("reason", format!("say why, in at most {MAX_REASON} bytes")));
    }
    Ok(text)
}

/// Takes a node out for good: its identities are refused everywhere. It comes back only by a new enrolment.
#[utoipa::path(
    post, path = "/v1/nodes/{name}/revoke", tag = "nodes", params(("name" = String, Path)), request_body = RevokeRequest,
    responses(
        (status = 200, body = RevokeResult),
        (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 404, body = Problem, description = "no enrolment of this node is in force"), (status = 422, body = Problem),
    )
)]
pub(super) async fn revoke(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Path(node): Path<String>,
    JsonBody(request): JsonBody<RevokeRequest>,
) -> Result<Json<RevokeResult>, ApiError> {
    let reason = reason(request.reason)?;
    let (name, why, registry) = (node.clone(), reason.clone(), context.registry.clone());
    let revoked = context
        .state
        .run(move |state| {
            let revoked = state.end_enrolment(&caller.name, &name, None, Standing::Compromised, &why)?;
            if revoked.is_some() {
                registry.revoke(&name, &why);
            }
            Ok::<_, StateError>(revoked)
        })
        .await?;
    let Some(revoked) = revoked else {
        return Err(ApiError::not_found(format!("Node {node} is not enrolled: there is nothing to revoke")));
    };
    tracing::warn!(event = "node.revoked", node, reason, "an operator revoked a node");
    Ok(Json(acknowledged(&context, revoked).await))
}

/// Refuses a workload's identity everywhere, whatever its key, until it is restored.
#[utoipa::path(
    post, path = "/v1/workloads/{namespace}/{name}/revoke", tag = "nodes",
    params(("namespace" = String, Path), ("name" = String, Path)), request_body = RevokeRequest,
    responses(
        (status = 200, body = RevokeResult),
        (status = 401, body = Problem), (status = 403, body = Problem), (status = 422, body = Problem),
    )
)]
pub(super) async fn revoke_workload(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Path((namespace, name)): Path<(String, String)>,
    JsonBody(request): JsonBody<RevokeRequest>,
) -> Result<Json<RevokeResult>, ApiError> {
    let reason = reason(request.reason)?;
    let id = workload_id(&context, &namespace, &name)?;
    tracing::warn!(event = "workload.revoked", %id, reason, "an operator revoked a workload's identity");
    let revoked = context.state.run(move |state| state.revoke_identity(&caller.name, &id, &reason)).await?;
    Ok(Json(acknowledged(&context, revoked).await))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct RestoreParameters {
    /// Why, for the audit trail.
    reason: String,
}

/// Lifts the revocation of a workload's identity.
#[utoipa::path(
    delete, path = "/v1/workloads/{namespace}/{name}/revoke", tag = "nodes",
    params(RestoreParameters, ("namespace" = String, Path), ("name" = String, Path)),
    responses(
        (status = 200, body = RevokeResult),
        (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 404, body = Problem, description = "it is not revoked"), (status = 422, body = Problem),
    )
)]
pub(super) async fn restore_workload(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Path((namespace, name)): Path<(String, String)>,
    Parameters(parameters): Parameters<RestoreParameters>,
) -> Result<Json<RevokeResult>, ApiError> {
    let reason = reason(parameters.reason)?;
    let id = workload_id(&context, &namespace, &name)?;
    let subject = id.clone();
    let restored = context.state.run(move |state| state.restore_identity(&caller.name, &id, &reason)).await?;
    let restored = restored.ok_or_else(|| ApiError::not_found(format!("{subject} is not revoked")))?;
    tracing::warn!(event = "workload.restored", id = %subject, "an operator lifted a revocation");
    Ok(Json(acknowledged(&context, restored).await))
}

fn workload_id(context: &Context, namespace: &str, name: &str) -> Result<SpiffeId, ApiError> {
    let key = Key { kind: Kind::Workload, namespace: namespace.to_owned(), name: name.to_owned() };
    if !context.state.configuration().snapshot.resources.contains_key(&key) {
        return Err(ApiError::not_found(format!("there is no {}", crate::state::describe(&key))));
    }
    SpiffeId::workload(context.state.domain(), namespace, name)
        .map_err(|error| ApiError::invalid("name", error.to_string()))
}

/// Waits, but not for long, until every node that may carry traffic has applied this version.
async fn acknowledged(context: &Context, revoked: Revoked) -> RevokeResult {
    let mut progress = context.registry.watch_progress();
    let all = async {
        while context.registry.applied_revocations().iter().any(|(_, version)| *version < revoked.version) {
            if progress.changed().await.is_err() {
                return;
            }
        }
    };
    // Whether all of them did in time is what is looked at next.
    drop(tokio::time::timeout(ACKNOWLEDGEMENTS, all).await);
    let (done, pending): (Vec<_>, Vec<_>) =
        context.registry.applied_revocations().into_iter().partition(|(_, version)| *version >= revoked.version);
    let names = |nodes: Vec<(String, u64)>| nodes.into_iter().map(|(node, _)| node).collect();
    RevokeResult {
        version: revoked.version,
        identities: revoked.identities,
        acknowledged: names(done),
        pending: names(pending),
    }
}

/// How every node stands.
#[utoipa::path(
    get, path = "/v1/node-status", tag = "nodes",
    responses((status = 200, body = NodeStatusList), (status = 401, body = Problem))
)]
pub(super) async fn status(
    Allowed { .. }: Allowed<Reads>,
    State(context): State<Context>,
) -> Result<Json<NodeStatusList>, ApiError> {
    let enrolments = context.state.run(|state| state.scan::<EnrolmentRecord>(Table::Enrolments, "")).await?;
    let configuration = context.state.configuration();
    let now = clocks();
    let nodes = configuration
        .snapshot
        .resources
        .range(node_key("")..)
        .map_while(|(_, resource)| match &**resource {
            Resource::Node(node) => Some(node),
            _ => None,
        })
        .map(|node| {
            let name = &node.metadata.name;
            let enrolment = enrolments.iter().find(|(key, ..)| key == name).map(|(_, record, _)| record);
            let mut status = NodeStatus {
                name: name.clone(),
                state: enrolment.map_or("new", |record| record.standing.name()).to_owned(),
                reason: enrolment.map(|record| record.reason.clone()).unwrap_or_default(),
                addresses: node.spec.addresses.iter().map(ToString::to_string).collect(),
                heartbeat_age_ms: None,
                lease_left_ms: 0,
                config_version: 0,
                revocation_version: 0,
                firewall_applied: false,
                proxy_ready: false,
                firewall_repairs: 0,
                proxy_restarts: 0,
                flows: 0,
                workloads_ready: Vec::new(),
            };
            if let Some(peer) = context.registry.status(name, now) {
                (status.state, status.reason) = match peer.state {
                    PeerState::Enrolled => ("enrolling".into(), String::new()),
                    PeerState::Active { .. } => ("active".into(), String::new()),
                    PeerState::Lost(reason) => ("lost".into(), describe(&reason)),
                    PeerState::Compromised(reason) => ("compromised".into(), describe(&reason)),
                    PeerState::Retired => ("retired".into(), status.reason),
                };
                status.heartbeat_age_ms = peer.heartbeat_age_ms;
                status.lease_left_ms = peer.lease_left_ms;
                status.config_version = peer.config_version;
                status.revocation_version = peer.revocation_version;
                status.firewall_applied = peer.health.firewall_applied;
                status.proxy_ready = peer.health.proxy_ready;
                status.firewall_repairs = peer.health.firewall_repairs;
                status.proxy_restarts = peer.health.proxy_restarts;
                status.flows = peer.health.flows;
                status.workloads_ready = peer.health.workloads_ready;
            }
            status
        })
        .collect();
    Ok(Json(NodeStatusList { nodes }))
}
