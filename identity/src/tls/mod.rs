//! rustls configurations: TLS 1.3 only, AES-GCM only, X25519MLKEM768 or X25519, and SPIFFE identities on both sides.
//!
//! | who connects to whom | client | server |
//! |---|---|---|
//! | proxy to proxy | [`client_config`] with [`ExpectedPeer::ServerName`] | [`server_config`], by server name, [`ClientAuth::Required`] |
//! | node to controller | [`client_config`] with [`ExpectedPeer::AnyController`] | [`server_config`], fixed, [`ClientAuth::Optional`] |
//! | node without an identity to controller | [`enrolment_client_config`] | the same |
//! | operator with a certificate | as a node | the same |
//! | operator with a token | [`anonymous_client_config`] | the same |
//!
//! No tickets, no resumption, no early data: every connection is verified anew, so that a revocation is never bypassed.
//! Bundle, revocations and SVIDs are looked up at every handshake: replace them in place, never rebuild a configuration.

/// What all verifiers say of handshakes' signatures: rustls has no type for it that the traits of clients and servers share.
macro_rules! signatures {
    () => {
        /// rustls asks verifiers for TLS 1.2, too; no configuration of ours offers it.
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls13_signature(message, cert, dss, &super::SIGNATURE_ALGORITHMS)
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            super::SIGNATURE_ALGORITHMS.supported_schemes()
        }
    };
}
use signatures;

mod client;
mod enrolment;
mod error;
mod server;

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs as provider};
use rustls::{CommonState, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::aws_lc_rs::{ECDSA_P256_SHA256, ECDSA_P384_SHA384};

pub use client::{ExpectedPeer, anonymous_client_config, client_config};
pub use enrolment::{EnrolmentPeer, enrolment_client_config, enrolment_peer};
pub use error::{TlsError, refusal};
pub use server::{ClientAuth, ServerIdentity, server_config};

use crate::SpiffeId;
use crate::trust::Trust;
use crate::verify::{PeerVerified, VerifyError};

/// The crypto provider of every configuration: aws-lc-rs with less.
pub fn crypto_provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                provider::cipher_suite::TLS13_AES_128_GCM_SHA256,
                provider::cipher_suite::TLS13_AES_256_GCM_SHA384,
            ],
            kx_groups: vec![provider::kx_group::X25519MLKEM768, provider::kx_group::X25519],
            signature_verification_algorithms: SIGNATURE_ALGORITHMS,
            ..provider::default_provider()
        })
    });
    Arc::clone(&PROVIDER)
}

/// Authorities may be P-256 or P-384; who signs a handshake has a P-256 key.
pub(crate) static SIGNATURE_ALGORITHMS: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: &[ECDSA_P256_SHA256, ECDSA_P384_SHA384],
    mapping: &[(SignatureScheme::ECDSA_NISTP256_SHA256, &[ECDSA_P256_SHA256])],
};

/// The TLS server name by which a client asks for exactly this identity ([`ExpectedPeer::ServerName`]).
pub fn server_name(id: &SpiffeId) -> Result<ServerName<'static>, TlsError> {
    let name = id.server_name().ok_or_else(|| TlsError::NoServerName(id.clone()))?;
    ServerName::try_from(name).map_err(|_| TlsError::NoServerName(id.clone()))
}

/// Who is at the other end of a connection, after its handshake; `None`: the client showed no certificate (only where
/// that is optional).
///
/// Time and revocations are checked again; signatures only if this `trust` has not verified the same chain before, so
/// after a handshake that was made with it this is cheap. It is safe on any connection, whoever configured it.
pub fn peer_of(connection: &CommonState, trust: &Trust, now: UnixTime) -> Result<Option<PeerVerified>, VerifyError> {
    presented(connection).map(|chain| trust.verify(chain, now)).transpose()
}

/// Like [`peer_of`] for the client of a controller: the peer must be one ([`Trust::verify_controller`]).
pub fn controller_of(connection: &CommonState, trust: &Trust, now: UnixTime) -> Result<PeerVerified, VerifyError> {
    trust.verify_controller(presented(connection).ok_or(VerifyError::NoCertificate)?, now)
}

/// Certificates count only once the handshake is over: until then their sender has not shown to hold the key.
fn presented(connection: &CommonState) -> Option<&[CertificateDer<'static>]> {
    connection.peer_certificates().filter(|_| !connection.is_handshaking())
}
