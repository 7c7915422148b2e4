//! A flow's task on a shared tunnel: what its application sends, what it was too slow to take, and the end.
//!
//! What arrives and is taken at once does not come by here: the tunnel's own task writes it (`tunnel/shared/hub.rs`).

use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::{Ending, OPTIMISTIC, give_way};
use crate::relay::socket::Socket;
use crate::tunnel::link::LinkError;
use crate::tunnel::oct::exchange::{Direction, Exchange};
use crate::tunnel::oct::frame::Kind;
use crate::tunnel::pool::Leased;
use crate::tunnel::shared::hub::Hub;
use crate::tunnel::shared::outbox::Put;
use crate::tunnel::shared::stream::{Moving, Stream};
use crate::worker::registry::{Cut, Flow};

/// Frames that a flow packs before the worker's other flows have a turn.
const TURN: usize = 4;

/// How a flow on a shared tunnel went.
#[derive(Debug)]
pub enum Outcome {
    /// It ended.
    Ended(Ending),
    /// It goes on over a tunnel of its own.
    Moved(Box<Moved>),
}

/// A flow that goes on over a tunnel of its own.
#[derive(Debug)]
pub struct Moved {
    /// The application's connection.
    pub app: Socket,
    /// The tunnel, on which CONTINUE was agreed.
    pub leased: Leased,
    /// Where the flow stands.
    pub exchange: Exchange,
}

/// A flow that is ready to run.
#[derive(Debug)]
pub struct SharedRelay<'a> {
    /// The tunnel.
    pub hub: &'a Hub,
    /// The flow's place on it; the application's connection is in it (none: refused already).
    pub stream: &'a Rc<Stream>,
    /// For accounting and for being cut.
    pub flow: &'a Flow,
    /// Bytes that go first.
    pub replay: Vec<u8>,
    /// Opener on a tunnel that others used before: keep what is sent until the answer, for a retry.
    pub keep: bool,
}

impl<'a> SharedRelay<'a> {
    /// Runs the flow to its end, or until it moves. `bulk` is called once when it should move.
    pub fn run<F: FnOnce() + 'a>(self, bulk: F) -> impl Future<Output = Outcome> + use<'a, F> {
        let SharedRelay { hub, stream, flow, replay, keep } = self;
        let mut state = State {
            hub,
            stream,
            flow,
            replay,
            kept: keep.then(Vec::new),
            app_ended: false,
            app_shut: false,
            allowance: OPTIMISTIC,
            ending: None,
            more: false,
            bulk: Some(bulk),
        };
        poll_fn(move |context| state.poll(context))
    }
}

struct State<'a, F> {
    hub: &'a Hub,
    stream: &'a Rc<Stream>,
    flow: &'a Flow,
    replay: Vec<u8>,
    kept: Option<Vec<u8>>,
    /// The application has ended its direction.
    app_ended: bool,
    /// We have ended ours towards the application.
    app_shut: bool,
    allowance: usize,
    ending: Option<Ending>,
    /// Its turn was over before the application had nothing more to say.
    more: bool,
    bulk: Option<F>,
}

