//! SPIFFE identities: keys, CSRs, issuing, verification and rustls configuration.
//!
//! | module | what it owns |
//! |---|---|
//! | [`key`] | private keys, made where they live and zeroized with their last owner |
//! | [`csr`] | certificate signing requests: limits, syntax, proof of possession |
//! | [`authority`] | the root and the issuer: what the controller signs, and the X.509-SVID profile that it signs |
//! | [`svid`] | an SVID with its key; the hot-swappable set of those that a process holds |
//! | [`bundle`] | the roots that a process trusts |
//! | [`revocation`] | identities and keys that are trusted no more |
//! | [`verify`] | the one place that decides whether a peer is who it says; makes the proof type [`verify::PeerVerified`] |
//! | [`trust`] | bundle, revocations and trust domain as one hot-swappable handle, with a cache of verified chains |
//! | [`tls`] | rustls configurations that are made of the above |
//!
//! A missing security input denies: a bundle or a revocation set that was never loaded is not an empty one.
//! Nothing here reads the clock or does I/O but the randomness of key and serial number generation; rustls brings the
//! time to its verifiers, everything else takes it as an argument.

#![forbid(unsafe_code)]

pub mod authority;
pub mod bundle;
pub mod csr;
pub mod digest;
pub mod key;
mod profile;
pub mod revocation;
pub mod svid;
pub mod tls;
pub mod trust;
pub mod verify;

pub use opencluster_policy::spiffe::{SpiffeError, SpiffeId, Subject, TrustDomain};
pub use profile::ProfileError;
pub use rustls_pki_types::{CertificateDer, UnixTime};
