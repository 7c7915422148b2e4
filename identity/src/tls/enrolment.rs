//! A node's first connection: it has no identity and trusts nobody yet but the root whose fingerprint its token carries.

use std::sync::Arc;

use rustls::CommonState;
use rustls::client::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::client::{chain, configure};
use super::error::{TlsError, to_rustls};
use super::presented;
use crate::SpiffeId;
use crate::bundle::TrustBundle;
use crate::digest::Sha256Digest;
use crate::profile::MAX_CERTIFICATE_BYTES;
use crate::verify::{self, ChainVerified, MAX_CHAIN, VerifyError};

/// For enrolling: trusts exactly the root certificate with this SHA-256, which the controller presents at the end of its
/// chain ([`crate::svid::Svid::presenting_root`]), and accepts any controller of the trust domain that this root states.
///
/// The connection may be made with any server name or address. No client certificate is shown, and no revocations are
/// consulted: a node that is enrolling has neither, and the token names the authority, not the controller.
pub fn enrolment_client_config(root: Sha256Digest, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
    configure(Arc::new(EnrolmentVerifier { root }), None, alpn)
}

/// The controller that an enrolling node talks to.
#[derive(Clone, Debug)]
pub struct EnrolmentPeer {
    controller: SpiffeId,
    bundle: TrustBundle,
}

impl EnrolmentPeer {
    /// Its identity.
    pub fn controller(&self) -> &SpiffeId {
        &self.controller
    }

    /// The root that the token names, as a bundle; also tells the trust domain.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }
}

/// Who is at the other end of a connection that was made with [`enrolment_client_config`]. Verifies it all again.
pub fn enrolment_peer(
    connection: &CommonState,
    root: Sha256Digest,
    now: UnixTime,
) -> Result<EnrolmentPeer, VerifyError> {
    verify_controller(presented(connection).ok_or(VerifyError::NoCertificate)?, root, now)
}

fn verify_controller(
    chain: &[CertificateDer<'_>],
    root: Sha256Digest,
    now: UnixTime,
) -> Result<EnrolmentPeer, VerifyError> {
    if chain.len() > MAX_CHAIN {
        return Err(VerifyError::ChainTooLong(chain.len()));
    }
    let presented = chain
        .iter()
        .filter(|certificate| certificate.len() <= MAX_CERTIFICATE_BYTES)
        .find(|certificate| Sha256Digest::of(certificate) == root)
        .ok_or(VerifyError::RootNotPresented(root))?;
    let bundle = TrustBundle::from_der([presented.clone().into_owned()])
        .map_err(|error| VerifyError::EnrolmentRoot(error.to_string()))?;
    let ChainVerified { id, .. } = verify::verify_chain(chain, &bundle, bundle.domain(), now)?;
    verify::require_controller(&id)?;
    Ok(EnrolmentPeer { controller: id, bundle })
}

#[derive(Debug)]
struct EnrolmentVerifier {
    root: Sha256Digest,
}

impl ServerCertVerifier for EnrolmentVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_controller(&chain(end_entity, intermediates), self.root, now).map_err(to_rustls)?;
        Ok(ServerCertVerified::assertion())
    }

    super::signatures!();
}
