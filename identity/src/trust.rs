//! What a process decides about peers with: trust domain, bundle and revocations, shared and hot-swappable.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;
use aws_lc_rs::digest::{Context, SHA256};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::TrustDomain;
use crate::bundle::{BundleError, TrustBundle};
use crate::revocation::{RevocationSet, Revocations};
use crate::verify::{self, ChainVerified, PeerVerified, VerifyError};

/// How many verified chains are remembered. Only valid chains get in, so a stranger cannot fill it.
const CACHE_CAPACITY: usize = 1024;

/// A process's trust, one handle for all of its rustls configurations: cheap to clone, replaced in place.
///
/// Starts with neither bundle nor revocations, and then refuses everybody. (One exception is explained at
/// [`Trust::verify_controller`].)
#[derive(Clone)]
pub struct Trust(Arc<Inner>);

struct Inner {
    domain: TrustDomain,
    bundle: ArcSwapOption<TrustBundle>,
    revocations: Revocations,
    /// Chains whose signatures were verified, by the digest of all their certificates. A handshake's verifier puts them
    /// there, so that asking for the peer's identity afterwards costs no more signatures.
    verified: Mutex<HashMap<[u8; 32], Remembered>>,
}

struct Remembered {
    chain: ChainVerified,
    /// Verified against exactly this bundle: a replaced bundle makes the entry worthless, even if it was made by a
    /// handshake that had begun before.
    bundle: Arc<TrustBundle>,
}

impl Trust {
    /// Trusts nobody yet.
    pub fn new(domain: TrustDomain) -> Self {
        Self(Arc::new(Inner {
            domain,
            bundle: ArcSwapOption::empty(),
            revocations: Revocations::not_loaded(),
            verified: Mutex::default(),
        }))
    }

    /// Trusts a bundle's trust domain by that bundle; revocations are still not loaded.
    pub fn with_bundle(bundle: TrustBundle) -> Self {
        let trust = Self::new(bundle.domain().clone());
        trust.0.bundle.store(Some(Arc::new(bundle)));
        trust
    }

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        &self.0.domain
    }

    /// Puts a bundle in force, which must be of this trust domain. Handshakes that begin after this returns obey it.
    pub fn replace_bundle(&self, bundle: TrustBundle) -> Result<(), BundleError> {
        if bundle.domain() != self.domain() {
            return Err(BundleError::TwoDomains { first: self.domain().clone(), other: bundle.domain().clone() });
        }
        self.0.bundle.store(Some(Arc::new(bundle)));
        Ok(())
    }

    /// The bundle in force; `None`: not loaded.
    pub fn bundle(&self) -> Option<Arc<TrustBundle>> {
        self.0.bundle.load_full()
    }

    /// Puts a revocation set in force. Handshakes that begin after this returns obey it; live flows are for the caller to
    /// check, with [`Trust::revocations`].
    pub fn replace_revocations(&self, set: RevocationSet) {
        self.0.revocations.replace(set);
    }

    /// Back to 'not loaded', which refuses everybody: what is in force is known to be out of date.
    pub fn forget_revocations(&self) {
        self.0.revocations.forget();
    }

    /// The revocations, to check live flows with.
    pub fn revocations(&self) -> &Revocations {
        &self.0.revocations
    }

    /// [`verify::verify_peer`] with what is in force now. Signatures of a chain that was verified before are not verified
    /// again; time and revocations always are.
    pub fn verify(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<PeerVerified, VerifyError> {
        let verified = self.verify_chain(chain, now)?;
        self.0.revocations.check(&verified.id, &verified.spki_sha256)?;
        Ok(verified.into_peer())
    }

    /// Like [`Trust::verify`], for a peer that must be a controller.
    ///
    /// Revocations are consulted if they are loaded. If they are not, a controller is accepted all the same: it is from a
    /// controller that they come, over the very connection that is being made.
    pub fn verify_controller(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<PeerVerified, VerifyError> {
        let verified = self.verify_chain(chain, now)?;
        verify::require_controller(&verified.id)?;
        if let Some(revocations) = self.0.revocations.current() {
            revocations.check(&verified.id, &verified.spki_sha256)?;
        }
        Ok(verified.into_peer())
    }

    fn verify_chain(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<ChainVerified, VerifyError> {
        let bundle = self.bundle().ok_or(VerifyError::BundleNotLoaded)?;
        let digest = digest(chain);
        if let Some(known) = self.cache().get(&digest) {
            let validity = known.chain.validity;
            if Arc::ptr_eq(&known.bundle, &bundle) && (validity.not_before..=validity.not_after).contains(&now) {
                return Ok(known.chain.clone());
            }
        }
        let chain = verify::verify_chain(chain, &bundle, &self.0.domain, now)?;
        let mut cache = self.cache();
        if cache.len() >= CACHE_CAPACITY {
            cache.clear();
        }
        cache.insert(digest, Remembered { chain: chain.clone(), bundle });
        Ok(chain)
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 32], Remembered>> {
        // Nothing that holds the lock can leave the map half-changed.
        self.0.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("domain", &self.0.domain)
            .field("bundle", &self.bundle())
            .field("revocations", &self.0.revocations.version())
            .finish_non_exhaustive()
    }
}

/// Lengths are part of it, so that no two chains have the same text to digest.
fn digest(chain: &[CertificateDer<'_>]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for certificate in chain {
        context.update(&certificate.len().to_be_bytes());
        context.update(certificate);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}
