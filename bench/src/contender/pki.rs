//! Certificates of the TLS contenders, made anew for every run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256,
};

use crate::error::BenchError;

/// The name in the server's certificate, which the client checks.
pub(super) const SERVER_NAME: &str = "server.ocbench.test";
const CLIENT_NAME: &str = "client.ocbench.test";

/// A certificate authority and one certificate for each side; PEM files in a folder that only root can enter.
#[derive(Debug)]
pub struct Pki {
    /// The authority's certificate.
    pub authority: PathBuf,
    /// Certificate and key of the client side.
    pub client: PathBuf,
    /// Certificate and key of the server side.
    pub server: PathBuf,
}

impl Pki {
    /// Makes them under `folder`.
    pub fn create(folder: &Path) -> Result<Self, BenchError> {
        fs::create_dir_all(folder).map_err(BenchError::file("creating", folder))?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(BenchError::file("closing", folder))?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "ocbench authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);

        let pki = Self {
            authority: folder.join("authority.pem"),
            client: folder.join("client.pem"),
            server: folder.join("server.pem"),
        };
        write(&pki.authority, &certificate)?;
        write(&pki.client, &leaf(&issuer, CLIENT_NAME, ExtendedKeyUsagePurpose::ClientAuth)?)?;
        write(&pki.server, &leaf(&issuer, SERVER_NAME, ExtendedKeyUsagePurpose::ServerAuth)?)?;
        Ok(pki)
    }
}

fn leaf(issuer: &Issuer<'_, KeyPair>, name: &str, usage: ExtendedKeyUsagePurpose) -> Result<String, BenchError> {
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    Ok(params.signed_by(&key, issuer)?.pem() + &key.serialize_pem())
}

fn write(path: &Path, pem: &str) -> Result<(), BenchError> {
    fs::write(path, pem).map_err(BenchError::file("writing", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(BenchError::file("closing", path))
}
