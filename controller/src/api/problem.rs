//! Errors as the API tells them: `application/problem+json`.

use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use opencluster_api::rest::{FieldProblem, Problem};
use opencluster_policy::resource::Faults;

use crate::attest::{RandomError, TokenError};
use crate::state::resources::ChangeError;
use crate::state::{StateError, describe};

/// What a handler fails with.
#[derive(Debug)]
pub struct ApiError(Box<Problem>);

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &str, detail: impl Into<String>) -> Self {
        Self(Box::new(Problem {
            code: code.to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            fields: Vec::new(),
            current: None,
        }))
    }

    pub(super) fn invalid(field: &str, message: impl Into<String>) -> Self {
        let message = message.into();
        let mut error = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", format!("{field}: {message}"));
        error.0.fields.push(FieldProblem { document: 0, field: field.to_owned(), line: 0, column: 0, message });
        error
    }

    pub(super) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }

    pub(super) fn with_current(mut self, current: Option<serde_json::Value>) -> Self {
        self.0.current = current;
        self
    }

    fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(event = "api.internal", %error, "a request failed for a reason of our own");
        let detail = "the controller could not do this: its log says why (event api.internal)";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        // A status that was made from a StatusCode is one.
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.0)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<StateError> for ApiError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::ShuttingDown => Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting-down", error.to_string()),
            error => Self::internal(&error),
        }
    }
}

impl From<RandomError> for ApiError {
    fn from(error: RandomError) -> Self {
        Self::internal(&error)
    }
}

impl From<Faults> for ApiError {
    fn from(faults: Faults) -> Self {
        let detail = match faults.0.as_slice() {
            [fault] => fault.to_string(),
            several => format!("{} faults, nothing was changed", several.len()),
        };
        let mut error = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", detail);
        error.0.fields = faults
            .0
            .into_iter()
            .map(|fault| FieldProblem {
                document: fault.document,
                field: fault.field,
                line: fault.line,
                column: fault.column,
                message: fault.message,
            })
            .collect();
        error
    }
}

impl From<ChangeError> for ApiError {
    fn from(error: ChangeError) -> Self {
        let detail = error.to_string();
        match error {
            ChangeError::State(error) => error.into(),
            ChangeError::Invalid(faults) => faults.into(),
            ChangeError::Conflict { .. } | ChangeError::Exists { .. } => {
                Self::new(StatusCode::CONFLICT, "conflict", detail)
            }
            ChangeError::Referenced { .. } => Self::new(StatusCode::CONFLICT, "in-use", detail),
            ChangeError::NotFound(key) => Self::not_found(format!("there is no {}", describe(&key))),
        }
    }
}

impl From<TokenError> for ApiError {
    fn from(error: TokenError) -> Self {
        let detail = error.to_string();
        match error {
            TokenError::State(error) => error.into(),
            TokenError::Random(error) => error.into(),
            TokenError::NoNode(_) => Self::not_found(detail),
            TokenError::TooMany { .. } => Self::new(StatusCode::CONFLICT, "too-many-tokens", detail),
        }
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "too-large",
                "the body is larger than this request may have: split it",
            ),
            status => Self::new(status, "unreadable", rejection.body_text()),
        }
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid-query", rejection.body_text())
    }
}
