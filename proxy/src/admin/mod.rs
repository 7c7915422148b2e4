//! Local administration on a Unix socket: `/metrics` (OpenMetrics), `/healthz`, `/flows` (JSON). Read only.

pub mod metrics;

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::shared::Shared;
use crate::worker::Command;

/// Connections at once.
const CONNECTIONS: usize = 16;
/// For a request's header.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves the socket in the background.
pub fn serve(socket: StdUnixListener, shared: Arc<Shared>, workers: Vec<mpsc::Sender<Command>>) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    let socket = UnixListener::from_std(socket)?;
    let admin = Arc::new(Admin { shared, workers });
    tokio::spawn(accept(socket, admin));
    Ok(())
}

struct Admin {
    shared: Arc<Shared>,
    // Weak would be better only if this outlived the control thread; it does not: both end with the runtime.
    workers: Vec<mpsc::Sender<Command>>,
}

async fn accept(socket: UnixListener, admin: Arc<Admin>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match socket.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the admin socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let admin = Arc::clone(&admin);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&admin), request));
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "admin connection");
            }
            drop(slot);
        });
    }
}

async fn answer(admin: Arc<Admin>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.method() != Method::GET {
        return Ok(text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()));
    }
    Ok(match request.uri().path() {
        "/metrics" => match admin.shared.metrics.encode() {
            Ok(metrics) => {
                respond(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", metrics)
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        "/healthz" => match admin.shared.readiness() {
            Ok(()) => text(StatusCode::OK, "ok\n".to_owned()),
            Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        },
        "/flows" => flows(&admin).await,
        _ => text(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /flows\n".to_owned()),
    })
}

async fn flows(admin: &Admin) -> Response<Full<Bytes>> {
    let mut all = Vec::new();
    for worker in &admin.workers {
        let (reply, answer) = oneshot::channel();
        // A worker that has ended has no flows.
        if worker.send(Command::Flows(reply)).await.is_ok()
            && let Ok(flows) = answer.await
        {
            all.extend(flows);
        }
    }
    match serde_json::to_string(&all) {
        Ok(json) => respond(StatusCode::OK, "application/json", json),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", body)
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
