//! The kernel's side of the packet filter: a netfilter netlink socket that sends batches and waits for every answer.
//!
//! The netlink protocol is written and read here instead of through libnftnl and libmnl: see
//! `docs/decisions/0010-own-nf_tables-messages.md`.

mod attributes;
mod message;
mod monitor;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::rules::{TABLE, TableFamily};
use attributes::{Attributes, iterate};
pub(crate) use message::{Batch, OWNED_AND_PERSISTENT};
use message::{Message, flag, kind};
pub(crate) use monitor::Monitor;

const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// Room for the answers to a batch with thousands of messages.
const RECEIVE_BUFFER: usize = 8 * 1024 * 1024;

/// What can go wrong between us and nf_tables.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetlinkError {
    #[error("netfilter netlink socket: cannot {what}: {source}")]
    Socket { what: &'static str, source: io::Error },
    #[error("nf_tables refused {what}: {source}")]
    Refused { what: String, source: io::Error },
    #[error("nf_tables did not answer {0} of the messages of a batch; what is in force is unknown")]
    Unanswered(usize),
    #[error("nf_tables sent an answer that cannot be read")]
    Malformed,
    #[error("the rules kept changing while they were read")]
    Interrupted,
}

/// A socket of the nf_tables subsystem, in the network namespace of the thread that made it. Tables with the owner flag
/// belong to it.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    port: u32,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        let socket = open_socket(0)?;
        let address = rustix::net::getsockname(&socket)
            .and_then(SocketAddrNetlink::try_from)
            .map_err(|error| NetlinkError::Socket { what: "learn its address", source: error.into() })?;
        Ok(Self { socket, port: address.pid(), sequence: 0 })
    }

    /// Distinguishes this socket's changes from others' in notifications.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Sends a batch, and returns when the kernel has answered every message of it. On an error nothing of it is in force.
    pub(crate) fn commit(&mut self, batch: &Batch) -> Result<(), NetlinkError> {
        const NFTABLES: u16 = 10;
        let mut bytes = Vec::with_capacity(64 * 1024);
        let mut expected = BTreeMap::new();
        let sequence = self.next_sequence();
        write_message(&mut bytes, kind::BATCH_BEGIN, flag::REQUEST, sequence, 0, NFTABLES, &[]);
        for message in &batch.messages {
            let Message { kind, flags, family, payload, what } = message;
            let sequence = self.next_sequence();
            write_message(&mut bytes, *kind, *flags, sequence, *family, 0, payload);
            expected.insert(sequence, what);
        }
        let sequence = self.next_sequence();
        write_message(&mut bytes, kind::BATCH_END, flag::REQUEST, sequence, 0, NFTABLES, &[]);
        self.send(&bytes)?;

        // The kernel works a batch off within sendmsg: all answers are there.
        let mut first_error = None;
        let mut buffer = vec![0; 256 * 1024];
        while let Some(datagram) = receive(self.socket.as_fd(), &mut buffer)? {
            for received in messages(datagram) {
                let received = received?;
                if received.kind != ERROR {
                    continue;
                }
                let code = received.error_code()?;
                let what = expected.remove(&received.sequence);
                if code != 0 && first_error.is_none() {
                    first_error = Some(NetlinkError::Refused {
                        what: what.map_or_else(|| "the batch".to_owned(), Clone::clone),
                        source: io::Error::from_raw_os_error(code),
                    });
                }
            }
        }
        match first_error {
            Some(error) => Err(error),
            None if expected.is_empty() => Ok(()),
            None => Err(NetlinkError::Unanswered(expected.len())),
        }
    }

    /// Everything that is in our tables, as the kernel describes it, except what changes by itself (the lease).
    pub(crate) fn dump(&mut self) -> Result<Vec<Vec<u8>>, NetlinkError> {
        const ATTEMPTS: usize = 20;
        for _ in 0..ATTEMPTS {
            match self.dump_once() {
                Err(NetlinkError::Interrupted) => {}
                result => return result,
            }
        }
        Err(NetlinkError::Interrupted)
    }

    fn dump_once(&mut self) -> Result<Vec<Vec<u8>>, NetlinkError> {
        let mut description = Vec::new();
        for family in [TableFamily::Inet, TableFamily::Netdev] {
            for kind in [kind::GET_TABLE, kind::GET_SET, kind::GET_CHAIN, kind::GET_RULE] {
                self.dump_kind(kind, family, &mut description)?;
            }
        }
        Ok(description)
    }

    fn dump_kind(&mut self, kind: u16, family: TableFamily, into: &mut Vec<Vec<u8>>) -> Result<(), NetlinkError> {
        const INTERRUPTED: u16 = 0x10;
        let sequence = self.next_sequence();
        // Of tables all are listed, whatever is asked for.
        let payload =
            if kind == kind::GET_TABLE { Vec::new() } else { Attributes::default().text(1, TABLE).into_bytes() };
        let mut bytes = Vec::new();
        write_message(&mut bytes, kind, flag::REQUEST | flag::DUMP, sequence, family as u8, 0, &payload);
        self.send(&bytes)?;
        let mut buffer = vec![0; 256 * 1024];
        let mut interrupted = false;
        loop {
            // A dump is produced while it is read: the next part is there when the one before has been taken.
            let Some(datagram) = receive(self.socket.as_fd(), &mut buffer)? else {
                return Err(NetlinkError::Malformed);
            };
            for received in messages(datagram) {
                let received = received?;
                if received.sequence != sequence {
                    continue;
                }
                interrupted |= received.flags & INTERRUPTED != 0;
                match received.kind {
                    DONE if interrupted => return Err(NetlinkError::Interrupted),
                    DONE => return Ok(()),
                    ERROR => {
                        let code = received.error_code()?;
                        // A table that is gone describes itself by its absence.
                        if code == rustix::io::Errno::NOENT.raw_os_error() {
                            return Ok(());
                        }
                        let source = io::Error::from_raw_os_error(code);
                        return Err(NetlinkError::Refused { what: "to list our tables".to_owned(), source });
                    }
                    _ => into.extend(description(&received)?),
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        let kernel = SocketAddrNetlink::new(0, 0);
        let sent = rustix::net::sendto(&self.socket, bytes, SendFlags::empty(), &kernel)
            .map_err(|error| NetlinkError::Socket { what: "send", source: error.into() })?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(NetlinkError::Socket { what: "send the whole batch", source: io::ErrorKind::WriteZero.into() })
        }
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }
}

/// What a message of a dump says that stays, if it is about our tables.
fn description(received: &Received) -> Result<Option<Vec<u8>>, NetlinkError> {
    let attributes = received.attributes()?;
    let ours = iterate(attributes).any(|(kind, value)| kind == 1 && value == b"opencluster\0");
    Ok(ours.then(|| stable_part(received.kind, attributes)))
}

/// Reads a datagram in every way in which one is read here: how many messages were in it.
pub(crate) fn read_all(datagram: &[u8]) -> Result<usize, NetlinkError> {
    let mut count = 0;
    for received in messages(datagram) {
        let received = received?;
        match received.kind {
            ERROR => drop(received.error_code()?),
            kind::NEW_GENERATION => drop(monitor::change(&received)?),
            _ => drop(description(&received)?),
        }
        count += 1;
    }
    Ok(count)
}

/// Attributes without the uses of chains and tables (they are counted by what refers to them, which is described itself)
/// and the number of elements in the set (the lease comes and goes).
fn stable_part(kind: u16, attributes: &[u8]) -> Vec<u8> {
    const TABLE_USE: u16 = 3;
    const CHAIN_USE: u16 = 6;
    const SET_COUNT: u16 = 20;
    let mut stable = kind.to_ne_bytes().to_vec();
    for (attribute, value) in iterate(attributes) {
        let changing = match kind {
            kind::NEW_TABLE => attribute == TABLE_USE,
            kind::NEW_CHAIN => attribute == CHAIN_USE,
            kind::NEW_SET => attribute == SET_COUNT,
            _ => false,
        };
        if !changing {
            stable.extend_from_slice(&attribute.to_ne_bytes());
            stable.extend_from_slice(value);
        }
    }
    stable
}

fn open_socket(groups: u32) -> Result<OwnedFd, NetlinkError> {
    let failed = |what| move |error: rustix::io::Errno| NetlinkError::Socket { what, source: error.into() };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(NETFILTER))
        .map_err(failed("open it"))?;
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)
        .map_err(failed("enlarge its receive buffer (CAP_NET_ADMIN is needed)"))?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups)).map_err(failed("bind it"))?;
    Ok(socket)
}

