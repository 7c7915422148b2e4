//! The benchmark of Opencluster Secure Mode: a load generator of its own, the contenders it compares, and the report.
//!
//! Top down: [`runner`] interleaves [`scenario`]s over [`contender`]s, which live on the hosts of [`topology`]; each
//! measurement is one run of the generator in [`load`]; [`stats`] condenses the rounds and [`report`] writes them down.
#![forbid(unsafe_code)]

pub mod args;
pub mod contender;
pub mod error;
pub mod histogram;
pub mod load;
mod measure;
pub mod process;
pub mod report;
pub mod runner;
pub mod scenario;
pub mod stats;
pub mod topology;
