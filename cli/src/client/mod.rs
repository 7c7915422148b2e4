//! The policy API's client: typed requests over one verified connection.

pub(crate) mod answer;
mod connect;
mod events;
pub(crate) mod settings;

use std::io;
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Method, Request, Response};
use opencluster_identity::SpiffeId;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use self::answer::AnswerError;
pub(crate) use self::connect::ConnectError;
pub(crate) use self::events::Events;
pub(crate) use self::settings::Settings;
use crate::error::CliError;

/// No answer of the controller is larger: an audit page or a list of ten thousand resources fits.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// A connection to a controller whose identity was verified.
pub(crate) struct Client {
    settings: Settings,
    peer: SpiffeId,
    sender: SendRequest<Full<Bytes>>,
}

/// Why a request had no usable answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// There is no connection that can be trusted.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection broke.
    #[error("the connection to {server} broke: {source}")]
    Http {
        /// Where to.
        server: String,
        /// How.
        source: hyper::Error,
    },
    /// No answer in time.
    #[error("{server} did not answer within {} s", timeout.as_secs_f32())]
    Timeout {
        /// Where to.
        server: String,
        /// How long it had.
        timeout: Duration,
    },
    /// More than any answer has.
    #[error("{server} answered with more than {MAX_ANSWER} bytes")]
    TooLarge {
        /// Where to.
        server: String,
    },
    /// The answer makes no sense.
    #[error("{server}: {source}")]
    Answer {
        /// Where to.
        server: String,
        /// What about it.
        source: AnswerError,
    },
}

impl ClientError {
    /// For programs.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Connect(error) => error.code(),
            Self::Http { .. } => "connection-lost",
            Self::Timeout { .. } => "timeout",
            Self::TooLarge { .. } | Self::Answer { .. } => "bad-answer",
        }
    }

    /// What to do.
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Connect(error) => error.hint(),
            Self::Http { .. } => {
                "a change may or may not have been made: look (opencluster get, audit list)".to_owned()
            }
            Self::Timeout { .. } => {
                "give it more time with --timeout 60s; a change may have been made all the same: look".to_owned()
            }
            Self::TooLarge { .. } | Self::Answer { .. } => {
                "is this the policy API of an Opencluster controller, and of this version (opencluster version)?"
                    .to_owned()
            }
        }
    }
}

impl Client {
    /// Connects and verifies the controller.
    pub(crate) async fn connect(settings: Settings) -> Result<Self, ClientError> {
        let connected = tokio::time::timeout(settings.timeout, connect::connect(&settings)).await;
        let (peer, stream) = connected.unwrap_or_else(|_| Err(ConnectError::timeout(&settings)))?;
        let server = settings.server.to_string();
        let (sender, connection) = hyper::client::conn::http1::handshake(stream)
            .await
            .map_err(|source| ClientError::Http { server: server.clone(), source })?;
        // The connection's own errors reach the request that is waiting on it.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { settings, peer, sender })
    }

    /// The controller's verified identity.
    pub(crate) fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// Where it is connected to, and as whom.
    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Reads.
    pub(crate) async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, CliError> {
        self.exchange(Method::GET, path, None, Bytes::new()).await
    }

    /// Asks for something to be done.
    pub(crate) async fn post<B: Serialize, T: DeserializeOwned>(
        &mut self,
        path: &str,
        body: &B,
    ) -> Result<T, CliError> {
        let body = serde_json::to_vec(body).map_err(|error| CliError::Output(error.into()))?;
        self.exchange(Method::POST, path, Some("application/json"), body.into()).await
    }

    /// Sends documents.
    pub(crate) async fn post_documents<T: DeserializeOwned>(&mut self, path: &str, text: &str) -> Result<T, CliError> {
        self.exchange(Method::POST, path, Some("application/yaml"), Bytes::copy_from_slice(text.as_bytes())).await
    }

    /// Deletes.
    pub(crate) async fn delete<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, CliError> {
        self.exchange(Method::DELETE, path, None, Bytes::new()).await
    }

    /// Server-sent events, until the server ends them.
    pub(crate) async fn events(&mut self, path: &str) -> Result<Events, CliError> {
        let response = self.send(Method::GET, path, None, Bytes::new()).await?;
        if response.status().is_success() {
            return Ok(Events::new(response.into_body(), self.settings.server.to_string()));
        }
        let status = response.status();
        let body = self.collect(response.into_body()).await?;
        // Whatever a failed answer holds, it is no stream.
        let problem = answer::problem(status, &body).map_err(|source| self.bad_answer(source))?;
        Err(CliError::Refused(problem))
    }

    async fn exchange<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Bytes,
    ) -> Result<T, CliError> {
        let timeout = self.settings.timeout;
        let answered = tokio::time::timeout(timeout, async {
            let response = self.send(method, path, content_type, body).await?;
            let status = response.status();
            Ok::<_, ClientError>((status, self.collect(response.into_body()).await?))
        })
        .await;
        let (status, body) = answered
            .unwrap_or_else(|_| Err(ClientError::Timeout { server: self.settings.server.to_string(), timeout }))?;
        if status.is_success() {
            return Ok(answer::decode(&body).map_err(|source| self.bad_answer(source))?);
        }
        Err(CliError::Refused(answer::problem(status, &body).map_err(|source| self.bad_answer(source))?))
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.settings.server.authority())
            .header(USER_AGENT, concat!("opencluster/", env!("CARGO_PKG_VERSION")))
            .header(ACCEPT, "application/json, application/problem+json, text/event-stream");
        if let Some(content_type) = content_type {
            request = request.header(CONTENT_TYPE, content_type);
        }
        if let Some(token) = &self.settings.token {
            request = request.header(AUTHORIZATION, token.header());
        }
        let request = request.body(Full::new(body)).map_err(|error| self.bad_answer(AnswerError::Request(error)))?;
        let server = self.settings.server.to_string();
        self.sender.ready().await.map_err(|source| ClientError::Http { server: server.clone(), source })?;
        self.sender.send_request(request).await.map_err(|source| ClientError::Http { server, source })
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, ClientError> {
        let server = self.settings.server.to_string();
        match Limited::new(body, MAX_ANSWER).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) => match error.downcast::<hyper::Error>() {
                Ok(source) => Err(ClientError::Http { server, source: *source }),
                Err(error) if error.is::<LengthLimitError>() => Err(ClientError::TooLarge { server }),
                Err(error) => Err(self.bad_answer(AnswerError::Body(io::Error::other(error)))),
            },
        }
    }

    fn bad_answer(&self, source: AnswerError) -> ClientError {
        ClientError::Answer { server: self.settings.server.to_string(), source }
    }
}
