//! `init`: a new cluster.
//!
//! Everything is made beside its place first and moved there, without overwriting, once it is whole: what fails leaves
//! nothing that looks like a cluster.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use opencluster_api::rest::Role;
use opencluster_identity::UnixTime;
use zeroize::Zeroizing;

use crate::api::auth::{CredentialError, create_token};
use crate::ca::{Authority, CaError};
use crate::config::{Config, ConfigError};
use crate::state::{State, StateError};
use crate::store::{Batch, EmbeddedStore, Store as _, StoreError, StoreKeyError};

/// The first administrator.
const ADMIN: &str = "admin";

/// How long their token is good: time to make operators and tokens for them.
const ADMIN_TTL: Duration = Duration::from_hours(30 * 24);

/// Why no cluster was made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store's key.
    #[error(transparent)]
    Key(#[from] StoreKeyError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The authority.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The administrator's token.
    #[error("the administrator's token: {0}")]
    Credential(#[from] CredentialError),
    /// A file is in the way.
    #[error("{0} exists already and is not overwritten: move it away first")]
    Exists(PathBuf),
    /// A file could not be written.
    #[error("{path}: {source}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What `init` made.
pub struct NewCluster {
    /// The administrator's token, unless it was written to a file.
    pub admin_token: Option<Zeroizing<String>>,
    /// The root certificate, PEM.
    pub root_pem: String,
    /// SHA-256 of the root certificate.
    pub fingerprint: String,
}

/// Makes store, authority and the first administrator's token. Overwrites nothing.
pub fn init(config: &Config, admin_token_file: Option<&Path>, ca_file: Option<&Path>) -> Result<NewCluster, InitError> {
    let (domain, _) = config.identity()?;
    let key = config.store_key.load()?;
    let root_file = config.root_certificate_path();
    let mut outputs = vec![config.state.as_path(), root_file.as_path()];
    outputs.extend(admin_token_file);
    outputs.extend(ca_file);
    for path in outputs {
        if std::fs::symlink_metadata(path).is_ok() {
            return Err(InitError::Exists(path.to_owned()));
        }
    }

    let draft = Draft::beside(&config.state);
    let store = Arc::new(EmbeddedStore::create(&draft.0, &key)?);
    let mut batch = Batch::default();
    let bundle = Authority::create(&domain, &mut batch, UnixTime::now())?;
    store.commit(batch)?;
    let state = State::load(domain, store)?;
    let (token, _) = create_token(&state, "init", ADMIN, Role::Admin, ADMIN_TTL)?;
    drop(state);

    let root_pem = bundle.to_pem();
    write_new(&root_file, root_pem.as_bytes(), 0o644)?;
    if let Some(path) = ca_file {
        write_new(path, root_pem.as_bytes(), 0o644)?;
    }
    if let Some(path) = admin_token_file {
        write_new(path, format!("{}\n", *token).as_bytes(), 0o600)?;
    }
    draft.publish(&config.state)?;
    Ok(NewCluster {
        admin_token: admin_token_file.is_none().then_some(token),
        root_pem,
        fingerprint: bundle.fingerprints().map(|fingerprint| fingerprint.to_string()).collect(),
    })
}

/// A store in the making, removed unless it is published.
struct Draft(PathBuf);

impl Draft {
    fn beside(path: &Path) -> Self {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".init-{}", std::process::id()));
        Self(name.into())
    }

    /// Unlike a rename, a link never replaces anything.
    fn publish(self, path: &Path) -> Result<(), InitError> {
        std::fs::hard_link(&self.0, path).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => InitError::Exists(path.to_owned()),
            _ => InitError::Write { path: path.to_owned(), source },
        })?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|source| InitError::Write { path: directory.to_owned(), source })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let mut lock = self.0.clone().into_os_string();
        lock.push(".lock");
        for path in [self.0.as_path(), Path::new(&lock)] {
            match std::fs::remove_file(path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!(path = %path.display(), %error, "a temporary file could not be removed"),
            }
        }
    }
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), InitError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => InitError::Exists(path.to_owned()),
        _ => InitError::Write { path: path.to_owned(), source },
    };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed)
}
