//! SVIDs: a certificate chain with the key that it names, and the set of those that a process holds.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::SpiffeId;
use crate::digest::Sha256Digest;
use crate::key::PrivateKey;
use crate::profile::{self, LeafProfile, ProfileError};
use crate::verify::MAX_CHAIN;

/// An X.509-SVID with its private key, ready for handshakes.
///
/// The key lives as long as the last handshake that uses it, and is then overwritten.
pub struct Svid {
    id: SpiffeId,
    spki_sha256: Sha256Digest,
    not_before: UnixTime,
    not_after: UnixTime,
    rotate_at: UnixTime,
    certified: Arc<CertifiedKey>,
}

/// Why a chain and a key are not an SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// No certificate, or too many.
    #[error("an SVID's chain has 1 to {MAX_CHAIN} certificates, this one has {0}")]
    Chain(usize),
    /// The leaf is not an SVID's.
    #[error("the issued certificate is not an X.509-SVID")]
    Profile(#[from] ProfileError),
    /// A certificate for another key.
    #[error("the certificate of {id} is for another key (SPKI {found}) than ours (SPKI {ours})")]
    KeyMismatch {
        /// Whose.
        id: SpiffeId,
        /// In the certificate.
        found: Sha256Digest,
        /// Our key's.
        ours: Sha256Digest,
    },
    /// A certificate for another identity.
    #[error("a certificate for {expected} was asked for, but this one is for {found}")]
    WrongIdentity {
        /// In the certificate.
        found: SpiffeId,
        /// Asked for.
        expected: SpiffeId,
    },
    /// The random number generator failed.
    #[error("the random number generator failed")]
    Random,
}

impl Svid {
    /// Joins an issued chain (leaf first, DER) with the key that its CSR was made with. The leaf must follow the SVID
    /// profile, name `expected` and hold exactly this key.
    pub fn new(expected: &SpiffeId, chain: Vec<CertificateDer<'static>>, key: PrivateKey) -> Result<Self, SvidError> {
        let Some(leaf) = chain.first().filter(|_| chain.len() <= MAX_CHAIN) else {
            return Err(SvidError::Chain(chain.len()));
        };
        let LeafProfile { id, spki_sha256, validity } = profile::leaf(leaf)?;
        if id != *expected {
            return Err(SvidError::WrongIdentity { found: id, expected: expected.clone() });
        }
        if spki_sha256 != key.spki_sha256() {
            return Err(SvidError::KeyMismatch { id, found: spki_sha256, ours: key.spki_sha256() });
        }
        Ok(Self {
            id,
            spki_sha256,
            not_before: validity.not_before,
            not_after: validity.not_after,
            rotate_at: rotation_time(validity.not_before, validity.not_after)?,
            certified: Arc::new(CertifiedKey::new(chain, Arc::new(key))),
        })
    }

    /// Presents a root at the end of the chain. Only controllers do, for enrolling nodes that know no more of it than its
    /// fingerprint.
    pub fn presenting_root(mut self, root: CertificateDer<'static>) -> Result<Self, SvidError> {
        let mut chain = self.certified.cert.clone();
        chain.push(root);
        if chain.len() > MAX_CHAIN {
            return Err(SvidError::Chain(chain.len()));
        }
        self.certified = Arc::new(CertifiedKey::new(chain, Arc::clone(&self.certified.key)));
        Ok(self)
    }

    /// Whose it is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// SHA-256 of the public key.
    pub fn spki_sha256(&self) -> &Sha256Digest {
        &self.spki_sha256
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// From when it counts.
    pub fn not_before(&self) -> UnixTime {
        self.not_before
    }

    /// Until when it counts.
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    /// When to ask for its successor: at half its life, or up to a tenth of its life earlier, at random, so that SVIDs
    /// that were issued together are not all renewed together.
    pub fn rotate_at(&self) -> UnixTime {
        self.rotate_at
    }

    /// How long to wait for [`Svid::rotate_at`]; zero: now.
    pub fn rotate_in(&self, now: UnixTime) -> Duration {
        Duration::from_secs(self.rotate_at.as_secs().saturating_sub(now.as_secs()))
    }

    pub(crate) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("spki_sha256", &self.spki_sha256)
            .field("not_after", &self.not_after.as_secs())
            .finish_non_exhaustive()
    }
}

fn rotation_time(not_before: UnixTime, not_after: UnixTime) -> Result<UnixTime, SvidError> {
    let mut random = [0; 4];
    aws_lc_rs::rand::fill(&mut random).map_err(|_| SvidError::Random)?;
    let life = not_after.as_secs().saturating_sub(not_before.as_secs());
    let jitter = u128::from(life / 10) * u128::from(u32::from_be_bytes(random)) / u128::from(u32::MAX);
    // At most life / 10: it fits whatever life fits in.
    let wait = life / 2 - jitter as u64;
    Ok(UnixTime::since_unix_epoch(Duration::from_secs(not_before.as_secs() + wait)))
}

/// The SVIDs that a process holds, shared by its rustls configurations and replaced in place.
///
/// A handshake takes the SVID that is there when it begins; connections that are up keep what they negotiated. So
/// installing a successor drops no connection, and removing an identity ends only its new handshakes (cutting its live
/// flows is for the caller).
#[derive(Clone, Default)]
pub struct SvidStore(Arc<ArcSwap<Held>>);

#[derive(Clone, Default)]
struct Held {
    by_id: HashMap<SpiffeId, Arc<Svid>>,
    by_server_name: HashMap<String, Arc<Svid>>,
}

impl SvidStore {
    /// Holds nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Installs an SVID, in place of an older one of the same identity.
    pub fn install(&self, svid: Svid) {
        let svid = Arc::new(svid);
        self.0.rcu(|held| {
            let mut held = Held::clone(held);
            if let Some(name) = svid.id.server_name() {
                held.by_server_name.insert(name, Arc::clone(&svid));
            }
            held.by_id.insert(svid.id.clone(), Arc::clone(&svid));
            held
        });
    }

    /// Drops the identity with its key. Says whether it was there.
    pub fn remove(&self, id: &SpiffeId) -> bool {
        let mut was_there = false;
        self.0.rcu(|held| {
            let mut held = Held::clone(held);
            was_there = held.by_id.remove(id).is_some();
            held.by_server_name.retain(|_, svid| svid.id != *id);
            held
        });
        was_there
    }

    /// Drops every identity, with its key, that `keep` does not want.
    pub fn retain(&self, keep: impl Fn(&SpiffeId) -> bool) {
        self.0.rcu(|held| {
            let mut held = Held::clone(held);
            held.by_id.retain(|id, _| keep(id));
            held.by_server_name.retain(|_, svid| keep(&svid.id));
            held
        });
    }

    /// Drops everything: severed.
    pub fn clear(&self) {
        self.0.store(Arc::default());
    }

    /// The current SVID of an identity.
    pub fn get(&self, id: &SpiffeId) -> Option<Arc<Svid>> {
        self.0.load().by_id.get(id).cloned()
    }

    /// The current SVID that a TLS server name stands for ([`SpiffeId::server_name`]).
    pub fn by_server_name(&self, name: &str) -> Option<Arc<Svid>> {
        self.0.load().by_server_name.get(name).cloned()
    }

    /// All current SVIDs, for looking after their rotation.
    pub fn all(&self) -> Vec<Arc<Svid>> {
        self.0.load().by_id.values().cloned().collect()
    }
}

impl fmt::Debug for SvidStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.load().by_id.keys()).finish()
    }
}
