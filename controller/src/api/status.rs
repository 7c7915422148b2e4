//! The controller's own state, the audit trail, and who the caller is.

use axum::Json;
use axum::extract::State;
use opencluster_api::rest::{AuditPage, ClusterStatus, Problem, Whoami};
use opencluster_policy::snapshot::Snapshot;
use serde::Deserialize;
use utoipa::IntoParams;

use super::Context;
use super::auth::{Allowed, Reads};
use super::extract::Parameters;
use super::problem::ApiError;
use crate::audit;
use crate::state::{StateError, resources, timestamp, timestamp_of};

const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1000;

/// The controller's state.
#[utoipa::path(
    get, path = "/v1/status", tag = "cluster",
    responses((status = 200, body = ClusterStatus), (status = 401, body = Problem))
)]
pub(super) async fn status(Allowed { .. }: Allowed<Reads>, State(context): State<Context>) -> Json<ClusterStatus> {
    let configuration = context.state.configuration();
    let snapshot: &Snapshot = &configuration.snapshot;
    let timing = context.registry.timing();
    Json(ClusterStatus {
        trust_domain: context.state.domain().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        store_version: context.state.store().revision(),
        config_version: snapshot.version,
        revocation_version: context.state.revocations().version,
        now: timestamp(time::OffsetDateTime::now_utc()),
        root_expires: timestamp_of(context.authority.root_not_after().as_secs() as i64),
        issuer_expires: timestamp_of(context.authority.issuer_not_after().as_secs() as i64),
        root_fingerprint: context.authority.root_fingerprint().to_string(),
        lease_ms: timing.lease_ms(),
        heartbeat_ms: timing.heartbeat_ms(),
        // It was verified from its start before the controller served, and every event since was added to its head.
        audit_chain_ok: true,
        resources: resources::count(snapshot),
    })
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct AuditParameters {
    /// The first sequence; 1 when absent.
    #[serde(default)]
    from: Option<u64>,
    /// At most so many events; default 100, at most 1000.
    #[serde(default)]
    limit: Option<usize>,
}

/// The audit trail.
#[utoipa::path(
    get, path = "/v1/audit", tag = "cluster", params(AuditParameters),
    responses((status = 200, body = AuditPage), (status = 401, body = Problem), (status = 422, body = Problem))
)]
pub(super) async fn audit(
    Allowed { .. }: Allowed<Reads>,
    State(context): State<Context>,
    Parameters(parameters): Parameters<AuditParameters>,
) -> Result<Json<AuditPage>, ApiError> {
    let from = parameters.from.unwrap_or(1).max(1);
    let limit = parameters.limit.unwrap_or(DEFAULT_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(ApiError::invalid("limit", format!("{limit} is not between 1 and {MAX_PAGE}")));
    }
    let page = context
        .state
        .run(move |state| {
            let events = audit::page(state.store(), from, limit)?;
            let end = events.last().map_or(0, |event| event.sequence);
            let next = (end != 0 && end < state.audit_events()?).then_some(end + 1);
            Ok::<_, StateError>(AuditPage { events, next })
        })
        .await?;
    Ok(Json(page))
}

/// Who the caller is.
#[utoipa::path(
    get, path = "/v1/whoami", tag = "cluster",
    responses((status = 200, body = Whoami), (status = 401, body = Problem))
)]
pub(super) async fn whoami(Allowed { caller, .. }: Allowed<Reads>) -> Json<Whoami> {
    Json(Whoami { name: caller.name, role: caller.role, expires: timestamp_of(caller.expires) })
}

/// Whether the controller serves.
#[utoipa::path(get, path = "/healthz", tag = "cluster", security(()), responses((status = 200, body = String)))]
pub(super) async fn health() -> &'static str {
    "ok\n"
}
