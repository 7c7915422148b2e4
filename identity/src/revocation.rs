//! Revocation: identities and keys that are trusted no more.
//!
//! By SPIFFE ID and SHA-256 of the public key, never by certificate fingerprint: a revoked key may hold any number of
//! certificates that nobody has seen.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use arc_swap::ArcSwapOption;

use crate::SpiffeId;
use crate::digest::Sha256Digest;

/// One version of everything that is revoked. Lookups cost one hash of the SPIFFE ID and do not allocate.
#[derive(Clone, Debug, Default)]
pub struct RevocationSet {
    version: u64,
    entries: HashMap<SpiffeId, RevokedKeys>,
}

#[derive(Clone, Debug)]
enum RevokedKeys {
    All,
    Some(HashSet<Sha256Digest>),
}

/// Why an identity may not be accepted now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevocationError {
    /// Without a revocation set nobody can be told from a revoked peer, so nobody is accepted.
    #[error("no revocation set has been loaded yet: every identity is refused until the controller has sent one")]
    NotLoaded,
    /// Revoked.
    #[error("{id} is revoked, with every key")]
    Identity {
        /// Who.
        id: SpiffeId,
    },
    /// This key is revoked; the identity may have another.
    #[error("the key {spki_sha256} of {id} is revoked")]
    Key {
        /// Who.
        id: SpiffeId,
        /// SHA-256 of its SubjectPublicKeyInfo.
        spki_sha256: Sha256Digest,
    },
}

impl RevocationSet {
    /// A set of this version in which nothing is revoked yet.
    pub fn new(version: u64) -> Self {
        Self { version, entries: HashMap::new() }
    }

    /// Revokes one key of `id`, or all of them (`None`; on the wire: an empty hash).
    pub fn revoke(&mut self, id: SpiffeId, key: Option<Sha256Digest>) {
        let revoked = self.entries.entry(id).or_insert_with(|| RevokedKeys::Some(HashSet::new()));
        match (key, revoked) {
            (None, revoked) => *revoked = RevokedKeys::All,
            (Some(key), RevokedKeys::Some(keys)) => {
                keys.insert(key);
            }
            (Some(_), RevokedKeys::All) => {}
        }
    }

    /// The version that the controller gave it.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// How many identities have something revoked.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is revoked.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether `id` is revoked with every key, so that a new key does not help.
    pub fn revokes_every_key_of(&self, id: &SpiffeId) -> bool {
        matches!(self.entries.get(id), Some(RevokedKeys::All))
    }

    /// Refuses `id` with this key if either is revoked.
    pub fn check(&self, id: &SpiffeId, spki_sha256: &Sha256Digest) -> Result<(), RevocationError> {
        match self.entries.get(id) {
            Some(RevokedKeys::All) => Err(RevocationError::Identity { id: id.clone() }),
            Some(RevokedKeys::Some(keys)) if keys.contains(spki_sha256) => {
                Err(RevocationError::Key { id: id.clone(), spki_sha256: *spki_sha256 })
            }
            None | Some(RevokedKeys::Some(_)) => Ok(()),
        }
    }
}

/// The revocation set in force, shared by every verifier of a process and replaced as a whole.
///
/// Starts as *not loaded*, which denies everything.
#[derive(Clone, Debug, Default)]
pub struct Revocations(Arc<ArcSwapOption<RevocationSet>>);

impl Revocations {
    /// Not loaded yet: denies everything.
    pub fn not_loaded() -> Self {
        Self::default()
    }

    /// Puts a set in force. Handshakes that begin after this returns obey it.
    pub fn replace(&self, set: RevocationSet) {
        self.0.store(Some(Arc::new(set)));
    }

    /// Back to *not loaded*, which denies everything: there is a newer set, but it cannot be put in force.
    pub fn forget(&self) {
        self.0.store(None);
    }

    /// The set in force; `None`: not loaded.
    pub fn current(&self) -> Option<Arc<RevocationSet>> {
        self.0.load_full()
    }

    /// The version in force; `None`: not loaded.
    pub fn version(&self) -> Option<u64> {
        self.0.load().as_ref().map(|set| set.version())
    }

    /// Refuses `id` with this key if either is revoked, and everyone while no set is loaded. Use it for live flows,
    /// too, when the set changes.
    pub fn check(&self, id: &SpiffeId, spki_sha256: &Sha256Digest) -> Result<(), RevocationError> {
        match self.0.load().as_ref() {
            None => Err(RevocationError::NotLoaded),
            Some(set) => set.check(id, spki_sha256),
        }
    }
}
