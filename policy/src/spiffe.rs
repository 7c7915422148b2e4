//! SPIFFE IDs (the SPIFFE-ID standard: syntax and limits) and what Opencluster reads in their paths.

use std::fmt;

/// A trust domain: 1–255 of `a-z 0-9 . - _`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(String);

/// A valid SPIFFE ID, at most 2048 bytes. Compared byte for byte.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: String,
    domain_end: usize,
}

/// What a SPIFFE ID of our own trust domain names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject<'a> {
    /// `/ns/<namespace>/sa/<name>`
    Workload {
        /// The namespace.
        namespace: &'a str,
        /// The workload's name.
        name: &'a str,
    },
    /// `/node/<name>`
    Node {
        /// The node's name.
        name: &'a str,
    },
    /// `/controller/<name>`
    Controller {
        /// The replica's name.
        name: &'a str,
    },
    /// Anything else.
    Other,
}

/// Why a text is not a SPIFFE ID or trust domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SpiffeError(pub String);

impl TrustDomain {
    /// Parses a trust domain name (without scheme).
    pub fn parse(_text: &str) -> Result<Self, SpiffeError> {
        todo!()
    }
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SpiffeId {
    /// Parses `spiffe://…`.
    pub fn parse(_text: &str) -> Result<Self, SpiffeError> {
        todo!()
    }
    /// `spiffe://<domain>/ns/<namespace>/sa/<name>`
    pub fn workload(_domain: &TrustDomain, _namespace: &str, _name: &str) -> Result<Self, SpiffeError> {
        todo!()
    }
    /// `spiffe://<domain>/node/<name>`
    pub fn node(_domain: &TrustDomain, _name: &str) -> Result<Self, SpiffeError> {
        todo!()
    }
    /// `spiffe://<domain>/controller/<name>`
    pub fn controller(_domain: &TrustDomain, _name: &str) -> Result<Self, SpiffeError> {
        todo!()
    }
    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.text
    }
    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.text["spiffe://".len()..self.domain_end]
    }
    /// The path, with its leading slash; empty for a trust domain's own ID.
    pub fn path(&self) -> &str {
        &self.text[self.domain_end..]
    }
    /// What it names.
    pub fn subject(&self) -> Subject<'_> {
        todo!()
    }
    /// The DNS name that stands for this ID in TLS server name indication, so that the peer can choose the certificate:
    /// `<name>.<namespace>.sa.<trust-domain>`, `<name>.node.<trust-domain>`, `<name>.controller.<trust-domain>`. `None`
    /// for other subjects.
    pub fn server_name(&self) -> Option<String> {
        todo!()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
