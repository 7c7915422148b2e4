//! A nonblocking TCP socket that asks the kernel first and waits second.
//!
//! tokio's own methods wait for readiness before they try, and need a second system call to learn that a socket is
//! drained. Here a short read or write clears the readiness itself, so a small message costs one `epoll_wait`, one read
//! and one write.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsFd;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// A connected socket, registered with the worker's runtime.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    /// It may be worth trying: nothing was heard to the contrary since the last wake-up.
    readable: bool,
    writable: bool,
}

/// Until it is [finished](Socket::finish), an application's connection ends with a reset, whatever ends it: if this process
/// is killed, the kernel closes its sockets, and an application would take that for the end of the data. What a listener
/// accepts takes this over from it, without a system call for each connection.
pub fn reset_unless_finished(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

impl Socket {
    /// Takes over a connected stream. Nagle's algorithm is off: this proxy does its own coalescing.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, readable: true, writable: true })
    }

    /// The same for an application's connection that was made here: see [`reset_unless_finished`].
    pub fn of_application(stream: TcpStream) -> io::Result<Self> {
        reset_unless_finished(&stream)?;
        Self::new(stream)
    }

    /// Closes an application's connection in order: both directions have ended, and what is still in the kernel's buffers
    /// is delivered.
    pub fn finish(self) {
        if let Err(error) = SockRef::from(&self.stream).set_linger(None) {
            tracing::debug!(%error, "a connection that ended in order was reset");
        }
    }

    /// Without the worker's runtime.
    pub fn into_std(self) -> io::Result<std::net::TcpStream> {
        self.stream.into_std()
    }

    /// For handshakes, which use tokio's own methods.
    pub fn stream_mut(&mut self) -> &mut TcpStream {
        // Whatever happened there, trying is right.
        self.readable = true;
        self.writable = true;
        &mut self.stream
    }

    /// The underlying stream.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Waits until a read is worth trying. Costs nothing if the last read filled its buffer.
    pub fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.readable {
            ready!(self.stream.poll_read_ready(context))?;
            self.readable = true;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads into the buffers in order; 0 is the end of the stream.
    pub fn poll_read_vectored(
        &mut self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.poll_readable(context))?;
            let wanted: usize = buffers.iter().map(|buffer| buffer.len()).sum();
            let result = match &mut *buffers {
                [single] => rustix::net::recv(&self.stream, &mut **single, RecvFlags::DONTWAIT).map(|(read, _)| read),
                many => rustix::io::readv(&self.stream, many),
            };
            match result {
                Ok(read) => {
                    if read < wanted && read > 0 {
                        self.drained();
                    }
                    return Poll::Ready(Ok(read));
                }
                Err(Errno::AGAIN) => self.drained(),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Writes some of the buffers.
    pub fn poll_write_vectored(
        &mut self,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            if !self.writable {
                ready!(self.stream.poll_write_ready(context))?;
                self.writable = true;
            }
            let wanted: usize = buffers.iter().map(|buffer| buffer.len()).sum();
            let result = match buffers {
                [single] => rustix::net::send(&self.stream, single, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
                // The Rust runtime ignores SIGPIPE.
                many => rustix::io::writev(&self.stream, many),
            };
            match result {
                Ok(written) => {
                    if written < wanted {
                        self.full();
                    }
                    return Poll::Ready(Ok(written));
                }
                Err(Errno::AGAIN) => self.full(),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Writes what the kernel takes at once: 0 if nothing. Only while no task waits for this socket to become writable.
    pub fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.writable {
            return Ok(0);
        }
        let mut written = 0;
        while written < bytes.len() {
            match rustix::net::send(&self.stream, &bytes[written..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    written += sent;
                    if written < bytes.len() {
                        self.full();
                        break;
                    }
                }
                Err(Errno::AGAIN) => {
                    self.full();
                    break;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(written)
    }

    /// Ends our direction in order.
    pub fn shutdown_write(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Write)?)
    }

    /// Closes the socket so that the other side sees a reset.
    pub fn reset(self) {
        self.reset_on_close();
    }

    /// Whenever the socket is closed, the other side sees a reset.
    pub fn reset_on_close(&self) {
        if let Err(error) = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)) {
            // It is closed all the same, only less loudly.
            tracing::debug!(%error, "a connection was closed without a reset");
        }
    }

    /// Whether the peer has closed or sent something unasked for, as far as epoll has told us (no system call).
    pub fn is_disturbed(&self) -> bool {
        let mut context = Context::from_waker(std::task::Waker::noop());
        self.stream.poll_read_ready(&mut context).is_ready()
    }

    fn drained(&mut self) {
        self.readable = false;
        clear(&self.stream, Interest::READABLE);
    }

    fn full(&mut self) {
        self.writable = false;
        clear(&self.stream, Interest::WRITABLE);
    }
}

/// Tells tokio that the kernel has nothing more for now. What closes a direction stays set, and an event that comes in
/// between is not lost: tokio compares ticks.
fn clear(stream: &TcpStream, interest: Interest) {
    let cleared = stream.try_io(interest, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    debug_assert!(cleared.is_err());
}
