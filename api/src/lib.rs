//! The wire contracts of Opencluster: protobuf between controller and nodes ([`control`]), messages between node daemon
//! and proxy ([`local`]), and the types of the policy API ([`rest`]).

pub mod local;
pub mod rest;

/// The generated modules, nested as their packages are.
#[allow(missing_docs, clippy::pedantic, unreachable_pub)]
mod generated {
    pub mod control {
        pub mod v1 {
            tonic::include_proto!("opencluster.control.v1");
        }
    }
    pub mod local {
        pub mod v1 {
            tonic::include_proto!("opencluster.local.v1");
        }
    }
}

/// Controller and nodes (`proto/opencluster/control/v1/control.proto`, where every field is documented).
pub mod control {
    pub use crate::generated::control::v1::*;

    /// The largest message that a controller sends and that a node must be ready to take: the snapshot of a large cluster.
    pub const MAX_MESSAGE_TO_NODE: usize = 64 * 1024 * 1024;

    /// The largest message that a controller takes from a node.
    pub const MAX_MESSAGE_FROM_NODE: usize = 1024 * 1024;
}
