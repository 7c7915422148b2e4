//! Ending what is still connected when the node is severed: applications get an error at once instead of waiting for
//! packets that never come. (That nothing passes is the packet filter's doing; this is a courtesy on top of it.)

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::netlink::{NETFILTER, SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const HEADER: usize = 16;
/// `inet_diag_sockid`: ports, addresses, interface, cookie.
const SOCKET_ID: usize = 48;
/// Where it stands in `inet_diag_msg` and, one state mask later, in `inet_diag_req_v2`.
const ID_IN_ANSWER: usize = 4;

const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;

/// Destroys every TCP connection of this network namespace that is not between loopback addresses, and that does not lead to one
/// of `spared`. Returns how many. One that cannot be destroyed keeps none of the others: the first error is returned at the
/// end.
pub(crate) fn reset_all(spared: &[SocketAddr]) -> io::Result<usize> {
    let families = [AddressFamily::INET, AddressFamily::INET6];
    sum_of_all(families.map(|family| reset_family(family.as_raw() as u8, spared)))
}

fn reset_family(family: u8, spared: &[SocketAddr]) -> io::Result<usize> {
    let flags = SocketFlags::CLOEXEC;
    // One for each family: whatever an error left unread is not taken for an answer about the next.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(SOCK_DIAG))?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
    let mut found = connections(&socket, family)?;
    found.retain(|id| !destination(family, id).is_some_and(|to| spared.contains(&to)));
    sum_of_all(found.iter().map(|id| destroy(&socket, family, id).map(usize::from)))
}

/// Goes on after errors.
fn sum_of_all(counts: impl IntoIterator<Item = io::Result<usize>>) -> io::Result<usize> {
    let mut sum = 0;
    let mut first_error = None;
    for count in counts {
        match count {
            Ok(count) => sum += count,
            Err(error) => drop(first_error.get_or_insert(error)),
        }
    }
    first_error.map_or(Ok(sum), Err)
}

/// Forgets every tracked connection of this network namespace, so that no rule takes a late packet for part of one.
pub(crate) fn forget_tracked() -> io::Result<()> {
    /// `IPCTNL_MSG_CT_DELETE` of the conntrack subsystem: without a tuple, of all.
    const DELETE: u16 = 1 << 8 | 2;
    const LENGTH: usize = HEADER + 4;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(NETFILTER))?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
    let mut bytes = Vec::with_capacity(LENGTH);
    bytes.extend_from_slice(&(LENGTH as u32).to_ne_bytes());
    bytes.extend_from_slice(&DELETE.to_ne_bytes());
    bytes.extend_from_slice(&(REQUEST | ACK).to_ne_bytes());
    // Sequence, port; then family, version and resource: all of them 0.
    bytes.extend_from_slice(&[0; 8 + 4]);
    rustix::net::sendto(&socket, &bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let datagram = receive(&socket)?;
    let Some((ERROR, payload, _)) = split(&datagram) else { return Err(io::ErrorKind::InvalidData.into()) };
    match error_of(payload) {
        done if done.raw_os_error() == Some(0) => Ok(()),
        error => Err(error),
    }
}

fn connections(socket: &OwnedFd, family: u8) -> io::Result<Vec<[u8; SOCKET_ID]>> {
    /// All states but LISTEN, TIME_WAIT and CLOSE.
    const STATES: u32 = 0xfff & !(1 << 10) & !(1 << 6) & !(1 << 7);
    send(socket, BY_FAMILY, REQUEST | DUMP, family, STATES, &[0; SOCKET_ID])?;
    let mut found = Vec::new();
    loop {
        if read_part(&receive(socket)?, family, &mut found)? {
            return Ok(found);
        }
    }
}

/// Part of a list of connections. Whether it was the last.
fn read_part(mut datagram: &[u8], family: u8, found: &mut Vec<[u8; SOCKET_ID]>) -> io::Result<bool> {
    while let Some((kind, payload, next)) = split(datagram) {
        datagram = next;
        match kind {
            DONE => return Ok(true),
            ERROR => return Err(error_of(payload)),
            _ => {
                let id = payload.get(ID_IN_ANSWER..).and_then(<[u8]>::first_chunk::<SOCKET_ID>);
                found.extend(id.filter(|id| !between_loopback_addresses(family, id)));
            }
        }
    }
    Ok(false)
}

/// Reads a datagram in every way in which one is read here: how many connections were in it.
pub(crate) fn read_all(datagram: &[u8]) -> usize {
    let mut found = Vec::new();
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        drop(read_part(datagram, family.as_raw() as u8, &mut found));
    }
    found.len()
}

/// `false`: it ended by itself in the meantime.
fn destroy(socket: &OwnedFd, family: u8, id: &[u8; SOCKET_ID]) -> io::Result<bool> {
    send(socket, DESTROY, REQUEST | ACK, family, u32::MAX, id)?;
    let datagram = receive(socket)?;
    let Some((ERROR, payload, _)) = split(&datagram) else { return Err(io::ErrorKind::InvalidData.into()) };
    let error = error_of(payload);
    match error.raw_os_error() {
        Some(0) => Ok(true),
        Some(code) if code == rustix::io::Errno::NOENT.raw_os_error() => Ok(false),
        _ => Err(error),
    }
}

