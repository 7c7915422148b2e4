//! Tunnels: authenticated, encrypted connections between two proxies. Small flows share one; a flow that has become bulk
//! gets one of its own.

pub mod inbound;
mod inbox;
pub mod info;
pub mod link;
pub mod oct;
pub mod pool;
pub mod shared;
pub mod tls;

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// How long a handshake's or a shared tunnel's data may stay unacknowledged before the other node is taken for dead.
#[cfg(not(test))]
const USER_TIMEOUT: Duration = Duration::from_secs(20);
#[cfg(test)]
const USER_TIMEOUT: Duration = Duration::from_secs(2);

/// Socket options of a tunnel: no Nagle, and a dead peer is noticed. Send and receive buffers stay under the kernel's
/// own tuning, which a fixed size would switch off.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(15)).with_interval(Duration::from_secs(5)).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}

/// Socket options of a leased tunnel, after its handshake. It stands still for as long as the application at its end does
/// not read, and the kernel's limit does not tell that from a node that is gone: a player that is paused for half a minute
/// would lose its flow. A node that is gone loses its lease, which cuts its tunnels on all others; and retransmissions that
/// nobody acknowledges end a tunnel as they end any TCP connection. (A shared tunnel is always read.)
fn tune_leased(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_tcp_user_timeout(None)
}
