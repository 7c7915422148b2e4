//! Revocations: of workloads' identities and keys; what is revoked; how workloads stand.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use opencluster_api::rest::{
    IdentityRevokeRequest, Problem, Revocation, RevocationList, RevokeRequest, RevokeResult, WorkloadKey,
    WorkloadStatus, WorkloadStatusList,
};
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::{SpiffeId, Subject};
use opencluster_policy::lease::PeerState;
use opencluster_policy::resource::{Key, Kind, Resource};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Context;
use super::auth::{Allowed, Changes, Reads};
use super::extract::{JsonBody, Parameters};
use super::problem::ApiError;
use crate::lease::clocks;
use crate::state::record::IssuedRecord;
use crate::state::revocation::Revoked;
use crate::state::timestamp_of;
use crate::store::Table;

/// How long a revocation's answer waits for the nodes to have applied it.
const ACKNOWLEDGEMENTS: Duration = Duration::from_secs(2);

const MAX_REASON: usize = 1024;

/// Everything that is revoked.
#[utoipa::path(
    get, path = "/v1/revocations", tag = "revocations",
    responses((status = 200, body = RevocationList), (status = 401, body = Problem))
)]
pub(super) async fn list(Allowed { .. }: Allowed<Reads>, State(context): State<Context>) -> Json<RevocationList> {
    let current = context.state.revocations();
    let revocations = current
        .entries()
        .map(|record| Revocation {
            spiffe_id: record.spiffe_id.clone(),
            key: (!record.key.is_empty()).then(|| record.key.clone()),
            reason: record.reason.clone(),
            since: record.since.map(timestamp_of),
            until: record.until.map(timestamp_of),
        })
        .collect();
    Json(RevocationList { version: current.version, revocations })
}

/// Refuses a workload's identity everywhere, or one key of it.
#[utoipa::path(
    post, path = "/v1/revocations", tag = "revocations", request_body = IdentityRevokeRequest,
    responses(
        (status = 200, body = RevokeResult),
        (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 404, body = Problem, description = "no certificate for this key is in force"),
        (status = 422, body = Problem),
    )
)]
pub(super) async fn revoke(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    JsonBody(request): JsonBody<IdentityRevokeRequest>,
) -> Result<Json<RevokeResult>, ApiError> {
    let id = workload(&context, &request.spiffe_id)?;
    let key = match request.key.as_deref() {
        None => None,
        Some(text) => Some(Sha256Digest::from_hex(text).map_err(|error| ApiError::invalid("key", error.to_string()))?),
    };
    revoke_identity(&context, caller.name, id, key, request.reason).await
}

/// Refuses a workload's identity everywhere, whatever its key, until it is restored.
#[utoipa::path(
    post, path = "/v1/workloads/{namespace}/{name}/revoke", tag = "revocations",
    params(("namespace" = String, Path), ("name" = String, Path)), request_body = RevokeRequest,
    responses(
        (status = 200, body = RevokeResult),
        (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 422, body = Problem),
    )
)]
pub(super) async fn revoke_workload(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Path((namespace, name)): Path<(String, String)>,
    JsonBody(request): JsonBody<RevokeRequest>,
) -> Result<Json<RevokeResult>, ApiError> {
    let id = existing_workload(&context, &namespace, &name)?;
    revoke_identity(&context, caller.name, id, None, request.reason).await
}

async fn revoke_identity(
    context: &Context,
    actor: String,
    id: SpiffeId,
    key: Option<Sha256Digest>,
    why: String,
) -> Result<Json<RevokeResult>, ApiError> {
    let why = reason(why)?;
    let (subject, text) = (id.clone(), why.clone());
    let revoked = context.state.run(move |state| state.revoke_identity(&actor, &id, key, &text)).await?;
    let revoked = revoked.ok_or_else(|| {
        let key = key.map(|key| key.to_string()).unwrap_or_default();
        ApiError::not_found(format!("no certificate of {subject} for the key {key} is in force: see its keys"))
    })?;
    let key = key.map_or_else(|| "all".to_owned(), |key| key.to_string());
    tracing::warn!(event = "workload.revoked", id = %subject, key, reason = why, "an operator revoked an identity");
    Ok(Json(acknowledged(context, revoked).await))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct LiftParameters {
    /// The identity.
    spiffe_id: String,
    /// Why, for the audit trail.
    reason: String,
}

/// Lifts the revocation of a workload's identity.
#[utoipa::path(
    delete, path = "/v1/revocations", tag = "revocations", params(LiftParameters),
    responses(
        (status = 200, body = RevokeResult),
        (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 404, body = Problem, description = "it is not revoked"), (status = 422, body = Problem),
    )
)]
pub(super) async fn lift(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Parameters(parameters): Parameters<LiftParameters>,
) -> Result<Json<RevokeResult>, ApiError> {
    let id = workload(&context, &parameters.spiffe_id)?;
    restore(&context, caller.name, id, parameters.reason).await
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct RestoreParameters {
    /// Why, for the audit trail.
    reason: String,
}

/// Lifts the revocation of a workload's identity.
#[utoipa::path(
    delete, path = "/v1/workloads/{namespace}/{name}/revoke", tag = "revocations",
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
    let id = existing_workload(&context, &namespace, &name)?;
    restore(&context, caller.name, id, parameters.reason).await
}

