//! Moves bytes between an application and a tunnel until both directions have ended.
//!
//! One future drives both directions of a flow. Each wake-up reads what is there, seals or opens it in place, and writes
//! it: one read and one write for a small message, up to 256 KiB each for bulk. What the other side does not take stays
//! in one buffer for each direction, and nothing more is read: backpressure is the kernel's own.

pub mod buffer;
pub mod shared;
pub mod socket;

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use self::socket::Socket;
use crate::tunnel::link::{LinkError, Loaded, MAX_PIECES, Source, Tunnel};
use crate::tunnel::oct::exchange::{Direction, Exchange, Violation};
use crate::tunnel::oct::frame::{Event, Kind, Refusal};
use crate::tunnel::tls::record::MAX_CONTENT;
use crate::worker::registry::{Cut, Flow};
use crate::worker::small_first::Turn;
use crate::worker::{busy_poll, small_first};

/// What the opener may send before the flow is accepted: one record. A retry on another tunnel can repeat it.
pub const OPTIMISTIC: usize = 16 * 1024 - 1024;

/// After so many bytes a flow lets the worker's other flows have a turn: less than one full buffer in each direction, so
/// that small messages beside it wait for a few copies and never for a series of them.
const TURN: usize = 128 * 1024;

/// What a cut flow may still receive before the tunnel itself is given up. More than socket buffers hold.
const MAX_DISCARDED: usize = 64 * 1024 * 1024;

/// How a flow ended.
#[derive(Debug)]
pub enum Ending {
    /// Both applications closed in order.
    Finished,
    /// The application on this side reset its connection.
    AppReset(io::Error),
    /// The other side reset the flow.
    PeerReset,
    /// The destination refused it.
    Refused(Refusal),
    /// Policy, revocation, lease or an operator cut it.
    Cut(Cut),
    /// The tunnel broke.
    Broken(Rc<LinkError>),
    /// The tunnel had been closed before it took the flow: it may be tried on another, with these bytes first.
    Stale {
        /// The application's connection.
        app: Socket,
        /// What was already read from it.
        replay: Vec<u8>,
    },
}

/// How a relay ended, and whether the tunnel is fit for the next flow.
#[derive(Debug)]
pub struct Outcome {
    /// What happened.
    pub ending: Ending,
    /// The tunnel is between flows again.
    pub reusable: bool,
}

/// A flow that is ready to run.
#[derive(Debug)]
pub struct Relay<'a> {
    /// The application's connection; `None` for a refused flow whose remains are thrown away.
    pub app: Option<Socket>,
    /// The tunnel, leased to this flow.
    pub tunnel: &'a mut Tunnel,
    /// OPEN, ACCEPT or REFUSE is noted in it and queued in the tunnel.
    pub exchange: Exchange,
    /// For accounting and for being cut.
    pub flow: &'a Flow,
    /// Bytes that go first.
    pub replay: Vec<u8>,
    /// Opener on a reused tunnel: keep what is sent until the answer, for a retry.
    pub keep: bool,
}

impl<'a> Relay<'a> {
    /// Runs the flow to its end. (Not an `async fn`: that would keep the parts and what is made of them.)
    pub fn run(self) -> impl Future<Output = Outcome> + use<'a> {
        let Relay { app, tunnel, exchange, flow, replay, keep } = self;
        let mut state = State {
            app,
            tunnel,
            flow,
            kept: keep.then(Vec::new),
            replay,
            app_ended: false,
            // A flow that moved here may have had that behind it.
            app_shut: exchange.remote() == Direction::Finished,
            exchange,
            allowance: OPTIMISTIC,
            discarded: 0,
            ending: None,
            bulk: false,
            place: 0,
        };
        if state.exchange.discards() {
            flow.ends();
        }
        poll_fn(move |context| state.poll(context))
    }
}

/// Lets the worker look at its sockets and go on with others first. (A task that just wakes itself is polled again and
/// again before the sockets are looked at.)
pub fn give_way<T>(context: &mut Context<'_>) -> Poll<T> {
    if pin!(tokio::task::yield_now()).poll(context).is_ready() {
        context.waker().wake_by_ref();
    }
    Poll::Pending
}

