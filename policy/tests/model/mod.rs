//! The models of `docs/lease.md`.

pub(crate) mod revocation;
pub(crate) mod side;
pub(crate) mod world;