/// The next datagram from the kernel, or `None` if there is none now.
fn receive<'a>(socket: BorrowedFd<'_>, buffer: &'a mut [u8]) -> Result<Option<&'a [u8]>, NetlinkError> {
    loop {
        let received = rustix::net::recvfrom(socket, &mut *buffer, RecvFlags::DONTWAIT);
        let (length, _, sender) = match received {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(NetlinkError::Socket { what: "receive", source: error.into() }),
        };
        let from_kernel =
            sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok()).is_some_and(|sender| sender.pid() == 0);
        // Any process may send to a netlink socket: only the kernel is believed.
        if from_kernel {
            return Ok(Some(&buffer[..length]));
        }
    }
}

fn write_message(bytes: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, payload: &[u8]) {
    let length = (HEADER + GENERIC_HEADER + payload.len()) as u32;
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&0_u32.to_ne_bytes());
    bytes.extend_from_slice(&[family, 0]);
    bytes.extend_from_slice(&resource.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// A message from the kernel.
#[derive(Debug)]
struct Received<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    payload: &'a [u8],
}

impl Received<'_> {
    /// The kernel's error, positive as in errno.h; 0 where there is none.
    fn error_code(&self) -> Result<i32, NetlinkError> {
        let code = self.payload.first_chunk().map(|code| i32::from_ne_bytes(*code));
        code.and_then(i32::checked_neg).ok_or(NetlinkError::Malformed)
    }

    fn attributes(&self) -> Result<&[u8], NetlinkError> {
        self.payload.get(GENERIC_HEADER..).ok_or(NetlinkError::Malformed)
    }
}

fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Result<Received<'_>, NetlinkError>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let received = parse_message(datagram);
        datagram = match &received {
            Some((_, rest)) => rest,
            None => &[],
        };
        Some(received.map(|(message, _)| message).ok_or(NetlinkError::Malformed))
    })
}

fn parse_message(datagram: &[u8]) -> Option<(Received<'_>, &[u8])> {
    let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
    let received = Received {
        kind: u16::from_ne_bytes(*datagram.get(4..)?.first_chunk()?),
        flags: u16::from_ne_bytes(*datagram.get(6..)?.first_chunk()?),
        sequence: u32::from_ne_bytes(*datagram.get(8..)?.first_chunk()?),
        port: u32::from_ne_bytes(*datagram.get(12..)?.first_chunk()?),
        payload: datagram.get(HEADER..length)?,
    };
    Some((received, datagram.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_datagram_ends_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            prop_assert!(messages(&bytes).count() <= bytes.len() / HEADER + 1);
            drop(read_all(&bytes));
        }
    }
}
