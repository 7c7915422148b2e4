//! Certificates that attackers have: none, forged ones, and real ones that were taken or that are no longer good.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};

use opencluster_identity::tls::crypto_provider;

/// Who somebody claims to be.
#[derive(Args, Clone, Debug)]
pub(crate) struct Claim {
    /// Where the certificate comes from
    #[arg(long, value_enum, default_value = "none")]
    identity: Kind,
    /// The SPIFFE ID in a forged certificate
    #[arg(long, value_name = "SPIFFE-ID", default_value = "spiffe://rig.test/ns/default/sa/a")]
    id: String,
    /// A real certificate chain, PEM
    #[arg(long, value_name = "FILE")]
    chain: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// No certificate
    None,
    /// Signed by an authority of one's own that looks just like the real one
    Foreign,
    /// Signed by its own key
    SelfSigned,
    /// The files of --chain and --key
    Files,
}

type Credentials = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Claim {
    fn credentials(&self) -> anyhow::Result<Option<Credentials>> {
        let uri = |text: &str| anyhow::Ok(SanType::URI(text.try_into()?));
        let leaf = || {
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![uri(&self.id)?];
            params.distinguished_name = rcgen::DistinguishedName::new();
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
            anyhow::Ok(params)
        };
        let key = KeyPair::generate()?;
        Ok(match self.identity {
            Kind::None => None,
            Kind::SelfSigned => {
                let certificate = leaf()?.self_signed(&key)?;
                Some((
                    vec![certificate.der().clone()],
                    PrivateKeyDer::try_from(key.serialize_der()).map_err(wrong_key)?,
                ))
            }
            Kind::Foreign => {
                let mut authority = CertificateParams::default();
                authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
                authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
                let domain = self.id.split('/').take(3).collect::<Vec<_>>().join("/");
                authority.subject_alt_names = vec![uri(&domain)?];
                let issuer = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
                let certificate = leaf()?.signed_by(&key, &issuer)?;
                let chain = vec![certificate.der().clone(), issuer.der().clone()];
                Some((chain, PrivateKeyDer::try_from(key.serialize_der()).map_err(wrong_key)?))
            }
            Kind::Files => {
                let (Some(chain), Some(key)) = (&self.chain, &self.key) else { bail!("give --chain and --key") };
                let chain = CertificateDer::pem_file_iter(chain)?.collect::<Result<Vec<_>, _>>()?;
                Some((chain, PrivateKeyDer::from_pem_file(key).context("the key")?))
            }
        })
    }

    /// A client that claims this, and that takes any server for the right one: attackers do not verify.
    pub(crate) fn client(&self) -> anyhow::Result<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer));
        Ok(match self.credentials()? {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
            None => builder.with_no_client_auth(),
        })
    }

    /// A server that claims this, and that takes any client.
    pub(crate) fn server(&self) -> anyhow::Result<ServerConfig> {
        let (chain, key) = self.credentials()?.context("a server needs a certificate")?;
        let builder = ServerConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?;
        Ok(builder.with_no_client_auth().with_single_cert(chain, key)?)
    }
}

fn wrong_key(message: &'static str) -> anyhow::Error {
    anyhow::anyhow!(message)
}

/// Takes any server for the right one.
#[derive(Debug)]
pub(crate) struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        crypto_provider().signature_verification_algorithms.supported_schemes()
    }
}
