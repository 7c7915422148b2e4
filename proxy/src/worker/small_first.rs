//! Small flows first: where the processor does not suffice for all, bulk flows rest for a moment, again and again, as
//! long as there are small flows beside them.
//!
//! Turns within a worker are short, so small messages never wait long for the worker itself. On a full machine they wait
//! for a processor: each of the threads that a message passes through (workers, applications) finds one that computes for
//! milliseconds, and bulk is what it computes. No priority helps (decision 0023): only less work does. Bulk that rests for
//! a part of the time leaves that time to the others, its own applications included, and shares what is left as before
//! (decision 0026).
//!
//! Nobody rests needlessly. It takes all of this:
//!
//! - small messages, a moment ago, on the same worker;
//! - a worker that was displaced from its processor in the middle of a bulk flow's turn, a moment ago: then others want
//!   it. A machine with processors to spare never sees a rest;
//! - bulk turns of [`RUN`] since the last rest.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// A turn that moves less is not bulk's.
const SMALL: usize = 16 * 1024;

/// So long bulk flows run between two rests, all of a worker's together.
const RUN: Duration = Duration::from_micros(500);

/// And so long they rest, at least: the runtime's timer rounds up to a whole millisecond.
const REST: Duration = Duration::from_millis(1);

/// Small flows are looked after for so long behind their last message.
const AFTER_SMALL: Duration = Duration::from_millis(20);

/// A worker that was away from its processor for longer in the middle of a turn was displaced by somebody who computes;
/// interrupts and the kernel's own short work take less.
const AWAY: Duration = Duration::from_micros(250);

/// Behind that the processor counts as wanted for so long. Rests themselves make it rare.
const AFTER_AWAY: Duration = Duration::from_millis(200);

/// Flows that may wait for the end of a rest before the list of them must grow.
const READY: usize = 64;

thread_local! {
    static RESTS: Rests = const { Rests::new() };
}

/// Makes room, so that no rest has to.
pub fn prepare() {
    RESTS.with(|rests| rests.waiting.borrow_mut().reserve(READY));
}

/// A message of a flow on a shared tunnel was carried. (What has a tunnel of its own became bulk once.)
pub fn small() {
    RESTS.with(|rests| rests.small.set(true));
}

/// For a bulk flow, before its turn: pending while they rest.
pub fn poll_rested(context: &Context<'_>) -> Poll<()> {
    RESTS.with(|rests| rests.poll_rested(Instant::now(), context))
}

/// Rests since the last call.
pub fn take_count() -> u64 {
    RESTS.with(|rests| rests.count.take())
}

/// Ends rests. A task of each worker.
pub async fn warden() {
    let mut sleep = pin!(tokio::time::sleep(Duration::ZERO));
    poll_fn(|context| {
        RESTS.with(|rests| {
            let mut warden = rests.warden.borrow_mut();
            if !warden.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *warden = Some(context.waker().clone());
            }
            drop(warden);
            let Some(until) = rests.until.get() else { return Poll::<()>::Pending };
            if sleep.deadline() != until.into() {
                sleep.as_mut().reset(until.into());
            }
            if sleep.as_mut().poll(context).is_ready() {
                rests.end();
            }
            Poll::Pending
        })
    })
    .await;
}

/// The turn of a flow that has a tunnel of its own, on the clock.
#[derive(Debug)]
pub struct Turn {
    began: Instant,
    /// The thread's processor time then, if it matters.
    used: Option<Duration>,
}

impl Turn {
    /// Begins.
    pub fn begin() -> Self {
        let began = Instant::now();
        let matters = RESTS.with(|rests| rests.small_lately(began));
        Self { began, used: matters.then(processor_time) }
    }

    /// It moved so many bytes. Whether the flow is bulk, for now.
    pub fn end(self, moved: usize) -> bool {
        if moved < SMALL {
            return false;
        }
        if let Some(used) = self.used {
            let took = self.began.elapsed();
            let away = took.saturating_sub(processor_time().saturating_sub(used));
            RESTS.with(|rests| rests.ran(self.began, took, away));
        }
        true
    }
}

/// Of this thread.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// One worker's state. Only its thread sees it.
#[derive(Debug)]
struct Rests {
    /// A small message came since somebody asked.
    small: Cell<bool>,
    /// When somebody asked and one had come.
    small_at: Cell<Option<Instant>>,
    away_at: Cell<Option<Instant>>,
    /// Bulk turns since the last rest, and when the last of them ended.
    ran: Cell<Duration>,
    ran_at: Cell<Option<Instant>>,
    /// Resting until then.
    until: Cell<Option<Instant>>,
    waiting: RefCell<Vec<Waker>>,
    warden: RefCell<Option<Waker>>,
    count: Cell<u64>,
}

