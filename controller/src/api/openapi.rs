//! The API's description of itself.

use axum::Json;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{explain, nodes, operators, resources, revocations, status, watch};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Opencluster policy API",
        description = "Resources, enrolment, revocation and audit of an Opencluster cluster. Every error is a `Problem` (RFC 9457).",
    ),
    paths(
        resources::apply, resources::list, resources::get_global, resources::get_namespaced,
        resources::delete_global, resources::delete_namespaced, watch::watch,
        explain::explain_flow,
        nodes::token, nodes::revoke, nodes::status,
        revocations::list, revocations::revoke, revocations::lift, revocations::workloads,
        revocations::revoke_workload, revocations::restore_workload,
        status::status, status::audit, status::whoami, status::health,
        operators::create, operators::certify, operators::list, operators::end,
        openapi,
    ),
    security(("token" = []), ("certificate" = [])),
    modifiers(&Schemes),
)]
struct Description;

struct Schemes;

impl Modify for Schemes {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        let mut bearer = Http::new(HttpAuthScheme::Bearer);
        bearer.description = Some("A token from `POST /v1/operators` or `opencluster-controller init`.".into());
        components.add_security_scheme("token", SecurityScheme::Http(bearer));
        components.add_security_scheme(
            "certificate",
            SecurityScheme::MutualTls {
                description: Some("A client certificate from `POST /v1/operators/{name}/certificate`.".into()),
                extensions: None,
            },
        );
    }
}

/// OpenAPI 3.1.
pub fn document() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "cluster", security(()), responses((status = 200, body = serde_json::Value)))]
pub(super) async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}
