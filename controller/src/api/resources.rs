//! Resources: apply, list, get, delete.

use axum::Json;
use axum::extract::{Path, State};
use opencluster_api::rest::{ApplyResult, ObjectList, Problem};
use opencluster_policy::resource::{Key, Kind, Resource};
use serde::Deserialize;
use utoipa::IntoParams;

use super::Context;
use super::auth::{Allowed, Changes, Reads};
use super::extract::{Parameters, TextBody};
use super::nodes::stored;
use super::problem::ApiError;
use crate::lease::clocks;
use crate::state::resources::ChangeError;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct ApplyParameters {
    /// Only say what would happen.
    #[serde(default)]
    dry_run: bool,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct ListParameters {
    /// Only of this namespace.
    #[serde(default)]
    namespace: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct DeleteParameters {
    /// Only if the resource has this version.
    #[serde(default)]
    resource_version: Option<u64>,
}

/// Applies documents: all of them or none.
#[utoipa::path(
    post, path = "/v1/apply", tag = "resources", params(ApplyParameters),
    request_body(content = String, content_type = "application/yaml", description = "YAML or JSON documents separated by `---`"),
    responses(
        (status = 200, body = ApplyResult),
        (status = 401, body = Problem), (status = 403, body = Problem),
        (status = 409, body = Problem, description = "a resource was changed meanwhile; `current` is what it is now"),
        (status = 413, body = Problem),
        (status = 422, body = Problem, description = "faults, each with its document, field, line and column"),
    )
)]
pub(super) async fn apply(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Parameters(parameters): Parameters<ApplyParameters>,
    TextBody(text): TextBody,
) -> Result<Json<ApplyResult>, ApiError> {
    let result = context
        .state
        .run(move |state| {
            let documents = Resource::parse_documents(&text)?;
            state
                .apply(&caller.name, documents, parameters.dry_run)
                .map_err(|error| with_current(error, &state.configuration().snapshot))
        })
        .await?;
    if !result.dry_run {
        tracing::info!(event = "api.applied", version = result.version, documents = result.changes.len(), "applied");
    }
    Ok(Json(result))
}

/// All resources of a kind.
#[utoipa::path(
    get, path = "/v1/{kind}", tag = "resources", params(ListParameters, ("kind" = String, Path, description = "nodes, workloads, services or policies")),
    responses(
        (status = 200, body = ObjectList),
        (status = 401, body = Problem), (status = 404, body = Problem),
    )
)]
pub(super) async fn list(
    Allowed { .. }: Allowed<Reads>,
    State(context): State<Context>,
    Path(kind): Path<String>,
    Parameters(parameters): Parameters<ListParameters>,
) -> Result<Json<ObjectList>, ApiError> {
    let kind = kind_of(&kind)?;
    let configuration = context.state.configuration();
    let items = configuration
        .snapshot
        .resources
        .iter()
        .filter(|(key, _)| key.kind == kind)
        .filter(|(key, _)| parameters.namespace.as_ref().is_none_or(|namespace| key.namespace == *namespace))
        .map(|(_, resource)| resource.to_json())
        .collect();
    Ok(Json(ObjectList { version: configuration.snapshot.version, items }))
}

/// One resource of a kind without namespaces.
#[utoipa::path(
    get, path = "/v1/{kind}/{name}", tag = "resources",
    params(("kind" = String, Path, description = "nodes"), ("name" = String, Path)),
    responses((status = 200, body = serde_json::Value), (status = 401, body = Problem), (status = 404, body = Problem))
)]
pub(super) async fn get_global(
    Allowed { .. }: Allowed<Reads>,
    State(context): State<Context>,
    Path((kind, name)): Path<(String, String)>,
) -> Result<Json<serde_json::Value>, ApiError> {
    get(&context, &key_of(&kind, None, name)?)
}

/// One resource.
#[utoipa::path(
    get, path = "/v1/{kind}/{namespace}/{name}", tag = "resources",
    params(("kind" = String, Path, description = "workloads, services or policies"), ("namespace" = String, Path), ("name" = String, Path)),
    responses((status = 200, body = serde_json::Value), (status = 401, body = Problem), (status = 404, body = Problem))
)]
pub(super) async fn get_namespaced(
    Allowed { .. }: Allowed<Reads>,
    State(context): State<Context>,
    Path((kind, namespace, name)): Path<(String, String, String)>,
) -> Result<Json<serde_json::Value>, ApiError> {
    get(&context, &key_of(&kind, Some(namespace), name)?)
}

