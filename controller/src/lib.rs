//! The control plane: certificate authority, enrolment, leases, policy API, revocation and audit.

#![forbid(unsafe_code)]

pub mod api;
pub mod attest;
pub mod audit;
pub mod ca;
pub mod config;
pub mod grpc;
pub mod init;
pub mod lease;
pub mod lifetime;
pub mod listen;
pub mod serve;
pub mod state;
pub mod store;
