//! What a shared tunnel keeps for each flow. The tunnel's task writes what arrives; the flow's task does the rest.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use super::WINDOW;
use crate::relay::buffer::Backlog;
use crate::relay::socket::Socket;
use crate::tunnel::link::LinkError;
use crate::tunnel::oct::exchange::{Exchange, Role};
use crate::tunnel::oct::frame::Refusal;
use crate::tunnel::pool::Leased;
use crate::worker::registry::Flow;
use crate::worker::small_first;

/// Full frames in a row that make a flow bulk.
const BULK: u8 = 8;

/// A frame that nothing small would fill.
const FULL: usize = 8 * 1024;

/// A direction, seen from this proxy.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    /// To the peer.
    Sent = 0,
    /// From the peer.
    Received = 1,
}

/// The move of a flow to a tunnel of its own.
#[derive(Debug, Default)]
pub enum Moving {
    /// It stays.
    #[default]
    No,
    /// It should: a tunnel is being prepared.
    Preparing,
    /// The tunnel is ready: MOVE may go.
    Ready(Box<Leased>),
    /// Our direction has moved.
    Sent(Box<Leased>),
    /// There is no tunnel to be had: it stays for good.
    Failed,
}

/// One flow on a shared tunnel.
#[derive(Debug)]
pub struct Stream {
    /// Its number on the tunnel.
    pub id: u32,
    /// For accounting, and for waking the flow's task.
    pub flow: Rc<Flow>,
    /// Which frames may come.
    pub exchange: RefCell<Exchange>,
    /// The application's connection, once there is one.
    pub app: RefCell<Option<Socket>>,
    /// What the application has not taken yet.
    pub backlog: RefCell<Backlog>,
    /// Data that arrives goes to nobody.
    pub dropping: Cell<bool>,
    /// The application's connection broke while the tunnel's task wrote to it.
    pub app_error: RefCell<Option<io::Error>>,
    /// The destination's answer, if it was no.
    pub refusal: RefCell<Option<Refusal>>,
    /// The tunnel broke.
    pub broken: RefCell<Option<Rc<LinkError>>>,
    /// What we may still send.
    pub credit: Cell<u32>,
    /// Its task waits for room in the tunnel's outbox.
    pub(super) wants_room: Cell<bool>,
    /// Which of the acceptor's workers has it.
    pub worker: Cell<u16>,
    /// Its move to a tunnel of its own.
    pub moving: RefCell<Moving>,
    /// The peer's direction has moved.
    pub peer_moved: Cell<bool>,
    /// What the peer may still send.
    window: Cell<u32>,
    /// What was taken since the last CREDIT.
    taken: Cell<u32>,
    /// Full frames in a row: sent, received.
    full_frames: [Cell<u8>; 2],
}

impl Stream {
    /// A stream whose OPEN was sent or received.
    pub(super) fn new(id: u32, role: Role, flow: Rc<Flow>, app: Option<Socket>) -> Self {
        Self {
            id,
            flow,
            exchange: RefCell::new(Exchange::new(role)),
            app: RefCell::new(app),
            backlog: RefCell::default(),
            dropping: Cell::new(false),
            app_error: RefCell::default(),
            refusal: RefCell::default(),
            broken: RefCell::default(),
            credit: Cell::new(WINDOW),
            wants_room: Cell::new(false),
            worker: Cell::new(0),
            moving: RefCell::default(),
            peer_moved: Cell::new(false),
            window: Cell::new(WINDOW),
            taken: Cell::new(0),
            full_frames: Default::default(),
        }
    }

    /// Data has arrived: to the application as far as it takes it, the rest to the backlog. Returns the credit that is to
    /// be given to the peer.
    pub(super) fn arrived(&self, bytes: &[u8]) -> Result<Option<u32>, LinkError> {
        let length = bytes.len() as u32;
        let Some(window) = self.window.get().checked_sub(length) else { return Err(LinkError::Window) };
        self.window.set(window);
        if self.dropping.get() {
            return Ok(None);
        }
        self.flow.add_received(bytes.len());
        if self.note_frame(Way::Received, bytes.len()) {
            self.flow.watch.wake();
        }
        let mut written = 0;
        if self.backlog.borrow().is_empty()
            && let Some(app) = &mut *self.app.borrow_mut()
        {
            match app.write_now(bytes) {
                Ok(taken) => written = taken,
                Err(error) => {
                    *self.app_error.borrow_mut() = Some(error);
                    self.dropping.set(true);
                    self.flow.watch.wake();
                    return Ok(None);
                }
            }
        }
        if written < bytes.len() {
            if self.backlog.borrow_mut().push(&bytes[written..]).is_err() {
                self.drop_data();
                self.flow.watch.cut(crate::worker::registry::Cut::Overloaded);
                return Ok(None);
            }
            self.flow.watch.wake();
        }
        Ok(self.taken(written))
    }

    /// The application has taken so many bytes: the credit that is to be given to the peer, if it is worth a frame.
    pub fn taken(&self, bytes: usize) -> Option<u32> {
        let taken = self.taken.get() + bytes as u32;
        if taken < WINDOW / 2 {
            self.taken.set(taken);
            return None;
        }
        self.taken.set(0);
        self.window.set(self.window.get() + taken);
        Some(taken)
    }

    /// Nothing of what has arrived or arrives goes anywhere.
    pub fn drop_data(&self) {
        self.dropping.set(true);
        self.backlog.borrow_mut().clear();
    }

    /// Notes the size of a frame of data: bulk rests for small ones. Whether that made the flow bulk.
    pub fn note_frame(&self, way: Way, length: usize) -> bool {
        let count = &self.full_frames[way as usize];
        // A small frame ends a run, but a flow that is bulk stays so.
        if count.get() >= BULK {
            return false;
        }
        if length >= FULL {
            count.set(count.get() + 1);
        } else {
            count.set(0);
            small_first::small();
        }
        count.get() >= BULK
    }

    /// Whether it should have a tunnel of its own.
    pub fn is_bulk(&self) -> bool {
        self.full_frames.iter().any(|count| count.get() >= BULK)
    }
}
