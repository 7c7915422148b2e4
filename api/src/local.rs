//! Node daemon and proxy: messages (`proto/opencluster/local/v1/local.proto`) over a Unix stream socket.
//!
//! A frame is a big-endian `u32` length followed by a protobuf message of at most [`MAX_FRAME`] bytes. File descriptors
//! travel as `SCM_RIGHTS` with the first byte of the frame that announces them.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;

pub use crate::generated::local::v1::*;

/// The largest message that either side accepts: a snapshot of a large cluster fits, a runaway peer does not.
pub const MAX_FRAME: usize = 256 * 1024 * 1024;

/// [`Setup::busy_poll_us`] unless the operator says otherwise. The answer of an application on an awake host is there within
/// 100 µs; twice as long won nothing (decision 0024).
pub const BUSY_POLL_US: u32 = 150;

/// The most that it can be: beyond a millisecond, sleeping is as good.
pub const MAX_BUSY_POLL_US: u32 = 1_000;

/// The most descriptors in one message (the kernel's own limit is 253).
pub const MAX_DESCRIPTORS: usize = 128;

/// The most descriptors that may wait to be taken: those of one message, and of a second one that has begun to arrive. A
/// peer that sends more than it announces must not fill the other's descriptor table.
const MAX_WAITING: usize = 2 * MAX_DESCRIPTORS;

/// What can go wrong on the socket between daemon and proxy.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer closed the socket, or it could not be read or written.
    #[error("local channel: {0}")]
    Io(#[from] io::Error),
    /// The peer sent something that is not a message.
    #[error("local channel: malformed message: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A frame longer than [`MAX_FRAME`] was announced or requested.
    #[error("local channel: frame of {0} bytes exceeds the limit of {MAX_FRAME}")]
    TooLarge(usize),
    /// More than [`MAX_DESCRIPTORS`] descriptors in one message, or twice as many that nobody takes.
    #[error("local channel: {0} descriptors exceed the limit of {MAX_DESCRIPTORS}")]
    TooManyDescriptors(usize),
    /// The kernel had to drop descriptors (`MSG_CTRUNC`).
    #[error("local channel: descriptors were lost in transit (is the file descriptor limit reached?)")]
    DescriptorsLost,
    /// The peer went away cleanly, between two messages.
    #[error("local channel: closed by the peer")]
    Closed,
}

/// One end of the socket. Sending and receiving are independent: wrap it in an `Arc` to do both at once. Neither is
/// cancel-safe in the middle of a frame: give each direction a task of its own.
#[derive(Debug)]
pub struct Channel {
    socket: tokio::net::UnixStream,
}

/// The receiving half's state: bytes and descriptors that arrived but were not consumed yet.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Inbox {
    /// Takes the next descriptor that arrived with the messages so far.
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }
}

impl Channel {
    /// Wraps a connected socket (a `socketpair`). Must be called inside a tokio runtime with I/O enabled.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket: tokio::net::UnixStream::from_std(socket)? })
    }

    /// Sends one message, and `descriptors` with it.
    pub async fn send<M: Message>(&self, message: &M, descriptors: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let length = message.encoded_len();
        if length > MAX_FRAME {
            return Err(ChannelError::TooLarge(length));
        }
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(ChannelError::TooManyDescriptors(descriptors.len()));
        }
        let mut frame = Vec::with_capacity(4 + length);
        frame.extend_from_slice(&(length as u32).to_be_bytes());
        message.encode_raw(&mut frame);

        let mut sent = 0;
        while sent < frame.len() {
            let accompanying = if sent == 0 { descriptors } else { &[] };
            sent += self
                .socket
                .async_io(Interest::WRITABLE, || send_some(self.socket.as_fd(), &frame[sent..], accompanying))
                .await?;
        }
        Ok(())
    }

    /// Receives one message; descriptors that came along are in `inbox` afterwards, in order.
    pub async fn receive<M: Message + Default>(&self, inbox: &mut Inbox) -> Result<M, ChannelError> {
        loop {
            if let Some(length) = inbox.bytes.first_chunk::<4>() {
                let length = u32::from_be_bytes(*length) as usize;
                if length > MAX_FRAME {
                    return Err(ChannelError::TooLarge(length));
                }
                if inbox.bytes.len() >= 4 + length {
                    let message = M::decode(&inbox.bytes[4..4 + length])?;
                    inbox.bytes.drain(..4 + length);
                    return Ok(message);
                }
            }
            let received =
                self.socket.async_io(Interest::READABLE, || receive_some(self.socket.as_fd(), inbox)).await?;
            match received {
                _ if inbox.descriptors.len() > MAX_WAITING => {
                    return Err(ChannelError::TooManyDescriptors(inbox.descriptors.len()));
                }
                Received::Bytes(0) if inbox.bytes.is_empty() => return Err(ChannelError::Closed),
                Received::Bytes(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Received::Bytes(_) => {}
                Received::DescriptorsLost => return Err(ChannelError::DescriptorsLost),
            }
        }
    }
}

