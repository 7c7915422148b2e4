//! The certificate authority: its keys in the sealed store, its signatures, and the controller's own SVID.

use std::time::Duration;

use opencluster_identity::authority::{
    AuthorityError, DEFAULT_ISSUER_LIFETIME, DEFAULT_ROOT_LIFETIME, Issued, Issuer, Root,
};
use opencluster_identity::bundle::{BundleError, TrustBundle};
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::key::{KeyError, PrivateKey};
use opencluster_identity::svid::{Svid, SvidError};
use opencluster_identity::{CertificateDer, SpiffeId, TrustDomain, UnixTime};

use crate::store::{Batch, Expect, Store, StoreError, Table};

const ROOT: &str = "root";
const ISSUER: &str = "issuer";

/// An issuer that ends sooner than this is replaced when the controller starts.
const RENEW_ISSUER_BEFORE: Duration = Duration::from_hours(30 * 24);

/// How long the controller's own certificate is valid; it is renewed at half that.
const OWN_TTL: Duration = Duration::from_hours(24);

/// What can go wrong with the authority.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Making or reading an authority, or signing.
    #[error("certificate authority: {0}")]
    Authority(#[from] AuthorityError),
    /// The bundle.
    #[error("certificate authority: {0}")]
    Bundle(#[from] BundleError),
    /// The controller's own key.
    #[error("the controller's own key: {0}")]
    Key(#[from] KeyError),
    /// The controller's own SVID.
    #[error("the controller's own SVID: {0}")]
    Svid(#[from] SvidError),
    /// There is none in the store.
    #[error("the store holds no {0}: it was not made by `opencluster-controller init`, or init did not finish")]
    Missing(&'static str),
    /// The configuration names another trust domain than the store was made for.
    #[error(
        "the store was made for the trust domain {stored}, the configuration says {configured}: correct trust_domain, or start a new cluster"
    )]
    TrustDomain {
        /// Of the store.
        stored: TrustDomain,
        /// Of the configuration.
        configured: TrustDomain,
    },
}

/// The authority, ready to sign. The root's key stays in the store: only a new issuer needs it.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer,
    bundle: TrustBundle,
    root: CertificateDer<'static>,
    root_not_after: UnixTime,
}

impl Authority {
    /// Makes root and issuer for a new cluster and adds them to the batch; the root's bundle.
    pub fn create(domain: &TrustDomain, batch: &mut Batch, now: UnixTime) -> Result<TrustBundle, CaError> {
        let root = Root::create(domain, DEFAULT_ROOT_LIFETIME, now)?;
        let issuer = root.create_issuer(DEFAULT_ISSUER_LIFETIME, now)?;
        for key in [ROOT, ISSUER] {
            batch.require(Table::Ca, key, Expect::Absent);
        }
        batch.put(Table::Ca, ROOT, root.danger_secret_bytes()?);
        batch.put(Table::Ca, ISSUER, issuer.danger_secret_bytes()?);
        Ok(root.bundle()?)
    }

    /// Loads the authority, with a new issuer if the old one is about to end.
    pub fn load(store: &dyn Store, configured: &TrustDomain, now: UnixTime) -> Result<Self, CaError> {
        let read = |key, name| store.get(Table::Ca, key)?.ok_or(CaError::Missing(name));
        let root = Root::from_secret_bytes(&read(ROOT, "root authority")?.value)?;
        if root.domain() != configured {
            return Err(CaError::TrustDomain { stored: root.domain().clone(), configured: configured.clone() });
        }
        let mut issuer = Issuer::from_secret_bytes(&read(ISSUER, "issuing authority")?.value)?;
        if issuer.not_after().as_secs() < now.as_secs() + RENEW_ISSUER_BEFORE.as_secs() {
            let renewed = root.create_issuer(DEFAULT_ISSUER_LIFETIME, now)?;
            let mut batch = Batch::default();
            batch.put(Table::Ca, ISSUER, renewed.danger_secret_bytes()?);
            store.commit(batch)?;
            tracing::info!(
                event = "ca.issuer-renewed",
                old_end = issuer.not_after().as_secs(),
                new_end = renewed.not_after().as_secs(),
                "the issuing certificate was about to end: made a new one"
            );
            issuer = renewed;
        }
        Ok(Self { bundle: root.bundle()?, root: root.certificate().clone(), root_not_after: root.not_after(), issuer })
    }

    /// Signs an SVID for exactly this identity.
    pub fn issue(
        &self,
        csr_der: &[u8],
        expected: &SpiffeId,
        ttl: Duration,
        now: UnixTime,
    ) -> Result<Issued, AuthorityError> {
        self.issuer.issue(csr_der, expected, ttl, now)
    }

    /// Makes a key and an SVID for this controller. It shows the root, for nodes that only know its fingerprint.
    pub fn own_svid(&self, id: &SpiffeId, now: UnixTime) -> Result<Svid, CaError> {
        let key = PrivateKey::generate()?;
        let issued = self.issue(&key.csr_der(id)?, id, OWN_TTL, now)?;
        Ok(Svid::new(id, issued.chain, key)?.presenting_root(self.root.clone())?)
    }

    /// The roots.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// SHA-256 of the root certificate: what enrolment tokens carry.
    pub fn root_fingerprint(&self) -> Sha256Digest {
        Sha256Digest::of(&self.root)
    }

    /// When the root ends.
    pub fn root_not_after(&self) -> UnixTime {
        self.root_not_after
    }

    /// When the issuer ends.
    pub fn issuer_not_after(&self) -> UnixTime {
        self.issuer.not_after()
    }
}