struct State<'a> {
    app: Option<Socket>,
    tunnel: &'a mut Tunnel,
    exchange: Exchange,
    flow: &'a Flow,
    kept: Option<Vec<u8>>,
    replay: Vec<u8>,
    /// The application has ended its direction.
    app_ended: bool,
    /// We have ended ours towards the application.
    app_shut: bool,
    allowance: usize,
    discarded: usize,
    ending: Option<Ending>,
    /// Its last turn that moved something was one of bulk: it rests when bulk does.
    bulk: bool,
    /// Its place among those that rest.
    place: u64,
}

impl State<'_> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Outcome> {
        if let Poll::Ready(cut) = self.flow.watch.poll_cut(context) {
            if let Some(app) = self.app.take() {
                app.reset();
            }
            return Poll::Ready(Outcome { ending: Ending::Cut(cut), reusable: false });
        }
        if self.bulk {
            ready!(small_first::poll_rested(context, &mut self.place));
        }
        let (clock, mut moved) = (Turn::begin(), 0);
        let polled = self.turn(context, &mut moved);
        self.bulk = clock.end(moved, self.bulk);
        polled
    }

    fn turn(&mut self, context: &mut Context<'_>, turn: &mut usize) -> Poll<Outcome> {
        loop {
            let before = *turn;
            if let Err(error) = self.outward(context, turn).and_then(|()| self.inward(context, turn)) {
                return Poll::Ready(self.broken(context, error));
            }
            if self.is_done() {
                let ending = self.ending.take().unwrap_or(Ending::Finished);
                if let (Ending::Finished, Some(app)) = (&ending, self.app.take()) {
                    app.finish();
                }
                return Poll::Ready(Outcome { ending, reusable: true });
            }
            if matches!(self.ending, Some(Ending::AppReset(_))) && self.exchange.local() == Direction::Finished {
                // Our direction has ended in order, so RESET cannot tell the peer any more: the tunnel must.
                let ending = self.ending.take().unwrap_or(Ending::PeerReset);
                return Poll::Ready(Outcome { ending, reusable: false });
            }
            if *turn == before {
                return Poll::Pending;
            }
            if *turn > TURN {
                return give_way(context);
            }
        }
    }

    // --- application → tunnel ---------------------------------------------------------------------------------------

    fn outward(&mut self, context: &mut Context<'_>, turn: &mut usize) -> Result<(), LinkError> {
        while self.tunnel.has_room() {
            let running = self.exchange.local() == Direction::Running;
            let limit = if self.exchange.unanswered() { self.allowance } else { usize::MAX };
            let source = match &mut self.app {
                Some(_) if running && !self.replay.is_empty() => Source::Bytes(&self.replay),
                Some(app) if running && !self.app_ended && limit > 0 => Source::App(app, limit, self.kept.as_mut()),
                _ if self.tunnel.has_control() => Source::Nothing,
                _ => break,
            };
            let replaying = matches!(source, Source::Bytes(_));
            let loaded = match self.tunnel.load(context, source) {
                Poll::Ready(loaded) => loaded?,
                Poll::Pending => break,
            };
            match loaded {
                Loaded::Data(length) => {
                    if replaying {
                        self.replay.drain(..length);
                    }
                    self.allowance = self.allowance.saturating_sub(length);
                    self.flow.add_sent(length);
                    *turn += length;
                    busy_poll::sent(length.div_ceil(MAX_CONTENT) as u32);
                }
                Loaded::Control => *turn += 1,
                Loaded::End => {
                    self.app_ended = true;
                    self.end_local(Kind::Fin);
                }
                Loaded::Broken(error) => self.app_broken(error),
            }
        }
        if self.tunnel.has_output()
            && let Poll::Ready(sent) = self.tunnel.poll_send(context)
        {
            sent?;
            *turn += 1;
        }
        Ok(())
    }

    fn end_local(&mut self, kind: Kind) {
        if !self.exchange.local().ended() {
            self.tunnel.queue(kind);
            self.exchange.sent(kind);
            if kind == Kind::Reset {
                self.flow.ends();
            }
        }
    }

    fn app_broken(&mut self, error: io::Error) {
        self.app = None;
        self.ending.get_or_insert(Ending::AppReset(error));
        self.tunnel.drop_data();
        self.end_local(Kind::Reset);
    }

    // --- tunnel → application ---------------------------------------------------------------------------------------

    fn inward(&mut self, context: &mut Context<'_>, turn: &mut usize) -> Result<(), LinkError> {
        let limit = *turn + TURN;
        while *turn < limit {
            if !self.deliver(context, turn) {
                return Ok(());
            }
            if self.exchange.remote().ended() {
                self.remote_ended();
                return Ok(());
            }
            let arrived = self.decode()?;
            *turn += arrived;
            if arrived > 0 || self.exchange.remote().ended() {
                continue;
            }
            match self.tunnel.poll_receive(context) {
                Poll::Ready(received) => received?,
                Poll::Pending => return Ok(()),
            }
        }
        Ok(())
    }

    /// Whether all data that had arrived is delivered.
    fn deliver(&mut self, context: &mut Context<'_>, turn: &mut usize) -> bool {
        if !self.tunnel.has_data() {
            return true;
        }
        let Some(app) = &mut self.app else {
            self.tunnel.drop_data();
            return true;
        };
        match self.tunnel.poll_deliver(context, app) {
            Poll::Ready(Ok(())) => *turn += 1,
            Poll::Ready(Err(error)) => {
                self.app_broken(error);
                *turn += 1;
            }
            // A reset does not wait for an application that does not read.
            Poll::Pending if self.exchange.remote() == Direction::Cut => self.tunnel.drop_data(),
            Poll::Pending => return false,
        }
        true
    }

    /// Decodes what has arrived, up to one delivery's worth; returns bytes and frames seen.
    fn decode(&mut self) -> Result<usize, LinkError> {
        let mut seen = 0;
        while self.tunnel.pieces() < MAX_PIECES && !self.exchange.remote().ended() {
            let discard = self.exchange.discards();
            let Some(event) = self.tunnel.next_event(discard)? else { break };
            seen += 1;
            match event {
                Event::Data(length) => {
                    self.exchange.received(Kind::Data)?;
                    seen += length;
                    if discard {
                        self.discarded += length;
                        if self.discarded > MAX_DISCARDED {
                            return Err(LinkError::Deaf);
                        }
                    } else {
                        busy_poll::received(1);
                        self.flow.add_received(length);
                    }
                }
                Event::Accept(_) => {
                    self.exchange.received(Kind::Accept)?;
                    self.kept = None;
                    self.flow.accepted();
                }
                Event::Refuse(refusal) => {
                    self.exchange.received(Kind::Refuse)?;
                    self.kept = None;
                    self.ending.get_or_insert(Ending::Refused(refusal));
                }
                Event::Fin => self.exchange.received(Kind::Fin)?,
                Event::Reset => {
                    self.exchange.received(Kind::Reset)?;
                    self.ending.get_or_insert(Ending::PeerReset);
                }
                Event::Open(_) | Event::Continue(_) | Event::Credit(_) | Event::Move => {
                    return Err(Violation { kind: Kind::Open, direction: self.exchange.remote() }.into());
                }
            }
        }
        Ok(seen)
    }

    fn remote_ended(&mut self) {
        if self.app_shut {
            return;
        }
        self.app_shut = true;
        if self.exchange.remote() == Direction::Cut {
            if let Some(app) = self.app.take() {
                app.reset();
            }
            self.end_local(Kind::Reset);
        } else if let Some(app) = &self.app
            && let Err(error) = app.shutdown_write()
        {
            self.app_broken(error);
        }
    }

    // --- the end ----------------------------------------------------------------------------------------------------

    fn is_done(&self) -> bool {
        self.exchange.is_over() && self.app_shut && self.tunnel.is_flushed() && !self.tunnel.has_data()
    }

    fn broken(&mut self, context: &mut Context<'_>, mut error: LinkError) -> Outcome {
        if matches!(error, LinkError::Io(_)) && self.kept.is_some() {
            // A write fails with a reset although the peer's close_notify was there to be read: it tells what a retry
            // needs to know.
            while let Poll::Ready(event) = self.tunnel.poll_event(context) {
                if let Err(reason) = event {
                    error = reason;
                    break;
                }
            }
        }
        // Without an answer, and if the peer closed in order (it does so only between flows) or has got nothing of the
        // application's, nothing was done that a second try could do twice.
        let untouched = matches!(error, LinkError::CloseNotify) || self.flow.sent() == 0;
        let ending = match (self.app.take(), self.kept.take()) {
            (Some(app), Some(kept)) if untouched && self.exchange.unanswered() => Ending::Stale { app, replay: kept },
            (app, _) => {
                if let Some(app) = app {
                    app.reset();
                }
                self.ending.take().unwrap_or(Ending::Broken(Rc::new(error)))
            }
        };
        Outcome { ending, reusable: false }
    }
}
