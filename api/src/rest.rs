//! The types of the policy API (HTTPS, JSON). Paths are in [`path`]; the API describes itself at `/openapi.json`.

mod revocations;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use revocations::{
    IdentityRevokeRequest, Revocation, RevocationList, WorkloadKey, WorkloadStatus, WorkloadStatusList,
};

/// The paths of the API, relative to its base URL. `{kind}` is a plural in lower case: `nodes`, `services`,
/// `workloads`, `policies`.
pub mod path {
    /// `GET ?namespace=`: an [`super::ObjectList`].
    pub const LIST: &str = "/v1/{kind}";
    /// `GET`, `DELETE ?resource_version=`: one resource (kinds with a namespace).
    pub const NAMESPACED: &str = "/v1/{kind}/{namespace}/{name}";
    /// `GET`, `DELETE ?resource_version=`: one resource (kinds without a namespace).
    pub const GLOBAL: &str = "/v1/{kind}/{name}";
    /// `POST` (YAML or JSON documents, `?dry_run=true`): an [`super::ApplyResult`]. All or nothing.
    pub const APPLY: &str = "/v1/apply";
    /// `GET ?from=VERSION`: server-sent events, each an [`super::WatchEvent`].
    pub const WATCH: &str = "/v1/watch";
    /// `POST` [`super::ExplainRequest`]: an [`super::ExplainResult`].
    pub const EXPLAIN_FLOW: &str = "/v1/explain/flow";
    /// `POST` [`super::TokenRequest`]: a [`super::TokenResult`].
    pub const NODE_TOKEN: &str = "/v1/nodes/{name}/token";
    /// `POST` [`super::RevokeRequest`]: a [`super::RevokeResult`].
    pub const NODE_REVOKE: &str = "/v1/nodes/{name}/revoke";
    /// `POST` [`super::RevokeRequest`]: a [`super::RevokeResult`]. In force until it is lifted: `DELETE ?reason=`.
    pub const WORKLOAD_REVOKE: &str = "/v1/workloads/{namespace}/{name}/revoke";
    /// `GET`: a [`super::RevocationList`]; `POST` [`super::IdentityRevokeRequest`]: a [`super::RevokeResult`]. That
    /// of an identity is in force until it is lifted (`DELETE ?spiffe_id=&reason=`), that of a key for good.
    pub const REVOCATIONS: &str = "/v1/revocations";
    /// `GET`: a [`super::WorkloadStatusList`].
    pub const WORKLOAD_STATUS: &str = "/v1/workload-status";
    /// `GET`: a [`super::NodeStatusList`].
    pub const NODE_STATUS: &str = "/v1/node-status";
    /// `GET`: a [`super::ClusterStatus`].
    pub const STATUS: &str = "/v1/status";
    /// `GET ?from=SEQUENCE&limit=`: an [`super::AuditPage`].
    pub const AUDIT: &str = "/v1/audit";
    /// `POST` [`super::OperatorRequest`]: an [`super::OperatorResult`]; `GET`: an [`super::OperatorList`]. Administrators
    /// only.
    pub const OPERATORS: &str = "/v1/operators";
    /// `DELETE`: ends all credentials of an operator, a [`super::OperatorList`] of what was ended. Administrators only.
    pub const OPERATOR: &str = "/v1/operators/{name}";
    /// `POST` [`super::OperatorCertificateRequest`]: an [`super::OperatorCertificate`]. Administrators only.
    pub const OPERATOR_CERTIFICATE: &str = "/v1/operators/{name}/certificate";
    /// `GET`: a [`super::Whoami`].
    pub const WHOAMI: &str = "/v1/whoami";
    /// The description of this API, OpenAPI 3.1. No credentials needed.
    pub const OPENAPI: &str = "/openapi.json";
    /// `GET`: 200 when the controller serves. No credentials needed.
    pub const HEALTH: &str = "/healthz";
}

/// What an operator may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads.
    Viewer,
    /// Reads and changes resources, enrols and revokes.
    Operator,
    /// Everything, operators included.
    Admin,
}

/// Who the caller is, by the credentials of this very request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Whoami {
    /// As in the audit trail.
    pub name: String,
    /// What they may do.
    pub role: Role,
    /// RFC 3339: when the credentials end.
    pub expires: String,
}

