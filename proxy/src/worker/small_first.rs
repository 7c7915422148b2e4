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
//! - a worker that the scheduler keeps displacing from its processor in the middle of bulk turns: then others want it. A
//!   machine with processors to spare does not see that;
//! - bulk turns of [`RUN`] since the last rest.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

/// A turn that moves less is not bulk's.
const BULK: usize = 16 * 1024;

/// A turn that moves less has moved no data: sending and delivering count as one each.
const NOTHING: usize = 1024;

/// So long bulk flows run between two rests, all of a worker's together.
const RUN: Duration = Duration::from_micros(500);

/// And so long they rest, at least: the runtime's timer rounds up, to two milliseconds if nothing else happens.
const REST: Duration = Duration::from_millis(1);

/// Small flows are looked after for so long after a bulk turn has found that there are some.
const AFTER_SMALL: Duration = Duration::from_millis(20);

/// Bulk turns of so long tell whether others want the processor.
const SAMPLE: Duration = Duration::from_millis(10);

/// They do if the worker was displaced for one part in so many of a sample.
const WANTED: u32 = 8;

/// And still do, while there are rests, which leave them room, for one part in so many.
const STILL_WANTED: u32 = 64;

/// A sample says something about so long after it.
const AFTER_SAMPLE: Duration = Duration::from_millis(200);

/// Places for flows that wait for the end of a rest; more of them need memory.
const READY: usize = 64;

thread_local! {
    static RESTS: Rests = const { Rests::new() };
}

/// Makes room, so that no rest has to.
pub fn prepare() {
    RESTS.with(|rests| rests.waiting.borrow_mut().reserve(READY));
}

/// A small message was carried.
pub fn small() {
    RESTS.with(|rests| rests.small.set(true));
}

/// For a bulk flow, before its turn: pending while bulk rests. `place` is the flow's own, 0 in the beginning: it tells
/// whether it has a place among those that wait.
pub fn poll_rested(context: &Context<'_>, place: &mut u64) -> Poll<()> {
    RESTS.with(|rests| rests.poll_rested(Instant::now, context, place))
}

/// Rests since the last call.
pub fn take_count() -> u64 {
    RESTS.with(|rests| {
        let number = rests.number.get();
        number - rests.told.replace(number)
    })
}

