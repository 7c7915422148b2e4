//! The sockets that the proxy gets: made here, with privilege, so that it needs none.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use opencluster_api::local::{Listener, listener::Kind};
use socket2::{Domain, Protocol, Socket, Type};

/// Connections that may wait for a worker.
const BACKLOG: i32 = 4096;

/// Why a listener could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    #[error("cannot listen on {address}: {source}")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("cannot listen on {}: {source}", path.display())]
    Unix { path: PathBuf, source: io::Error },
}

/// A message to the proxy with the sockets that it announces.
pub(crate) type Announced = (Listener, Vec<OwnedFd>);

/// The capture listeners of one workload: one for each worker on each loopback address.
pub(crate) fn capture(namespace: &str, name: &str, port: u16, workers: u32) -> Result<Announced, ListenError> {
    let mut announced = (
        Listener {
            kind: Kind::Capture.into(),
            workload_namespace: namespace.to_owned(),
            workload_name: name.to_owned(),
            ..Listener::default()
        },
        Vec::new(),
    );
    for address in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        each_worker(&mut announced, SocketAddr::new(address, port), workers)?;
    }
    Ok(announced)
}

/// The tunnel listeners: for each of the node's addresses, one for each worker.
pub(crate) fn tunnels(addresses: &[IpAddr], port: u16, workers: u32) -> Result<Vec<Announced>, ListenError> {
    addresses
        .iter()
        .map(|address| {
            let mut announced = (Listener { kind: Kind::Tunnel.into(), ..Listener::default() }, Vec::new());
            each_worker(&mut announced, SocketAddr::new(*address, port), workers)?;
            Ok(announced)
        })
        .collect()
}

/// The admin socket: root's only.
pub(crate) fn admin(path: &Path) -> Result<Announced, ListenError> {
    let failed = |source| ListenError::Unix { path: path.to_owned(), source };
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let message = Listener { kind: Kind::Admin.into(), descriptors: 1, workers: vec![0], ..Listener::default() };
    Ok((message, vec![listener.into()]))
}

fn each_worker(announced: &mut Announced, address: SocketAddr, workers: u32) -> Result<(), ListenError> {
    let (message, descriptors) = announced;
    for worker in 0..workers {
        match listen(address) {
            Ok(socket) => descriptors.push(socket.into()),
            // A host without IPv6 has nothing to capture there.
            Err(error) if address.is_ipv6() && address.ip().is_loopback() && unavailable(&error) => return Ok(()),
            Err(source) => return Err(ListenError::Tcp { address, source }),
        }
        message.workers.push(worker);
        message.descriptors += 1;
    }
    Ok(())
}

fn unavailable(error: &io::Error) -> bool {
    use nix::errno::Errno;
    [Errno::EAFNOSUPPORT, Errno::EADDRNOTAVAIL].iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

fn listen(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if !address.ip().is_loopback() {
        // The node's addresses may come up later than we do (or, in IPv6, still be looked for elsewhere).
        match address {
            SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
            SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
        }
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}
