//! Certificates that attackers have: none, forged ones, and real ones that were taken or that are no longer good.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use opencluster_forge::{Forged, ForgingCa, forge_self_signed, gullible_client, gullible_server, leaf_params};
use rcgen::CertificateParams;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ServerConfig};
use time::OffsetDateTime;

use opencluster_identity::tls::crypto_provider;

/// Who somebody claims to be.
#[derive(Args, Clone, Debug)]
pub(crate) struct Claim {
    /// Where the certificate comes from
    #[arg(long, value_enum, default_value = "none")]
    identity: Kind,
    /// The SPIFFE ID in a forged certificate; more than one for a certificate of several names
    #[arg(long, value_name = "SPIFFE-ID", default_value = "spiffe://rig.test/ns/default/sa/a")]
    id: Vec<String>,
    /// From when a forged certificate counts, in seconds from now
    #[arg(long, value_name = "SECONDS", default_value_t = -1800, allow_negative_numbers = true)]
    from: i64,
    /// Until when
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, allow_negative_numbers = true)]
    until: i64,
    /// The stolen secret of an issuer
    #[arg(long, value_name = "FILE")]
    issuer: Option<PathBuf>,
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
    /// Signed by the cluster's own issuer, with the secret of --issuer
    Stolen,
    /// The files of --chain and --key
    Files,
}

type Credentials = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Claim {
    fn credentials(&self) -> anyhow::Result<Option<Credentials>> {
        let forged = match self.identity {
            Kind::None => return Ok(None),
            Kind::Files => {
                let (Some(chain), Some(key)) = (&self.chain, &self.key) else { bail!("give --chain and --key") };
                let chain = CertificateDer::pem_file_iter(chain)?.collect::<Result<Vec<_>, _>>()?;
                return Ok(Some((chain, PrivateKeyDer::from_pem_file(key).context("the key")?)));
            }
            Kind::SelfSigned => forge_self_signed(&self.leaf()?)?,
            Kind::Foreign => ForgingCa::create(self.domain()?, self.domain()?)?.forge(&self.leaf()?)?,
            Kind::Stolen => {
                let secret = fs::read(self.issuer.as_ref().context("give --issuer")?)?;
                ForgingCa::stolen(&secret)?.forge(&self.leaf()?)?
            }
        };
        let key = forged.private_key();
        let Forged { chain, .. } = forged;
        Ok(Some((chain, key)))
    }

    fn leaf(&self) -> anyhow::Result<CertificateParams> {
        let ids: Vec<_> = self.id.iter().map(String::as_str).collect();
        let mut params = leaf_params(&ids)?;
        let now = OffsetDateTime::now_utc();
        params.not_before = now + time::Duration::seconds(self.from);
        params.not_after = now + time::Duration::seconds(self.until);
        Ok(params)
    }

    /// Of the first name, which need not be a SPIFFE ID.
    fn domain(&self) -> anyhow::Result<&str> {
        self.id.first().and_then(|id| id.split('/').nth(2)).context("an --id with a host name in it is wanted")
    }

    /// A client that claims this, and that takes any server for the right one: attackers do not verify.
    pub(crate) fn client(&self) -> anyhow::Result<ClientConfig> {
        let builder = gullible_client(&crypto_provider())?;
        Ok(match self.credentials()? {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
            None => builder.with_no_client_auth(),
        })
    }

    /// A server that claims this, and that takes any client.
    pub(crate) fn server(&self) -> anyhow::Result<ServerConfig> {
        let (chain, key) = self.credentials()?.context("a server needs a certificate")?;
        gullible_server(&crypto_provider(), chain, key)
    }
}
