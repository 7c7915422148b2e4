//! The one socket that the node daemon leaves open across exec.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why the descriptor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// Not open, or no Unix stream socket.
    #[error("file descriptor {0} is not a Unix stream socket: the proxy is started by opencluster-node, not by hand")]
    NotASocket(RawFd),
    /// Standard input, output and error are something else.
    #[error("file descriptor {0} cannot be the control socket")]
    Reserved(RawFd),
    /// It was taken before.
    #[error("the control socket was taken already")]
    Taken,
    /// It could not be prepared.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
}

/// Takes the inherited socket. Only once in the life of the process.
pub fn take_control_socket(fd: RawFd) -> Result<UnixStream, InheritError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if fd <= 2 {
        return Err(InheritError::Reserved(fd));
    }
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(InheritError::Taken);
    }
    // SAFETY: the borrow ends before the descriptor is owned below; if it is not open, fstat and getsockopt say so.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let is_unix = rustix::net::sockopt::socket_domain(borrowed).is_ok_and(|d| d == rustix::net::AddressFamily::UNIX);
    let is_stream = rustix::net::sockopt::socket_type(borrowed).is_ok_and(|t| t == rustix::net::SocketType::STREAM);
    if !(is_unix && is_stream) {
        return Err(InheritError::NotASocket(fd));
    }
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC).map_err(io::Error::from)?;
    // SAFETY: it is open (it answered), it was inherited across exec so nothing in this process owns it, and `TAKEN`
    // lets this line run once.
    Ok(UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}