fn send_some(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("the ancillary buffer is too small for the descriptors"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(socket, &[io::IoSlice::new(bytes)], &mut ancillary, flags)?)
}

enum Received {
    Bytes(usize),
    DescriptorsLost,
}

fn receive_some(socket: BorrowedFd<'_>, inbox: &mut Inbox) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0_u8; 16 * 1024];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut [io::IoSliceMut::new(&mut buffer)], &mut ancillary, flags)?;
    inbox.bytes.extend_from_slice(&buffer[..received.bytes]);
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            inbox.descriptors.extend(descriptors);
        }
    }
    if received.flags.contains(rustix::net::ReturnFlags::CTRUNC) {
        return Ok(Received::DescriptorsLost);
    }
    Ok(Received::Bytes(received.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Channel, Channel) {
        let (left, right) = UnixStream::pair().expect("socketpair");
        (Channel::new(left).expect("channel"), Channel::new(right).expect("channel"))
    }

    #[tokio::test]
    async fn messages_and_descriptors_arrive_in_order() {
        let (daemon, proxy) = pair();
        let (passed, mut kept) = UnixStream::pair().expect("socketpair");
        let listener =
            ToProxy { message: Some(to_proxy::Message::Listener(Listener { descriptors: 1, ..Listener::default() })) };
        let drain = ToProxy { message: Some(to_proxy::Message::Drain(Drain { deadline_ms: 7 })) };
        daemon.send(&listener, &[passed.as_fd()]).await.expect("send");
        daemon.send(&drain, &[]).await.expect("send");

        let mut inbox = Inbox::default();
        assert_eq!(proxy.receive::<ToProxy>(&mut inbox).await.expect("receive"), listener);
        let mut received = UnixStream::from(inbox.take_descriptor().expect("a descriptor"));
        io::Write::write_all(&mut kept, b"x").expect("write");
        let mut byte = [0];
        io::Read::read_exact(&mut received, &mut byte).expect("read through the passed descriptor");
        assert_eq!(proxy.receive::<ToProxy>(&mut inbox).await.expect("receive"), drain);
        assert!(inbox.take_descriptor().is_none());
    }

    #[tokio::test]
    async fn an_oversized_length_is_refused_before_anything_is_kept() {
        let (left, right) = UnixStream::pair().expect("socketpair");
        let channel = Channel::new(right).expect("channel");
        io::Write::write_all(&mut &left, &u32::MAX.to_be_bytes()).expect("write");
        let error = channel.receive::<ToProxy>(&mut Inbox::default()).await.expect_err("refused");
        assert!(matches!(error, ChannelError::TooLarge(_)), "{error}");
    }

    #[tokio::test]
    async fn descriptors_that_nobody_takes_do_not_pile_up() {
        let (daemon, proxy) = pair();
        let (passed, _kept) = UnixStream::pair().expect("socketpair");
        let descriptors = [passed.as_fd(); MAX_DESCRIPTORS];
        let mut inbox = Inbox::default();
        let mut outcomes = Vec::new();
        for _ in 0..3 {
            proxy.send(&ToDaemon::default(), &descriptors).await.expect("send");
            outcomes.push(daemon.receive::<ToDaemon>(&mut inbox).await);
        }
        assert!(outcomes[0].is_ok() && outcomes[1].is_ok(), "{outcomes:?}");
        assert!(matches!(outcomes[2], Err(ChannelError::TooManyDescriptors(_))), "{outcomes:?}");
    }

    #[tokio::test]
    async fn a_closed_peer_is_told_from_a_broken_frame() {
        let (left, right) = UnixStream::pair().expect("socketpair");
        let channel = Channel::new(right).expect("channel");
        io::Write::write_all(&mut &left, &[0, 0, 0, 9, 1]).expect("write");
        drop(left);
        let error = channel.receive::<ToProxy>(&mut Inbox::default()).await.expect_err("broken");
        assert!(matches!(error, ChannelError::Io(_)), "{error}");
    }
}
