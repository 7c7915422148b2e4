//! Certificate signing requests (PKCS#10) from outside: limits, syntax and proof of possession.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls_pki_types::alg_id;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer;

use crate::SpiffeId;
use crate::digest::Sha256Digest;
use crate::profile::{self, P256_POINT_BYTES, ProfileError};

/// A request above this is refused unparsed. A SPIFFE ID may have 2048 bytes; the rest has about 250.
pub const MAX_CSR_BYTES: usize = 4 * 1024;

/// A request whose sender has shown that it holds the private key. Only [`VerifiedCsr::parse`] makes one.
///
/// Nothing but the public key and the name that was asked for is read: whatever else a request asks for (another
/// subject, CA rights, a longer life) is not heard.
#[derive(Clone, Debug)]
pub struct VerifiedCsr {
    id: SpiffeId,
    public_point: [u8; P256_POINT_BYTES],
    spki_sha256: Sha256Digest,
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Too big to look at.
    #[error("the certificate signing request has {0} bytes: at most {MAX_CSR_BYTES} are accepted")]
    TooLarge(usize),
    /// Not DER, not PKCS#10, or something after its end.
    #[error("not one well-formed PKCS#10 certificate signing request: {0}")]
    Malformed(String),
    /// The one name.
    #[error(
        "a certificate signing request must ask for exactly one SPIFFE ID, as its only subject alternative name: {0}"
    )]
    Name(String),
    /// Only P-256 with SHA-256.
    #[error("a certificate signing request must have an ECDSA P-256 key and be signed with ecdsa-with-SHA256")]
    Algorithm,
    /// The sender does not hold the key.
    #[error("the certificate signing request for {0} is not signed by the key that it asks a certificate for")]
    Signature(SpiffeId),
}

impl VerifiedCsr {
    /// Parses a request, DER, and verifies its signature with its own public key.
    pub fn parse(der: &[u8]) -> Result<Self, CsrError> {
        if der.len() > MAX_CSR_BYTES {
            return Err(CsrError::TooLarge(der.len()));
        }
        let request = match X509CertificationRequest::from_der(der) {
            Ok(([], request)) => request,
            Ok(_) => return Err(CsrError::Malformed("bytes follow its end".into())),
            Err(error) => return Err(CsrError::Malformed(error.to_string())),
        };
        let info = &request.certification_request_info;
        let public_point = profile::p256_point(&info.subject_pki).map_err(|_| CsrError::Algorithm)?;
        let signature = &*request.signature_value.data;
        if !frames_ecdsa_with_sha256(der, info.raw, signature) {
            return Err(CsrError::Algorithm);
        }
        let id = requested_id(&request)?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, public_point)
            .verify(info.raw, signature)
            .map_err(|_| CsrError::Signature(id.clone()))?;
        Ok(Self { id, public_point, spki_sha256: Sha256Digest::of(info.subject_pki.raw) })
    }

    /// The identity that it asks for. Whether the sender may have it is for the caller to know.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    pub fn spki_sha256(&self) -> Sha256Digest {
        self.spki_sha256
    }
}

impl rcgen::PublicKeyData for VerifiedCsr {
    fn der_bytes(&self) -> &[u8] {
        &self.public_point
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

/// Whether the signed part is in a SEQUENCE in which exactly the algorithm identifier of ecdsa-with-SHA256 and the signature
/// follow it, in DER. The signature does not cover these bytes, and the parser is not strict about their tags.
fn frames_ecdsa_with_sha256(der: &[u8], info: &[u8], signature: &[u8]) -> bool {
    // An ECDSA signature of P-256 has at most 72 bytes, so all lengths here are of the short form.
    let Ok(bits_length @ ..=0x7f) = u8::try_from(signature.len() + 1) else {
        return false;
    };
    let algorithm = alg_id::ECDSA_SHA256.as_ref();
    let tail = [&[0x30, algorithm.len() as u8], algorithm, &[0x03, bits_length, 0], signature].concat();
    let header = der.strip_suffix(&*tail).and_then(|rest| rest.strip_suffix(info));
    header.is_some_and(|header| header.first() == Some(&0x30))
}

fn requested_id(request: &X509CertificationRequest<'_>) -> Result<SpiffeId, CsrError> {
    // Every occurrence counts: two requests of which one is looked at would be a way to smuggle the other.
    let mut names = request
        .certification_request_info
        .iter_attributes()
        .filter_map(|attribute| match attribute.parsed_attribute() {
            ParsedCriAttribute::ExtensionRequest(requested) => Some(&requested.extensions),
            _ => None,
        })
        .flatten()
        .filter_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(names) => Some(names),
            _ => None,
        });
    let (Some(first), None) = (names.next(), names.next()) else {
        return Err(CsrError::Name("it has none, or more than one extension of that kind".into()));
    };
    if first.general_names.len() > 1 {
        return Err(CsrError::Name(format!("it has {}", first.general_names.len())));
    }
    profile::one_uri(&first.general_names).map_err(|error| match error {
        ProfileError::SpiffeId(error) => CsrError::Name(error.to_string()),
        other => CsrError::Name(other.to_string()),
    })
}