/// Every error of the API (RFC 9457, `application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Stable and machine readable: `invalid`, `unauthenticated`, `forbidden`, `not-found`, `conflict`, `too-large`, …
    pub code: String,
    /// The HTTP status.
    pub status: u16,
    /// What is wrong and what to do, for people.
    pub detail: String,
    /// Where exactly, one for each fault found.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldProblem>,
    /// For `conflict`: the resource as it is now; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub current: Option<serde_json::Value>,
}

/// One fault in a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldProblem {
    /// Which of several documents, from 0.
    pub document: usize,
    /// For example `spec.ports[0].port`.
    pub field: String,
    /// From 1; 0 where unknown.
    pub line: usize,
    /// From 1; 0 where unknown.
    pub column: usize,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Resources in their canonical JSON form, `metadata.resourceVersion` set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ObjectList {
    /// The store's version that this list was read at: watch from here.
    pub version: u64,
    /// The resources.
    #[schema(value_type = Vec<Object>)]
    pub items: Vec<serde_json::Value>,
}

/// What an apply did, or would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApplyResult {
    /// Nothing was changed.
    pub dry_run: bool,
    /// The store's version afterwards.
    pub version: u64,
    /// In the order of the documents.
    pub changes: Vec<Change>,
}

/// What happened to one resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    /// For example `Policy`.
    pub kind: String,
    /// Empty for kinds without a namespace.
    pub namespace: String,
    /// The resource's name.
    pub name: String,
    /// created, updated, unchanged or deleted.
    pub action: Action,
}

/// See [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It was not there.
    Created,
    /// It was there and differed.
    Updated,
    /// It was there already, the same.
    Unchanged,
    /// It is gone.
    Deleted,
}

/// One change, as watched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WatchEvent {
    /// The store's version after this change.
    pub version: u64,
    /// What happened to what.
    pub change: Change,
    /// The resource afterwards; absent when deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub object: Option<serde_json::Value>,
}

/// Which flow to explain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExplainRequest {
    /// A workload (`name`, `namespace/name`) or a SPIFFE ID.
    pub from: String,
    /// `SERVICE:PORT` or `NAMESPACE/SERVICE:PORT`.
    pub to: String,
}

/// Why a flow is allowed or denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExplainResult {
    /// The verdict.
    pub allowed: bool,
    /// The source's SPIFFE ID.
    pub from: String,
    /// The service, as `namespace/name:port`.
    pub to: String,
    /// The workloads that back it (SPIFFE IDs).
    pub backends: Vec<String>,
    /// The policy and rule that decided, for example `default/a-to-echo, from[0]`; empty for the default.
    pub rule: String,
    /// The whole story for people, one sentence a line: what decided, or the nearest rule and what it lacked.
    pub reasons: Vec<String>,
}

/// For whom a token is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// Seconds until it expires; default 900, at most 86,400.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
}

/// A one-time enrolment token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenResult {
    /// The node that it is bound to.
    pub node: String,
    /// `oct1.NODE.SECRET.FINGERPRINT`: shown once, stored hashed. The fingerprint is the SHA-256 of the root certificate.
    pub token: String,
    /// RFC 3339.
    pub expires: String,
}

impl std::fmt::Debug for TokenResult {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("TokenResult").field("node", &self.node).finish_non_exhaustive()
    }
}

/// Why something is revoked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RevokeRequest {
    /// For the audit trail and the peers' logs.
    pub reason: String,
}

/// How far a revocation has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RevokeResult {
    /// The revocation set's version that holds it.
    pub version: u64,
    /// The identities that are refused from now on.
    pub identities: Vec<String>,
    /// Nodes that applied it.
    pub acknowledged: Vec<String>,
    /// Nodes that did not within the request's time.
    pub pending: Vec<String>,
}

/// All nodes' states.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatusList {
    /// In the order of their names.
    pub nodes: Vec<NodeStatus>,
}

