//! The command against a real controller: both are programs of this build, joined by a Unix socket in a directory of their
//! own.

mod cluster;
mod credentials;
mod resources;
mod trail;
mod trust;
