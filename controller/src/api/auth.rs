//! Who calls, and what they may do.
//!
//! A caller shows a bearer token (`ocb1.ID.SECRET`) or a client certificate. Both are looked up in the store at every
//! request, so ending a credential ends it at once. A token that is shown must be good, whatever certificate is shown too.

use std::marker::PhantomData;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::request::Parts;
use http::{StatusCode, header};
use opencluster_api::rest::Role;
use opencluster_identity::Subject;
use opencluster_identity::digest::Sha256Digest;
use serde_json::json;
use zeroize::Zeroizing;

use super::Context;
use super::problem::ApiError;
use crate::attest::{RandomError, new_id, new_secret, secret_matches};
use crate::listen::Peer;
use crate::state::record::OperatorRecord;
use crate::state::{State, StateError, timestamp_of};
use crate::store::Table;

const PREFIX: &str = "ocb1";

/// An authenticated caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// As in the audit trail.
    pub name: String,
    /// What they may do.
    pub role: Role,
    /// When the credentials end, Unix seconds.
    pub expires: i64,
}

/// A request's least role.
pub trait Least {
    /// It.
    const ROLE: Role;
}

/// Viewers and above.
pub struct Reads;
/// Operators and above.
pub struct Changes;
/// Administrators.
pub struct Administers;

impl Least for Reads {
    const ROLE: Role = Role::Viewer;
}
impl Least for Changes {
    const ROLE: Role = Role::Operator;
}
impl Least for Administers {
    const ROLE: Role = Role::Admin;
}

/// Proof that the caller is authenticated and has at least the role `L`. A handler that takes it cannot be called otherwise.
pub struct Allowed<L> {
    /// Who.
    pub caller: Caller,
    least: PhantomData<L>,
}

impl<L: Least> FromRequestParts<Context> for Allowed<L> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, context: &Context) -> Result<Self, ApiError> {
        let peer = parts.extensions.get::<Peer>().cloned();
        let source = peer.as_ref().and_then(|peer| peer.address).map(|address| address.ip());
        let caller = authenticate(context, parts, peer).await?;
        let Some(caller) = caller else { return Err(bad_credentials(context, source)) };
        if caller.role < L::ROLE {
            let detail =
                format!("{} has the role {}, this needs {}", caller.name, role_name(caller.role), role_name(L::ROLE));
            return Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", detail));
        }
        Ok(Self { caller, least: PhantomData })
    }
}

/// The caller; `None`: the credentials are not, or no longer, good.
async fn authenticate(context: &Context, parts: &Parts, peer: Option<Peer>) -> Result<Option<Caller>, ApiError> {
    if let Some(value) = parts.headers.get(header::AUTHORIZATION) {
        let value = Zeroizing::new(value.as_bytes().to_vec());
        return Ok(context.state.run(move |state| by_token(state, &value)).await?);
    }
    let Some(identity) = peer.and_then(|peer| peer.identity) else {
        let detail = "send Authorization: Bearer TOKEN, or connect with a client certificate";
        return Err(ApiError::new(StatusCode::UNAUTHORIZED, "unauthenticated", detail));
    };
    let Subject::Operator { name } = identity.id().subject() else {
        let detail = format!("{} is not an operator's identity", identity.id());
        return Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", detail));
    };
    let (name, key) = (name.to_owned(), *identity.spki_sha256());
    Ok(context.state.run(move |state| by_certificate(state, &name, key)).await?)
}

/// Secrets of 256 bits are not guessed; the limit is for the log. So it stops nobody whose credentials are good, and
/// nobody can lock out those who share an address with them.
fn bad_credentials(context: &Context, source: Option<IpAddr>) -> ApiError {
    let now = Instant::now();
    // Who may connect to the Unix socket may do worse than fill the log.
    if source.is_some_and(|source| !context.failures.permits(source, now)) {
        let detail = "too many requests with bad credentials from this address: wait a minute";
        return ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too-many-failures", detail);
    }
    if let Some(source) = source {
        context.failures.failed(source, now);
    }
    tracing::warn!(event = "api.unauthenticated", ?source, "a request with bad credentials");
    let detail = "the credentials are unknown, ended or expired: ask an administrator for new ones";
    ApiError::new(StatusCode::UNAUTHORIZED, "unauthenticated", detail)
}

