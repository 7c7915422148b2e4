//! The side that accepts.

use std::sync::Arc;

use rustls::DistinguishedName;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerConfig};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::client::chain;
use super::crypto_provider;
use super::error::{TlsError, to_rustls};
use crate::SpiffeId;
use crate::svid::SvidStore;
use crate::trust::Trust;

/// Whether clients must show an SVID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// No SVID, no connection: proxies.
    Required,
    /// Who shows none is let in as nobody: enrolment and bearer tokens. Who shows a bad one is refused.
    Optional,
}

/// Who the server is.
#[derive(Clone, Debug)]
pub enum ServerIdentity {
    /// The identity that the client asks for by [`super::server_name`]; a client that asks for none, or for one that the
    /// store does not hold, is refused. For proxies, which speak for many workloads.
    ByServerName(SvidStore),
    /// Always this one, whatever name the client asks for. For controllers, which nodes know by address.
    Fixed(SvidStore, SpiffeId),
}

/// For accepting connections.
///
/// A client that offers protocols (ALPN) of which none is in `alpn` is refused. One that offers none at all is not: who
/// speaks more than one protocol must look at the connection's `alpn_protocol`.
pub fn server_config(
    identity: ServerIdentity,
    trust: &Trust,
    client_auth: ClientAuth,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Provider)?
        .with_client_cert_verifier(Arc::new(PeerVerifier { trust: trust.clone(), client_auth }))
        .with_cert_resolver(Arc::new(identity));
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.send_half_rtt_data = false;
    Ok(Arc::new(config))
}

impl ResolvesServerCert for ServerIdentity {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let svid = match self {
            Self::ByServerName(svids) => svids.by_server_name(hello.server_name()?),
            Self::Fixed(svids, id) => svids.get(id),
        };
        svid.map(|svid| Arc::clone(svid.certified()))
    }
}

#[derive(Debug)]
struct PeerVerifier {
    trust: Trust,
    client_auth: ClientAuth,
}

impl ClientCertVerifier for PeerVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        self.client_auth == ClientAuth::Required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.trust.verify(&chain(end_entity, intermediates), now).map_err(to_rustls)?;
        Ok(ClientCertVerified::assertion())
    }

    super::signatures!();
}
