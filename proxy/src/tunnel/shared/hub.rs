//! One shared tunnel. Its task reads, writes what arrives to the applications, and sends what the flows' tasks packed.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

use super::STREAMS;
use super::outbox::{Outbox, Put};
use super::stream::{Stream, Way};
use crate::relay::give_way;
use crate::relay::socket::Socket;
use crate::tunnel::inbox::Inbox;
use crate::tunnel::info::TunnelInfo;
use crate::tunnel::link::LinkError;
use crate::tunnel::oct::exchange::{Direction, Role};
use crate::tunnel::oct::frame::{Event, Framing, Kind, Open, Refusal, encode_accept, encode_credit, encode_empty};
use crate::tunnel::tls::handshake::Established;
use crate::tunnel::tls::record::{RECORD_HEADER, RECORD_TRAILER, Session};
use crate::worker::busy_poll;
use crate::worker::registry::{Flow, Watch};

/// After so many bytes the worker's other tasks have a turn.
const TURN: usize = 128 * 1024;

/// How often the worker looks for more before what is packed leaves, as long as there is more.
const LOOKS: u32 = 2;

/// What is worth a write of its own.
const ENOUGH: usize = 8 * 1024;

/// What the tunnel's task reports to whoever runs it.
#[derive(Debug)]
pub enum Happened {
    /// The peer opened a stream.
    Opened(u32, Open),
    /// The peer closed the tunnel in order, or it was retired and has no streams any more.
    Closed,
}

/// The tunnel itself.
#[derive(Debug)]
struct Io {
    socket: Socket,
    session: Session,
    inbox: Inbox,
    outbox: Outbox,
    /// Where control frames are encoded.
    frame: Vec<u8>,
}

/// Data frames that wait in the outbox for company.
#[derive(Debug, Default)]
struct Gathered {
    frames: Cell<u32>,
    /// How many there were at the last look, and how many looks there were.
    seen: Cell<u32>,
    looks: Cell<u32>,
}

/// A shared tunnel.
#[derive(Debug)]
pub struct Hub {
    /// Who is at its ends.
    pub info: Rc<TunnelInfo>,
    /// For being cut.
    pub watch: Watch,
    role: Role,
    io: RefCell<Io>,
    streams: RefCell<HashMap<u32, Rc<Stream>, foldhash::fast::RandomState>>,
    next: Cell<u32>,
    /// The tunnel's task.
    task: RefCell<Option<Waker>>,
    /// Some stream waits for room in the outbox.
    waiting: Cell<bool>,
    gathered: Gathered,
    idle_since: Cell<Instant>,
    retired: Cell<bool>,
    dead: Cell<bool>,
}

impl Hub {
    /// From a handshake's result. `None`: the peer sent more behind its handshake than it may.
    pub fn new(role: Role, socket: Socket, established: Established, info: Rc<TunnelInfo>) -> Option<Rc<Self>> {
        let inbox = Inbox::new(Framing::Shared, &established.leftover)?;
        let io = Io { socket, session: established.session, inbox, outbox: Outbox::default(), frame: Vec::new() };
        Some(Rc::new(Self {
            info,
            watch: Watch::default(),
            role,
            io: RefCell::new(io),
            streams: RefCell::default(),
            next: Cell::new(1),
            task: RefCell::default(),
            waiting: Cell::new(false),
            gathered: Gathered::default(),
            idle_since: Cell::new(Instant::now()),
            retired: Cell::new(false),
            dead: Cell::new(false),
        }))
    }

    /// Whether another flow may come.
    pub fn has_place(&self) -> bool {
        !self.retired.get() && !self.dead.get() && self.streams.borrow().len() < STREAMS && self.next.get() < u32::MAX
    }

    /// Since when it has carried nothing; `None`: it carries something.
    pub fn idle_since(&self) -> Option<Instant> {
        self.streams.borrow().is_empty().then(|| self.idle_since.get())
    }

    /// Whether it has ended.
    pub fn is_dead(&self) -> bool {
        self.dead.get()
    }

    /// Whether part of a frame has arrived.
    pub fn is_mid_frame(&self) -> bool {
        self.io.borrow().inbox.is_mid_frame()
    }

    /// Takes no new flows, and closes in order once the last has ended.
    pub fn retire(&self) {
        self.retired.set(true);
        self.wake_task();
    }

