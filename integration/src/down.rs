//! Removing a rig, knowing only its name: it works half up, after a crash, and from another checkout.

use crate::cgroup::{CgroupError, Cgroups};
use crate::layout::{self, ALL_RIGS};
use crate::netns::{self, NetnsError};
use crate::state::{StateDir, StateError};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum DownError {
    /// Processes or cgroups stay.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Namespaces stay.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Files stay.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What was there and is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Processes.
    pub processes: usize,
    /// Network namespaces.
    pub namespaces: usize,
}

/// Kills every process of the rig and removes its cgroups, its namespaces (with links and mounts) and, when given, its
/// state. Goes on after a failure, so that as much as possible is gone; the first failure is returned.
pub fn down(rig: &str, state: Option<&StateDir>) -> Result<Removed, DownError> {
    let mut removed = Removed::default();
    let processes = remove_processes(rig, &mut removed);
    let namespaces = remove_namespaces(rig, &mut removed);
    let files = state.map_or(Ok(()), |state| state.remove().map_err(DownError::from));
    processes.and(namespaces).and(files).map(|()| removed)
}

/// Whether anything of a rig of that name is there.
pub fn is_there(rig: &str) -> Result<bool, DownError> {
    Ok(Cgroups::find()?.exists(&layout::rig_cgroup(rig)) || !netns::of_rig(rig)?.is_empty())
}

fn remove_processes(rig: &str, removed: &mut Removed) -> Result<(), DownError> {
    let cgroups = Cgroups::find()?;
    let cgroup = layout::rig_cgroup(rig);
    removed.processes = cgroups.processes(&cgroup)?.len();
    cgroups.destroy(&cgroup)?;
    Ok(cgroups.remove_if_empty(ALL_RIGS)?)
}

fn remove_namespaces(rig: &str, removed: &mut Removed) -> Result<(), DownError> {
    let mut outcome = Ok(());
    for name in netns::of_rig(rig)? {
        match netns::delete(&name) {
            Ok(()) => removed.namespaces += 1,
            Err(error) => outcome = outcome.and(Err(error.into())),
        }
    }
    outcome
}
