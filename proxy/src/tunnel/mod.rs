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

/// How long data may stay unacknowledged before the other node is taken for dead.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

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
