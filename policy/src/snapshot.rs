//! A consistent set of resources, changes to it, and the difference between two of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::resource::{Faults, Key, Resource};

/// Resources at one version. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Grows by one with each change.
    pub version: u64,
    /// By key.
    pub resources: Arc<BTreeMap<Key, Arc<Resource>>>,
}

/// What separates two snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// New or changed.
    pub upserts: Vec<Arc<Resource>>,
    /// Gone.
    pub deletes: Vec<Key>,
}

impl Snapshot {
    /// What turns `self` into `newer`.
    pub fn difference(&self, _newer: &Self) -> Difference {
        todo!()
    }
    /// `self` after `difference`, at `version`. Checks nothing: see [`Snapshot::check`].
    #[must_use]
    pub fn apply(&self, _difference: &Difference, _version: u64) -> Self {
        todo!()
    }
    /// Checks what resources say of each other: references exist, addresses belong to one node, no two workloads claim
    /// the same port of the same node through services. `Fault::document` counts within `changed`.
    pub fn check(&self, _changed: &[Key]) -> Result<(), Faults> {
        todo!()
    }
}
