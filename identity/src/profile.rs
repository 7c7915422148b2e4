//! The X.509-SVID profile: what a certificate must and must not say, besides being signed.

use std::time::Duration;

use rustls::sign::public_key_to_spki;
use rustls_pki_types::{UnixTime, alg_id};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use crate::digest::Sha256Digest;
use crate::{SpiffeError, SpiffeId, TrustDomain};

/// A certificate above this is refused unparsed. Ours have about 700 bytes; a SPIFFE ID may have 2048.
pub(crate) const MAX_CERTIFICATE_BYTES: usize = 8 * 1024;

/// An uncompressed point of P-256: 0x04, x, y.
pub(crate) const P256_POINT_BYTES: usize = 65;

/// Why a certificate is not the X.509-SVID (or SVID authority) that it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// Too big to look at.
    #[error("the certificate has {0} bytes: at most {MAX_CERTIFICATE_BYTES} are accepted")]
    TooLarge(usize),
    /// Not DER, not X.509 v3, or something after its end.
    #[error("not one well-formed X.509 v3 certificate: {0}")]
    Malformed(String),
    /// An SVID has exactly one URI name.
    #[error("an SVID has exactly one URI in its subject alternative names, this certificate has {0}")]
    UriNames(usize),
    /// The URI is not a SPIFFE ID.
    #[error("the certificate's URI is not a SPIFFE ID: {0}")]
    SpiffeId(#[source] SpiffeError),
    /// A leaf names somebody, not the trust domain itself.
    #[error("{0} has no path: it names a trust domain, which only authorities may")]
    NoPath(SpiffeId),
    /// A leaf must not be a CA.
    #[error("the certificate of {0} is a CA's: an authority must not act as a peer")]
    IsCa(SpiffeId),
    /// An authority must be a CA.
    #[error("the certificate is not a CA's: basic constraints and key usage must say so")]
    NotCa,
    /// An authority is named like its trust domain.
    #[error("an authority's one URI must be its trust domain's SPIFFE ID without a path, not {0}")]
    AuthorityName(SpiffeId),
    /// Leaves sign handshakes and nothing else.
    #[error("the key usage of {0} must have digitalSignature, and neither keyCertSign nor cRLSign")]
    KeyUsage(SpiffeId),
    /// SVIDs are used at both ends.
    #[error("the extended key usage of {0} must have both serverAuth and clientAuth")]
    ExtendedKeyUsage(SpiffeId),
    /// Another kind of key.
    #[error("the certificate's key is not an uncompressed ECDSA P-256 public key")]
    KeyType,
}

/// What a certificate that follows the leaf profile says.
#[derive(Clone, Debug)]
pub(crate) struct LeafProfile {
    pub(crate) id: SpiffeId,
    pub(crate) spki_sha256: Sha256Digest,
    pub(crate) validity: Validity,
}

/// What a certificate that follows the authority profile says.
#[derive(Clone, Debug)]
pub(crate) struct AuthorityProfile {
    pub(crate) domain: TrustDomain,
    pub(crate) public_point: [u8; P256_POINT_BYTES],
    pub(crate) validity: Validity,
}

/// From the first to the last second in which a certificate counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Validity {
    pub(crate) not_before: UnixTime,
    pub(crate) not_after: UnixTime,
}

impl Validity {
    /// The time in which both count.
    pub(crate) fn intersect(self, other: Self) -> Self {
        Self { not_before: self.not_before.max(other.not_before), not_after: self.not_after.min(other.not_after) }
    }
}

/// Holds a leaf to the profile. Says nothing about who signed it.
pub(crate) fn leaf(der: &[u8]) -> Result<LeafProfile, ProfileError> {
    let certificate = parse(der)?;
    let id = one_spiffe_id(&certificate)?;
    if id.path().is_empty() {
        return Err(ProfileError::NoPath(id));
    }
    if basic_constraints(&certificate)?.is_some_and(|constraints| constraints.ca) {
        return Err(ProfileError::IsCa(id));
    }
    match certificate.key_usage().map_err(malformed)?.map(|extension| extension.value) {
        Some(usage) if usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign() => {}
        _ => return Err(ProfileError::KeyUsage(id)),
    }
    match certificate.extended_key_usage().map_err(malformed)?.map(|extension| extension.value) {
        Some(usage) if usage.server_auth && usage.client_auth => {}
        _ => return Err(ProfileError::ExtendedKeyUsage(id)),
    }
    p256_point(certificate.public_key())?;
    Ok(LeafProfile {
        id,
        spki_sha256: Sha256Digest::of(certificate.public_key().raw),
        validity: validity(&certificate)?,
    })
}

