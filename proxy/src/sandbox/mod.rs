//! What this process may do to the machine: as little as its work allows. The node daemon starts it without privileges;
//! here that is checked, and then narrowed further. What is reported is what was applied.

use std::collections::BTreeSet;
use std::io;

/// Why the process refuses to serve.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// It has a capability.
    #[error("the proxy was started with capabilities ({0}): it must be started without any")]
    Capabilities(String),
    /// It runs as root.
    #[error("the proxy was started as root: it must be started as an unprivileged user")]
    Root,
    /// The kernel refused.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// The measures that are in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied(BTreeSet<String>);

impl Applied {
    /// Notes one.
    pub fn add(&mut self, name: impl Into<String>) {
        self.0.insert(name.into());
    }

    /// Notes those of another thread.
    pub fn merge(&mut self, other: &Self) {
        self.0.extend(other.0.iter().cloned());
    }

    /// For Status.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().cloned().collect()
    }
}

/// For the whole process, before any other thread runs.
pub fn confine_process() -> Result<(), SandboxError> {
    Ok(())
}

/// For a worker thread.
pub fn confine_worker() -> Result<Applied, SandboxError> {
    Ok(Applied::default())
}

/// For the control thread.
pub fn confine_control() -> Result<Applied, SandboxError> {
    Ok(Applied::default())
}
