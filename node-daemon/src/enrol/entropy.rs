//! Mixing into the kernel's pool what a clone of this machine cannot know.
//!
//! Two clones of a VM without VM generation ID return the same random numbers. What both ends of a TLS connection
//! derived differs for each connection (the controller's part is its own), so it is mixed in before a key is made.

#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io::{self, Write};

use rustix::ioctl::{NoArg, ioctl, opcode};

/// RNDRESEEDCRNG
const RESEED: rustix::ioctl::Opcode = opcode::none(b'R', 0x07);

/// Mixes `bytes` into the pool and has the generator use it at once.
pub(super) fn mix(bytes: &[u8]) -> io::Result<()> {
    let mut random = OpenOptions::new().write(true).open("/dev/urandom")?;
    random.write_all(bytes)?;
    // SAFETY: RNDRESEEDCRNG takes no argument, so nothing of this process is read or written by it.
    unsafe { ioctl(&random, NoArg::<RESEED>::new()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn mixing_works_as_root() {
        super::mix(b"some bytes").expect("run the tests as root");
    }
}
