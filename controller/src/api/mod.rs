//! The policy API: HTTPS for operators.

pub mod auth;
mod explain;
mod extract;
mod nodes;
mod openapi;
mod operators;
mod problem;
mod resources;
mod revocations;
mod status;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{delete, get, post};
use http::StatusCode;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use opencluster_api::rest::path;
use opencluster_identity::UnixTime;
use tokio::sync::watch as channel;
use tower::ServiceExt as _;

use crate::attest::limit::FailureLimit;
use crate::ca::Authority;
use crate::lease::registry::Registry;
use crate::lifetime::LifetimePolicy;
use crate::listen::{Connection, shutting_down};
use crate::state::State;
use problem::ApiError;

pub use openapi::document as openapi_document;

/// How long a client has for the head of a request, also between two requests.
const HEAD: Duration = Duration::from_secs(15);

/// How long a request may take, its body included.
const REQUEST: Duration = Duration::from_secs(30);

/// The largest head.
const HEAD_BYTES: usize = 32 * 1024;

/// The largest body, except of an apply.
const BODY_BYTES: usize = 64 * 1024;

/// The largest body of an apply: what the parser takes.
const APPLY_BYTES: usize = 4 * 1024 * 1024;

/// How long a connection has to finish what it does when the controller ends.
const GRACE: Duration = Duration::from_secs(3);

/// What handlers work with.
#[derive(Clone, Debug)]
pub struct Context {
    /// The state.
    pub state: Arc<State>,
    /// The certificate authority.
    pub authority: Arc<Authority>,
    /// The nodes.
    pub registry: Arc<Registry>,
    /// How long they live.
    pub lifetime: LifetimePolicy,
    /// Requests with bad credentials.
    pub failures: Arc<FailureLimit>,
    /// Becomes true when the controller ends.
    pub shutdown: channel::Receiver<bool>,
}

/// All routes.
pub fn router(context: Context) -> Router {
    Router::new()
        .route(path::APPLY, post(resources::apply).layer(DefaultBodyLimit::max(APPLY_BYTES)))
        .route(path::LIST, get(resources::list))
        .route(path::GLOBAL, get(resources::get_global).delete(resources::delete_global))
        .route(path::NAMESPACED, get(resources::get_namespaced).delete(resources::delete_namespaced))
        .route(path::WATCH, get(watch::watch))
        .route(path::EXPLAIN_FLOW, post(explain::explain_flow))
        .route(path::NODE_TOKEN, post(nodes::token))
        .route(path::NODE_REVOKE, post(nodes::revoke))
        .route(path::WORKLOAD_REVOKE, post(revocations::revoke_workload).delete(revocations::restore_workload))
        .route(path::REVOCATIONS, get(revocations::list).post(revocations::revoke).delete(revocations::lift))
        .route(path::WORKLOAD_STATUS, get(revocations::workloads))
        .route(path::NODE_STATUS, get(nodes::status))
        .route(path::STATUS, get(status::status))
        .route(path::AUDIT, get(status::audit))
        .route(path::WHOAMI, get(status::whoami))
        .route(path::OPERATORS, get(operators::list).post(operators::create))
        .route(path::OPERATOR, delete(operators::end))
        .route(path::OPERATOR_CERTIFICATE, post(operators::certify))
        .route(path::OPENAPI, get(openapi::openapi))
        .route(path::HEALTH, get(status::health))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .layer(axum::middleware::from_fn(in_time))
        .with_state(context)
}

async fn no_route() -> ApiError {
    ApiError::not_found("there is nothing at this path: /openapi.json describes what there is")
}

async fn no_method() -> ApiError {
    let detail = "this path does not take this method: /openapi.json describes which it takes";
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", detail)
}

/// A body that trickles in does not hold a connection for ever. (A watch has answered when its first event comes.)
async fn in_time(request: Request, next: Next) -> Result<Response, ApiError> {
    tokio::time::timeout(REQUEST, next.run(request)).await.map_err(|_| {
        let detail = format!("the request was not complete within {} s", REQUEST.as_secs());
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", detail)
    })
}

/// Serves one connection.
pub async fn serve(connection: Connection, router: Router, mut shutdown: channel::Receiver<bool>) {
    let peer = connection.peer().clone();
    let life = peer
        .identity
        .as_ref()
        .map(|identity| Duration::from_secs(identity.not_after().as_secs().saturating_sub(UnixTime::now().as_secs())));
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        router.clone().oneshot(request.map(axum::body::Body::new))
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(connection), service);
    tokio::pin!(serving);
    let result = tokio::select! {
        result = serving.as_mut() => result,
        () = end_of(life, &mut shutdown) => {
            serving.as_mut().graceful_shutdown();
            match tokio::time::timeout(GRACE, serving).await {
                Ok(result) => result,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = result {
        tracing::debug!(event = "api.connection", %error, "a connection ended with an error");
    }
}

/// A connection ends with the controller, or with the certificate that it was authenticated by.
async fn end_of(life: Option<Duration>, shutdown: &mut channel::Receiver<bool>) {
    match life {
        Some(life) => tokio::select! {
            () = tokio::time::sleep(life) => {}
            () = shutting_down(shutdown) => {}
        },
        None => shutting_down(shutdown).await,
    }
}
