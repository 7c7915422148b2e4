//! The server side: echo, sink and source in one process, one thread.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use socket2::{Domain, Protocol, Socket, Type};

use super::poll::{EventFlags, Poll};
use super::stream::CHUNK;
use crate::error::BenchError;

/// A connection storm of 10,000 must not overflow the accept queue (the namespaces allow this much).
const BACKLOG: i32 = 16_384;

/// The longest time that a source sends for.
const LONGEST_SOURCE: Duration = Duration::from_hours(1);

/// Where to listen for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listeners {
    /// Sends back what it receives; holds no memory for an idle connection.
    pub echo: SocketAddr,
    /// Counts what it receives and answers the count (8 bytes, big-endian) at its end.
    pub sink: SocketAddr,
    /// Reads a number of milliseconds (8 bytes, big-endian), sends for that long, and closes.
    pub source: SocketAddr,
}

#[derive(Debug, Clone, Copy)]
enum Role {
    Echo,
    Sink,
    Source,
}

enum Peer {
    /// What a short write left over.
    Echo(Vec<u8>),
    Sink(u64),
    Source {
        request: Vec<u8>,
        until: Option<Instant>,
    },
}

/// What to do with a connection after an event.
#[derive(PartialEq, Eq)]
enum Next {
    Keep,
    Watch(EventFlags),
    Close,
}

/// Serves until it is killed. `ready` is called once when all listeners are there.
pub fn serve(listeners: &Listeners, ready: impl FnOnce() -> Result<(), BenchError>) -> Result<(), BenchError> {
    let mut poll = Poll::new(1024)?;
    let roles = [(Role::Echo, listeners.echo), (Role::Sink, listeners.sink), (Role::Source, listeners.source)];
    let mut sockets = Vec::new();
    for (index, &(_, address)) in roles.iter().enumerate() {
        let socket = listen(address).map_err(BenchError::socket(format!("listening on {address}")))?;
        poll.add(&socket, index as u64, EventFlags::IN)?;
        sockets.push(socket);
    }
    ready()?;
    let mut peers = Slots::default();
    let mut buffer = vec![0x5a; CHUNK];
    loop {
        poll.wait(None)?;
        for event in 0..poll.len() {
            let (token, _) = poll.event(event);
            let index = token as usize;
            if let (Some(socket), Some((role, _))) = (sockets.get(index), roles.get(index)) {
                accept(socket, *role, &poll, &mut peers, roles.len())?;
                continue;
            }
            let slot = index - roles.len();
            let Some((stream, peer)) = peers.get(slot) else { continue };
            match step(stream, peer, &mut buffer) {
                Next::Keep => {}
                Next::Watch(interest) => poll.modify(&*stream, token, interest)?,
                Next::Close => peers.remove(slot),
            }
        }
    }
}

fn listen(address: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    // Inherited by every accepted socket: one system call less for each of them.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn accept(socket: &Socket, role: Role, poll: &Poll, peers: &mut Slots, offset: usize) -> Result<(), BenchError> {
    loop {
        let stream = match accept_with(socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(stream) => stream,
            Err(Errno::AGAIN) => return Ok(()),
            // The peer was gone before it was accepted.
            Err(Errno::CONNABORTED | Errno::INTR) => continue,
            Err(e) => return Err(BenchError::socket("accepting (is the limit of open files too small?)")(e.into())),
        };
        let peer = match role {
            Role::Echo => Peer::Echo(Vec::new()),
            Role::Sink => Peer::Sink(0),
            Role::Source => Peer::Source { request: Vec::new(), until: None },
        };
        let (slot, stream) = peers.insert(stream.into(), peer);
        poll.add(stream, (slot + offset) as u64, EventFlags::IN)?;
    }
}

fn step(stream: &mut TcpStream, peer: &mut Peer, buffer: &mut [u8]) -> Next {
    let result = match peer {
        Peer::Echo(left) => echo(stream, left, buffer),
        Peer::Sink(count) => sink(stream, count, buffer),
        Peer::Source { request, until } => source(stream, request, until, buffer),
    };
    match result {
        Ok(next) => next,
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Next::Keep,
        // A peer that resets is the client's to report: it knows whether it meant to.
        Err(_) => Next::Close,
    }
}

fn echo(stream: &mut TcpStream, left: &mut Vec<u8>, buffer: &mut [u8]) -> std::io::Result<Next> {
    if !left.is_empty() {
        let n = stream.write(left)?;
        left.drain(..n);
        if left.is_empty() {
            *left = Vec::new();
            return Ok(Next::Watch(EventFlags::IN));
        }
        return Ok(Next::Keep);
    }
    let n = stream.read(buffer)?;
    if n == 0 {
        return Ok(Next::Close);
    }
    let written = match stream.write(&buffer[..n]) {
        Ok(written) => written,
        Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
        Err(e) => return Err(e),
    };
    if written < n {
        left.extend_from_slice(&buffer[written..n]);
        return Ok(Next::Watch(EventFlags::OUT));
    }
    Ok(Next::Keep)
}

fn sink(stream: &mut TcpStream, count: &mut u64, buffer: &mut [u8]) -> std::io::Result<Next> {
    let n = stream.read(buffer)?;
    if n == 0 {
        // Eight bytes always fit the empty send buffer of a connection that never sent.
        stream.write_all(&count.to_be_bytes())?;
        return Ok(Next::Close);
    }
    *count += n as u64;
    Ok(Next::Keep)
}

fn source(
    stream: &mut TcpStream,
    request: &mut Vec<u8>,
    until: &mut Option<Instant>,
    buffer: &mut [u8],
) -> std::io::Result<Next> {
    if let Some(until) = until {
        if Instant::now() >= *until {
            return Ok(Next::Close);
        }
        // The buffer was last written by reads of other connections: what is sent does not matter.
        return stream.write(buffer).map(|_| Next::Keep);
    }
    let mut piece = [0; 8];
    let n = stream.read(&mut piece)?;
    if n == 0 {
        return Ok(Next::Close);
    }
    request.extend_from_slice(&piece[..n]);
    let Some(milliseconds) = request.first_chunk::<8>() else { return Ok(Next::Keep) };
    let length = Duration::from_millis(u64::from_be_bytes(*milliseconds)).min(LONGEST_SOURCE);
    *until = Some(Instant::now() + length);
    Ok(Next::Watch(EventFlags::OUT))
}

/// Connections by small numbers that are used again.
#[derive(Default)]
struct Slots {
    used: Vec<Option<(TcpStream, Peer)>>,
    free: Vec<usize>,
}

impl Slots {
    fn insert(&mut self, stream: TcpStream, peer: Peer) -> (usize, &TcpStream) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.used.push(None);
            self.used.len() - 1
        });
        let (stream, _) = self.used[slot].insert((stream, peer));
        (slot, stream)
    }

    fn get(&mut self, slot: usize) -> Option<&mut (TcpStream, Peer)> {
        self.used.get_mut(slot)?.as_mut()
    }

    fn remove(&mut self, slot: usize) {
        if self.used[slot].take().is_some() {
            self.free.push(slot);
        }
    }
}