/// Ends rests. A task of each worker.
pub async fn warden() {
    if let Err(error) = getrusage(UsageWho::RUSAGE_THREAD) {
        tracing::warn!(%error, "bulk will not rest for small flows: what this worker uses of processors is not to be had");
    }
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

/// The turn of a flow that has a tunnel of its own, on the clock if there are small flows.
#[derive(Debug)]
pub struct Turn(Option<(Instant, Usage)>);

impl Turn {
    /// Begins.
    pub fn begin() -> Self {
        Self(RESTS.with(|rests| rests.sees_small(Instant::now)).map(|now| (now, Usage::now())))
    }

    /// It moved so much. Whether the flow is bulk, if it was before.
    pub fn end(self, moved: usize, was_bulk: bool) -> bool {
        let is_bulk = if moved < NOTHING { was_bulk } else { moved >= BULK };
        if let (true, Self(Some((began, before)))) = (is_bulk, self) {
            let (took, after) = (began.elapsed(), Usage::now());
            RESTS.with(|rests| rests.ran(began, took, after.displaced(&before, took)));
        }
        is_bulk
    }
}

/// What a thread has used.
#[derive(Clone, Copy, Debug)]
struct Usage {
    processor: Duration,
    /// How often the scheduler took the processor away.
    displacements: i64,
}

impl Usage {
    /// Of this thread; nothing if that is not to be had: then nobody is displaced, which [`warden`] has told.
    fn now() -> Self {
        let Ok(usage) = getrusage(UsageWho::RUSAGE_THREAD) else {
            return Self { processor: Duration::ZERO, displacements: 0 };
        };
        let microseconds = [usage.user_time(), usage.system_time()]
            .map(|time| time.tv_sec().unsigned_abs() * 1_000_000 + time.tv_usec().unsigned_abs());
        Self {
            processor: Duration::from_micros(microseconds.iter().sum()),
            displacements: usage.involuntary_context_switches(),
        }
    }

    /// How long the processor was somebody else's since then, which was so long ago. Without a displacement, what is
    /// missing has been used by interrupts, or by the hypervisor.
    fn displaced(&self, before: &Self, took: Duration) -> Duration {
        if self.displacements == before.displacements {
            return Duration::ZERO;
        }
        took.saturating_sub(self.processor.saturating_sub(before.processor))
    }
}

/// One worker's state. Only its thread sees it.
#[derive(Debug)]
struct Rests {
    /// A small message came since somebody asked.
    small: Cell<bool>,
    /// When somebody asked and one had come, unless that is long ago.
    small_at: Cell<Option<Instant>>,
    /// The sample that is being taken: bulk turns, and what of them the worker was displaced for.
    sampled: Cell<Duration>,
    displaced: Cell<Duration>,
    /// When a sample last said that others want the processor.
    wanted_at: Cell<Option<Instant>>,
    /// Bulk turns since the last rest, and when the last of them ended.
    ran: Cell<Duration>,
    ran_at: Cell<Option<Instant>>,
    /// Resting until then.
    until: Cell<Option<Instant>>,
    waiting: RefCell<Vec<Waker>>,
    warden: RefCell<Option<Waker>>,
    /// Rests so far, and how many have been told of.
    number: Cell<u64>,
    told: Cell<u64>,
}

impl Rests {
    const fn new() -> Self {
        Self {
            small: Cell::new(false),
            small_at: Cell::new(None),
            sampled: Cell::new(Duration::ZERO),
            displaced: Cell::new(Duration::ZERO),
            wanted_at: Cell::new(None),
            ran: Cell::new(Duration::ZERO),
            ran_at: Cell::new(None),
            until: Cell::new(None),
            waiting: RefCell::new(Vec::new()),
            warden: RefCell::new(None),
            number: Cell::new(0),
            told: Cell::new(0),
        }
    }

    /// Now, if there are small flows. The clock is only looked at where there were some.
    fn sees_small(&self, clock: impl FnOnce() -> Instant) -> Option<Instant> {
        if !self.small.get() && self.small_at.get().is_none() {
            return None;
        }
        let now = clock();
        if self.small.take() {
            self.small_at.set(Some(now));
        } else if !within(self.small_at.get(), now, AFTER_SMALL) {
            self.small_at.set(None);
        }
        self.small_at.get().map(|_| now)
    }

    /// A bulk turn beside small flows.
    fn ran(&self, began: Instant, took: Duration, displaced: Duration) {
        let ended = began + took;
        self.sample(ended, took, displaced);
        // A pause of its own was as good as a rest.
        let since = if within(self.ran_at.replace(Some(ended)), began, REST) { self.ran.get() } else { Duration::ZERO };
        self.ran.set(since + took.saturating_sub(displaced));
        if self.ran.get() >= RUN && self.is_wanted(ended) && self.until.get().is_none() {
            self.ran.set(Duration::ZERO);
            self.until.set(Some(ended + REST));
            self.number.update(|number| number + 1);
            if let Some(warden) = &*self.warden.borrow() {
                warden.wake_by_ref();
            }
        }
    }

    fn sample(&self, now: Instant, took: Duration, displaced: Duration) {
        self.sampled.update(|sampled| sampled + took);
        self.displaced.update(|sum| sum + displaced);
        if self.sampled.get() < SAMPLE {
            return;
        }
        let share = if self.is_wanted(now) { STILL_WANTED } else { WANTED };
        if self.displaced.take() * share >= self.sampled.take() {
            self.wanted_at.set(Some(now));
        }
    }

    /// Whether others want the processor.
    fn is_wanted(&self, now: Instant) -> bool {
        within(self.wanted_at.get(), now, AFTER_SAMPLE)
    }

    fn poll_rested(&self, clock: impl FnOnce() -> Instant, context: &Context<'_>, place: &mut u64) -> Poll<()> {
        let Some(until) = self.until.get() else { return Poll::Ready(()) };
        if clock() >= until + REST {
            // The warden is late.
            self.end();
            return Poll::Ready(());
        }
        // A flow can be woken several times in a rest, and has a place after the first.
        if std::mem::replace(place, self.number.get()) != self.number.get() {
            self.waiting.borrow_mut().push(context.waker().clone());
        }
        Poll::Pending
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
    const TURN: Duration = Duration::from_micros(100);

    fn is_resting(rests: &Rests, now: Instant) -> bool {
        rests.poll_rested(|| now, &Context::from_waker(Waker::noop()), &mut 0).is_pending()
    }

    /// Turns one after another, for so long, each of them with so much displacement; rests are cut short. When the last has
    /// ended, and how many rests there were.
    fn run(rests: &Rests, start: Instant, duration: Duration, displaced: Duration) -> (Instant, u64) {
        let (mut now, before) = (start, rests.number.get());
        while now < start + duration {
            rests.ran(now, TURN + displaced, displaced);
            now += TURN + displaced;
            rests.end();
        }
        (now, rests.number.get() - before)
    }

    #[test]
    fn bulk_rests_while_others_want_the_processor() {
        let rests = Rests::new();
        let (now, count) = run(&rests, Instant::now(), 100 * MS, Duration::ZERO);
        assert_eq!(count, 0, "with a processor of its own it never rests");
        let (now, count) = run(&rests, now, 100 * MS, TURN / 10);
        assert_eq!(count, 0, "a little displacement is the kernel's own work");
        let (now, count) = run(&rests, now, 100 * MS, TURN / 5);
        assert!((100..170).contains(&count), "every {RUN:?} of turns, after the first sample: {count} rests");
        let (now, count) = run(&rests, now, 500 * MS, TURN / 20);
        assert!(count > 700, "they go on, although rests leave others room: {count} rests");
        let (now, _) = run(&rests, now, AFTER_SAMPLE + 2 * SAMPLE, Duration::ZERO);
        let (_, count) = run(&rests, now, 100 * MS, Duration::ZERO);
        assert_eq!(count, 0, "until nobody wants it any more");
    }

    #[test]
    fn a_rest_begins_after_a_run_and_ends() {
        let (rests, mut now) = (Rests::new(), Instant::now());
        rests.wanted_at.set(Some(now));
        for _ in 0..RUN.as_micros() / TURN.as_micros() {
            assert!(!is_resting(&rests, now));
            rests.ran(now, TURN, Duration::ZERO);
            now += TURN;
        }
        assert!(is_resting(&rests, now));
        rests.end();
        assert!(!is_resting(&rests, now));
        rests.ran(now, TURN, Duration::ZERO);
        assert!(!is_resting(&rests, now + TURN), "it has a whole run again");
    }

    #[test]
    fn a_pause_is_as_good_as_a_rest() {
        let (rests, mut now) = (Rests::new(), Instant::now());
        for _ in 0..20 {
            rests.wanted_at.set(Some(now));
            now = run(&rests, now, RUN * 4 / 5, Duration::ZERO).0 + REST;
        }
        assert_eq!(rests.number.get(), 0);
        run(&rests, now, RUN, Duration::ZERO);
        assert_eq!(rests.number.get(), 1, "the control");
    }

    #[test]
    fn small_flows_are_looked_after_for_a_moment() {
        let (rests, now) = (Rests::new(), Instant::now());
        assert_eq!(rests.sees_small(|| unreachable!("without small flows nobody asks for the time")), None);
        rests.small.set(true);
        for at in [now, now + AFTER_SMALL / 2] {
            assert_eq!(rests.sees_small(|| at), Some(at));
        }
        assert_eq!(rests.sees_small(|| now + AFTER_SMALL), None);
        assert_eq!(rests.sees_small(|| unreachable!("nor again when they are gone")), None);
    }

    #[test]
    fn who_waits_has_one_place_and_is_woken_even_if_the_warden_is_late() {
        let (rests, now) = (Rests::new(), Instant::now());
        let context = Context::from_waker(Waker::noop());
        rests.until.set(Some(now + REST));
        rests.number.set(1);
        let (mut one, mut other) = (0, 0);
        for _ in 0..3 {
            assert!(rests.poll_rested(|| now, &context, &mut one).is_pending());
            assert!(rests.poll_rested(|| now + REST, &context, &mut other).is_pending());
        }
        assert_eq!(rests.waiting.borrow().len(), 2);
        assert!(rests.poll_rested(|| now + 2 * REST, &context, &mut one).is_ready());
        assert!(rests.waiting.borrow().is_empty());
        assert!(!is_resting(&rests, now));
    }

    #[test]
    fn only_a_displaced_thread_was_displaced() {
        let usage = |processor, displacements| Usage { processor: processor * MS, displacements };
        let before = usage(10, 7);
        assert_eq!(usage(12, 7).displaced(&before, 5 * MS), Duration::ZERO, "interrupts");
        assert_eq!(usage(12, 8).displaced(&before, 5 * MS), 3 * MS);
        assert_eq!(usage(16, 8).displaced(&before, 5 * MS), Duration::ZERO, "its clock is coarser");
    }
}