    // --- what flows do ----------------------------------------------------------------------------------------------

    /// Opens a stream for a flow. If the tunnel has ended meanwhile, the stream says so.
    pub fn open(&self, open: &Open, flow: Rc<Flow>, app: Socket) -> Rc<Stream> {
        let id = self.next.get();
        self.next.set(id.saturating_add(1));
        let stream = Rc::new(Stream::new(id, self.role, flow, Some(app)));
        stream.exchange.borrow_mut().sent(Kind::Open);
        let sent =
            if self.dead.get() { Err(LinkError::CloseNotify) } else { self.control(|f| open.encode(Some(id), f)) };
        match sent {
            Ok(()) => {
                self.streams.borrow_mut().insert(id, Rc::clone(&stream));
            }
            Err(error) => *stream.broken.borrow_mut() = Some(Rc::new(error)),
        }
        stream
    }

    /// Whether a flow has used it before.
    pub fn is_used(&self) -> bool {
        self.next.get() > 1
    }

    /// Takes a stream that the peer opened ([`Happened::Opened`]).
    pub fn adopt(&self, id: u32, flow: Rc<Flow>) -> Result<Rc<Stream>, LinkError> {
        let stream = Rc::new(Stream::new(id, self.role, flow, None));
        stream.exchange.borrow_mut().received(Kind::Open)?;
        self.streams.borrow_mut().insert(id, Rc::clone(&stream));
        Ok(stream)
    }

    /// Answers yes.
    pub fn accept(&self, stream: &Stream, worker: u16) -> Result<(), LinkError> {
        stream.exchange.borrow_mut().sent(Kind::Accept);
        self.control(|frame| encode_accept(stream.id, worker, frame))
    }

    /// Answers no.
    pub fn refuse(&self, stream: &Stream, refusal: &Refusal) -> Result<(), LinkError> {
        stream.exchange.borrow_mut().sent(Kind::Refuse);
        self.control(|frame| refusal.encode(Some(stream.id), frame))?;
        self.ended(stream);
        Ok(())
    }

    /// Ends our direction with FIN or RESET, unless it has ended so already.
    pub fn end(&self, stream: &Stream, kind: Kind) -> Result<(), LinkError> {
        {
            let mut exchange = stream.exchange.borrow_mut();
            // A direction that has ended in order may still be cut.
            let done = if kind == Kind::Reset { exchange.local() == Direction::Cut } else { exchange.local().ended() };
            if done || self.dead.get() {
                return Ok(());
            }
            exchange.sent(kind);
        }
        self.control(|frame| encode_empty(kind, Some(stream.id), frame))?;
        self.ended(stream);
        Ok(())
    }

    /// Our direction goes on elsewhere.
    pub fn moved(&self, stream: &Stream) -> Result<(), LinkError> {
        self.control(|frame| encode_empty(Kind::Move, Some(stream.id), frame))
    }

    /// The stream has moved: its number means nothing any more.
    pub fn forget(&self, stream: &Stream) {
        self.remove(stream.id);
    }

    /// Gives the peer credit.
    pub fn credit(&self, stream: &Stream, bytes: u32) -> Result<(), LinkError> {
        if stream.exchange.borrow().remote().ended() {
            return Ok(());
        }
        self.control(|frame| encode_credit(stream.id, bytes, frame))
    }

    /// Packs what the application has sent.
    pub fn read(
        &self,
        context: &mut Context<'_>,
        app: &mut Socket,
        stream: &Stream,
        limit: usize,
        keep: Option<&mut Vec<u8>>,
    ) -> Poll<Result<Put, LinkError>> {
        let io = &mut *self.io.borrow_mut();
        let put = ready!(io.outbox.read(context, app, stream.id, limit, keep, &mut io.session))?;
        match put {
            Put::Data(length) => self.packed(stream, length),
            Put::Full => self.wait_for_room(stream),
            _ => {}
        }
        Poll::Ready(Ok(put))
    }

    /// Packs bytes that were read before; how many.
    pub fn write(&self, stream: &Stream, bytes: &[u8]) -> Result<usize, LinkError> {
        let io = &mut *self.io.borrow_mut();
        let length = io.outbox.bytes(stream.id, bytes, &mut io.session)?;
        if length == 0 {
            self.wait_for_room(stream);
        } else {
            self.packed(stream, length);
        }
        Ok(length)
    }

