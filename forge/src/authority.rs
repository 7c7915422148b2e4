//! Authorities that sign whatever they are told to: somebody's own, or a real one whose key was stolen.

use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

const HOUR: Duration = Duration::from_hours(1);

/// What the controller's issuer would put into a leaf, valid for an hour around now, with these URIs.
pub fn leaf_params(uris: &[&str]) -> anyhow::Result<CertificateParams> {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names =
        uris.iter().map(|uri| anyhow::Ok(SanType::URI((*uri).try_into()?))).collect::<Result<_, _>>()?;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = now - HOUR / 2;
    params.not_after = now + HOUR / 2;
    Ok(params)
}

/// A leaf that nobody else signed.
pub fn forge_self_signed(params: &CertificateParams) -> anyhow::Result<Forged> {
    let key = KeyPair::generate()?;
    Ok(Forged { chain: vec![params.self_signed(&key)?.der().clone()], key })
}

/// An authority that signs whatever it is told to.
pub struct ForgingCa {
    /// Its root; `None` where only an issuer was stolen.
    root_der: Option<CertificateDer<'static>>,
    issuer_der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl ForgingCa {
    /// One of the attacker's own, which looks just like a real one: a root of one trust domain, and an issuer of one.
    pub fn create(root_domain: &str, issuer_domain: &str) -> anyhow::Result<Self> {
        let root_key = KeyPair::generate()?;
        let root_params = ca_params("Forged root", root_domain, 1)?;
        let root_der = root_params.self_signed(&root_key)?.der().clone();
        let root = Issuer::new(root_params, root_key);
        let issuer_key = KeyPair::generate()?;
        let issuer_params = ca_params("Forged issuer", issuer_domain, 0)?;
        let issuer_der = issuer_params.signed_by(&issuer_key, &root)?.der().clone();
        Ok(Self { root_der: Some(root_der), issuer_der, issuer: Issuer::new(issuer_params, issuer_key) })
    }

    /// A real issuer, from what a controller keeps of it in its sealed store: a magic number of 8 bytes, the private key's 32,
    /// the certificate.
    pub fn stolen(secret: &[u8]) -> anyhow::Result<Self> {
        let rest = secret.strip_prefix(b"ocISSU\0\x01").context("not an issuer's secret")?;
        let (scalar, certificate) = rest.split_first_chunk::<32>().context("an issuer's secret that was cut off")?;
        let issuer_der = CertificateDer::from(certificate.to_vec());
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(pkcs8(scalar)))?;
        let mut name = DistinguishedName::new();
        for (kind, value) in [(DnType::OrganizationName, "Opencluster"), (DnType::CommonName, "Issuer")] {
            name.push(kind, value);
        }
        // Of the issuer's own certificate, only its name goes into what it signs.
        let mut params = CertificateParams::default();
        params.distinguished_name = name;
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self { root_der: None, issuer_der, issuer: Issuer::new(params, key) })
    }

    /// The root, for those who are to trust this authority.
    pub fn root(&self) -> anyhow::Result<&CertificateDer<'static>> {
        self.root_der.as_ref().ok_or_else(|| anyhow!("of a stolen issuer the root is not known"))
    }

    /// The issuer's certificate.
    pub fn issuer(&self) -> &CertificateDer<'static> {
        &self.issuer_der
    }

    /// Signs a leaf.
    pub fn forge(&self, params: &CertificateParams) -> anyhow::Result<Forged> {
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.issuer)?.der().clone();
        Ok(Forged { chain: vec![leaf, self.issuer_der.clone()], key })
    }

    /// Signs an authority below the issuer, and with that a leaf: one CA too many.
    pub fn forge_below(&self, domain: &str, params: &CertificateParams) -> anyhow::Result<Forged> {
        let sub_key = KeyPair::generate()?;
        let sub_params = ca_params("Forged sub-issuer", domain, 0)?;
        let sub_der = sub_params.signed_by(&sub_key, &self.issuer)?.der().clone();
        let sub = Issuer::new(sub_params, sub_key);
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &sub)?.der().clone();
        Ok(Forged { chain: vec![leaf, sub_der, self.issuer_der.clone()], key })
    }
}

/// A certificate chain with its key.
pub struct Forged {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's.
    pub key: KeyPair,
}

impl Forged {
    /// The key as rustls wants it.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }
}

fn ca_params(name: &str, domain: &str, path_length: u8) -> anyhow::Result<CertificateParams> {
    ensure!(!domain.contains("://"), "{domain}: a trust domain is wanted, not a URI");
    let mut params = leaf_params(&[&format!("spiffe://{domain}")])?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.extended_key_usages = vec![];
    Ok(params)
}

/// A P-256 private key as a `PrivateKeyInfo`.
fn pkcs8(scalar: &[u8; 32]) -> Vec<u8> {
    const BEFORE_THE_SCALAR: &[u8] = &[
        0x30, 0x41, 0x02, 0x01, 0x00, // version 0
        0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, // an elliptic curve's
        0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, // P-256
        0x04, 0x27, 0x30, 0x25, 0x02, 0x01, 0x01, 0x04, 0x20, // ECPrivateKey, version 1
    ];
    [BEFORE_THE_SCALAR, scalar].concat()
}