fn by_token(state: &State, header: &[u8]) -> Result<Option<Caller>, StateError> {
    let Some((id, secret)) = split_header(header) else { return Ok(None) };
    let Some((record, _)) = state.get::<OperatorRecord>(Table::Operators, &token_key(id))? else { return Ok(None) };
    Ok(if secret_matches(&secret, &record.hash) { in_time(record) } else { None })
}

/// `Bearer ocb1.ID.SECRET`
fn split_header(header: &[u8]) -> Option<(&str, Zeroizing<Vec<u8>>)> {
    let (scheme, token) = std::str::from_utf8(header).ok()?.split_once(' ')?;
    let (prefix, rest) = token.trim().split_once('.')?;
    let (id, secret) = rest.split_once('.')?;
    let well_formed = scheme.eq_ignore_ascii_case("bearer")
        && prefix == PREFIX
        && (1..=64).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let secret = Zeroizing::new(URL_SAFE_NO_PAD.decode(secret).ok()?);
    well_formed.then_some((id, secret))
}

fn by_certificate(state: &State, name: &str, key: Sha256Digest) -> Result<Option<Caller>, StateError> {
    let record = state.get::<OperatorRecord>(Table::Operators, &certificate_key(&key.to_string()))?;
    Ok(record.filter(|(record, _)| record.name == name).and_then(|(record, _)| in_time(record)))
}

fn in_time(record: OperatorRecord) -> Option<Caller> {
    (record.expires > time::OffsetDateTime::now_utc().unix_timestamp()).then_some(Caller {
        name: record.name,
        role: record.role,
        expires: record.expires,
    })
}

fn token_key(id: &str) -> String {
    format!("token/{id}")
}

pub(super) fn certificate_key(key: &str) -> String {
    format!("certificate/{key}")
}

/// As operators write it.
pub(super) fn role_name(role: Role) -> &'static str {
    match role {
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Admin => "admin",
    }
}

/// Why no credential was made.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
}

impl From<CredentialError> for ApiError {
    fn from(error: CredentialError) -> Self {
        match error {
            CredentialError::State(error) => error.into(),
            CredentialError::Random(error) => error.into(),
        }
    }
}

/// Makes a bearer token and records it; the token, to be shown once, and when it expires.
pub fn create_token(
    state: &State,
    actor: &str,
    name: &str,
    role: Role,
    ttl: Duration,
) -> Result<(Zeroizing<String>, i64), CredentialError> {
    let secret = new_secret()?;
    let id = new_id()?;
    let mut writer = state.write()?;
    let expires = writer.now().unix_timestamp().saturating_add_unsigned(ttl.as_secs());
    let hash = Sha256Digest::of(secret.as_slice()).to_string();
    writer.put(Table::Operators, token_key(&id), &OperatorRecord { name: name.to_owned(), role, hash, expires })?;
    let after = json!({"role": role, "kind": "token", "id": id, "expires": timestamp_of(expires)});
    writer.audit(actor, "operator.create", format!("operator {name}"), None, Some(after));
    writer.commit()?;
    let text = Zeroizing::new(URL_SAFE_NO_PAD.encode(secret.as_slice()));
    Ok((Zeroizing::new(format!("{PREFIX}.{id}.{}", *text)), expires))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_well_formed_header_is_split() {
        let secret = URL_SAFE_NO_PAD.encode([7; 32]);
        let header = format!("bearer ocb1.0123abcd.{secret}");
        let (id, found) = split_header(header.as_bytes()).expect("well formed");
        assert_eq!((id, found.as_slice()), ("0123abcd", [7; 32].as_slice()));
        for wrong in [
            format!("Basic ocb1.0123abcd.{secret}"),
            format!("Bearer oct1.0123abcd.{secret}"),
            format!("Bearer ocb1.../.{secret}"),
            format!("Bearer ocb1..{secret}"),
            "Bearer ocb1.0123abcd".to_owned(),
            "Bearer ocb1.0123abcd.!".to_owned(),
        ] {
            assert!(split_header(wrong.as_bytes()).is_none(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_taken_or_left(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some((id, _)) = split_header(&bytes) {
                prop_assert!(id.bytes().all(|byte| byte.is_ascii_hexdigit()));
            }
        }

        #[test]
        fn a_header_that_nearly_is_one_is_taken_or_left(text in "[Bb]earer ocb1[.]{0,2}[0-9a-f/]{0,8}[.]{0,2}[A-Za-z0-9_=-]{0,50}") {
            if let Some((id, _)) = split_header(text.as_bytes()) {
                prop_assert!(!id.is_empty() && !id.contains('/'));
            }
        }
    }
}
