//! The authorities: a root that signs issuers, and an issuer that signs SVIDs.
//!
//! The root lives long and signs rarely: it can be kept off line. The issuer signs for as long as it is valid, and only
//! SVIDs (path length 0). Both name their trust domain in their one URI, and verification holds every issuer of a chain to
//! it: an issuer of another trust domain under the same root cannot vouch for ours. (A URI name constraint would say the
//! same to other software, but webpki and rcgen do not implement it; with one, webpki refuses every SVID.)

use std::fmt;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::bundle::{BundleError, TrustBundle};
use crate::csr::{CsrError, VerifiedCsr};
use crate::digest::Sha256Digest;
use crate::key::{KeyError, PrivateKey};
use crate::profile::{self, MAX_CERTIFICATE_BYTES, ProfileError, Validity};
use crate::{SpiffeId, TrustDomain};

/// How long an SVID lives unless something else is asked for.
pub const DEFAULT_SVID_TTL: Duration = Duration::from_hours(1);

/// How long a root lives unless something else is asked for: ten years.
pub const DEFAULT_ROOT_LIFETIME: Duration = Duration::from_hours(10 * 365 * 24);

/// How long an issuer lives unless something else is asked for: one year.
pub const DEFAULT_ISSUER_LIFETIME: Duration = Duration::from_hours(365 * 24);

/// Certificates count from up to this long before they are made, for verifiers whose clocks are behind.
const MAX_BACKDATE: Duration = Duration::from_mins(1);

/// The root authority of a trust domain.
pub struct Root(Authority);

/// The authority that signs SVIDs.
pub struct Issuer(Authority);

/// A certificate that was just signed.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, then the issuer; without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// Whose.
    pub id: SpiffeId,
    /// SHA-256 of its public key: what a revocation of it will name.
    pub spki_sha256: Sha256Digest,
    /// From when it counts.
    pub not_before: UnixTime,
    /// Until when it counts.
    pub not_after: UnixTime,
    /// Its serial number, hex.
    pub serial: String,
}

/// Why an authority did not do it.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The CSR.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The CSR asks for somebody else.
    #[error("the certificate signing request asks for {requested}, its sender may only have {expected}")]
    WrongIdentity {
        /// In the CSR.
        requested: SpiffeId,
        /// What the caller allows.
        expected: SpiffeId,
    },
    /// Another trust domain.
    #[error("{id} is not of this authority's trust domain `{ours}`")]
    TrustDomain {
        /// For whom.
        id: SpiffeId,
        /// Ours.
        ours: TrustDomain,
    },
    /// No path.
    #[error("{0} names the trust domain itself: an SVID needs a path")]
    NoPath(SpiffeId),
    /// Of no use to anyone.
    #[error("a certificate with a lifetime of {0:?} cannot be issued: whole seconds are needed, at least one")]
    Lifetime(Duration),
    /// Too late, or too early.
    #[error(
        "this authority's own certificate counts from {not_before} to {not_after} (Unix seconds), and now it is {now}"
    )]
    OutsideValidity {
        /// First second.
        not_before: u64,
        /// Last second.
        not_after: u64,
        /// Now.
        now: u64,
    },
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The random number generator failed.
    #[error("the random number generator failed")]
    Random,
    /// rcgen.
    #[error("could not make a certificate for {uri}")]
    Sign {
        /// For whom.
        uri: String,
        /// Why.
        source: rcgen::Error,
    },
    /// A time that X.509 cannot say.
    #[error("{0} (Unix seconds) is beyond what a certificate can say")]
    Time(u64),
    /// The sealed secret is not one.
    #[error("not the secret of a {kind} authority: {reason}")]
    Secret {
        /// "root" or "issuer".
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Its certificate is not what it should be.
    #[error("the authority's certificate is not a SPIFFE authority's")]
    Profile(#[from] ProfileError),
    /// Its bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

impl Root {
    /// Makes a root for a trust domain.
    pub fn create(domain: &TrustDomain, lifetime: Duration, now: UnixTime) -> Result<Self, AuthorityError> {
        let key = PrivateKey::generate()?;
        let validity = validity(lifetime, now, None)?;
        let params = authority_params(domain, &ROOT, 1, validity)?;
        let certificate = params
            .self_signed(&key)
            .map_err(|source| AuthorityError::Sign { uri: format!("the root of {domain}"), source })?;
        Ok(Self(Authority { kind: &ROOT, domain: domain.clone(), key, certificate: certificate.into(), validity }))
    }

    /// Makes an issuer, which never outlives the root.
    pub fn create_issuer(&self, lifetime: Duration, now: UnixTime) -> Result<Issuer, AuthorityError> {
        let root = &self.0;
        let key = PrivateKey::generate()?;
        let validity = validity(lifetime, now, Some(root.validity))?;
        let params = authority_params(&root.domain, &ISSUER, 0, validity)?;
        let certificate = root
            .sign(&params, &key)
            .map_err(|source| AuthorityError::Sign { uri: format!("the issuer of {}", root.domain), source })?;
        Ok(Issuer(Authority { kind: &ISSUER, domain: root.domain.clone(), key, certificate, validity }))
    }

    /// The root's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.0.certificate
    }

    /// A bundle of this one root.
    pub fn bundle(&self) -> Result<TrustBundle, AuthorityError> {
        Ok(TrustBundle::from_der([self.0.certificate.clone()])?)
    }

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        &self.0.domain
    }

    /// Until when it counts.
    pub fn not_after(&self) -> UnixTime {
        self.0.validity.not_after
    }

    /// The private key and the certificate, in the clear: for the controller's sealed store and nothing else.
    pub fn danger_secret_bytes(&self) -> Result<Zeroizing<Vec<u8>>, AuthorityError> {
        self.0.danger_secret_bytes()
    }

    /// What [`Root::danger_secret_bytes`] gave.
    pub fn from_secret_bytes(bytes: &[u8]) -> Result<Self, AuthorityError> {
        Authority::from_secret_bytes(&ROOT, bytes).map(Self)
    }
}