    fn wait_for_room(&self, stream: &Stream) {
        stream.wants_room.set(true);
        self.waiting.set(true);
    }

    fn packed(&self, stream: &Stream, length: usize) {
        stream.credit.set(stream.credit.get().saturating_sub(length as u32));
        stream.flow.add_sent(length);
        stream.note_frame(Way::Sent, length);
        self.gathered.frames.update(|frames| frames.saturating_add(1));
        busy_poll::sent(1);
        self.wake_task();
    }

    fn control(&self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), LinkError> {
        let io = &mut *self.io.borrow_mut();
        io.frame.clear();
        encode(&mut io.frame);
        if !io.outbox.control(&io.frame, &mut io.session)? {
            return Err(LinkError::Choked);
        }
        self.wake_task();
        Ok(())
    }

    fn ended(&self, stream: &Stream) {
        if stream.exchange.borrow().is_over() {
            self.remove(stream.id);
        }
    }

    fn remove(&self, id: u32) {
        let mut streams = self.streams.borrow_mut();
        if streams.remove(&id).is_some() && streams.is_empty() {
            self.idle_since.set(Instant::now());
            if self.retired.get() {
                self.wake_task();
            }
        }
    }

    fn wake_task(&self) {
        if let Some(task) = &*self.task.borrow() {
            task.wake_by_ref();
        }
    }

    // --- the tunnel's task ------------------------------------------------------------------------------------------

    /// Carries what there is to carry; ready when something has happened that its owner must see to.
    pub fn poll(&self, context: &mut Context<'_>) -> Poll<Result<Happened, LinkError>> {
        {
            let mut task = self.task.borrow_mut();
            if !task.as_ref().is_some_and(|task| task.will_wake(context.waker())) {
                *task = Some(context.waker().clone());
            }
        }
        if let Poll::Ready(cut) = self.watch.poll_cut(context) {
            return Poll::Ready(Err(LinkError::Cut(cut)));
        }
        let (mut turn, mut turned) = (0, false);
        let happened = loop {
            if let Some((stream, event)) = self.next_event()? {
                turn += 1;
                if let Event::Data(length) = event {
                    turn += length;
                    busy_poll::received(1);
                }
                if let Some(happened) = self.handle(stream, event)? {
                    break Some(happened);
                }
            } else {
                let io = &mut *self.io.borrow_mut();
                match io.inbox.poll_fill(&mut io.socket, context) {
                    Poll::Ready(filled) => filled?,
                    Poll::Pending => break None,
                }
            }
            if turn > TURN {
                turned = true;
                break None;
            }
        };
        if happened.is_none() && !turned && self.gathers() {
            return give_way(context);
        }
        self.flush(context)?;
        if let Some(happened) = happened {
            return Poll::Ready(Ok(happened));
        }
        if self.retired.get() && self.streams.borrow().is_empty() && self.io.borrow().outbox.is_empty() {
            return Poll::Ready(Ok(Happened::Closed));
        }
        if turned {
            return give_way(context);
        }
        Poll::Pending
    }