/// Holds a root or an issuer to the profile. Says nothing about who signed it.
pub(crate) fn authority(der: &[u8]) -> Result<AuthorityProfile, ProfileError> {
    let certificate = parse(der)?;
    let is_ca = basic_constraints(&certificate)?.is_some_and(|constraints| constraints.ca);
    let signs = certificate.key_usage().map_err(malformed)?.is_some_and(|usage| usage.value.key_cert_sign());
    if !(is_ca && signs) {
        return Err(ProfileError::NotCa);
    }
    let id = one_spiffe_id(&certificate)?;
    if !id.path().is_empty() {
        return Err(ProfileError::AuthorityName(id));
    }
    Ok(AuthorityProfile {
        domain: TrustDomain::parse(id.trust_domain()).map_err(ProfileError::SpiffeId)?,
        public_point: p256_point(certificate.public_key())?,
        validity: validity(&certificate)?,
    })
}

/// The key as an uncompressed P-256 point. The encoding must be the canonical one: the revocation set knows keys by the
/// digest of their encoding, so no key may have two.
pub(crate) fn p256_point(spki: &SubjectPublicKeyInfo<'_>) -> Result<[u8; P256_POINT_BYTES], ProfileError> {
    let point =
        <[u8; P256_POINT_BYTES]>::try_from(&*spki.subject_public_key.data).map_err(|_| ProfileError::KeyType)?;
    let canonical = public_key_to_spki(&alg_id::ECDSA_P256, point);
    if point[0] != 0x04 || canonical.as_ref() != spki.raw {
        return Err(ProfileError::KeyType);
    }
    Ok(point)
}

/// The one URI among these names, as a SPIFFE ID.
pub(crate) fn one_uri<'a>(names: impl IntoIterator<Item = &'a GeneralName<'a>>) -> Result<SpiffeId, ProfileError> {
    let mut uris = names.into_iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (Some(uri), 0) => SpiffeId::parse(uri).map_err(ProfileError::SpiffeId),
        (first, more) => Err(ProfileError::UriNames(usize::from(first.is_some()) + more)),
    }
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, ProfileError> {
    if der.len() > MAX_CERTIFICATE_BYTES {
        return Err(ProfileError::TooLarge(der.len()));
    }
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(ProfileError::Malformed("bytes follow its end".into())),
        Err(error) => Err(malformed(error)),
    }
}

fn one_spiffe_id(certificate: &X509Certificate<'_>) -> Result<SpiffeId, ProfileError> {
    match certificate.subject_alternative_name().map_err(malformed)? {
        None => Err(ProfileError::UriNames(0)),
        Some(names) => one_uri(&names.value.general_names),
    }
}

fn basic_constraints<'a>(
    certificate: &'a X509Certificate<'_>,
) -> Result<Option<&'a x509_parser::extensions::BasicConstraints>, ProfileError> {
    Ok(certificate.basic_constraints().map_err(malformed)?.map(|extension| extension.value))
}

fn validity(certificate: &X509Certificate<'_>) -> Result<Validity, ProfileError> {
    let validity = certificate.validity();
    Ok(Validity {
        not_before: unix_time(validity.not_before.timestamp())?,
        not_after: unix_time(validity.not_after.timestamp())?,
    })
}

fn unix_time(seconds: i64) -> Result<UnixTime, ProfileError> {
    match u64::try_from(seconds) {
        Ok(seconds) => Ok(UnixTime::since_unix_epoch(Duration::from_secs(seconds))),
        Err(_) => Err(ProfileError::Malformed("its validity begins or ends before 1970".into())),
    }
}

fn malformed(error: impl std::fmt::Display) -> ProfileError {
    ProfileError::Malformed(error.to_string())
}
