//! The configuration file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use opencluster_policy::lifetime::Age;
use opencluster_policy::spiffe::{SpiffeId, TrustDomain};
use serde::Deserialize;

use crate::lifetime::LifetimePolicy;
use crate::store::key::StoreKeySource;

/// The configuration, as read. Unknown keys are errors.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The cluster's trust domain, for example `prod.example.org`. Fixed by `init`.
    pub trust_domain: String,
    /// This replica's name: its identity is `spiffe://<trust_domain>/controller/<name>`.
    pub name: String,
    /// The store.
    pub state: PathBuf,
    /// The key that the store is sealed with.
    pub store_key: StoreKeySource,
    /// Where nodes connect to (gRPC).
    #[serde(default = "default_node_listen")]
    pub node_listen: Vec<SocketAddr>,
    /// Where operators connect to (HTTPS).
    #[serde(default = "default_api_listen")]
    pub api_listen: Vec<SocketAddr>,
    /// The same API on a Unix socket; also over TLS.
    #[serde(default)]
    pub api_socket: Option<PathBuf>,
    /// How long a node may carry traffic after a heartbeat.
    #[serde(default = "default_lease_ms")]
    pub lease_ms: u32,
    /// How often nodes send heartbeats.
    #[serde(default = "default_heartbeat_ms")]
    pub heartbeat_ms: u32,
    /// How long certificates of nodes and workloads are valid.
    #[serde(default = "default_svid_ttl_s")]
    pub svid_ttl_s: u64,
    /// How old an enrolment may get, unless its Node says otherwise (`spec.maxAge`); then the node is retired.
    #[serde(default = "default_node_max_age_s")]
    pub node_max_age_s: u64,
    /// How long before its end a node is cordoned and drains; at most half of its life.
    #[serde(default = "default_node_drain_s")]
    pub node_drain_s: u64,
    /// Whether a host must have been restarted before it enrols again. False only where hosts share one kernel: there, a
    /// restart of one is not seen.
    #[serde(default = "default_require_new_boot")]
    pub require_new_boot: bool,
    /// The log.
    #[serde(default)]
    pub log: LogConfig,
}

/// The log goes to standard error.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// One JSON object a line, for programs.
    #[serde(default)]
    pub json: bool,
}

fn default_node_listen() -> Vec<SocketAddr> {
    vec![SocketAddr::from(([0_u16; 8], 7443))]
}

fn default_api_listen() -> Vec<SocketAddr> {
    vec![SocketAddr::from(([127, 0, 0, 1], 7480))]
}

fn default_lease_ms() -> u32 {
    3000
}

fn default_heartbeat_ms() -> u32 {
    500
}

fn default_svid_ttl_s() -> u64 {
    3600
}

fn default_node_max_age_s() -> u64 {
    7 * 86_400
}

fn default_node_drain_s() -> u64 {
    300
}

fn default_require_new_boot() -> bool {
    true
}

/// Why the configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("configuration {path}: {source}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is larger than any configuration.
    #[error("configuration {0}: larger than {MAX_CONFIG} bytes: is this the right file?")]
    TooLarge(PathBuf),
    /// Not what a configuration looks like; the message says where.
    #[error("configuration {path}: {detail}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What and where.
        detail: String,
    },
    /// A value that cannot work.
    #[error("configuration, {field}: {message}")]
    Invalid {
        /// Which value.
        field: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
}

const MAX_CONFIG: u64 = 1024 * 1024;

