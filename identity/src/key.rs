//! Private keys: ECDSA P-256, generated in the process that uses them.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::encoding::AsBigEndian;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use rcgen::{CertificateParams, DistinguishedName, PublicKeyData, SanType};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::sign::{Signer, SigningKey, public_key_to_spki};
use rustls::{SignatureAlgorithm, SignatureScheme};
use rustls_pki_types::alg_id;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

use crate::SpiffeId;
use crate::digest::Sha256Digest;

/// A P-256 signing key.
///
/// There is no way to get the key out of it: it signs, makes CSRs, and disappears. (The authorities, whose keys must
/// outlive their process in the controller's sealed store, have the one exception, in their own module.)
/// AWS-LC overwrites the key's memory when the last owner drops it. Debug shows nothing of it.
pub struct PrivateKey {
    pair: Arc<EcdsaKeyPair>,
    spki: SubjectPublicKeyInfoDer<'static>,
    spki_sha256: Sha256Digest,
}

/// What can go wrong with a private key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The random number generator or the library failed.
    #[error("could not generate a P-256 key: the random number generator or the crypto library failed")]
    Generate,
    /// Not a P-256 private key.
    #[error("not an ECDSA P-256 private key in PKCS#8 or SEC 1 form: {0}")]
    Rejected(String),
    /// The CSR could not be made.
    #[error("could not make a certificate signing request for {id}")]
    Csr {
        /// For whom.
        id: SpiffeId,
        /// Why.
        source: rcgen::Error,
    },
}

impl PrivateKey {
    /// Makes a new key.
    pub fn generate() -> Result<Self, KeyError> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(|_| KeyError::Generate)?;
        Ok(Self::new(pair))
    }

    /// Reads a key that someone else keeps in a file: an operator's client key, PEM (PKCS#8 or SEC 1).
    pub fn from_pem(pem: &[u8]) -> Result<Self, KeyError> {
        let key =
            rustls_pki_types::PrivateKeyDer::from_pem_slice(pem).map_err(|e| KeyError::Rejected(e.to_string()))?;
        let key = Zeroizing::new(key);
        let pair = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, key.secret_der())
            .map_err(|e| KeyError::Rejected(e.to_string()))?;
        Ok(Self::new(pair))
    }

    /// A PKCS#10 request, DER, whose one SAN is `id` as a URI.
    pub fn csr_der(&self, id: &SpiffeId) -> Result<Vec<u8>, KeyError> {
        let failed = |source| KeyError::Csr { id: id.clone(), source };
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(failed)?)];
        Ok(params.serialize_request(self).map_err(failed)?.der().to_vec())
    }

    /// The public key as a SubjectPublicKeyInfo, DER.
    pub fn spki_der(&self) -> &[u8] {
        self.spki.as_ref()
    }

    /// SHA-256 of [`PrivateKey::spki_der`]: how revocations name this key.
    pub fn spki_sha256(&self) -> Sha256Digest {
        self.spki_sha256
    }

    /// The private scalar, for an authority's secret bytes only.
    pub(crate) fn danger_scalar(&self) -> Result<Zeroizing<[u8; 32]>, KeyError> {
        let scalar = self.pair.private_key().as_be_bytes().map_err(|_| KeyError::Generate)?;
        let mut out = Zeroizing::new([0; 32]);
        let start = 32usize.checked_sub(scalar.as_ref().len()).ok_or(KeyError::Generate)?;
        out[start..].copy_from_slice(scalar.as_ref());
        Ok(out)
    }

    /// The inverse of [`PrivateKey::danger_scalar`]; refuses a scalar that does not belong to `public_point`.
    pub(crate) fn from_scalar(scalar: &[u8; 32], public_point: &[u8]) -> Result<Self, KeyError> {
        EcdsaKeyPair::from_private_key_and_public_key(&ECDSA_P256_SHA256_ASN1_SIGNING, scalar, public_point)
            .map(Self::new)
            .map_err(|e| KeyError::Rejected(e.to_string()))
    }

    fn new(pair: EcdsaKeyPair) -> Self {
        let spki = public_key_to_spki(&alg_id::ECDSA_P256, pair.public_key());
        let spki_sha256 = Sha256Digest::of(spki.as_ref());
        Self { pair: Arc::new(pair), spki, spki_sha256 }
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(P-256, hidden)")
    }
}

impl PublicKeyData for PrivateKey {
    fn der_bytes(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for PrivateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        match self.pair.sign(&SystemRandom::new(), message) {
            Ok(signature) => Ok(signature.as_ref().to_vec()),
            Err(_) => Err(rcgen::Error::RingUnspecified),
        }
    }
}

impl SigningKey for PrivateKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = SignatureScheme::ECDSA_NISTP256_SHA256;
        offered.contains(&scheme).then(|| -> Box<dyn Signer> { Box::new(HandshakeSigner(Arc::clone(&self.pair))) })
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(SubjectPublicKeyInfoDer::from(self.spki.as_ref()))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

/// What rustls holds from choosing a signature scheme to sending CertificateVerify.
struct HandshakeSigner(Arc<EcdsaKeyPair>);

impl fmt::Debug for HandshakeSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HandshakeSigner(P-256, hidden)")
    }
}

impl Signer for HandshakeSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        match self.0.sign(&SystemRandom::new(), message) {
            Ok(signature) => Ok(signature.as_ref().to_vec()),
            Err(_) => {
                Err(rustls::Error::General("the crypto library could not sign with this process's own key".into()))
            }
        }
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ECDSA_NISTP256_SHA256
    }
}
