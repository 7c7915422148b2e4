//! The network interfaces of this network namespace.

use std::collections::BTreeSet;
use std::io;

/// Names of all interfaces that lead off this machine (or might).
pub(crate) fn all_but_loopback() -> io::Result<BTreeSet<String>> {
    Ok(nix::net::if_::if_nameindex()?
        .iter()
        .map(|interface| interface.name().to_string_lossy().into_owned())
        .filter(|name| name != "lo")
        .collect())
}