impl Config {
    /// Reads and checks a file. Relative paths in it count from its directory.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_CONFIG {
            return Err(ConfigError::TooLarge(path.to_owned()));
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        Self::parse(&text, path)
    }

    /// Parses and checks a text; `path` is where it came from.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = serde_norway::from_str(text)
            .map_err(|error| ConfigError::Malformed { path: path.to_owned(), detail: error.to_string() })?;
        let base = path.parent().unwrap_or(Path::new(""));
        config.state = base.join(&config.state);
        config.store_key = config.store_key.relative_to(base);
        config.api_socket = config.api_socket.map(|socket| base.join(socket));
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |field, message: String| Err(ConfigError::Invalid { field, message });
        self.identity()?;
        if self.node_listen.is_empty() {
            return invalid("node_listen", "no address: nodes could not connect".into());
        }
        if self.api_listen.is_empty() && self.api_socket.is_none() {
            return invalid("api_listen", "no address and no api_socket: operators could not connect".into());
        }
        if !(20..=60_000).contains(&self.heartbeat_ms) {
            return invalid("heartbeat_ms", format!("{} is not between 20 and 60000", self.heartbeat_ms));
        }
        if self.lease_ms > 600_000 || self.lease_ms < self.heartbeat_ms.saturating_mul(2) {
            return invalid(
                "lease_ms",
                format!(
                    "{} must be at least twice heartbeat_ms ({}), so that one lost heartbeat does not sever a node, and at most 600000",
                    self.lease_ms, self.heartbeat_ms
                ),
            );
        }
        if !(60..=86_400).contains(&self.svid_ttl_s) {
            return invalid("svid_ttl_s", format!("{} is not between 60 and 86400", self.svid_ttl_s));
        }
        self.lifetime()?;
        if self.node_drain_s > self.node_max_age_s {
            return invalid(
                "node_drain_s",
                format!("{} is longer than a whole life, node_max_age_s ({})", self.node_drain_s, self.node_max_age_s),
            );
        }
        Ok(())
    }

    /// The trust domain and this replica's identity.
    pub fn identity(&self) -> Result<(TrustDomain, SpiffeId), ConfigError> {
        let domain = TrustDomain::parse(&self.trust_domain)
            .map_err(|error| ConfigError::Invalid { field: "trust_domain", message: error.to_string() })?;
        let id = SpiffeId::controller(&domain, &self.name)
            .map_err(|error| ConfigError::Invalid { field: "name", message: error.to_string() })?;
        Ok((domain, id))
    }

    /// The life of nodes.
    pub fn lifetime(&self) -> Result<LifetimePolicy, ConfigError> {
        let max_age = Age::from_seconds(self.node_max_age_s).map_err(|_| ConfigError::Invalid {
            field: "node_max_age_s",
            message: format!("{} is not between 10 and {} (366 days)", self.node_max_age_s, 366 * 86_400),
        })?;
        Ok(LifetimePolicy { max_age, drain: Duration::from_secs(self.node_drain_s) })
    }

    /// The root certificate (PEM) that `init` writes beside the store, for operators and for `ca`.
    pub fn root_certificate_path(&self) -> PathBuf {
        let mut path = self.state.clone().into_os_string();
        path.push(".ca.pem");
        path.into()
    }

    /// The validity of the certificates that nodes and workloads get.
    pub fn svid_ttl(&self) -> Duration {
        Duration::from_secs(self.svid_ttl_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = "trust_domain: t.test\nname: ctl\nstate: s.redb\nstore_key: {file: key}\n";

    #[test]
    fn the_smallest_configuration_has_the_documented_defaults() {
        let config = Config::parse(SMALLEST, Path::new("/etc/oc/controller.yaml")).expect("valid");
        assert_eq!((config.lease_ms, config.heartbeat_ms, config.svid_ttl_s), (3000, 500, 3600));
        assert_eq!(config.node_listen, [SocketAddr::from(([0_u16; 8], 7443))]);
        assert_eq!(config.api_listen, [SocketAddr::from(([127, 0, 0, 1], 7480))]);
        assert_eq!(config.state, Path::new("/etc/oc/s.redb"));
        assert_eq!((config.node_max_age_s, config.node_drain_s, config.require_new_boot), (604_800, 300, true));
        assert!(!config.log.json);
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (addition, expected) in [
            ("leese_ms: 5\n", "unknown field `leese_ms`"),
            ("lease_ms: [1]\n", "line 5"),
            ("lease_ms: 900\n", "lease_ms: 900 must be at least twice heartbeat_ms (500)"),
            ("heartbeat_ms: 1\n", "heartbeat_ms"),
            ("svid_ttl_s: 5\n", "svid_ttl_s"),
            ("node_max_age_s: 5\n", "node_max_age_s"),
            ("node_max_age_s: 60\n", "node_drain_s: 300 is longer"),
            ("node_listen: []\n", "node_listen"),
            ("api_listen: []\n", "api_listen"),
            ("log: {jsn: true}\n", "jsn"),
        ] {
            let error = Config::parse(&format!("{SMALLEST}{addition}"), Path::new("c.yaml")).expect_err(addition);
            assert!(error.to_string().contains(expected), "{error}");
        }
        let error = Config::parse(&SMALLEST.replace("t.test", "T_!"), Path::new("c.yaml")).expect_err("bad domain");
        assert!(error.to_string().contains("trust_domain"), "{error}");
    }
}