impl Rests {
    const fn new() -> Self {
        Self {
            small: Cell::new(false),
            small_at: Cell::new(None),
            away_at: Cell::new(None),
            ran: Cell::new(Duration::ZERO),
            ran_at: Cell::new(None),
            until: Cell::new(None),
            waiting: RefCell::new(Vec::new()),
            warden: RefCell::new(None),
            count: Cell::new(0),
        }
    }

    fn small_lately(&self, now: Instant) -> bool {
        if self.small.take() {
            self.small_at.set(Some(now));
        }
        within(self.small_at.get(), now, AFTER_SMALL)
    }

    /// A bulk turn beside small flows.
    fn ran(&self, began: Instant, took: Duration, away: Duration) {
        let ended = began + took;
        if away > AWAY {
            self.away_at.set(Some(ended));
        }
        // A pause of its own was as good as a rest.
        let since = if within(self.ran_at.replace(Some(ended)), began, REST) { self.ran.get() } else { Duration::ZERO };
        self.ran.set(since + took.saturating_sub(away));
        if self.ran.get() >= RUN && within(self.away_at.get(), ended, AFTER_AWAY) && self.until.get().is_none() {
            self.ran.set(Duration::ZERO);
            self.until.set(Some(ended + REST));
            self.count.update(|count| count + 1);
            if let Some(warden) = &*self.warden.borrow() {
                warden.wake_by_ref();
            }
        }
    }

    fn poll_rested(&self, now: Instant, context: &Context<'_>) -> Poll<()> {
        match self.until.get() {
            // The second: the warden is late, and waiting for him would be in vain if he is gone.
            None => Poll::Ready(()),
            Some(until) if now >= until + REST => Poll::Ready(()),
            Some(_) => {
                let mut waiting = self.waiting.borrow_mut();
                // A socket may wake a flow again and again that has its place already.
                if !waiting.last().is_some_and(|waker| waker.will_wake(context.waker())) {
                    waiting.push(context.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    fn end(&self) {
        self.until.set(None);
        for waker in self.waiting.borrow_mut().drain(..) {
            waker.wake();
        }
    }
}

fn within(then: Option<Instant>, now: Instant, limit: Duration) -> bool {
    then.is_some_and(|then| now.saturating_duration_since(then) < limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn is_resting(rests: &Rests, now: Instant) -> bool {
        rests.poll_rested(now, &Context::from_waker(Waker::noop())).is_pending()
    }

    /// Turns of 100 us, one after another, for so long; when the last has ended.
    fn run(rests: &Rests, start: Instant, duration: Duration, away: Duration) -> Instant {
        let (turn, mut now) = (Duration::from_micros(100), start);
        while now < start + duration {
            rests.ran(now, turn + away, away);
            now += turn + away;
        }
        now
    }

    #[test]
    fn bulk_rests_where_the_worker_was_displaced_and_had_its_run() {
        let (rests, start) = (Rests::new(), Instant::now());
        let now = run(&rests, start, 10 * MS, Duration::ZERO);
        assert!(!is_resting(&rests, now), "with a processor of its own it never rests");
        let now = run(&rests, now, MS, AWAY + MS);
        assert!(is_resting(&rests, now));
        rests.end();
        assert!(!is_resting(&rests, now));
        let half = run(&rests, now, RUN / 2, Duration::ZERO);
        assert!(!is_resting(&rests, half), "it has a whole run again");
        let later = run(&rests, half + AFTER_AWAY, 10 * MS, Duration::ZERO);
        assert!(!is_resting(&rests, later), "displaced long ago");
    }

    #[test]
    fn short_absences_are_the_kernels_own() {
        let (rests, start) = (Rests::new(), Instant::now());
        let now = run(&rests, start, 50 * MS, AWAY);
        assert_eq!(rests.count.get(), 0);
        run(&rests, now, 50 * MS, AWAY + Duration::from_micros(1));
        assert_eq!(rests.count.get(), 1, "the control");
    }

    #[test]
    fn a_pause_is_as_good_as_a_rest() {
        let (rests, start) = (Rests::new(), Instant::now());
        rests.ran(start, AWAY + MS, AWAY + MS);
        let mut now = start + AWAY + MS;
        for _ in 0..20 {
            now = run(&rests, now, RUN * 4 / 5, Duration::ZERO);
            assert!(!is_resting(&rests, now));
            now += REST;
        }
    }

    #[test]
    fn small_flows_are_looked_after_for_a_moment() {
        let (rests, now) = (Rests::new(), Instant::now());
        assert!(!rests.small_lately(now));
        rests.small.set(true);
        assert!(rests.small_lately(now));
        assert!(rests.small_lately(now + AFTER_SMALL / 2));
        assert!(!rests.small_lately(now + AFTER_SMALL));
    }

    #[test]
    fn nobody_waits_for_a_warden_who_does_not_come() {
        let (rests, now) = (Rests::new(), Instant::now());
        rests.until.set(Some(now + REST));
        assert!(is_resting(&rests, now));
        assert!(is_resting(&rests, now + REST));
        assert!(!is_resting(&rests, now + 2 * REST));
    }
}
