//! The trust bundle: the roots of one trust domain.

use std::fmt;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor};

use crate::TrustDomain;
use crate::digest::Sha256Digest;
use crate::profile::{self, ProfileError};

/// More roots than this are refused: one, and another during a rotation, are usual.
pub const MAX_ROOTS: usize = 8;

/// A PEM text above this is refused unparsed.
pub const MAX_PEM_BYTES: usize = 128 * 1024;

/// The roots of one trust domain, at least one.
#[derive(Clone)]
pub struct TrustBundle {
    domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
}

/// Why a bundle is refused.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Trusting nobody is no bundle.
    #[error("a trust bundle needs at least one root certificate")]
    Empty,
    /// Too many.
    #[error("a trust bundle of {0} roots: at most {MAX_ROOTS} are accepted")]
    TooMany(usize),
    /// Too big to look at.
    #[error("a PEM text of {0} bytes: at most {MAX_PEM_BYTES} are accepted")]
    TooLarge(usize),
    /// Not PEM.
    #[error("not a PEM text of certificates (-----BEGIN CERTIFICATE-----): {0}")]
    Pem(String),
    /// Not a root of ours.
    #[error("root {index} of the trust bundle (counted from 1) is not a SPIFFE authority's certificate")]
    Root {
        /// Which, from 1.
        index: usize,
        /// Why.
        source: ProfileError,
    },
    /// webpki does not take it.
    #[error("root {index} of the trust bundle (counted from 1) cannot be a trust anchor: {source}")]
    Anchor {
        /// Which, from 1.
        index: usize,
        /// Why.
        source: webpki::Error,
    },
    /// Roots of two trust domains.
    #[error("a trust bundle has the roots of one trust domain, this one of {first} and of {other}")]
    TwoDomains {
        /// The first root's.
        first: TrustDomain,
        /// Another root's.
        other: TrustDomain,
    },
}

impl TrustBundle {
    /// Takes roots, DER. Each must be a SPIFFE authority (CA, one URI: its trust domain), all of one trust domain.
    pub fn from_der(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Result<Self, BundleError> {
        let roots: Vec<_> = roots.into_iter().collect();
        if roots.len() > MAX_ROOTS {
            return Err(BundleError::TooMany(roots.len()));
        }
        let mut domain: Option<TrustDomain> = None;
        let mut anchors = Vec::with_capacity(roots.len());
        for (index, root) in (1..).zip(&roots) {
            let profile = profile::authority(root).map_err(|source| BundleError::Root { index, source })?;
            match &domain {
                Some(first) if *first != profile.domain => {
                    return Err(BundleError::TwoDomains { first: first.clone(), other: profile.domain });
                }
                _ => domain = Some(profile.domain),
            }
            let anchor =
                webpki::anchor_from_trusted_cert(root).map_err(|source| BundleError::Anchor { index, source })?;
            anchors.push(anchor.to_owned());
        }
        let domain = domain.ok_or(BundleError::Empty)?;
        Ok(Self { domain, roots, anchors })
    }

    /// Reads roots from a PEM text. Text around the certificates is ignored, as OpenSSL does; other PEM sections too.
    pub fn from_pem(pem: &[u8]) -> Result<Self, BundleError> {
        if pem.len() > MAX_PEM_BYTES {
            return Err(BundleError::TooLarge(pem.len()));
        }
        let roots = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| BundleError::Pem(error.to_string()))?;
        Self::from_der(roots)
    }

    /// The roots as PEM.
    pub fn to_pem(&self) -> String {
        let sections: Vec<_> = self.roots.iter().map(|root| pem::Pem::new("CERTIFICATE", root.to_vec())).collect();
        pem::encode_many_config(&sections, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
    }

    /// The trust domain whose identities these roots vouch for.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The roots, DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// SHA-256 of each root certificate, DER: what an enrolment token carries.
    pub fn fingerprints(&self) -> impl Iterator<Item = Sha256Digest> + '_ {
        self.roots.iter().map(|root| Sha256Digest::of(root))
    }

    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustBundle")
            .field("domain", &self.domain)
            .field("fingerprints", &self.fingerprints().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}
