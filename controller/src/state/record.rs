//! What is stored, as JSON, beside the resources.

use opencluster_api::rest::Role;
use serde::{Deserialize, Serialize};

/// An enrolment token. The token itself is never stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRecord {
    /// The node that it is bound to.
    pub node: String,
    /// SHA-256 of the secret, hexadecimal.
    pub hash: String,
    /// Unix seconds.
    pub expires: i64,
}

/// A node's enrolment: the latest one only, whatever became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolmentRecord {
    /// Tells it from other enrolments of the node.
    pub id: String,
    /// The node.
    pub node: String,
    /// The boot that enrolled.
    pub boot_id: String,
    /// The boots of all enrolments of this node before: each cost an operator's token.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier_boots: Vec<String>,
    /// RFC 3339.
    pub enrolled: String,
    /// What became of it.
    pub standing: Standing,
    /// Why, where there is a reason.
    #[serde(default)]
    pub reason: String,
}

impl EnrolmentRecord {
    /// Every boot that enrolled as this node up to now.
    pub fn boots(&self) -> Vec<String> {
        self.earlier_boots.iter().chain([&self.boot_id]).cloned().collect()
    }
}

/// What became of an enrolment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// In force.
    Active,
    /// Its lease ran out.
    Lost,
    /// It was found out, or revoked.
    Compromised,
    /// Taken out of service.
    Retired,
}

impl Standing {
    /// As in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Lost => "lost",
            Self::Compromised => "compromised",
            Self::Retired => "retired",
        }
    }
}

/// A key that a certificate was issued for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IssuedRecord {
    /// The node whose session asked for it.
    pub node: String,
    /// The identity.
    pub spiffe_id: String,
    /// SHA-256 of the SubjectPublicKeyInfo, hexadecimal.
    pub key: String,
    /// When the certificate ends, Unix seconds.
    pub not_after: i64,
}

/// An identity, or one key of it, that is refused from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevocationRecord {
    /// The identity.
    pub spiffe_id: String,
    /// SHA-256 of the SubjectPublicKeyInfo, hexadecimal; empty: every key.
    pub key: String,
    /// Why.
    pub reason: String,
    /// When it was made, Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<i64>,
    /// When the last certificate for this key has ended, Unix seconds; absent: in force until it is lifted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
}

impl RevocationRecord {
    /// The key of the record in its table.
    pub fn table_key(&self) -> String {
        Self::table_key_of(&self.spiffe_id, &self.key)
    }

    /// The key in its table of the record of an identity and a key; an empty key stands for all.
    pub fn table_key_of(spiffe_id: &str, key: &str) -> String {
        format!("{spiffe_id}|{key}")
    }
}

/// An operator's credential: a bearer token (hashed) or a client certificate's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorRecord {
    /// Who.
    pub name: String,
    /// What they may do.
    pub role: Role,
    /// SHA-256 of the token's secret, or of the certificate's SubjectPublicKeyInfo; hexadecimal.
    pub hash: String,
    /// Unix seconds.
    pub expires: i64,
}