/// Deletes a resource of a kind without namespaces. A node that is deleted is taken out of service.
#[utoipa::path(
    delete, path = "/v1/{kind}/{name}", tag = "resources",
    params(DeleteParameters, ("kind" = String, Path, description = "nodes"), ("name" = String, Path)),
    responses(
        (status = 200, body = ApplyResult),
        (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 409, body = Problem, description = "others need it, or it was changed meanwhile"),
    )
)]
pub(super) async fn delete_global(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Path((kind, name)): Path<(String, String)>,
    Parameters(parameters): Parameters<DeleteParameters>,
) -> Result<Json<ApplyResult>, ApiError> {
    delete(context, caller.name, key_of(&kind, None, name)?, parameters).await
}

/// Deletes a resource.
#[utoipa::path(
    delete, path = "/v1/{kind}/{namespace}/{name}", tag = "resources",
    params(DeleteParameters, ("kind" = String, Path, description = "workloads, services or policies"), ("namespace" = String, Path), ("name" = String, Path)),
    responses(
        (status = 200, body = ApplyResult),
        (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 409, body = Problem, description = "others need it, or it was changed meanwhile"),
    )
)]
pub(super) async fn delete_namespaced(
    Allowed { caller, .. }: Allowed<Changes>,
    State(context): State<Context>,
    Path((kind, namespace, name)): Path<(String, String, String)>,
    Parameters(parameters): Parameters<DeleteParameters>,
) -> Result<Json<ApplyResult>, ApiError> {
    delete(context, caller.name, key_of(&kind, Some(namespace), name)?, parameters).await
}

fn get(context: &Context, key: &Key) -> Result<Json<serde_json::Value>, ApiError> {
    let configuration = context.state.configuration();
    let resource = configuration.snapshot.resources.get(key).ok_or_else(|| ChangeError::NotFound(key.clone()))?;
    Ok(Json(resource.to_json()))
}

async fn delete(
    context: Context,
    actor: String,
    key: Key,
    parameters: DeleteParameters,
) -> Result<Json<ApplyResult>, ApiError> {
    let registry = context.registry.clone();
    let (result, retired) = context
        .state
        .run(move |state| {
            let result = state
                .delete(&actor, &key, parameters.resource_version)
                .map_err(|error| with_current(error, &state.configuration().snapshot))?;
            let retired = (key.kind == Kind::Node)
                .then(|| registry.retire(&key.name, &actor, "its Node resource was deleted", clocks()))
                .flatten();
            Ok::<_, ApiError>((result, retired.map(|recorded| (key.name, recorded))))
        })
        .await?;
    if let Some((node, recorded)) = retired {
        stored(&node, recorded).await?;
    }
    Ok(Json(result))
}

fn with_current(error: ChangeError, snapshot: &opencluster_policy::snapshot::Snapshot) -> ApiError {
    let current = match &error {
        ChangeError::Conflict { key, .. } | ChangeError::Exists { key, .. } => {
            snapshot.resources.get(key).map(|resource| resource.to_json())
        }
        _ => None,
    };
    ApiError::from(error).with_current(current)
}

fn kind_of(text: &str) -> Result<Kind, ApiError> {
    Kind::ALL.into_iter().find(|kind| kind.plural() == text).ok_or_else(|| {
        let kinds = Kind::ALL.map(Kind::plural).join(", ");
        ApiError::not_found(format!("there is no kind \"{text}\": the kinds are {kinds}"))
    })
}

fn key_of(kind: &str, namespace: Option<String>, name: String) -> Result<Key, ApiError> {
    let kind = kind_of(kind)?;
    if kind.namespaced() != namespace.is_some() {
        let right = if kind.namespaced() { "NAMESPACE/NAME" } else { "NAME" };
        return Err(ApiError::not_found(format!("{} are found at /v1/{}/{right}", kind.plural(), kind.plural())));
    }
    Ok(Key { kind, namespace: namespace.unwrap_or_default(), name })
}
