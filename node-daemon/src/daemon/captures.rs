//! Which capture port and cgroup each workload of this node has.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::resources::Workload;
use crate::cgroup::{self, CgroupError, Tree};
use crate::firewall::policy::{Capture, FIRST_CAPTURE_PORT, LAST_CAPTURE_PORT};

/// Why a workload cannot be captured. It has no network then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaptureError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("workload {0}: all capture ports ({FIRST_CAPTURE_PORT}-{LAST_CAPTURE_PORT}) are taken")]
    NoPort(Workload),
}

/// The assignment.
#[derive(Debug)]
pub(crate) struct Captures {
    tree: Tree,
    assigned: BTreeMap<Workload, Capture>,
    /// Ports that the running proxy listens on, or did: given to another workload, they would still be served under the
    /// identity of the first. They are free again when the proxy has been replaced.
    spent: BTreeSet<u16>,
}

/// What a new set of workloads changed.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    pub(crate) added: Vec<Workload>,
    pub(crate) removed: Vec<Workload>,
    pub(crate) failed: Vec<CaptureError>,
}

impl Captures {
    pub(crate) fn new(tree: Tree) -> Self {
        Self { tree, assigned: BTreeMap::new(), spent: BTreeSet::new() }
    }

    /// Makes the assignment fit the workloads that belong here. Cgroups of those that do not are emptied.
    pub(crate) fn fit(&mut self, wanted: &BTreeSet<Workload>) -> Changes {
        let mut changes = Changes::default();
        let gone: Vec<Workload> = self.assigned.keys().filter(|workload| !wanted.contains(workload)).cloned().collect();
        for workload in gone {
            self.assigned.remove(&workload);
            if let Err(error) = self.clear_out(&workload) {
                changes.failed.push(error.into());
            }
            changes.removed.push(workload);
        }
        for workload in wanted {
            if self.assigned.contains_key(workload) {
                continue;
            }
            match self.assign(workload) {
                Ok(capture) => {
                    self.spent.insert(capture.port);
                    self.assigned.insert(workload.clone(), capture);
                    changes.added.push(workload.clone());
                }
                Err(error) => changes.failed.push(error),
            }
        }
        changes
    }

    fn assign(&self, workload: &Workload) -> Result<Capture, CaptureError> {
        let port = (FIRST_CAPTURE_PORT..=LAST_CAPTURE_PORT)
            .find(|port| !self.spent.contains(port))
            .ok_or_else(|| CaptureError::NoPort(workload.clone()))?;
        let cgroup = self.tree.create(&self.tree.workload(&workload.namespace, &workload.name))?;
        Ok(Capture { cgroup, port })
    }

    /// What no longer belongs here does not run here.
    fn clear_out(&self, workload: &Workload) -> Result<(), CgroupError> {
        let path = self.path(workload);
        cgroup::kill_all(&path)?;
        if !cgroup::remove(&path)? {
            // Processes that were just killed leave in their own time; an empty directory does no harm.
            tracing::debug!(path = %path.display(), "the cgroup is still in use");
        }
        Ok(())
    }

    /// The old proxy and its listeners are gone: only assigned ports are spent.
    pub(crate) fn proxy_replaced(&mut self) {
        self.spent = self.assigned.values().map(|capture| capture.port).collect();
    }

    /// Where its processes live.
    pub(crate) fn path(&self, workload: &Workload) -> PathBuf {
        self.tree.workload(&workload.namespace, &workload.name)
    }

    pub(crate) fn assigned(&self) -> &BTreeMap<Workload, Capture> {
        &self.assigned
    }
}
