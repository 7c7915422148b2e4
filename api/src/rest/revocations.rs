//! Revocations: what is refused everywhere, and how the identities of workloads stand.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Everything that is revoked now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RevocationList {
    /// The version that nodes acknowledge.
    pub version: u64,
    /// By identity.
    pub revocations: Vec<Revocation>,
}

/// One identity, or one key of it, that is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Revocation {
    /// Whose.
    pub spiffe_id: String,
    /// SHA-256 of the public key (SubjectPublicKeyInfo, DER), hexadecimal; absent: every key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Why.
    pub reason: String,
    /// RFC 3339: since when; absent for entries of older controllers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// RFC 3339: when the last certificate for the key has ended and the entry goes; absent: in force until it is lifted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
}

/// Which identity to refuse, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct IdentityRevokeRequest {
    /// A workload's SPIFFE ID of this trust domain. It need not have a Workload any more: certificates outlive resources.
    pub spiffe_id: String,
    /// Only this key of it: SHA-256 of the SubjectPublicKeyInfo, hexadecimal. The workload gets another key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// For the audit trail and the peers' logs.
    pub reason: String,
}

/// How the identities of workloads stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WorkloadStatusList {
    /// In the order of their namespaces and names.
    pub workloads: Vec<WorkloadStatus>,
}

/// How a workload's identity stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WorkloadStatus {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its identity.
    pub spiffe_id: String,
    /// The nodes that may run it.
    pub nodes: Vec<String>,
    /// Active nodes whose proxy holds its identity.
    pub ready_on: Vec<String>,
    /// Why it is revoked with every key; absent: it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<String>,
    /// The keys that have certificates in force.
    pub keys: Vec<WorkloadKey>,
}

/// A key of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WorkloadKey {
    /// SHA-256 of the public key (SubjectPublicKeyInfo, DER), hexadecimal.
    pub key: String,
    /// The node that made it.
    pub node: String,
    /// RFC 3339: when its last certificate ends.
    pub not_after: String,
    /// Why this key is revoked; absent: it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<String>,
}
