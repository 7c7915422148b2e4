//! Enrolment: how a node without an identity gets one.
//!
//! A token is made by an operator for one node name. It is `oct1.NODE.SECRET.FINGERPRINT`: the fingerprint lets the node
//! verify the controller before it says anything, so nothing is trusted on first use; the secret is stored as its SHA-256
//! only, is good once and for a limited time. Consuming the token, recording the enrolment and revoking the keys of the
//! enrolment before are one transaction whose condition is that the token is still there: of two that use it at the same
//! time, one wins.

pub mod limit;
pub mod service;

use std::time::Duration;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use opencluster_identity::authority::{AuthorityError, Issued};
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::{SpiffeId, UnixTime};
use serde_json::json;
use zeroize::Zeroizing;

use crate::ca::Authority;
use crate::state::record::{EnrolmentRecord, IssuedRecord, Standing, TokenRecord};
use crate::state::{State, StateError, node_key, timestamp, timestamp_of};
use crate::store::{Expect, StoreError, Table};

/// How many unused tokens a node may have.
const MAX_TOKENS: usize = 8;

/// Bytes of a secret.
const SECRET: usize = 32;

/// A secret for a token: random, zeroized.
pub(crate) fn new_secret() -> Result<Zeroizing<[u8; SECRET]>, RandomError> {
    let mut secret = Zeroizing::new([0; SECRET]);
    aws_lc_rs::rand::fill(&mut *secret).map_err(|_| RandomError)?;
    Ok(secret)
}

/// A short random identifier.
pub(crate) fn new_id() -> Result<String, RandomError> {
    let mut id = [0; 8];
    aws_lc_rs::rand::fill(&mut id).map_err(|_| RandomError)?;
    Ok(hex::encode(id))
}

/// The operating system gave no random bytes.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the system gave no random bytes")]
pub struct RandomError;

/// Whether `secret` is the one with this hash (hexadecimal); takes the same time wherever they differ.
pub(crate) fn secret_matches(secret: &[u8], hash: &str) -> bool {
    hex::decode(hash).is_ok_and(|hash| verify_slices_are_equal(Sha256Digest::of(secret).as_bytes(), &hash).is_ok())
}

/// Why no token was made.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// There is no such node.
    #[error("there is no Node {0}: apply a Node resource with its addresses first")]
    NoNode(String),
    /// Enough.
    #[error("Node {node} has {MAX_TOKENS} unused tokens already; the first of them expires at {first}")]
    TooMany {
        /// The node.
        node: String,
        /// RFC 3339.
        first: String,
    },
}

/// A new token, to be shown once.
pub struct NewToken {
    /// `oct1.NODE.SECRET.FINGERPRINT`
    pub token: Zeroizing<String>,
    /// Unix seconds.
    pub expires: i64,
}

/// What a node asks for.
pub struct Application {
    /// Its name.
    pub node: String,
    /// The secret part of its token, as text.
    pub secret: Zeroizing<String>,
    /// Its CSR.
    pub csr_der: Vec<u8>,
    /// Its boot.
    pub boot_id: String,
    /// Whether that must be another one than those of the node's enrolments before.
    pub require_new_boot: bool,
    /// What its hardware and hypervisor are known by; empty: not measured.
    pub machine: Vec<u8>,
}

/// Why a node was not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The state.
    #[error(transparent)]
    State(StateError),
    /// Randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The token. The reason is for the log: the caller is not told which it was.
    #[error("{0}")]
    Token(&'static str),
    /// The request.
    #[error("{0}")]
    Invalid(String),
}

impl From<StateError> for EnrolError {
    fn from(error: StateError) -> Self {
        match error {
            // The token went between finding and consuming it: the other one won.
            StateError::Store(StoreError::Conflict { table: Table::Tokens, .. }) => Self::Token("token used already"),
            error => Self::State(error),
        }
    }
}

/// A new enrolment.
#[derive(Debug)]
pub struct Enrolled {
    /// Names this enrolment.
    pub id: String,
    /// The node's SVID.
    pub issued: Issued,
}

impl State {
    /// Makes a token for a node.
    pub fn create_token(
        &self,
        actor: &str,
        node: &str,
        ttl: Duration,
        root: Sha256Digest,
    ) -> Result<NewToken, TokenError> {
        let secret = new_secret()?;
        let id = new_id()?;
        let mut writer = self.write()?;
        if !self.configuration().snapshot.resources.contains_key(&node_key(node)) {
            return Err(TokenError::NoNode(node.to_owned()));
        }
        let now = writer.now().unix_timestamp();
        let mut unused = Vec::new();
        for (key, record, _) in self.scan::<TokenRecord>(Table::Tokens, &format!("{node}/"))? {
            if record.expires <= now {
                writer.delete(Table::Tokens, key);
            } else {
                unused.push(record.expires);
            }
        }
        if unused.len() >= MAX_TOKENS {
            let first = unused.iter().min().copied().map(timestamp_of).unwrap_or_default();
            return Err(TokenError::TooMany { node: node.to_owned(), first });
        }
        let expires = now.saturating_add_unsigned(ttl.as_secs());
        let record =
            TokenRecord { node: node.to_owned(), hash: Sha256Digest::of(secret.as_slice()).to_string(), expires };
        writer.put(Table::Tokens, format!("{node}/{id}"), &record)?;
        let after = json!({"token": id, "expires": timestamp_of(expires)});
        writer.audit(actor, "token.create", format!("Node {node}"), None, Some(after));
        writer.commit()?;
        let text = Zeroizing::new(URL_SAFE_NO_PAD.encode(secret.as_slice()));
        Ok(NewToken { token: Zeroizing::new(format!("oct1.{node}.{}.{root}", *text)), expires })
    }

