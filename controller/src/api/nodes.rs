//! Nodes: tokens, revocation, status. (Revocations of workloads are in `revocations`.)

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use opencluster_api::rest::{
    NodeStatus, NodeStatusList, Problem, RevokeRequest, RevokeResult, TokenRequest, TokenResult,
};
use opencluster_policy::lease::PeerState;
use opencluster_policy::resource::Resource;

use super::Context;
use super::auth::{Allowed, Changes, Reads};
use super::extract::JsonBody;
use super::problem::ApiError;
use super::revocations::{acknowledged, reason};
use crate::lease::clocks;
use crate::lease::ends::Recorded;
use crate::state::record::EnrolmentRecord;
use crate::state::revocation::Revoked;
use crate::state::{node_key, timestamp_of};
use crate::store::Table;

const DEFAULT_TOKEN_TTL: u64 = 900;
const MAX_TOKEN_TTL: u64 = 86_400;

/// How long an answer waits for a node's end to be stored.
const STORED: Duration = Duration::from_secs(2);

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

/// Takes a node out for good: its identities are refused everywhere. It comes back only by a new enrolment.
#[utoipa::path(
    post, path = "/v1/nodes/{name}/revoke", tag = "nodes", params(("name" = String, Path)), request_body = RevokeRequest,
    responses(
        (status = 200, body = RevokeResult),
        (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 404, body = Problem, description = "no enrolment of this node is in force"), (status = 422, body = Problem),
        (status = 503, body = Problem, description = "it is out, but that could not be stored yet: this is tried again"),
    )
)]
pub(super) async fn revoke(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Path(node): Path<String>,
    JsonBody(request): JsonBody<RevokeRequest>,
) -> Result<Json<RevokeResult>, ApiError> {
    let reason = reason(request.reason)?;
    // The node is out now, whatever the store does; that is stored and announced by whoever does so for all ends.
    let recorded = context.registry.revoke(&node, &caller.name, &reason, clocks());
    let Some(recorded) = recorded else {
        return Err(ApiError::not_found(format!("Node {node} is not enrolled: there is nothing to revoke")));
    };
    tracing::warn!(event = "node.revoked", node, reason, "an operator revoked a node");
    let revoked = stored(&node, recorded).await?;
    Ok(Json(acknowledged(&context, revoked).await))
}

/// What was revoked with a node that is out, once that is stored.
pub(super) async fn stored(node: &str, recorded: Recorded) -> Result<Revoked, ApiError> {
    match tokio::time::timeout(STORED, recorded).await {
        Ok(Ok(revoked)) => Ok(revoked),
        Ok(Err(_)) | Err(_) => Err(ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "not-stored",
            format!(
                "Node {node} is out and gets no lease any more, but that its identities are revoked could not be stored yet: \
                 it is tried until it can be, and nobody's lease is renewed before (see the controller's log)"
            ),
        )),
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
                age_left_ms: None,
                cordoned: false,
                heartbeat_age_ms: None,
                heartbeats: 0,
                lease_left_ms: 0,
                config_version: 0,
                revocation_version: 0,
                firewall_applied: false,
                generation_watched: false,
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
                    PeerState::Lost(reason) => ("lost".into(), reason.to_string()),
                    PeerState::Compromised(reason) => ("compromised".into(), reason.to_string()),
                    PeerState::Retired(reason) => ("retired".into(), reason.to_string()),
                };
                if let Some(life) = &peer.life {
                    let left = context.lifetime.left(life, node.spec.max_age, now.boottime);
                    status.age_left_ms = Some(u64::try_from(left.time.as_millis()).unwrap_or(u64::MAX));
                    status.cordoned = left.cordoned;
                }
                status.heartbeat_age_ms = peer.heartbeat_age_ms;
                status.heartbeats = peer.heartbeats;
                status.lease_left_ms = peer.lease_left_ms;
                status.config_version = peer.config_version;
                status.revocation_version = peer.revocation_version;
                status.firewall_applied = peer.health.firewall_applied;
                status.proxy_ready = peer.health.proxy_ready;
                status.firewall_repairs = peer.health.firewall_repairs;
                status.proxy_restarts = peer.health.proxy_restarts;
                status.flows = peer.health.flows;
                status.generation_watched = peer.health.generation_watched;
                status.workloads_ready = peer.health.workloads_ready;
            }
            status
        })
        .collect();
    Ok(Json(NodeStatusList { nodes }))
}
