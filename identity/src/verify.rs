//! Verification: the one place that decides whether a chain of certificates proves an identity.

use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use crate::bundle::TrustBundle;
use crate::digest::Sha256Digest;
use crate::profile::{self, LeafProfile, MAX_CERTIFICATE_BYTES, ProfileError, Validity};
use crate::revocation::{RevocationError, Revocations};
use crate::tls::SIGNATURE_ALGORITHMS;
use crate::{SpiffeId, Subject, TrustDomain};

/// A longer chain is refused unparsed: leaf, issuer, one more during a change of issuers, and the root that controllers
/// send along.
pub const MAX_CHAIN: usize = 4;

/// The proof that a peer is who it says it is: chain, time, SVID profile, trust domain and revocations were checked.
///
/// Only this crate's verification makes one, so a function that takes it cannot be called for a peer that was not
/// verified. It says nothing about what comes later: check [`Revocations`] again when the set changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerVerified {
    id: SpiffeId,
    spki_sha256: Sha256Digest,
    not_after: UnixTime,
}

impl PeerVerified {
    /// The peer's identity.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// SHA-256 of its public key (SubjectPublicKeyInfo, DER): what revocations name.
    pub fn spki_sha256(&self) -> &Sha256Digest {
        &self.spki_sha256
    }

    /// When the proof runs out: the end of the certificate, or of its issuer's if that comes first.
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }
}

