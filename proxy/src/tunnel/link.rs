//! One tunnel: a socket, its TLS session, and frames in both directions, driven by whichever task owns it.
//!
//! There is no lock and no split: one task drives both directions. Outgoing records are composed and sealed in one
//! buffer and leave in one write; incoming records are opened where the kernel put them, and their data is written to
//! the application from there.

use std::io::{self, IoSlice, IoSliceMut};
use std::task::{Context, Poll, ready};

use super::inbox::Inbox;
use super::oct::frame::{Continue, Event, FrameError, Framing, HEADER, Kind, Open, Refusal, data_header, encode_empty};
use super::tls::handshake::Established;
use super::tls::record::{
    KEY_UPDATE_RECORD, MAX_CONTENT, MAX_OWN_RECORD, RECORD_HEADER, RECORD_TRAILER, RecordError, Session,
};
use crate::relay::buffer::{self, Buffer, LARGE_RECORDS, Size};
use crate::relay::socket::Socket;

/// Pieces of data that one write to the application gathers at most.
pub const MAX_PIECES: usize = 64;

/// Why a tunnel is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection broke.
    #[error("the tunnel's connection broke: {0}")]
    Io(#[from] io::Error),
    /// The peer closed it in order (it does so only between flows).
    #[error("the peer closed the tunnel")]
    CloseNotify,
    /// The connection ended without a close_notify.
    #[error("the tunnel's connection ended in the middle")]
    Truncated,
    /// The TLS session is broken.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The peer sent something that is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer sent a frame out of turn.
    #[error(transparent)]
    Violation(#[from] super::oct::exchange::Violation),
    /// The peer sent more than it may.
    #[error("the peer sent more data than a stream's window allows")]
    Window,
    /// A stream that there is not.
    #[error("the peer sent {kind:?} for stream {stream}, which is not open")]
    NoStream {
        /// What arrived.
        kind: Kind,
        /// For which.
        stream: u32,
    },
    /// Streams without number.
    #[error("the peer opened more streams than a shared tunnel may carry")]
    TooManyStreams,
    /// We would have to say more than the peer reads.
    #[error("the peer does not read its control frames")]
    Choked,
    /// It was cut.
    #[error("the tunnel was cut: {0}")]
    Cut(crate::worker::registry::Cut),
    /// The peer goes on sending to a flow that was cut.
    #[error("the peer did not stop sending after the flow was cut")]
    Deaf,
}

/// Ciphertext that waits to be sent.
#[derive(Debug, Default)]
struct Outbox {
    buffer: Option<Buffer>,
    sent: u32,
    end: u32,
}

/// Where the data of outgoing records comes from.
#[derive(Debug)]
pub enum Source<'a> {
    /// Only queued control frames.
    Nothing,
    /// The application, at most so many bytes; a copy is kept if somebody may need it again.
    App(&'a mut Socket, usize, Option<&'a mut Vec<u8>>),
    /// Bytes that were read from the application before.
    Bytes(&'a [u8]),
}

/// What [`Tunnel::load`] did.
#[derive(Debug)]
pub enum Loaded {
    /// So many bytes of data are sealed.
    Data(usize),
    /// Only control frames, or nothing.
    Control,
    /// The application ended its direction.
    End,
    /// The application's connection broke.
    Broken(io::Error),
}

/// A tunnel.
#[derive(Debug)]
pub struct Tunnel {
    socket: Socket,
    session: Session,
    outbox: Outbox,
    inbox: Inbox,
    /// Pieces of data that are written to the application already.
    delivered: u32,
    /// Encoded control frames for the next record.
    control: Vec<u8>,
    load_size: Size,
}

impl Tunnel {
    /// A tunnel over an established session. `None`: the peer sent more behind its handshake than it may.
    pub fn new(socket: Socket, session: Session, leftover: &[u8]) -> Option<Self> {
        Some(Self {
            socket,
            session,
            outbox: Outbox::default(),
            inbox: Inbox::new(Framing::Leased, leftover)?,
            delivered: 0,
            control: Vec::new(),
            load_size: Size::Small,
        })
    }

    /// From a handshake's result.
    pub fn from_handshake(socket: Socket, established: Established) -> Option<Self> {
        Self::new(socket, established.session, &established.leftover)
    }

    /// What another worker needs to go on with it; `None` if something is half done.
    pub fn into_parts(mut self) -> Option<(std::net::TcpStream, Session)> {
        if !self.is_idle() {
            return None;
        }
        self.socket.into_std().ok().map(|stream| (stream, self.session))
    }

    /// The socket, for its addresses.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Queues OPEN for the next record.
    pub fn queue_open(&mut self, open: &Open) {
        open.encode(None, &mut self.control);
    }

    /// Queues CONTINUE for the next record.
    pub fn queue_continue(&mut self, of: &Continue) {
        of.encode(&mut self.control);
    }

    /// Queues REFUSE for the next record.
    pub fn queue_refusal(&mut self, refusal: &Refusal) {
        refusal.encode(None, &mut self.control);
    }

    /// Queues ACCEPT, FIN or RESET for the next record.
    pub fn queue(&mut self, kind: Kind) {
        encode_empty(kind, None, &mut self.control);
    }

    /// Whether everything that was queued has gone to the kernel.
    pub fn is_flushed(&self) -> bool {
        self.outbox.buffer.is_none() && self.control.is_empty() && !self.inbox.key_update_due
    }

    /// Whether a control frame waits for a record.
    pub fn has_control(&self) -> bool {
        !self.control.is_empty() || self.inbox.key_update_due
    }

    /// Whether ciphertext waits to be sent.
    pub fn has_output(&self) -> bool {
        self.outbox.buffer.is_some()
    }

    /// Between flows, with nothing half done: fit for the pool.
    pub fn is_idle(&mut self) -> bool {
        self.inbox.give_back();
        self.is_flushed() && !self.inbox.is_mid_frame()
    }

    /// Whether an idle tunnel is of no use any more (no system call).
    pub fn is_disturbed(&self) -> bool {
        self.socket.is_disturbed()
    }

    /// Closes with a reset: the peer resets its side of the flow.
    pub fn reset(self) {
        self.socket.reset();
    }

    // --- outgoing ---------------------------------------------------------------------------------------------------

    /// Composes and seals records: queued control frames first, then data from `source` in the same record. Pending
    /// means that there is nothing to send until the application has more.
    pub fn load(&mut self, context: &mut Context<'_>, source: Source<'_>) -> Poll<Result<Loaded, LinkError>> {
        let mut source = source;
        if let Source::App(app, ..) = &mut source
            && !self.has_control()
        {
            // An idle flow takes no buffer.
            match ready!(app.poll_readable(context)) {
                Ok(()) => {}
                Err(error) => return Poll::Ready(Ok(Loaded::Broken(error))),
            }
        }
        if self.outbox.buffer.is_none() {
            let size = if matches!(source, Source::Nothing) { Size::Small } else { self.load_size };
            self.outbox = Outbox { buffer: Some(buffer::take(size)), sent: 0, end: 0 };
        }
        let loaded = self.compose(context, source);
        if self.outbox.end == 0 {
            self.outbox.buffer = None;
        }
        loaded
    }

    /// Room for at least one more record in the outbox.
    pub fn has_room(&self) -> bool {
        let end = self.outbox.end as usize;
        self.outbox.buffer.as_ref().is_none_or(|b| b.len() - end >= MAX_OWN_RECORD + KEY_UPDATE_RECORD)
    }

    fn compose(&mut self, context: &mut Context<'_>, source: Source<'_>) -> Poll<Result<Loaded, LinkError>> {
        let Some(buffer) = &mut self.outbox.buffer else { return Poll::Ready(Ok(Loaded::Control)) };
        let mut at = self.outbox.end as usize;
        if self.inbox.key_update_due || self.session.wants_key_update() {
            at += self.session.seal_key_update(&mut buffer[at..])?;
            self.inbox.key_update_due = false;
            self.outbox.end = at as u32;
        }

        // First record: control frames, then the header and the beginning of the data.
        let control = self.control.len();
        buffer[at + RECORD_HEADER..][..control].copy_from_slice(&self.control);
        let data_at = at + RECORD_HEADER + control + HEADER;
        let first_room = MAX_CONTENT - control - HEADER;
        let outcome = match source {
            Source::Nothing => Loaded::Control,
            Source::Bytes(bytes) => {
                let length = bytes.len().min(first_room);
                buffer[data_at..data_at + length].copy_from_slice(&bytes[..length]);
                Loaded::Data(length)
            }
            Source::App(app, limit, keep) => {
                let read =
                    read_into_records(app, context, &mut buffer[at..], data_at - at, first_room.min(limit), limit);
                match read {
                    Poll::Pending if control == 0 => return Poll::Pending,
                    Poll::Pending => Loaded::Control,
                    Poll::Ready(Ok((0, _))) => Loaded::End,
                    Poll::Ready(Ok((read, room))) => {
                        self.load_size = if read == room {
                            Size::Large
                        } else if read < MAX_CONTENT {
                            Size::Small
                        } else {
                            self.load_size
                        };
                        if let Some(keep) = keep {
                            keep.extend_from_slice(&buffer[data_at..data_at + read.min(first_room)]);
                        }
                        Loaded::Data(read)
                    }
                    Poll::Ready(Err(error)) => Loaded::Broken(error),
                }
            }
        };

        let data = if let Loaded::Data(length) = outcome { length } else { 0 };
        if control == 0 && data == 0 {
            return Poll::Ready(Ok(outcome));
        }
        let first = data.min(first_room);
        let mut content = control;
        if first > 0 {
            buffer[data_at - HEADER..data_at].copy_from_slice(&data_header(first));
            content += HEADER + first;
        }
        at += self.session.seal_data(&mut buffer[at..], content)?;
        self.control.clear();

        // The others are full slots of the same layout, except for the last.
        let mut rest = data - first;
        while rest > 0 {
            let length = rest.min(MAX_CONTENT - HEADER);
            buffer[at + RECORD_HEADER..][..HEADER].copy_from_slice(&data_header(length));
            at += self.session.seal_data(&mut buffer[at..], HEADER + length)?;
            rest -= length;
        }
        self.outbox.end = at as u32;
        Poll::Ready(Ok(outcome))
    }

    /// Sends what is loaded.
    pub fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        while let Some(buffer) = &self.outbox.buffer {
            let rest = IoSlice::new(&buffer[self.outbox.sent as usize..self.outbox.end as usize]);
            let written = ready!(self.socket.poll_write_vectored(context, &[rest]))?;
            self.outbox.sent += written as u32;
            if self.outbox.sent == self.outbox.end {
                self.outbox = Outbox::default();
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends everything that is loaded and queued.
    pub fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        loop {
            ready!(self.poll_send(context))?;
            if !self.has_control() {
                return Poll::Ready(Ok(()));
            }
            ready!(self.load(context, Source::Nothing))?;
        }
    }

    /// Tells the peer that nothing more comes, if the kernel takes it at once.
    pub fn close(mut self) {
        let mut context = Context::from_waker(std::task::Waker::noop());
        if !matches!(self.poll_flush(&mut context), Poll::Ready(Ok(()))) {
            return;
        }
        let mut record = [0; RECORD_HEADER + 2 + RECORD_TRAILER];
        if self.session.seal_close_notify(&mut record).is_ok()
            && let Poll::Ready(Err(error)) = self.socket.poll_write_vectored(&mut context, &[IoSlice::new(&record)])
        {
            tracing::debug!(%error, "the peer did not take the close_notify");
        }
    }

    // --- incoming ---------------------------------------------------------------------------------------------------

    /// The next event from what has already arrived; data is noted for [`Tunnel::poll_deliver`] unless `discard`.
    pub fn next_event(&mut self, discard: bool) -> Result<Option<Event>, LinkError> {
        let event = self.inbox.next(&mut self.session)?;
        if let Some(Event::Data(length)) = event
            && !discard
        {
            self.inbox.note(length);
        }
        Ok(event)
    }

    /// Whether data waits to be delivered.
    pub fn has_data(&self) -> bool {
        self.inbox.buffer.as_ref().is_some_and(|buffer| !buffer.ranges().is_empty())
    }

    /// Pieces of data that wait.
    pub fn pieces(&self) -> usize {
        self.inbox.buffer.as_ref().map_or(0, |buffer| buffer.ranges().len())
    }

    /// Writes waiting data to the application; returns when all of it is written.
    pub fn poll_deliver(&mut self, context: &mut Context<'_>, app: &mut Socket) -> Poll<io::Result<()>> {
        loop {
            let Some(buffer) = &mut self.inbox.buffer else { return Poll::Ready(Ok(())) };
            let ranges = &buffer.ranges()[self.delivered as usize..];
            if ranges.is_empty() {
                if let Some(ranges) = buffer.ranges_mut() {
                    ranges.clear();
                }
                self.delivered = 0;
                self.inbox.give_back();
                return Poll::Ready(Ok(()));
            }
            let mut pieces = [IoSlice::new(&[]); MAX_PIECES];
            let count = ranges.len().min(MAX_PIECES);
            for (piece, &(start, end)) in pieces.iter_mut().zip(ranges) {
                *piece = IoSlice::new(&buffer[start as usize..end as usize]);
            }
            let mut written = ready!(app.poll_write_vectored(context, &pieces[..count]))? as u32;
            let delivered = self.delivered as usize;
            let Some(ranges) = buffer.ranges_mut() else { return Poll::Ready(Ok(())) };
            for range in &mut ranges[delivered..] {
                let step = written.min(range.1 - range.0);
                range.0 += step;
                written -= step;
                if range.0 < range.1 {
                    break;
                }
                self.delivered += 1;
            }
        }
    }

    /// Throws away data that waits.
    pub fn drop_data(&mut self) {
        if let Some(ranges) = self.inbox.buffer.as_mut().and_then(Buffer::ranges_mut) {
            ranges.clear();
        }
        self.delivered = 0;
        self.inbox.give_back();
    }

    /// Reads more from the socket. Only when nothing waits to be delivered and [`Tunnel::next_event`] has found nothing.
    pub fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        self.inbox.poll_fill(&mut self.socket, context)
    }

    /// The next event, reading as needed. For the moments between flows, when no data is expected.
    pub fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Result<Event, LinkError>> {
        loop {
            if let Some(event) = self.next_event(true)? {
                return Poll::Ready(Ok(event));
            }
            if self.inbox.key_update_due {
                ready!(self.poll_flush(context))?;
            }
            ready!(self.poll_receive(context))?;
        }
    }

    /// Something of a frame or record has arrived, but not all.
    pub fn is_mid_frame(&self) -> bool {
        self.inbox.is_mid_frame()
    }
}

/// Reads from the application straight into the places where records want their content: first at `first_at` (at most
/// `first_room`), then slot by slot. Returns what was read and what there was room for.
fn read_into_records(
    app: &mut Socket,
    context: &mut Context<'_>,
    buffer: &mut [u8],
    first_at: usize,
    first_room: usize,
    limit: usize,
) -> Poll<io::Result<(usize, usize)>> {
    let (first, slots) = buffer.split_at_mut(MAX_OWN_RECORD);
    let mut pieces: [IoSliceMut<'_>; LARGE_RECORDS] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
    pieces[0] = IoSliceMut::new(&mut first[first_at..first_at + first_room]);
    let (mut count, mut room) = (1, first_room);
    for (piece, slot) in pieces[1..].iter_mut().zip(slots.chunks_exact_mut(MAX_OWN_RECORD)) {
        if room >= limit {
            break;
        }
        let content = (MAX_CONTENT - HEADER).min(limit - room);
        *piece = IoSliceMut::new(&mut slot[RECORD_HEADER + HEADER..][..content]);
        count += 1;
        room += content;
    }
    app.poll_read_vectored(context, &mut pieces[..count]).map_ok(|read| (read, room))
}
