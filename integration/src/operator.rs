//! The rig as an operator of its cluster: the `opencluster` command with the rig's credentials.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use opencluster_api::rest::{ClusterStatus, NodeStatusList, ObjectList, TokenResult};
use serde::de::DeserializeOwned;

use crate::binaries::{Binaries, BinariesError};
use crate::state::StateDir;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The program is not built.
    #[error(transparent)]
    Binaries(#[from] BinariesError),
    /// It could not be started or fed.
    #[error("cannot run opencluster: {0}")]
    Run(#[from] io::Error),
    /// It refused or failed.
    #[error("`opencluster {command}` failed: {message}")]
    Refused {
        /// What was asked.
        command: String,
        /// What it said.
        message: String,
    },
    /// Its answer is not what it should be.
    #[error("`opencluster {command}` answered something unexpected: {source}")]
    Answer {
        /// What was asked.
        command: String,
        /// How serde puts it.
        source: serde_json::Error,
    },
}

/// An operator with the rig's administrator token.
#[derive(Clone, Debug)]
pub struct Operator {
    binaries: Binaries,
    state: StateDir,
}

impl Operator {
    /// For the rig whose state this is.
    pub fn new(binaries: Binaries, state: StateDir) -> Self {
        Self { binaries, state }
    }

    /// The command, with the environment that points it at the rig.
    pub fn command(&self) -> Result<Command, OperatorError> {
        let mut command = Command::new(self.binaries.path("opencluster")?);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("OPENCLUSTER_") {
                command.env_remove(name);
            }
        }
        command.env("OPENCLUSTER_SERVER", format!("unix:{}", self.state.api_socket().display()));
        command.env("OPENCLUSTER_CA", self.state.ca());
        command.env("OPENCLUSTER_TOKEN_FILE", self.state.admin_token());
        Ok(command)
    }

    /// Runs a command to its end, `input` on its standard input: what it printed.
    pub fn run(&self, arguments: &[&str], input: &str) -> Result<String, OperatorError> {
        let mut child = self
            .command()?
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let fed = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(OperatorError::Refused { command: arguments.join(" "), message });
        }
        fed?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Applies documents, all or none.
    pub fn apply(&self, documents: &str) -> Result<(), OperatorError> {
        self.run(&["apply", "-f", "-"], documents).map(|_| ())
    }

    /// Deletes a resource.
    pub fn delete(&self, kind: &str, name: &str) -> Result<(), OperatorError> {
        self.run(&["delete", kind, name], "").map(|_| ())
    }

    /// A new one-time token for a node.
    pub fn token(&self, node: &str) -> Result<TokenResult, OperatorError> {
        self.json(&["node", "token", node])
    }

    /// How the nodes are.
    pub fn nodes(&self) -> Result<NodeStatusList, OperatorError> {
        self.json(&["node", "list"])
    }

    /// How the controller is.
    pub fn status(&self) -> Result<ClusterStatus, OperatorError> {
        self.json(&["status"])
    }

    /// All workloads.
    pub fn workloads(&self) -> Result<ObjectList, OperatorError> {
        self.json(&["get", "workload", "--all-namespaces"])
    }

    fn json<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T, OperatorError> {
        let arguments = [arguments, &["-o", "json"]].concat();
        let text = self.run(&arguments, "")?;
        serde_json::from_str(&text).map_err(|source| OperatorError::Answer { command: arguments.join(" "), source })
    }
}