impl Issuer {
    /// Signs the SVID of `expected` for whoever made this CSR.
    ///
    /// Of the CSR, only the public key is taken, after its signature was verified and the name that it asks for was found
    /// to be `expected`. The SVID never outlives the issuer.
    pub fn issue(
        &self,
        csr_der: &[u8],
        expected: &SpiffeId,
        ttl: Duration,
        now: UnixTime,
    ) -> Result<Issued, AuthorityError> {
        let issuer = &self.0;
        let csr = VerifiedCsr::parse(csr_der)?;
        if csr.id() != expected {
            return Err(AuthorityError::WrongIdentity { requested: csr.id().clone(), expected: expected.clone() });
        }
        if expected.trust_domain() != issuer.domain.as_str() {
            return Err(AuthorityError::TrustDomain { id: expected.clone(), ours: issuer.domain.clone() });
        }
        if expected.path().is_empty() {
            return Err(AuthorityError::NoPath(expected.clone()));
        }
        let validity = validity(ttl, now, Some(issuer.validity))?;
        let (params, serial) = leaf_params(expected, validity)?;
        let leaf =
            issuer.sign(&params, &csr).map_err(|source| AuthorityError::Sign { uri: expected.to_string(), source })?;
        Ok(Issued {
            chain: vec![leaf, issuer.certificate.clone()],
            id: expected.clone(),
            spki_sha256: csr.spki_sha256(),
            not_before: validity.not_before,
            not_after: validity.not_after,
            serial,
        })
    }

