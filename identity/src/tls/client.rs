//! The side that connects.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, ResolvesClientCert, Resumption};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::crypto_provider;
use super::error::{TlsError, to_rustls};
use crate::SpiffeId;
use crate::svid::SvidStore;
use crate::trust::Trust;
use crate::verify::VerifyError;

/// Whom a client accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpectedPeer {
    /// Exactly the identity whose [`super::server_name`] the connection is made with.
    ServerName,
    /// Any controller of the trust domain, whatever name or address the connection is made with: clients know their
    /// controllers by address. Also before revocations are loaded ([`Trust::verify_controller`]).
    AnyController,
}

/// For connecting as `own`, with whatever SVID `svids` holds for it when a handshake begins. While it holds none, every
/// handshake fails on this side.
pub fn client_config(
    svids: &SvidStore,
    own: &SpiffeId,
    trust: &Trust,
    expected: ExpectedPeer,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TlsError> {
    let own = OwnIdentity { svids: svids.clone(), id: own.clone() };
    let verifier = PeerVerifier { trust: trust.clone(), expected, own: Some(own.clone()) };
    configure(Arc::new(verifier), Some(own), alpn)
}

/// For connecting without a certificate (an operator who has a bearer token): the server is verified all the same.
pub fn anonymous_client_config(
    trust: &Trust,
    expected: ExpectedPeer,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TlsError> {
    configure(Arc::new(PeerVerifier { trust: trust.clone(), expected, own: None }), None, alpn)
}

pub(super) fn configure(
    verifier: Arc<dyn ServerCertVerifier>,
    own: Option<OwnIdentity>,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, TlsError> {
    let builder = ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Provider)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match own {
        Some(own) => builder.with_client_cert_resolver(Arc::new(own)),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

/// One of the identities in a store: the one that a client connects as.
#[derive(Clone, Debug)]
pub(super) struct OwnIdentity {
    svids: SvidStore,
    id: SpiffeId,
}

impl ResolvesClientCert for OwnIdentity {
    fn resolve(&self, _root_hints: &[&[u8]], _schemes: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.svids.get(&self.id).map(|svid| Arc::clone(svid.certified()))
    }

    fn has_certs(&self) -> bool {
        self.svids.get(&self.id).is_some()
    }
}

#[derive(Debug)]
struct PeerVerifier {
    trust: Trust,
    expected: ExpectedPeer,
    own: Option<OwnIdentity>,
}

impl PeerVerifier {
    fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), VerifyError> {
        // A client that lost its SVID would otherwise finish the handshake and send data before the server's refusal.
        if let Some(own) = self.own.as_ref().filter(|own| !own.has_certs()) {
            return Err(VerifyError::NoOwnSvid(own.id.clone()));
        }
        match self.expected {
            ExpectedPeer::AnyController => self.trust.verify_controller(chain, now).map(drop),
            ExpectedPeer::ServerName => {
                let peer = self.trust.verify(chain, now)?;
                let expected = server_name.to_str();
                if peer.id().server_name().as_deref() == Some(&*expected) {
                    return Ok(());
                }
                Err(VerifyError::UnexpectedPeer { found: peer.id().clone(), expected: expected.into_owned() })
            }
        }
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(&chain(end_entity, intermediates), server_name, now).map_err(to_rustls)?;
        Ok(ServerCertVerified::assertion())
    }

    super::signatures!();
}

/// Leaf first, as [`crate::verify`] takes it; borrowed.
pub(super) fn chain<'a>(
    end_entity: &'a CertificateDer<'_>,
    intermediates: &'a [CertificateDer<'_>],
) -> Vec<CertificateDer<'a>> {
    std::iter::once(end_entity).chain(intermediates).map(|certificate| CertificateDer::from(&**certificate)).collect()
}