    fn next_event(&self) -> Result<Option<(u32, Event)>, LinkError> {
        let io = &mut *self.io.borrow_mut();
        match io.inbox.next(&mut io.session) {
            Ok(Some(event)) => Ok(Some((io.inbox.stream(), event))),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether it pays to look at the applications' sockets once more before sending. A look costs an `epoll_wait` that
    /// does not wait; every frame that it finds saves the kernel a packet through both hosts, and the peer a wake-up.
    fn gathers(&self) -> bool {
        let Gathered { frames, seen, looks } = &self.gathered;
        let more = frames.get() > seen.replace(frames.get());
        if !more || looks.get() == LOOKS || self.waiting.get() || self.io.borrow().outbox.len() >= ENOUGH {
            return false;
        }
        looks.set(looks.get() + 1);
        true
    }

    fn flush(&self, context: &mut Context<'_>) -> Result<(), LinkError> {
        let Gathered { frames, seen, looks } = &self.gathered;
        for count in [frames, seen, looks] {
            count.set(0);
        }
        let io = &mut *self.io.borrow_mut();
        if (io.inbox.key_update_due || io.session.wants_key_update()) && io.outbox.key_update(&mut io.session)? {
            io.inbox.key_update_due = false;
        }
        if let Poll::Ready(sent) = io.outbox.poll_send(context, &mut io.socket, &mut io.session) {
            sent?;
            if self.waiting.take() {
                for stream in self.streams.borrow().values().filter(|stream| stream.wants_room.take()) {
                    stream.flow.watch.wake();
                }
            }
        }
        Ok(())
    }

    fn handle(&self, id: u32, event: Event) -> Result<Option<Happened>, LinkError> {
        if let Event::Open(open) = event {
            let streams = self.streams.borrow();
            // Numbers only go up: none is used twice, so that late frames cannot be taken for another flow's.
            if self.role != Role::Acceptor || id < self.next.get() {
                return Err(LinkError::NoStream { kind: Kind::Open, stream: id });
            }
            if streams.len() >= 2 * STREAMS || id == u32::MAX {
                return Err(LinkError::TooManyStreams);
            }
            self.next.set(id + 1);
            return Ok(Some(Happened::Opened(id, open)));
        }
        let stream = self.streams.borrow().get(&id).cloned();
        let Some(stream) = stream else {
            // Credit for what had ended, and a cut of what had ended in order, cross with our own end.
            let late = matches!(event, Event::Credit(_) | Event::Reset) && id < self.next.get();
            let kind = event.kind();
            return if late { Ok(None) } else { Err(LinkError::NoStream { kind, stream: id }) };
        };
        match event {
            Event::Data(length) => {
                stream.exchange.borrow_mut().received(Kind::Data)?;
                if stream.peer_moved.get() {
                    return Err(LinkError::NoStream { kind: Kind::Data, stream: id });
                }
                let credit = stream.arrived(self.io.borrow().inbox.piece(length))?;
                if let Some(bytes) = credit {
                    self.credit(&stream, bytes)?;
                }
                return Ok(None);
            }
            Event::Credit(bytes) => {
                let before = stream.credit.get();
                let Some(after) = before.checked_add(bytes).filter(|sum| *sum <= super::WINDOW) else {
                    return Err(LinkError::Window);
                };
                stream.credit.set(after);
                if before > 0 {
                    return Ok(None);
                }
            }
            Event::Accept(worker) => {
                stream.exchange.borrow_mut().received(Kind::Accept)?;
                stream.worker.set(worker.unwrap_or_default());
                stream.flow.accepted();
            }
            Event::Refuse(refusal) => {
                stream.exchange.borrow_mut().received(Kind::Refuse)?;
                stream.refusal.borrow_mut().get_or_insert(refusal);
            }
            Event::Fin => stream.exchange.borrow_mut().received(Kind::Fin)?,
            Event::Reset => stream.exchange.borrow_mut().cut_late()?,
            Event::Move => {
                if stream.exchange.borrow().remote() == Direction::Waiting || stream.peer_moved.replace(true) {
                    return Err(LinkError::NoStream { kind: Kind::Move, stream: id });
                }
            }
            Event::Open(_) | Event::Continue(_) => {
                return Err(LinkError::NoStream { kind: event.kind(), stream: id });
            }
        }
        self.ended(&stream);
        stream.flow.watch.wake();
        Ok(None)
    }

    /// The tunnel has ended: every flow learns why, and the socket closes (in order, or with a reset).
    pub fn end_all(&self, reason: LinkError) {
        self.dead.set(true);
        self.retired.set(true);
        let reason = Rc::new(reason);
        for stream in self.streams.take().into_values() {
            *stream.broken.borrow_mut() = Some(Rc::clone(&reason));
            stream.flow.watch.wake();
        }
        self.task.take();
        if !matches!(*reason, LinkError::CloseNotify) {
            self.io.borrow().socket.reset_on_close();
        }
    }

    /// Tells the peer that nothing more comes, if the kernel takes it at once.
    pub fn close(&self) {
        self.dead.set(true);
        let io = &mut *self.io.borrow_mut();
        let mut record = [0; RECORD_HEADER + 2 + RECORD_TRAILER];
        if io.session.seal_close_notify(&mut record).is_ok()
            && let Err(error) = io.socket.write_now(&record)
        {
            tracing::debug!(%error, "the peer did not take the close_notify");
        }
        self.task.take();
    }
}