/// Why a peer is refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum VerifyError {
    /// No certificate.
    #[error("the peer sent no certificate")]
    NoCertificate,
    /// Too long.
    #[error("the peer sent a chain of {0} certificates: at most {MAX_CHAIN} are accepted")]
    ChainTooLong(usize),
    /// Too big.
    #[error("the peer sent a certificate of {0} bytes: at most {MAX_CERTIFICATE_BYTES} are accepted")]
    CertificateTooLarge(usize),
    /// Nobody can be verified yet.
    #[error("no trust bundle has been loaded yet: every peer is refused until the controller has sent one")]
    BundleNotLoaded,
    /// Signatures, time, path: webpki's word for it.
    #[error("the peer's certificate chain does not lead to a root of our trust bundle, or not now: {0}")]
    Chain(#[source] webpki::Error),
    /// The leaf is not an SVID.
    #[error("the peer's certificate is not an X.509-SVID")]
    Leaf(#[source] ProfileError),
    /// An issuer is not a SPIFFE authority.
    #[error("an issuer in the peer's certificate chain is not a SPIFFE authority")]
    Issuer(#[source] ProfileError),
    /// Another trust domain.
    #[error("{found} is of trust domain `{}`, ours is `{ours}`", found.trust_domain())]
    TrustDomain {
        /// Who it says it is.
        found: SpiffeId,
        /// Ours.
        ours: TrustDomain,
    },
    /// An issuer or a root of another trust domain vouches for ours.
    #[error("an authority of trust domain `{found}` cannot vouch for identities of `{ours}`")]
    AuthorityDomain {
        /// The authority's.
        found: TrustDomain,
        /// Ours.
        ours: TrustDomain,
    },
    /// Revoked, or nobody knows.
    #[error(transparent)]
    Revocation(#[from] RevocationError),
    /// A valid identity, but not the one that was called.
    #[error("the peer is {found}, which is not `{expected}`")]
    UnexpectedPeer {
        /// Who it is.
        found: SpiffeId,
        /// The server name that was asked for.
        expected: String,
    },
    /// A valid identity, but no controller.
    #[error("the peer is {0}, not a controller (/controller/<name>)")]
    NotController(SpiffeId),
    /// During enrolment the controller must show the root that the token names.
    #[error(
        "the peer did not present the root certificate {0} that the enrolment token names: wrong or impostor controller"
    )]
    RootNotPresented(Sha256Digest),
    /// The root that the token names is not one that an authority of ours would have.
    #[error("the root certificate that the enrolment token names cannot be trusted: {0}")]
    EnrolmentRoot(String),
    /// This process's own SVID is gone: it must not speak for that identity.
    #[error("this process holds no SVID for {0} (not issued yet, or removed): no connection is made in its name")]
    NoOwnSvid(SpiffeId),
}

/// Verifies a peer's chain, leaf first: size limits, then signatures, times and path constraints up to a root of
/// `bundle` (webpki), then the SVID profile of the leaf and the authority profile of each issuer, then the trust domain,
/// then the revocations.
///
/// Further certificates that are not needed for a path (a root, for example) do no harm.
pub fn verify_peer(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    revocations: &Revocations,
    domain: &TrustDomain,
    now: UnixTime,
) -> Result<PeerVerified, VerifyError> {
    let verified = verify_chain(chain, bundle, domain, now)?;
    revocations.check(&verified.id, &verified.spki_sha256)?;
    Ok(verified.into_peer())
}

/// A chain that is good within `validity`, whatever the revocations say.
#[derive(Clone, Debug)]
pub(crate) struct ChainVerified {
    pub(crate) id: SpiffeId,
    pub(crate) spki_sha256: Sha256Digest,
    pub(crate) validity: Validity,
}

impl ChainVerified {
    /// To be called after the revocations were consulted, or where there are none to consult: see the callers.
    pub(crate) fn into_peer(self) -> PeerVerified {
        PeerVerified { id: self.id, spki_sha256: self.spki_sha256, not_after: self.validity.not_after }
    }
}

/// All of [`verify_peer`] but the revocations.
pub(crate) fn verify_chain(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    domain: &TrustDomain,
    now: UnixTime,
) -> Result<ChainVerified, VerifyError> {
    check_limits(chain)?;
    let [leaf, intermediates @ ..] = chain else {
        return Err(VerifyError::NoCertificate);
    };
    if bundle.domain() != domain {
        return Err(VerifyError::AuthorityDomain { found: bundle.domain().clone(), ours: domain.clone() });
    }
    let end_entity = EndEntityCert::try_from(leaf).map_err(VerifyError::Chain)?;
    let path = end_entity
        // Which of the two usages is asked for makes no difference: the profile wants both.
        .verify_for_usage(
            SIGNATURE_ALGORITHMS.all,
            bundle.anchors(),
            intermediates,
            now,
            KeyUsage::client_auth(),
            None,
            None,
        )
        .map_err(VerifyError::Chain)?;

    let LeafProfile { id, spki_sha256, mut validity } = profile::leaf(leaf).map_err(VerifyError::Leaf)?;
    if id.trust_domain() != domain.as_str() {
        return Err(VerifyError::TrustDomain { found: id, ours: domain.clone() });
    }
    // This stands for a URI name constraint, which webpki does not implement (it refuses every URI under one).
    for issuer in path.intermediate_certificates() {
        let issuer = profile::authority(&issuer.der()).map_err(VerifyError::Issuer)?;
        if issuer.domain != *domain {
            return Err(VerifyError::AuthorityDomain { found: issuer.domain, ours: domain.clone() });
        }
        validity = validity.intersect(issuer.validity);
    }
    Ok(ChainVerified { id, spki_sha256, validity })
}

/// Refuses a peer that is not a controller.
pub(crate) fn require_controller(id: &SpiffeId) -> Result<(), VerifyError> {
    match id.subject() {
        Subject::Controller { .. } => Ok(()),
        _ => Err(VerifyError::NotController(id.clone())),
    }
}

fn check_limits(chain: &[CertificateDer<'_>]) -> Result<(), VerifyError> {
    if chain.len() > MAX_CHAIN {
        return Err(VerifyError::ChainTooLong(chain.len()));
    }
    match chain.iter().find(|certificate| certificate.len() > MAX_CERTIFICATE_BYTES) {
        Some(certificate) => Err(VerifyError::CertificateTooLarge(certificate.len())),
        None => Ok(()),
    }
}
