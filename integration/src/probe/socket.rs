//! Sockets for servers that must take thousands of connections at once.

use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

use opencluster_integration::report::Event;

/// A listener on `address` (`[::]:PORT` takes IPv4 too) with a long queue. Says so on standard output.
pub(crate) fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(16_384)?;
    let listener = TcpListener::from_std(socket.into())?;
    crate::tell(&Event::Listening { address: listener.local_addr()?.to_string() })?;
    Ok(listener)
}
