//! Each worker has a table of file descriptors of its own: the whole of the process's limit is there for each, and no lock
//! on a common table is between the cores. Descriptors therefore do not cross threads as numbers; listeners come to a
//! worker as they come to the process, over a socket.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use rustix::thread::UnshareFlags;

/// The control thread's end.
#[derive(Debug)]
pub struct Sender(UnixDatagram);

/// The worker's end.
#[derive(Debug)]
pub struct Receiver(UnixDatagram);

/// A way for descriptors to one worker. To be made before the worker leaves the common table.
pub fn pair() -> io::Result<(Sender, Receiver)> {
    let (sender, receiver) = UnixDatagram::pair()?;
    Ok((Sender(sender), Receiver(receiver)))
}

impl Sender {
    /// Sends one; the caller's own may be closed afterwards.
    pub fn pass(&self, descriptor: impl AsFd) -> io::Result<()> {
        let descriptors = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("the ancillary buffer is too small for a descriptor"));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&self.0, &[io::IoSlice::new(&[0])], &mut ancillary, flags)?;
        Ok(())
    }
}

impl Receiver {
    /// Takes the next one, which has been passed already.
    pub fn take(&self) -> io::Result<OwnedFd> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(&self.0, &mut [io::IoSliceMut::new(&mut [0])], &mut ancillary, flags)?;
        let passed = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        passed.ok_or_else(|| io::Error::other("the descriptor was lost in transit (is the limit reached?)"))
    }
}

/// Gives the calling thread a copy of the common table, for its own.
///
/// Only for a worker's thread, once the runtimes of *all* workers are made, and before it serves anything.
pub(super) fn leave_common_table() -> io::Result<()> {
    // SAFETY: From here on a number may mean another file on this thread than on others. What is open now means the same in
    // both tables for as long as it stays open: of that, this thread uses its runtime, and the wakers of the control thread
    // and of the other workers, whose owners keep them open in theirs to the end. It owns (and so closes) only its runtime
    // and its `Receiver`, whose numbers nobody else uses. What is opened from now on does not cross: listeners come through
    // `Receiver`, and nothing of a flow ever leaves its worker.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_listener_passes_into_a_table_of_its_own() {
        let (sender, receiver) = pair().expect("pair");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let worker = std::thread::spawn(move || {
            leave_common_table().expect("unshare");
            receiver.take().expect_err("nothing has been passed yet");
            sender.pass(&listener).expect("pass");
            let passed = TcpListener::from(receiver.take().expect("take"));
            passed.local_addr().expect("address")
        });
        assert_eq!(worker.join().expect("worker"), address);
    }
}
