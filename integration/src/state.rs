//! What a rig keeps on disk while it is up: configurations, credentials, sockets, logs and a record of itself.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::layout::{DEFAULT_RIG, Layout};
use crate::poll;
use crate::process::ProcessId;

/// What can go wrong with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is no rig.
    #[error("the rig {rig:?} is not up: there is no {path} (start it with: opencluster-rig up)")]
    NotUp {
        /// Which.
        rig: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The record is not what a rig of this version writes.
    #[error("{path} cannot be understood ({source}): remove the rig with `opencluster-rig down` and start it again")]
    Record {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// Somebody else is starting or stopping the same rig.
    #[error("another `opencluster-rig up` or `down` of the rig {0:?} is running and does not end")]
    Busy(String),
    /// The kernel's limit for the paths of Unix sockets.
    #[error("{0} is too long for the path of a Unix socket (107 bytes): build in a directory with a shorter path")]
    SocketPath(PathBuf),
}

/// What a rig remembers of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Names and addresses.
    pub layout: Layout,
    /// The holders, by host.
    pub holders: BTreeMap<String, ProcessId>,
    /// The daemons, by host.
    pub daemons: BTreeMap<String, ProcessId>,
    /// The cluster's trust domain.
    pub trust_domain: String,
}

/// The directory of one rig's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir {
    rig: String,
    path: PathBuf,
}

impl StateDir {
    /// `target/rig`, or `target/rig-NAME` for a rig with another name than the default.
    pub fn of(target: &Path, rig: &str) -> Self {
        let name = if rig == DEFAULT_RIG { "rig".to_owned() } else { format!("rig-{rig}") };
        Self { rig: rig.to_owned(), path: target.join(name) }
    }

    /// Makes it, empty, for root's eyes only.
    pub fn create(&self) -> Result<(), StateError> {
        self.remove()?;
        make_private(&self.path)?;
        let socket = self.api_socket();
        if socket.as_os_str().len() > 107 { Err(StateError::SocketPath(socket)) } else { Ok(()) }
    }

    /// Removes it with all that is in it.
    pub fn remove(&self) -> Result<(), StateError> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &self.path)(error)),
            _ => Ok(()),
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of one host's files; made when it is not there.
    pub fn host(&self, host: &str) -> Result<PathBuf, StateError> {
        let path = self.path.join(host);
        if !path.is_dir() {
            make_private(&path)?;
        }
        Ok(path)
    }

    /// A host's log: standard output and standard error of its daemon.
    pub fn log(&self, host: &str) -> PathBuf {
        self.path.join(host).join("log")
    }

    /// The access log of a node's proxy.
    pub fn access_log(&self, node: &str) -> PathBuf {
        self.path.join(node).join("access.log")
    }

    /// The socket of the controller's API.
    pub fn api_socket(&self) -> PathBuf {
        self.path.join("api.sock")
    }

    /// The cluster's root certificate, PEM.
    pub fn ca(&self) -> PathBuf {
        self.path.join("ca.pem")
    }

    /// The first administrator's bearer token.
    pub fn admin_token(&self) -> PathBuf {
        self.path.join("admin.token")
    }

    /// What a shell may source to point `opencluster` at this rig.
    pub fn env(&self) -> PathBuf {
        self.path.join("env")
    }

    /// /etc/hosts of every host.
    pub fn hosts(&self) -> PathBuf {
        self.path.join("hosts")
    }

    /// Writes a file that only root may read.
    pub fn write(path: &Path, content: &str) -> Result<(), StateError> {
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .and_then(|mut file| file.write_all(content.as_bytes()))
            .map_err(io_error("write", path))
    }

    /// Writes the record.
    pub fn save(&self, record: &Record) -> Result<(), StateError> {
        let path = self.record();
        let text =
            serde_json::to_string_pretty(record).map_err(|source| StateError::Record { path: path.clone(), source })?;
        Self::write(&path, &text)
    }

    /// Reads the record.
    pub fn load(&self) -> Result<Record, StateError> {
        let path = self.record();
        match fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).map_err(|source| StateError::Record { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(StateError::NotUp { rig: self.rig.clone(), path })
            }
            Err(error) => Err(io_error("read", &path)(error)),
        }
    }

    fn record(&self) -> PathBuf {
        self.path.join("rig.json")
    }
}

/// Held by whoever starts or stops a rig. An abstract socket: the kernel frees it with its holder, however that ends, and
/// no file is left behind.
#[derive(Debug)]
pub struct Lock {
    _socket: UnixListener,
}

impl Lock {
    /// Takes it, waiting for another holder to end.
    pub fn take(rig: &str) -> Result<Self, StateError> {
        const PATIENCE: Duration = Duration::from_mins(1);
        let io = |source| StateError::Io { action: "bind", path: format!("@opencluster-rig/{rig}").into(), source };
        let address = SocketAddr::from_abstract_name(format!("opencluster-rig/{rig}")).map_err(io)?;
        let taken = poll::until(PATIENCE, || match UnixListener::bind_addr(&address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
            outcome => Some(outcome),
        });
        match taken {
            Some(outcome) => Ok(Self { _socket: outcome.map_err(io)? }),
            None => Err(StateError::Busy(rig.to_owned())),
        }
    }
}

fn make_private(path: &Path) -> Result<(), StateError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("create", path))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }
}
