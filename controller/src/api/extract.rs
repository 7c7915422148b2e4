//! Parts of requests, with errors as the API tells them.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use http::StatusCode;
use http::request::Parts;
use serde::de::DeserializeOwned;

use super::Context;
use super::problem::ApiError;

/// The query, strict.
pub(super) struct Parameters<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<Context> for Parameters<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, context: &Context) -> Result<Self, ApiError> {
        let Query(parameters) = Query::<T>::from_request_parts(parts, context).await?;
        Ok(Self(parameters))
    }
}

/// A JSON body, whatever its content type says.
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Context> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, context: &Context) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, context).await?;
        // A body may be left out where nothing in it is needed.
        let bytes = if bytes.is_empty() { b"{}".as_slice() } else { &bytes };
        serde_json::from_slice(bytes).map(Self).map_err(|error| {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", format!("the JSON body: {error}"))
        })
    }
}

/// A text body.
pub(super) struct TextBody(pub(super) String);

impl FromRequest<Context> for TextBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, context: &Context) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, context).await?;
        String::from_utf8(bytes.into()).map(Self).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", format!("the body is not UTF-8 at byte {at}"))
        })
    }
}
