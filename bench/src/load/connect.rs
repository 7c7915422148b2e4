//! Connections of the client side.

use std::net::{SocketAddr, TcpStream};

use socket2::{Domain, Protocol, Socket, Type};

use super::ANSWER_TIMEOUT;
use crate::error::BenchError;

/// Connects, blocking, and returns a non-blocking stream without Nagle's delay.
pub(super) fn established(to: SocketAddr) -> Result<TcpStream, BenchError> {
    let stream = blocking(to)?;
    stream.set_nonblocking(true).map_err(BenchError::socket("setting a socket non-blocking"))?;
    Ok(stream)
}

/// Connects and returns a blocking stream whose reads and writes have a time limit.
pub(super) fn blocking(to: SocketAddr) -> Result<TcpStream, BenchError> {
    let what = || format!("connecting to {to}");
    let stream = TcpStream::connect_timeout(&to, ANSWER_TIMEOUT).map_err(BenchError::socket(what()))?;
    stream.set_nodelay(true).map_err(BenchError::socket(what()))?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(BenchError::socket(what()))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT)).map_err(BenchError::socket(what()))?;
    Ok(stream)
}

/// Begins to connect and returns at once; the stream becomes writable when it is established, or has failed.
pub(super) fn begun(to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&to.into()) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
        Err(e) => return Err(e),
    }
    Ok(socket.into())
}