async fn restore(context: &Context, actor: String, id: SpiffeId, why: String) -> Result<Json<RevokeResult>, ApiError> {
    let why = reason(why)?;
    let subject = id.clone();
    let restored = context.state.run(move |state| state.restore_identity(&actor, &id, &why)).await?;
    let restored = restored.ok_or_else(|| ApiError::not_found(format!("{subject} is not revoked")))?;
    tracing::warn!(event = "workload.restored", id = %subject, "an operator lifted a revocation");
    Ok(Json(acknowledged(context, restored).await))
}

/// How the identity of every workload stands: who holds it, with which keys, and what of it is revoked.
#[utoipa::path(
    get, path = "/v1/workload-status", tag = "revocations",
    responses((status = 200, body = WorkloadStatusList), (status = 401, body = Problem))
)]
pub(super) async fn workloads(
    Allowed { .. }: Allowed<Reads>,
    State(context): State<Context>,
) -> Result<Json<WorkloadStatusList>, ApiError> {
    let issued = context.state.run(|state| state.scan::<IssuedRecord>(Table::Issued, "")).await?;
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let mut keys: BTreeMap<String, Vec<IssuedRecord>> = BTreeMap::new();
    for (_, record, _) in issued.into_iter().filter(|(_, record, _)| record.not_after > now) {
        keys.entry(record.spiffe_id.clone()).or_default().push(record);
    }
    let configuration = context.state.configuration();
    let revocations = context.state.revocations();
    let workloads = configuration.snapshot.resources.values().filter_map(|resource| match &**resource {
        Resource::Workload(workload) => Some(workload),
        _ => None,
    });
    let workloads = workloads
        .map(|workload| {
            let (namespace, name) = (&workload.metadata.namespace, &workload.metadata.name);
            let id = SpiffeId::workload(context.state.domain(), namespace, name)
                .map_err(|error| ApiError::invalid("name", error.to_string()))?;
            let keys = keys.remove(id.as_str()).unwrap_or_default().into_iter().map(|record| WorkloadKey {
                revoked: revocations.key_revoked(id.as_str(), &record.key).map(|found| found.reason.clone()),
                not_after: timestamp_of(record.not_after),
                key: record.key,
                node: record.node,
            });
            Ok(WorkloadStatus {
                namespace: namespace.clone(),
                name: name.clone(),
                spiffe_id: id.to_string(),
                nodes: workload.spec.nodes.clone(),
                ready_on: ready_on(&context, &workload.spec.nodes, &id),
                revoked: revocations.identity_revoked(&id).map(|found| found.reason.clone()),
                keys: keys.collect(),
            })
        })
        .collect::<Result<_, ApiError>>()?;
    Ok(Json(WorkloadStatusList { workloads }))
}

fn ready_on(context: &Context, nodes: &[String], id: &SpiffeId) -> Vec<String> {
    let now = clocks();
    let holds = |node: &&String| {
        context.registry.status(node, now).is_some_and(|peer| {
            let active = matches!(peer.state, PeerState::Active { .. });
            active && peer.health.proxy_ready && peer.health.workloads_ready.iter().any(|ready| ready == id.as_str())
        })
    };
    nodes.iter().filter(holds).cloned().collect()
}

/// A workload's identity in this trust domain, whether or not there is a Workload (any more).
fn workload(context: &Context, text: &str) -> Result<SpiffeId, ApiError> {
    let invalid = |message: String| Err(ApiError::invalid("spiffe_id", message));
    let id = match SpiffeId::parse(text) {
        Ok(id) => id,
        Err(error) => return invalid(error.to_string()),
    };
    if !id.is_of(context.state.domain()) {
        return invalid(format!("{id} is not of this trust domain, {}", context.state.domain()));
    }
    match id.subject() {
        Subject::Workload { .. } => Ok(id),
        Subject::Node { name } => invalid(format!("{id} is a node: revoke the node {name}")),
        _ => invalid(format!("{id} is no workload")),
    }
}

fn existing_workload(context: &Context, namespace: &str, name: &str) -> Result<SpiffeId, ApiError> {
    let key = Key { kind: Kind::Workload, namespace: namespace.to_owned(), name: name.to_owned() };
    if !context.state.configuration().snapshot.resources.contains_key(&key) {
        return Err(ApiError::not_found(format!(
            "there is no {}; one that was deleted is revoked by its SPIFFE ID",
            crate::state::describe(&key)
        )));
    }
    SpiffeId::workload(context.state.domain(), namespace, name)
        .map_err(|error| ApiError::invalid("name", error.to_string()))
}

pub(super) fn reason(text: String) -> Result<String, ApiError> {
    if text.trim().is_empty() || text.len() > MAX_REASON {
        return Err(ApiError::invalid("reason", format!("say why, in at most {MAX_REASON} bytes")));
    }
    Ok(text)
}

/// Waits, but not for long, until every node that may carry traffic has applied this version.
pub(super) async fn acknowledged(context: &Context, revoked: Revoked) -> RevokeResult {
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