    /// The issuer's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.0.certificate
    }

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        &self.0.domain
    }

    /// Until when it counts.
    pub fn not_after(&self) -> UnixTime {
        self.0.validity.not_after
    }

    /// The private key and the certificate, in the clear: for the controller's sealed store and nothing else.
    pub fn danger_secret_bytes(&self) -> Result<Zeroizing<Vec<u8>>, AuthorityError> {
        self.0.danger_secret_bytes()
    }

    /// What [`Issuer::danger_secret_bytes`] gave.
    pub fn from_secret_bytes(bytes: &[u8]) -> Result<Self, AuthorityError> {
        Authority::from_secret_bytes(&ISSUER, bytes).map(Self)
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

struct Authority {
    kind: &'static Kind,
    domain: TrustDomain,
    key: PrivateKey,
    certificate: CertificateDer<'static>,
    validity: Validity,
}

/// What tells the two apart.
struct Kind {
    /// In messages.
    name: &'static str,
    /// In certificates.
    common_name: &'static str,
    /// First bytes of the secret: kind and format version.
    magic: &'static [u8; 8],
}

static ROOT: Kind = Kind { name: "root", common_name: "Root", magic: b"ocROOT\0\x01" };
static ISSUER: Kind = Kind { name: "issuer", common_name: "Issuer", magic: b"ocISSU\0\x01" };

impl Authority {
    fn sign(
        &self,
        params: &CertificateParams,
        subject_key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        // Only what ends up in the new certificate matters here: our name and key.
        let mut own = CertificateParams::default();
        own.distinguished_name = authority_name(self.kind);
        own.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let issuer = rcgen::Issuer::from_params(&own, &self.key);
        params.signed_by(subject_key, &issuer).map(CertificateDer::from)
    }

    /// Magic, scalar (32 bytes), certificate (the rest). The public key is in the certificate.
    fn danger_secret_bytes(&self) -> Result<Zeroizing<Vec<u8>>, AuthorityError> {
        let scalar = self.key.danger_scalar()?;
        // Allocated once, at its full size: growing would leave copies of the key behind.
        let length = self.kind.magic.len() + scalar.len() + self.certificate.len();
        let mut bytes = Zeroizing::new(Vec::with_capacity(length));
        bytes.extend_from_slice(self.kind.magic);
        bytes.extend_from_slice(&*scalar);
        bytes.extend_from_slice(&self.certificate);
        Ok(bytes)
    }

    fn from_secret_bytes(kind: &'static Kind, bytes: &[u8]) -> Result<Self, AuthorityError> {
        let refuse = |reason: &str| AuthorityError::Secret { kind: kind.name, reason: reason.into() };
        let rest = bytes.strip_prefix(kind.magic).ok_or_else(|| refuse("it does not begin like one"))?;
        let (scalar, certificate) = rest.split_first_chunk::<32>().ok_or_else(|| refuse("it is too short"))?;
        if certificate.len() > MAX_CERTIFICATE_BYTES {
            return Err(refuse("it is too long"));
        }
        let profile = profile::authority(certificate)?;
        let key = PrivateKey::from_scalar(scalar, &profile.public_point)
            .map_err(|_| refuse("its private key does not belong to its certificate"))?;
        Ok(Self {
            kind,
            domain: profile.domain,
            key,
            certificate: CertificateDer::from(certificate.to_vec()),
            validity: profile.validity,
        })
    }

    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(self.kind.common_name)
            .field("domain", &self.domain)
            .field("fingerprint", &Sha256Digest::of(&self.certificate))
            .field("not_after", &self.validity.not_after.as_secs())
            .finish_non_exhaustive()
    }
}

fn authority_params(
    domain: &TrustDomain,
    kind: &Kind,
    path_length: u8,
    validity: Validity,
) -> Result<CertificateParams, AuthorityError> {
    let (mut params, _) = params(&format!("spiffe://{domain}"), validity)?;
    params.distinguished_name = authority_name(kind);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn leaf_params(id: &SpiffeId, validity: Validity) -> Result<(CertificateParams, String), AuthorityError> {
    let (mut params, serial) = params(id.as_str(), validity)?;
    // No subject: the URI is the only name, and therefore (RFC 5280) critical.
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok((params, serial))
}

/// What all certificates have, and the serial number as text.
fn params(uri: &str, validity: Validity) -> Result<(CertificateParams, String), AuthorityError> {
    let mut serial = [0; 16];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| AuthorityError::Random)?;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = date_time(validity.not_before)?;
    params.not_after = date_time(validity.not_after)?;
    params.use_authority_key_identifier_extension = true;
    let name = uri.try_into().map_err(|source| AuthorityError::Sign { uri: uri.into(), source })?;
    params.subject_alt_names = vec![SanType::URI(name)];
    Ok((params, hex::encode(serial)))
}

fn authority_name(kind: &Kind) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Opencluster");
    name.push(DnType::CommonName, kind.common_name);
    name
}

/// From a little before `now` for `lifetime`, within the issuer's own.
fn validity(lifetime: Duration, now: UnixTime, issuer: Option<Validity>) -> Result<Validity, AuthorityError> {
    if lifetime.as_secs() == 0 {
        return Err(AuthorityError::Lifetime(lifetime));
    }
    // A tenth of a short life, so that half-life does not lie in the past when the certificate is made.
    let backdate = MAX_BACKDATE.as_secs().min(lifetime.as_secs() / 10);
    let not_before = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs().saturating_sub(backdate)));
    let not_after = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs().saturating_add(lifetime.as_secs())));
    let wanted = Validity { not_before, not_after };
    match issuer {
        None => Ok(wanted),
        Some(issuer) if (issuer.not_before..issuer.not_after).contains(&now) => Ok(wanted.intersect(issuer)),
        Some(issuer) => Err(AuthorityError::OutsideValidity {
            not_before: issuer.not_before.as_secs(),
            not_after: issuer.not_after.as_secs(),
            now: now.as_secs(),
        }),
    }
}

fn date_time(time: UnixTime) -> Result<OffsetDateTime, AuthorityError> {
    let seconds = i64::try_from(time.as_secs()).map_err(|_| AuthorityError::Time(time.as_secs()))?;
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| AuthorityError::Time(time.as_secs()))
}