impl<F: FnOnce()> State<'_, F> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Outcome> {
        if let Poll::Ready(cut) = self.flow.watch.poll_cut(context) {
            if let Err(error) = self.cut() {
                tracing::debug!(%error, "a flow that was cut could not be ended on its tunnel");
            }
            return Poll::Ready(Outcome::Ended(Ending::Cut(cut)));
        }
        if let Some(error) = self.stream.broken.borrow_mut().take() {
            return Poll::Ready(Outcome::Ended(self.broken(error)));
        }
        match self.step(context) {
            Ok(Some(outcome)) => Poll::Ready(outcome),
            Ok(None) if self.more => give_way(context),
            Ok(None) => Poll::Pending,
            Err(error) => {
                // Whatever fails here is the tunnel's: its task ends it for everybody.
                self.hub.watch.cut(Cut::Tunnel(error.to_string()));
                Poll::Ready(Outcome::Ended(self.broken(Rc::new(error))))
            }
        }
    }

    fn step(&mut self, context: &mut Context<'_>) -> Result<Option<Outcome>, LinkError> {
        if self.kept.is_some() && !self.unanswered() {
            self.kept = None;
        }
        if let Some(error) = self.stream.app_error.borrow_mut().take() {
            self.app_broken(error)?;
        }
        self.deliver(context)?;
        self.remote_ended()?;
        if let Some(moved) = self.movement()? {
            return Ok(Some(moved));
        }
        self.outward(context)?;
        if self.is_done() {
            let refusal = self.stream.refusal.borrow_mut().take();
            let ending = refusal.map(Ending::Refused).or_else(|| self.ending.take()).unwrap_or(Ending::Finished);
            if let (Ending::Finished, Some(app)) = (&ending, self.stream.app.borrow_mut().take()) {
                app.finish();
            }
            return Ok(Some(Outcome::Ended(ending)));
        }
        Ok(None)
    }

    fn unanswered(&self) -> bool {
        self.stream.exchange.borrow().unanswered()
    }

    fn local(&self) -> Direction {
        self.stream.exchange.borrow().local()
    }

    fn remote(&self) -> Direction {
        self.stream.exchange.borrow().remote()
    }

    // --- application → tunnel ---------------------------------------------------------------------------------------

    fn outward(&mut self, context: &mut Context<'_>) -> Result<(), LinkError> {
        self.more = false;
        for _ in 0..TURN {
            let limit =
                if self.unanswered() { self.allowance } else { usize::MAX }.min(self.stream.credit.get() as usize);
            let moving = matches!(*self.stream.moving.borrow(), Moving::Sent(_));
            if self.local() != Direction::Running || self.app_ended || moving || limit == 0 {
                return Ok(());
            }
            if !self.replay.is_empty() {
                let length = limit.min(self.replay.len());
                let sent = self.hub.write(self.stream, &self.replay[..length])?;
                self.replay.drain(..sent);
                self.allowance -= sent.min(self.allowance);
                if sent == 0 {
                    return Ok(());
                }
                continue;
            }
            let put = {
                let mut app = self.stream.app.borrow_mut();
                let Some(app) = &mut *app else { return Ok(()) };
                match self.hub.read(context, app, self.stream, limit, self.kept.as_mut()) {
                    Poll::Ready(put) => put?,
                    Poll::Pending => return Ok(()),
                }
            };
            match put {
                Put::Data(length) => self.allowance = self.allowance.saturating_sub(length),
                Put::Full => return Ok(()),
                Put::End => {
                    self.app_ended = true;
                    self.hub.end(self.stream, Kind::Fin)?;
                    return Ok(());
                }
                Put::Broken(error) => return self.app_broken(error),
            }
            if self.stream.is_bulk()
                && let Some(bulk) = self.bulk.take()
            {
                bulk();
            }
        }
        self.more = true;
        Ok(())
    }

    fn app_broken(&mut self, error: io::Error) -> Result<(), LinkError> {
        self.stream.app.borrow_mut().take();
        self.stream.drop_data();
        self.app_shut = true;
        self.ending.get_or_insert(Ending::AppReset(error));
        self.end_cut()
    }

    fn end_cut(&self) -> Result<(), LinkError> {
        self.flow.ends();
        self.hub.end(self.stream, Kind::Reset)
    }

    // --- tunnel → application ---------------------------------------------------------------------------------------

    fn deliver(&mut self, context: &mut Context<'_>) -> Result<(), LinkError> {
        if self.stream.is_bulk()
            && let Some(bulk) = self.bulk.take()
        {
            bulk();
        }
        loop {
            let written = {
                let mut app = self.stream.app.borrow_mut();
                let Some(app) = &mut *app else { return Ok(()) };
                let backlog = self.stream.backlog.borrow();
                if backlog.is_empty() {
                    return Ok(());
                }
                app.poll_write_vectored(context, &backlog.pieces())
            };
            match written {
                Poll::Ready(Ok(written)) => {
                    self.stream.backlog.borrow_mut().consume(written);
                    if let Some(bytes) = self.stream.taken(written) {
                        self.hub.credit(self.stream, bytes)?;
                    }
                }
                Poll::Ready(Err(error)) => return self.app_broken(error),
                Poll::Pending => return Ok(()),
            }
        }
    }

    fn remote_ended(&mut self) -> Result<(), LinkError> {
        match self.remote() {
            Direction::Cut => {
                // A reset does not wait for an application that does not read.
                self.stream.drop_data();
                if let Some(app) = self.stream.app.borrow_mut().take() {
                    app.reset();
                }
                self.app_shut = true;
                self.ending.get_or_insert(Ending::PeerReset);
                if !self.local().ended() {
                    self.end_cut()?;
                }
            }
            Direction::Finished if !self.app_shut && self.stream.backlog.borrow().is_empty() => {
                self.app_shut = true;
                let shut = match &*self.stream.app.borrow() {
                    Some(app) => app.shutdown_write(),
                    None => Ok(()),
                };
                if let Err(error) = shut {
                    return self.app_broken(error);
                }
            }
            _ => {}
        }
        Ok(())
    }

    // --- the move to a tunnel of its own ----------------------------------------------------------------------------

    /// Both directions have moved, and everything that came before has been delivered: the flow goes on elsewhere.
    fn movement(&mut self) -> Result<Option<Outcome>, LinkError> {
        let mut moving = self.stream.moving.borrow_mut();
        if let Moving::Ready(_) = *moving {
            let Moving::Ready(leased) = std::mem::take(&mut *moving) else { return Ok(None) };
            // What ended meanwhile has no use for it; its tunnel is dropped, which the peer sees.
            if self.local() == Direction::Cut || self.remote() == Direction::Cut {
                leased.tunnel.reset();
                return Ok(None);
            }
            self.hub.moved(self.stream)?;
            *moving = Moving::Sent(leased);
        }
        if !matches!(*moving, Moving::Sent(_)) || !self.stream.peer_moved.get() {
            return Ok(None);
        }
        if !self.stream.backlog.borrow().is_empty() || self.remote() == Direction::Cut {
            return Ok(None);
        }
        let Some(app) = self.stream.app.borrow_mut().take() else { return Ok(None) };
        let Moving::Sent(leased) = std::mem::take(&mut *moving) else { return Ok(None) };
        self.hub.forget(self.stream);
        let exchange = self.stream.exchange.borrow().clone();
        Ok(Some(Outcome::Moved(Box::new(Moved { app, leased: *leased, exchange }))))
    }

    // --- the end ----------------------------------------------------------------------------------------------------

    fn is_done(&self) -> bool {
        self.stream.exchange.borrow().is_over() && self.app_shut && self.stream.backlog.borrow().is_empty()
    }

    fn cut(&mut self) -> Result<(), LinkError> {
        self.stream.drop_data();
        if let Some(app) = self.stream.app.borrow_mut().take() {
            app.reset();
        }
        self.hub.end(self.stream, Kind::Reset)
    }

    fn broken(&mut self, error: Rc<LinkError>) -> Ending {
        self.stream.drop_data();
        // Without an answer, and if the peer closed in order (it does so only without flows) or has got nothing of the
        // application's, nothing was done that a second try could do twice.
        let untouched = matches!(*error, LinkError::CloseNotify) || self.flow.sent() == 0;
        let app = self.stream.app.borrow_mut().take();
        match (app, self.kept.take()) {
            (Some(app), Some(replay)) if untouched && self.unanswered() => Ending::Stale { app, replay },
            (app, _) => {
                if let Some(app) = app {
                    app.reset();
                }
                self.ending.take().unwrap_or(Ending::Broken(error))
            }
        }
    }
}
