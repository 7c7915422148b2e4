//! Operators' credentials. Administrators only.

use axum::Json;
use axum::extract::{Path, State};
use opencluster_api::rest::{
    OperatorCertificate, OperatorCertificateRequest, OperatorCredential, OperatorList, OperatorRequest, OperatorResult,
    Problem,
};
use opencluster_identity::{SpiffeId, UnixTime};
use serde_json::json;

use super::Context;
use super::auth::{Administers, Allowed, certificate_key, create_token};
use super::extract::JsonBody;
use super::nodes::ttl;
use super::problem::ApiError;
use crate::state::record::OperatorRecord;
use crate::state::{StateError, timestamp_of};
use crate::store::Table;

const DEFAULT_TTL: u64 = 28_800;
const MAX_TTL: u64 = 2_592_000;

/// The largest CSR, in PEM.
const MAX_CSR: usize = 16 * 1024;

/// Makes a bearer token for an operator.
#[utoipa::path(
    post, path = "/v1/operators", tag = "operators", request_body = OperatorRequest,
    responses((status = 200, body = OperatorResult), (status = 401, body = Problem), (status = 403, body = Problem), (status = 422, body = Problem))
)]
pub(super) async fn create(
    Allowed { caller, .. }: Allowed<Administers>,
    State(context): State<Context>,
    JsonBody(request): JsonBody<OperatorRequest>,
) -> Result<Json<OperatorResult>, ApiError> {
    let ttl = ttl(request.ttl_s, DEFAULT_TTL, MAX_TTL)?;
    identity(&context, &request.name)?;
    let OperatorRequest { name, role, .. } = request;
    let subject = name.clone();
    let (token, expires) = context
        .state
        .run(move |state| create_token(state, &caller.name, &subject, role, ttl).map_err(ApiError::from))
        .await?;
    Ok(Json(OperatorResult { name, role, token: token.to_string(), expires: timestamp_of(expires) }))
}

/// Makes a client certificate for an operator.
#[utoipa::path(
    post, path = "/v1/operators/{name}/certificate", tag = "operators", params(("name" = String, Path)),
    request_body = OperatorCertificateRequest,
    responses((status = 200, body = OperatorCertificate), (status = 401, body = Problem), (status = 403, body = Problem), (status = 422, body = Problem))
)]
pub(super) async fn certify(
    Allowed { caller, .. }: Allowed<Administers>,
    State(context): State<Context>,
    Path(name): Path<String>,
    JsonBody(request): JsonBody<OperatorCertificateRequest>,
) -> Result<Json<OperatorCertificate>, ApiError> {
    let ttl = ttl(request.ttl_s, DEFAULT_TTL, MAX_TTL)?;
    let id = identity(&context, &name)?;
    let role = request.role;
    let csr = csr_of(&request.csr_pem)?;
    let issued = context
        .authority
        .issue(&csr, &id, ttl, UnixTime::now())
        .map_err(|error| ApiError::invalid("csr_pem", error.to_string()))?;
    let record = OperatorRecord {
        name: name.clone(),
        role,
        hash: issued.spki_sha256.to_string(),
        expires: issued.not_after.as_secs() as i64,
    };
    let expires = timestamp_of(record.expires);
    let known = context
        .state
        .run(move |state| {
            let key = certificate_key(&record.hash);
            let mut writer = state.write()?;
            if state.get::<OperatorRecord>(Table::Operators, &key)?.is_some_and(|(known, _)| known.name != record.name) {
                return Ok(true);
            }
            writer.put(Table::Operators, key, &record)?;
            let after = json!({"role": role, "kind": "certificate", "key": record.hash, "expires": timestamp_of(record.expires)});
            writer.audit(&caller.name, "operator.create", format!("operator {}", record.name), None, Some(after));
            writer.commit()?;
            Ok::<_, StateError>(false)
        })
        .await?;
    if known {
        return Err(ApiError::invalid("csr_pem", "another operator has this key: make a new one"));
    }
    let certificate_pem = issued.chain.iter().map(|der| pem_of(der)).collect();
    Ok(Json(OperatorCertificate { name, role, certificate_pem, expires }))
}

/// All credentials that are in force.
#[utoipa::path(
    get, path = "/v1/operators", tag = "operators",
    responses((status = 200, body = OperatorList), (status = 401, body = Problem), (status = 403, body = Problem))
)]
pub(super) async fn list(
    Allowed { .. }: Allowed<Administers>,
    State(context): State<Context>,
) -> Result<Json<OperatorList>, ApiError> {
    let records = context.state.run(|state| state.scan::<OperatorRecord>(Table::Operators, "")).await?;
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    Ok(Json(shown(records.iter().filter(|(_, record, _)| record.expires > now))))
}

/// Ends all credentials of an operator, at once.
#[utoipa::path(
    delete, path = "/v1/operators/{name}", tag = "operators", params(("name" = String, Path)),
    responses((status = 200, body = OperatorList), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem))
)]
pub(super) async fn end(
    Allowed { caller, .. }: Allowed<Administers>,
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Result<Json<OperatorList>, ApiError> {
    let subject = name.clone();
    let ended = context
        .state
        .run(move |state| {
            let mut writer = state.write()?;
            let mut records = state.scan::<OperatorRecord>(Table::Operators, "")?;
            records.retain(|(_, record, _)| record.name == subject);
            if records.is_empty() {
                return Ok(None);
            }
            for (key, ..) in &records {
                writer.delete(Table::Operators, key.clone());
            }
            let before = json!({"credentials": records.len()});
            writer.audit(&caller.name, "operator.end", format!("operator {subject}"), Some(before), None);
            writer.commit()?;
            Ok::<_, StateError>(Some(shown(records.iter())))
        })
        .await?;
    ended.map(Json).ok_or_else(|| ApiError::not_found(format!("operator {name} has no credentials")))
}

fn shown<'a>(records: impl Iterator<Item = &'a (String, OperatorRecord, u64)>) -> OperatorList {
    let mut credentials: Vec<OperatorCredential> = records
        .map(|(key, record, _)| OperatorCredential {
            name: record.name.clone(),
            role: record.role,
            kind: key.split('/').next().unwrap_or_default().to_owned(),
            expires: timestamp_of(record.expires),
        })
        .collect();
    credentials.sort_by(|left, right| (&left.name, &left.expires).cmp(&(&right.name, &right.expires)));
    OperatorList { credentials }
}

/// Operators have names that an identity can have.
fn identity(context: &Context, name: &str) -> Result<SpiffeId, ApiError> {
    SpiffeId::operator(context.state.domain(), name).map_err(|error| ApiError::invalid("name", error.to_string()))
}

fn csr_of(pem: &str) -> Result<Vec<u8>, ApiError> {
    use rustls::pki_types::CertificateSigningRequestDer;
    use rustls::pki_types::pem::PemObject as _;
    if pem.len() > MAX_CSR {
        return Err(ApiError::invalid("csr_pem", format!("larger than {MAX_CSR} bytes")));
    }
    CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
        .map(|der| der.as_ref().to_vec())
        .map_err(|error| ApiError::invalid("csr_pem", format!("expected a PEM block CERTIFICATE REQUEST: {error}")))
}

fn pem_of(der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}
