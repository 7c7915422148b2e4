//! The nodes' port: HTTP/2 with two gRPC services on connections that [`listen`](crate::listen) accepted.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use opencluster_api::control::control_server::{ControlServer, SERVICE_NAME as CONTROL};
use opencluster_api::control::enrolment_server::{EnrolmentServer, SERVICE_NAME as ENROLMENT};
use opencluster_api::control::{MAX_MESSAGE_FROM_NODE, MAX_MESSAGE_TO_NODE};
use tokio::sync::{Notify, watch};
use tonic::Status;
use tonic::body::Body;
use tower::Service as _;

use crate::attest::service::EnrolmentService;
use crate::lease::service::ControlService;
use crate::listen::{Connection, shutting_down};

/// An enrolment's request: a name, a token, a CSR.
const MAX_ENROLMENT: usize = 16 * 1024;

/// How often a silent connection is asked whether it lives, and how long it has to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Calls that a connection may make together: a node makes one, and one more when it severs itself.
const STREAMS: u32 = 8;

/// The largest request headers.
const HEADERS: u32 = 16 * 1024;

/// How long a connection has to end when the controller ends it: sessions take leave of their nodes.
const GRACE: Duration = Duration::from_secs(2);

/// Both services.
#[derive(Clone, Debug)]
pub struct Services {
    enrolment: EnrolmentServer<EnrolmentService>,
    control: ControlServer<ControlService>,
}

impl Services {
    /// With limits on their messages.
    pub fn new(enrolment: EnrolmentService, control: ControlService) -> Self {
        Self {
            enrolment: EnrolmentServer::new(enrolment).max_decoding_message_size(MAX_ENROLMENT),
            control: ControlServer::new(control)
                .max_decoding_message_size(MAX_MESSAGE_FROM_NODE)
                .max_encoding_message_size(MAX_MESSAGE_TO_NODE),
        }
    }

    async fn call(mut self, request: Request<Body>) -> Result<Response<Body>, Infallible> {
        // `/package.Service/Method`
        match request.uri().path().split('/').nth(1) {
            Some(ENROLMENT) => self.enrolment.call(request).await,
            Some(CONTROL) => self.control.call(request).await,
            _ => Ok(Status::unimplemented("no such service").into_http()),
        }
    }
}

/// Ends the connection that a request came on. A peer that reads nothing does not notice the end of a stream.
#[derive(Clone, Debug, Default)]
pub struct HangUp(Arc<Notify>);

impl HangUp {
    /// What is on its way has [`GRACE`] to arrive.
    pub fn now(&self) {
        self.0.notify_one();
    }
}

/// Serves one connection to its end.
pub async fn serve(connection: Connection, services: Services, mut shutdown: watch::Receiver<bool>) {
    let peer = connection.peer().clone();
    let hang_up = HangUp::default();
    let hung_up = hang_up.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        request.extensions_mut().insert(hang_up.clone());
        services.clone().call(request.map(Body::new))
    });
    let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADERS)
        .serve_connection(TokioIo::new(connection), service);
    tokio::pin!(serving);
    let ended = tokio::select! {
        result = serving.as_mut() => Some(result),
        () = shutting_down(&mut shutdown) => None,
        () = hung_up.0.notified() => None,
    };
    let result = if let Some(result) = ended {
        result
    } else {
        serving.as_mut().graceful_shutdown();
        match tokio::time::timeout(GRACE, serving).await {
            Ok(result) => result,
            Err(_) => return,
        }
    };
    if let Err(error) = result {
        tracing::debug!(event = "nodes.connection", %error, "a connection ended with an error");
    }
}
