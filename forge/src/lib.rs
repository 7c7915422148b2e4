//! Certificates that no authority should make, for tests of those who must refuse them.
//!
//! Nothing here uses the code of `identity`: what attackers make is made with other tools. Only tests and the rig's probe
//! depend on this crate.

#![forbid(unsafe_code)]

mod authority;
mod peer;

pub use authority::{Forged, ForgingCa, forge_self_signed, leaf_params};
pub use peer::{gullible_client, gullible_server};
