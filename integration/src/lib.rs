//! The rig: whole clusters of real daemons on one machine, each host a network namespace with its own mount namespace.
//!
//! Nothing here touches the machine's own network: links and addresses are made inside the rig's namespaces, processes
//! live in cgroups of the rig's own, and [`down`] removes all of it knowing only the rig's name.

#![forbid(unsafe_code)]

pub mod binaries;
pub mod capture;
pub mod cgroup;
pub mod cuts;
pub mod down;
pub mod figures;
pub mod harness;
pub mod hindrance;
pub mod host;
pub mod layout;
pub mod netns;
pub mod operator;
pub mod poll;
pub mod process;
pub mod report;
pub mod rig;
pub mod state;
pub mod up;
pub mod vm;
