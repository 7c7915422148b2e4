//! A contender that a file describes: whatever else one wants to compare with.
//!
//! It gets two hosts of its own, which look like everybody's (same addresses, same kernel settings, a bridge between
//! them), so that it may redirect traffic, add addresses or load rules there without touching the others' figures.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::{Launch, NAMES, Service, server_args};
use crate::error::BenchError;
use crate::process;
use crate::topology::{self, Topology};

/// A step of the preparation is a short command.
const STEP: Duration = Duration::from_secs(30);

/// The largest description that is read.
const MAX_BYTES: u64 = 1 << 20;

/// The description, as in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct External {
    /// Its name in options and reports.
    pub name: String,
    /// What the report says of its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Commands that must succeed one after another before its programs start.
    #[serde(default)]
    pub prepare: Vec<Step>,
    /// Its programs, in the foreground. Their CPU time and memory, and that of their children, are its cost.
    #[serde(default)]
    pub programs: Vec<Step>,
    /// Where clients connect; without it, to the server's own address, which the preparation then redirects.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub targets: BTreeMap<Service, SocketAddr>,
    /// Where relative paths of its commands start: the file's folder.
    #[serde(skip)]
    folder: PathBuf,
}

/// A command on one of the two hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Where.
    pub host: Host,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment variables besides those of the run.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
}

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Host {
    /// 10.89.0.11, where the clients are.
    Client,
    /// 10.89.0.12, where the server is.
    Server,
}

impl External {
    /// Reads and checks the description in `file`.
    pub fn read(file: &Path) -> Result<Self, BenchError> {
        let wrong = |reason: String| BenchError::Peer(format!("{}: {reason}", file.display()));
        let size = fs::metadata(file).map_err(BenchError::file("reading", file))?.len();
        if size > MAX_BYTES {
            return Err(wrong(format!("{size} bytes are more than a description has")));
        }
        let text = fs::read_to_string(file).map_err(BenchError::file("reading", file))?;
        let mut external: Self = serde_json::from_str(&text)
            .map_err(|source| BenchError::Json { what: file.display().to_string(), source })?;
        let absolute = fs::canonicalize(file).map_err(BenchError::file("finding", file))?;
        external.folder = absolute.parent().map(Path::to_path_buf).unwrap_or_default();
        external.check().map_err(wrong)?;
        Ok(external)
    }

    fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        if !(1..=12).contains(&name.len()) || !name.bytes().all(plain) {
            return Err(format!("the name {name:?} must be 1 to 12 lower-case letters and digits"));
        }
        if NAMES.contains(&name.as_str()) {
            return Err(format!("{name:?} is a contender already: choose another name"));
        }
        if self.prepare.iter().chain(&self.programs).any(|step| step.command.is_empty()) {
            return Err("a command is empty".into());
        }
        match Service::ALL.into_iter().find(|s| !self.targets.is_empty() && !self.targets.contains_key(s)) {
            Some(missing) => Err(format!("targets: {} is missing; name all three, or none", missing.name())),
            None => Ok(()),
        }
    }

    pub(super) fn target(&self, service: Service) -> SocketAddr {
        self.targets.get(&service).copied().unwrap_or(SocketAddr::new(topology::SERVER, service.port()))
    }

    /// Runs the preparation.
    pub(super) async fn prepare(&self, hosts: &Topology) -> Result<(), BenchError> {
        for step in &self.prepare {
            process::finished(self.command(step, hosts)?, STEP).await?;
        }
        Ok(())
    }

    /// The server of the load on its hosts, and its programs.
    pub(super) fn programs(&self, hosts: &Topology, logs: &Path) -> Result<Vec<Launch>, BenchError> {
        let mut server = process::in_namespace(&hosts.server(), process::own_program()?)?;
        server.args(server_args());
        let log = logs.join(format!("{}-load-server.log", self.name));
        let mut all = vec![Launch { log, command: server, counts: false }];
        for (index, step) in self.programs.iter().enumerate() {
            let log = logs.join(format!("{}-{index}.log", self.name));
            all.push(Launch::counted(log, self.command(step, hosts)?));
        }
        Ok(all)
    }

    fn command(&self, step: &Step, hosts: &Topology) -> Result<Command, BenchError> {
        let host = match step.host {
            Host::Client => hosts.client(),
            Host::Server => hosts.server(),
        };
        let (program, args) =
            step.command.split_first().ok_or_else(|| BenchError::Peer("a command is empty".into()))?;
        let mut command = process::in_namespace(&host, program)?;
        command.args(args).envs(&step.env).current_dir(&self.folder);
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<External, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("peer.json");
        fs::write(&file, text).unwrap();
        External::read(&file).map_err(|e| e.to_string())
    }

    #[test]
    fn a_description_is_read_and_its_targets_default_to_the_server() {
        let peer = read(
            r#"{"name": "peer", "version": "1.0",
                "prepare": [{"host": "client", "command": ["true"]}],
                "programs": [{"host": "server", "command": ["./peer", "-x"], "env": {"A": "b"}}]}"#,
        )
        .unwrap();
        assert_eq!(peer.target(Service::Sink), SocketAddr::new(topology::SERVER, Service::Sink.port()));
        assert_eq!(peer.programs[0].host, Host::Server);
        let targets = r#"{"echo": "127.0.0.1:1", "sink": "127.0.0.1:2", "source": "[::1]:3"}"#;
        let peer = read(&format!(r#"{{"name": "peer", "targets": {targets}}}"#)).unwrap();
        assert_eq!(peer.target(Service::Source), "[::1]:3".parse().unwrap());
    }

    #[test]
    fn a_wrong_description_says_what_is_wrong() {
        for (text, hint) in [
            (r#"{"name": "us"}"#, "already"),
            (r#"{"name": "A b"}"#, "lower-case"),
            (r#"{"name": ""}"#, "lower-case"),
            (r#"{"name": "peer", "program": []}"#, "unknown field"),
            (r#"{"name": "peer", "programs": [{"host": "client", "command": []}]}"#, "empty"),
            (r#"{"name": "peer", "programs": [{"host": "moon", "command": ["x"]}]}"#, "client"),
            (r#"{"name": "peer", "targets": {"echo": "127.0.0.1:1"}}"#, "sink is missing"),
            ("{", "EOF"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains("peer.json") && error.contains(hint), "{text}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_description_or_refused(text in "\\PC{0,200}") {
            drop(serde_json::from_str::<External>(&text));
        }
    }
}
