//! The key that the store is sealed with: 32 bytes from a file, the environment or a systemd credential.

use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde::Deserialize;
use zeroize::{Zeroize as _, Zeroizing};

/// Where the key comes from: exactly one of `file`, `env`, `credential`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreKeySource {
    /// A file that only its owner can read.
    #[serde(default)]
    file: Option<PathBuf>,
    /// The name of an environment variable.
    #[serde(default)]
    env: Option<String>,
    /// The name of a systemd credential (`LoadCredential=`, `LoadCredentialEncrypted=`).
    #[serde(default)]
    credential: Option<String>,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum StoreKeyError {
    /// None or several sources.
    #[error("store_key: give exactly one of file, env, credential")]
    Ambiguous,
    /// The file could not be read.
    #[error("store_key: {path}: {source}. {MAKE_ONE}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others can read the file.
    #[error("store_key: {path} can be read by others (mode {mode:o}): chmod 600 {path}")]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// No such variable.
    #[error("store_key: the environment variable {0} is not set. {MAKE_ONE}")]
    Unset(String),
    /// Not started by systemd with credentials.
    #[error(
        "store_key: credential {0}: $CREDENTIALS_DIRECTORY is not set; start the controller by systemd with LoadCredential={0}:PATH"
    )]
    NoCredentials(String),
    /// Not a key.
    #[error("store_key: {from}: expected 32 bytes as 64 hexadecimal digits or in base64. {MAKE_ONE}")]
    Malformed {
        /// Where it was read.
        from: String,
    },
}

const MAKE_ONE: &str = "Make a key with: (umask 077; openssl rand -hex 32 > store.key)";

/// The key. Zeroized on drop, never printed.
pub struct StoreKey(Zeroizing<[u8; 32]>);

impl fmt::Debug for StoreKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("StoreKey")
    }
}

impl StoreKeySource {
    /// From this file.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { file: Some(path.into()), env: None, credential: None }
    }

    /// The same, with a relative file counting from `base`.
    #[must_use]
    pub fn relative_to(self, base: &Path) -> Self {
        Self { file: self.file.map(|file| base.join(file)), ..self }
    }

    /// Reads the key.
    pub fn load(&self) -> Result<StoreKey, StoreKeyError> {
        match (&self.file, &self.env, &self.credential) {
            (Some(path), None, None) => from_file(path),
            (None, Some(variable), None) => {
                let text = std::env::var(variable).map_err(|_| StoreKeyError::Unset(variable.clone()))?;
                StoreKey::parse(&Zeroizing::new(text))
                    .ok_or_else(|| StoreKeyError::Malformed { from: format!("environment variable {variable}") })
            }
            (None, None, Some(name)) => {
                let directory = std::env::var_os("CREDENTIALS_DIRECTORY")
                    .ok_or_else(|| StoreKeyError::NoCredentials(name.clone()))?;
                from_file(&Path::new(&directory).join(name))
            }
            _ => Err(StoreKeyError::Ambiguous),
        }
    }
}

fn from_file(path: &Path) -> Result<StoreKey, StoreKeyError> {
    let unreadable = |source| StoreKeyError::Unreadable { path: path.to_owned(), source };
    let mode = std::fs::metadata(path).map_err(unreadable)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(StoreKeyError::Exposed { path: path.to_owned(), mode });
    }
    let text = Zeroizing::new(std::fs::read(path).map_err(unreadable)?);
    std::str::from_utf8(&text)
        .ok()
        .and_then(StoreKey::parse)
        .ok_or_else(|| StoreKeyError::Malformed { from: path.display().to_string() })
}

impl StoreKey {
    /// From 64 hexadecimal digits, or base64 of 32 bytes (either alphabet, padded or not); space around it is ignored.
    pub fn parse(text: &str) -> Option<Self> {
        use base64::alphabet::{STANDARD, URL_SAFE};
        use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

        let text = text.trim();
        let lenient = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let decoded = if text.len() == 64 {
            hex::decode(text).ok()
        } else {
            [&STANDARD, &URL_SAFE].iter().find_map(|alphabet| GeneralPurpose::new(alphabet, lenient).decode(text).ok())
        };
        let mut decoded = Zeroizing::new(decoded?);
        let key = <[u8; 32]>::try_from(decoded.as_slice()).ok().map(|bytes| Self(Zeroizing::new(bytes)));
        decoded.zeroize();
        key
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_in_every_promised_form_and_nothing_else() {
        let bytes = [0xfb_u8; 32];
        let hex = hex::encode(bytes);
        let standard = base64::engine::general_purpose::STANDARD.encode(bytes);
        let url_safe = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
        assert_ne!(standard, url_safe);
        for text in [hex.clone(), format!(" {hex}\n"), hex.to_uppercase(), standard, url_safe] {
            assert_eq!(StoreKey::parse(&text).expect(&text).bytes(), &bytes);
        }
        for text in ["", "00", &hex[1..], &format!("{hex}00"), "zz"] {
            assert!(StoreKey::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_key_file_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("key");
        std::fs::write(&path, hex::encode([1; 32])).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("chmod");
        let error = StoreKeySource::file(&path).load().expect_err("exposed");
        assert!(matches!(error, StoreKeyError::Exposed { mode: 0o644, .. }), "{error}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
        StoreKeySource::file(&path).load().expect("readable by its owner only");
    }
}
