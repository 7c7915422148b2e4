//! Notifications of nf_tables: who changed rules, and when.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::attributes::iterate;
use super::{NetlinkError, Received, kind, messages, open_socket, receive};

/// NFNLGRP_NFTABLES as a bit mask.
const RULES_CHANGED: u32 = 1 << (7 - 1);

/// A subscription.
#[derive(Debug)]
pub(crate) struct Monitor {
    socket: OwnedFd,
}

/// Somebody committed a change (to any table of this network namespace).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// The netlink port of the socket that did it.
    pub(crate) port: u32,
    /// The process and its name, as far as the kernel tells.
    pub(crate) process: String,
}

impl Monitor {
    /// Subscribes.
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        Ok(Self { socket: open_socket(RULES_CHANGED)? })
    }

    /// The changes since the last call; waits for none. Losing notifications (an overflow) is an error that the caller
    /// answers with a verification.
    pub(crate) fn changes(&self) -> Result<Vec<Change>, NetlinkError> {
        let mut buffer = vec![0; 64 * 1024];
        let mut changes = Vec::new();
        while let Some(datagram) = receive(self.socket.as_fd(), &mut buffer)? {
            for received in messages(datagram) {
                let received = received?;
                if received.kind == kind::NEW_GENERATION {
                    changes.push(change(&received)?);
                }
            }
        }
        Ok(changes)
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

pub(super) fn change(received: &Received) -> Result<Change, NetlinkError> {
    Ok(Change { port: received.port, process: process(received.attributes()?) })
}

fn process(attributes: &[u8]) -> String {
    const PROCESS: u16 = 2;
    const NAME: u16 = 3;
    let mut id = None;
    let mut name = String::new();
    for (kind, value) in iterate(attributes) {
        match kind {
            PROCESS => id = value.first_chunk().map(|value| u32::from_be_bytes(*value)),
            NAME => String::from_utf8_lossy(value).trim_end_matches('\0').clone_into(&mut name),
            _ => {}
        }
    }
    match id {
        Some(id) => format!("process {id} ({name})"),
        None => "an unknown process".to_owned(),
    }
}