    /// Enrols a node, or not; `in_force` is called while no other change can happen, once the enrolment is committed.
    pub fn enrol(
        &self,
        authority: &Authority,
        ttl: Duration,
        application: &Application,
        in_force: impl FnOnce(&Enrolled),
    ) -> Result<Enrolled, EnrolError> {
        let node = application.node.as_str();
        let (token, revision) = self.find_token(node, &application.secret)?;
        let identity = self.applicant(application)?;
        let now = UnixTime::now();
        let issued = authority
            .issue(&application.csr_der, &identity, ttl, now)
            .map_err(|error| EnrolError::Invalid(refusal(&error)))?;
        let enrolled = Enrolled { id: new_id()?, issued };

        let mut writer = self.write()?;
        if !self.configuration().snapshot.resources.contains_key(&node_key(node)) {
            return Err(EnrolError::Token("no such Node"));
        }
        writer.require(Table::Tokens, token.clone(), Expect::Revision(revision));
        writer.delete(Table::Tokens, token.clone());
        let before = self.get::<EnrolmentRecord>(Table::Enrolments, node)?.map(|(record, _)| record);
        // A host that says truly which boot it is in cannot have been wiped since. (One that lies was never promised to be
        // found out by this: see docs/threat-model.md.)
        let mut earlier_boots = before.as_ref().map_or_else(Vec::new, EnrolmentRecord::boots);
        let known = earlier_boots.contains(&application.boot_id);
        if application.require_new_boot && known {
            return Err(EnrolError::Invalid(
                "boot_id: this boot of the host was enrolled before: wipe and restart the host, then enrol it".into(),
            ));
        }
        let replaced = self.revoke_keys_of(&mut writer, node, "the node enrolled again")?;
        let key = enrolled.issued.spki_sha256.to_string();
        let current = self.revocations();
        if replaced.iter().chain(current.entries()).any(|record| record.key == key) {
            return Err(EnrolError::Invalid("this key was enrolled before: make a new one".into()));
        }
        earlier_boots.retain(|boot| *boot != application.boot_id);
        let record = EnrolmentRecord {
            id: enrolled.id.clone(),
            node: node.to_owned(),
            boot_id: application.boot_id.clone(),
            earlier_boots,
            enrolled: timestamp(writer.now()),
            standing: Standing::Active,
            reason: String::new(),
        };
        writer.put(Table::Enrolments, node, &record)?;
        let issued = IssuedRecord {
            node: node.to_owned(),
            spiffe_id: identity.to_string(),
            key: key.clone(),
            not_after: enrolled.issued.not_after.as_secs() as i64,
        };
        writer.put(Table::Issued, format!("{node}/{key}"), &issued)?;
        writer.audit(
            &format!("node/{node}"),
            "node.enrol",
            format!("Node {node}"),
            before.map(|record| json!({"enrolment": record.id, "standing": record.standing})),
            Some(json!({
                "enrolment": record.id, "boot": record.boot_id, "key": key,
                "token": token.rsplit('/').next(), "revoked-keys": replaced.len(),
            })),
        );
        self.commit_revocations(writer, replaced, &[], |_| in_force(&enrolled))?;
        Ok(enrolled)
    }

    /// The token of this node with this secret: its key in the table, and its revision.
    fn find_token(&self, node: &str, secret: &str) -> Result<(String, u64), EnrolError> {
        let secret = Zeroizing::new(URL_SAFE_NO_PAD.decode(secret).map_err(|_| EnrolError::Token("malformed secret"))?);
        if secret.len() != SECRET || node.is_empty() || node.contains('/') {
            return Err(EnrolError::Token("malformed secret or node name"));
        }
        let mut found = None;
        for (key, record, revision) in self.scan::<TokenRecord>(Table::Tokens, &format!("{node}/"))? {
            if secret_matches(&secret, &record.hash) {
                found = Some((key, record, revision));
            }
        }
        let (key, record, revision) = found.ok_or(EnrolError::Token("unknown, used, or of another node"))?;
        if record.expires <= time::OffsetDateTime::now_utc().unix_timestamp() {
            return Err(EnrolError::Token("expired"));
        }
        Ok((key, revision))
    }

    fn applicant(&self, application: &Application) -> Result<SpiffeId, EnrolError> {
        let boot_id = &application.boot_id;
        if !(1..=64).contains(&boot_id.len()) || !boot_id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') {
            return Err(EnrolError::Invalid("boot_id: expected what /proc/sys/kernel/random/boot_id says".into()));
        }
        if !matches!(application.machine.len(), 0 | 32) {
            return Err(EnrolError::Invalid("machine: expected a SHA-256, or nothing".into()));
        }
        SpiffeId::node(self.domain(), &application.node).map_err(|error| EnrolError::Invalid(error.to_string()))
    }
}

/// For the node: its own mistakes in full, ours not at all.
fn refusal(error: &AuthorityError) -> String {
    match error {
        AuthorityError::Csr(_) | AuthorityError::WrongIdentity { .. } => format!("csr_der: {error}"),
        _ => "the certificate could not be issued: see the controller's log".into(),
    }
}