fn send(socket: &OwnedFd, kind: u16, flags: u16, family: u8, states: u32, id: &[u8; SOCKET_ID]) -> io::Result<()> {
    const TCP: u8 = 6;
    let mut bytes = Vec::with_capacity(HEADER + 8 + SOCKET_ID);
    bytes.extend_from_slice(&((HEADER + 8 + SOCKET_ID) as u32).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[family, TCP, 0, 0]);
    bytes.extend_from_slice(&states.to_ne_bytes());
    bytes.extend_from_slice(id);
    rustix::net::sendto(socket, &bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let (length, _, sender) = rustix::net::recvfrom(socket, buffer.as_mut_slice(), RecvFlags::empty())?;
        // Any process may send to a netlink socket: only the kernel is believed.
        if sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok()).is_some_and(|sender| sender.pid() == 0) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

/// Kind and payload of the first message, and what follows it.
fn split(datagram: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*datagram.get(4..)?.first_chunk()?);
    let payload = datagram.get(HEADER..length)?;
    Some((kind, payload, datagram.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn error_of(payload: &[u8]) -> io::Error {
    let code = payload.first_chunk().and_then(|code| i32::from_ne_bytes(*code).checked_neg());
    code.map_or_else(|| io::ErrorKind::InvalidData.into(), io::Error::from_raw_os_error)
}

/// Where the two addresses stand in `inet_diag_sockid`, behind the two ports.
const SOURCE: usize = 4;
const DESTINATION: usize = 20;

fn between_loopback_addresses(family: u8, id: &[u8; SOCKET_ID]) -> bool {
    [SOURCE, DESTINATION].into_iter().all(|at| address(family, id, at).is_some_and(|address| address.is_loopback()))
}

fn destination(family: u8, id: &[u8; SOCKET_ID]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(*id.get(2..)?.first_chunk()?);
    Some(SocketAddr::new(address(family, id, DESTINATION)?, port))
}

fn address(family: u8, id: &[u8; SOCKET_ID], at: usize) -> Option<IpAddr> {
    let bytes: [u8; 16] = *id.get(at..)?.first_chunk()?;
    Some(if family == AddressFamily::INET.as_raw() as u8 {
        Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
    } else {
        IpAddr::from(Ipv6Addr::from(bytes)).to_canonical()
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    fn pair(address: SocketAddr) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).expect("listen");
        let address = listener.local_addr().expect("address");
        // The kernel makes the route to a new address a little later than the address.
        let deadline = Instant::now() + Duration::from_secs(5);
        let client = loop {
            match TcpStream::connect(address) {
                Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable && Instant::now() < deadline => {
                    std::thread::park_timeout(Duration::from_millis(5));
                }
                connected => break connected.expect("connect"),
            }
        };
        client.set_read_timeout(Some(Duration::from_millis(100))).expect("timeout");
        (client, listener.accept().expect("accept").0)
    }

    #[test]
    fn r06_connections_end_but_those_between_loopback_addresses() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run the tests as root");
        let script = "ip link set lo up; ip address add 10.9.9.9/32 dev lo; ip address add fd09::9/128 dev lo nodad";
        assert!(std::process::Command::new("sh").args(["-c", script]).status().expect("sh").success());
        let [mut four, mut six, mut loopback] =
            ["10.9.9.9:0", "[fd09::9]:0", "127.0.0.1:0"].map(|address| pair(address.parse().expect("address")));
        let ends = |(client, _): &(TcpStream, TcpStream)| {
            [client.peer_addr().expect("address"), client.local_addr().expect("address")]
        };
        let spared = [ends(&four), ends(&six)].concat();
        assert_eq!(reset_all(&spared).expect("reset"), 0);
        for (client, _server) in [&mut four, &mut six] {
            assert_eq!(client.read(&mut [0]).expect_err("nothing to read").kind(), io::ErrorKind::WouldBlock, "spared");
        }
        assert_eq!(reset_all(&[]).expect("reset"), 2, "one end of each resets the other");
        for (client, _server) in [&mut four, &mut six] {
            let error = client.read(&mut [0]).expect_err("ended");
            let ended = [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset];
            assert!(ended.contains(&error.kind()), "{error}");
        }
        let error = loopback.0.read(&mut [0]).expect_err("nothing to read");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "the positive control");
        assert_eq!(reset_all(&[]).expect("reset"), 0);
    }

    #[test]
    fn r06_one_connection_that_cannot_be_ended_does_not_keep_the_others() {
        let mut asked = 0;
        let outcomes: [fn() -> io::Result<usize>; 4] =
            [|| Ok(1), || Err(rustix::io::Errno::OPNOTSUPP.into()), || Ok(1), || Err(rustix::io::Errno::PERM.into())];
        let ended = sum_of_all(outcomes.iter().map(|outcome| {
            asked += 1;
            outcome()
        }));
        assert_eq!(asked, 4, "all are asked for");
        assert_eq!(
            ended.expect_err("it is not passed over").raw_os_error(),
            Some(rustix::io::Errno::OPNOTSUPP.raw_os_error())
        );
        assert_eq!(sum_of_all([Ok(1), Ok(2)]).expect("no error"), 3);
    }

    #[test]
    fn r06_tracked_connections_are_forgotten() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run the tests as root");
        let script = "ip link set lo up; nft 'add table inet t; add chain inet t c { type filter hook input priority 0; }; \
                      add rule inet t c ct state established accept'";
        assert!(std::process::Command::new("sh").args(["-c", script]).status().expect("sh").success());
        let tracked = || {
            let count = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").expect("conntrack");
            count.trim().parse::<u32>().expect("a number")
        };
        let _connected = pair("127.0.0.1:0".parse().expect("address"));
        assert!(tracked() > 0, "the positive control");
        forget_tracked().expect("forgotten");
        assert_eq!(tracked(), 0);
    }
}