/// One node's state as the controller sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// The node's name.
    pub name: String,
    /// `new` (never enrolled), `enrolling`, `active`, `lost`, `compromised` or `retired`.
    pub state: String,
    /// Why, where the state has a reason.
    pub reason: String,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// Milliseconds until the end of its life, when it is retired; absent without an enrolment in force, or without an end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_left_ms: Option<u64>,
    /// The end of its life is near: it takes no new flows and no new work.
    #[serde(default)]
    pub cordoned: bool,
    /// Milliseconds since its last heartbeat; absent before the first.
    pub heartbeat_age_ms: Option<u64>,
    /// Heartbeats that were granted since it enrolled.
    #[serde(default)]
    pub heartbeats: u64,
    /// Milliseconds of lease left; 0 when it ran out.
    pub lease_left_ms: u64,
    /// The configuration version that it has applied.
    pub config_version: u64,
    /// The revocation version that it has applied.
    pub revocation_version: u64,
    /// Its firewall is in force.
    pub firewall_applied: bool,
    /// Its proxy serves.
    pub proxy_ready: bool,
    /// Firewall repairs since it started.
    pub firewall_repairs: u64,
    /// Proxy restarts since it started.
    pub proxy_restarts: u64,
    /// Live flows.
    pub flows: u64,
    /// Workloads (SPIFFE IDs) with an SVID installed.
    pub workloads_ready: Vec<String>,
    /// A change of its machine's generation (VMGENID) would be seen.
    #[serde(default)]
    pub generation_watched: bool,
}

/// The controller's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterStatus {
    /// The trust domain.
    pub trust_domain: String,
    /// The program's version.
    pub version: String,
    /// The store's version.
    pub store_version: u64,
    /// The configuration version that nodes should have.
    pub config_version: u64,
    /// The revocation version that nodes should have.
    pub revocation_version: u64,
    /// RFC 3339: the controller's clock.
    pub now: String,
    /// RFC 3339: when the root certificate ends.
    pub root_expires: String,
    /// RFC 3339: when the issuing certificate ends.
    pub issuer_expires: String,
    /// SHA-256 of the root certificate, hexadecimal.
    pub root_fingerprint: String,
    /// The lease that is granted.
    pub lease_ms: u32,
    /// How often nodes send heartbeats.
    pub heartbeat_ms: u32,
    /// The audit chain was verified from its start.
    pub audit_chain_ok: bool,
    /// Resources by kind.
    pub resources: std::collections::BTreeMap<String, usize>,
}

/// Part of the audit trail.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditPage {
    /// In order.
    pub events: Vec<AuditEvent>,
    /// The next `from`; absent at the end.
    pub next: Option<u64>,
}

/// One audit event. `hash` is the SHA-256 over the previous hash and this event's canonical JSON without `hash`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AuditEvent {
    /// From 1, without gaps.
    pub sequence: u64,
    /// RFC 3339.
    pub time: String,
    /// The operator, or `controller`, or a node.
    pub actor: String,
    /// For example `apply`, `delete`, `node.enrol`, `node.revoke`, `token.create`.
    pub action: String,
    /// For example `Policy default/a-to-echo`.
    pub subject: String,
    /// Before, where there was something.
    #[schema(value_type = Option<Object>)]
    pub before: Option<serde_json::Value>,
    /// After, where there is something.
    #[schema(value_type = Option<Object>)]
    pub after: Option<serde_json::Value>,
    /// Hexadecimal; of zeros for the first.
    pub previous: String,
    /// Hexadecimal.
    pub hash: String,
}

/// Makes an operator's bearer token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OperatorRequest {
    /// Who.
    pub name: String,
    /// What they may do.
    pub role: Role,
    /// Seconds until the token expires; default 28,800, at most 2,592,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
}

/// A new bearer token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperatorResult {
    /// Who.
    pub name: String,
    /// What they may do.
    pub role: Role,
    /// Shown once, stored hashed.
    pub token: String,
    /// RFC 3339.
    pub expires: String,
}

impl std::fmt::Debug for OperatorResult {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("OperatorResult").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Makes an operator's client certificate. Its identity is `spiffe://<trust-domain>/operator/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OperatorCertificateRequest {
    /// What they may do.
    pub role: Role,
    /// PKCS#10 in PEM, made where the key lives; its one SAN is the operator's SPIFFE ID.
    pub csr_pem: String,
    /// Seconds until it expires; default 28,800, at most 2,592,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
}

/// A new client certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperatorCertificate {
    /// Who.
    pub name: String,
    /// What they may do.
    pub role: Role,
    /// The chain in PEM, leaf first.
    pub certificate_pem: String,
    /// RFC 3339.
    pub expires: String,
}

/// Operators' credentials.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperatorList {
    /// In the order of their names.
    pub credentials: Vec<OperatorCredential>,
}

/// One credential. What it takes to use it is not stored, so it is not shown either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperatorCredential {
    /// Who.
    pub name: String,
    /// What they may do.
    pub role: Role,
    /// `token` or `certificate`.
    pub kind: String,
    /// RFC 3339.
    pub expires: String,
}
