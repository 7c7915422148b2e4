//! Busy polling: a worker that has just carried a single message goes on looking at its sockets for a moment instead of
//! going to sleep.
//!
//! Where messages come one at a time, most of their time passes in wake-ups: the processor that the worker slept on has
//! gone idle and must be woken (a virtual one by its hypervisor), and so must the next one in the chain. A worker that
//! stays awake until the answer is there saves both. The kernel has the same for its own idle loop
//! (`Documentation/virt/guest-halt-polling.rst`) and for network devices (`SO_BUSY_POLL`), where it is switched on.
//!
//! Nobody else is to pay for it (decision 0024):
//!
//! - It begins only where messages come one at a time, several in a row. More of them at once mean load, under which
//!   sleep is better: meanwhile more messages gather, and are carried together.
//! - It polls only when the runtime has nothing to do, and yields the processor before every look. A yield that takes
//!   long says that somebody else needs the processor: then it rests, eight times as long as it was away.
//! - Polling in vain is paid from a budget, a tenth of the time. A worker without traffic never polls.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use opencluster_api::local::BUSY_POLL_US;

/// How long a worker polls behind a message unless it is configured.
pub const WINDOW: Duration = Duration::from_micros(BUSY_POLL_US as u64);

/// So many single messages in a row are calm: it may poll behind them.
const CALM: u32 = 4;

/// A yield that takes longer has given the processor to somebody who needs it; an application's answer takes less.
const AWAY: Duration = Duration::from_micros(250);

/// So many times as long as such a yield took, there is no polling.
const REST: u32 = 8;

/// One part in so many of the time may be polled in vain.
const VAIN: u32 = 10;

/// What can be saved up of that, for single messages after silence.
const SAVED: Duration = Duration::from_millis(10);

thread_local! {
    static POLLING: Polling = const { Polling::new() };
}

/// Sets how long this worker polls behind a message; zero: never.
pub fn prepare(window: Duration) {
    POLLING.with(|polling| polling.window.set(window));
}

/// So many frames of data have come from applications.
pub fn sent(frames: u32) {
    POLLING.with(|polling| polling.sent.set(polling.sent.get().saturating_add(frames)));
}

/// So many frames of data have come from peers.
pub fn received(frames: u32) {
    POLLING.with(|polling| polling.received.set(polling.received.get().saturating_add(frames)));
}

/// For the runtime's `on_thread_park`: it has nothing to do and is about to sleep. Waking the lookout keeps it awake.
pub fn before_park() {
    POLLING.with(|polling| {
        let before = Instant::now();
        if !polling.goes_on(before) {
            return;
        }
        std::thread::yield_now();
        if polling.was_away(before, before.elapsed()) {
            return;
        }
        if let Some(lookout) = &*polling.lookout.borrow() {
            lookout.wake_by_ref();
        }
    });
}

/// A task that does nothing. While it is to run, the runtime does not sleep: it looks at its sockets and goes on.
pub async fn lookout() {
    poll_fn(|context| {
        POLLING.with(|polling| {
            let mut lookout = polling.lookout.borrow_mut();
            if !lookout.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *lookout = Some(context.waker().clone());
            }
            Poll::<()>::Pending
        })
    })
    .await;
}

/// What polling has brought since the last call.
pub fn take_counts() -> Counts {
    POLLING.with(|polling| polling.counts.take())
}

/// How often something came while a worker polled, and how often it polled in vain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Something came.
    pub hits: u64,
    /// Nothing came.
    pub misses: u64,
}

/// One worker's state. Only its thread sees it.
#[derive(Debug)]
struct Polling {
    window: Cell<Duration>,
    /// Frames since the runtime last had nothing to do.
    sent: Cell<u32>,
    received: Cell<u32>,
    /// How many times in a row there was one frame then, and not more.
    singles: Cell<u32>,
    /// Polling now, until then.
    until: Cell<Option<Instant>>,
    /// No polling before that.
    rests_until: Cell<Option<Instant>>,
    /// What may be polled in vain, as of when.
    budget: Cell<Duration>,
    budget_of: Cell<Option<Instant>>,
    lookout: RefCell<Option<Waker>>,
    counts: Cell<Counts>,
}

impl Polling {
    const fn new() -> Self {
        Self {
            window: Cell::new(Duration::ZERO),
            sent: Cell::new(0),
            received: Cell::new(0),
            singles: Cell::new(0),
            until: Cell::new(None),
            rests_until: Cell::new(None),
            budget: Cell::new(SAVED),
            budget_of: Cell::new(None),
            lookout: RefCell::new(None),
            counts: Cell::new(Counts { hits: 0, misses: 0 }),
        }
    }

    /// Nothing to do: whether to look at the sockets again instead of sleeping.
    fn goes_on(&self, now: Instant) -> bool {
        let messages = self.sent.take().max(self.received.take());
        match (messages, self.until.get()) {
            (0, None) => false,
            (0, Some(until)) => now < until || self.ends_in_vain(),
            (1, polling) => {
                self.singles.set(self.singles.get().saturating_add(1));
                if polling.is_some() {
                    self.count(1, 0);
                } else if !self.may_begin(now) {
                    return false;
                }
                self.until.set(Some(now + self.window.get()));
                true
            }
            _ => {
                self.singles.set(0);
                self.until.set(None);
                false
            }
        }
    }

    fn ends_in_vain(&self) -> bool {
        self.until.set(None);
        self.budget.set(self.budget.get().saturating_sub(self.window.get()));
        self.count(0, 1);
        false
    }

    fn may_begin(&self, now: Instant) -> bool {
        let window = self.window.get();
        if window.is_zero() || self.singles.get() < CALM || self.rests_until.get().is_some_and(|until| now < until) {
            return false;
        }
        let earned = self.budget_of.replace(Some(now)).map_or(Duration::ZERO, |then| (now - then) / VAIN);
        self.budget.set((self.budget.get() + earned).min(SAVED));
        self.budget.get() >= window
    }

    /// After a yield: whether it took so long that the processor is left to others.
    fn was_away(&self, before: Instant, away: Duration) -> bool {
        let long = away > AWAY;
        if long {
            self.until.set(None);
            self.rests_until.set(Some(before + away + away * REST));
        }
        long
    }

    fn count(&self, hits: u64, misses: u64) {
        self.counts.update(|counts| Counts { hits: counts.hits + hits, misses: counts.misses + misses });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polling() -> (Polling, Instant) {
        let polling = Polling::new();
        polling.window.set(WINDOW);
        polling.singles.set(CALM);
        (polling, Instant::now())
    }

    fn message(polling: &Polling) {
        polling.received.set(1);
    }

    #[test]
    fn a_single_message_makes_it_poll_until_the_window_ends() {
        let (polling, now) = polling();
        assert!(!polling.goes_on(now), "without traffic it sleeps");
        message(&polling);
        assert!(polling.goes_on(now));
        assert!(polling.goes_on(now + WINDOW / 2));
        // The answer is a hit, and the next one has the whole window.
        polling.sent.set(1);
        assert!(polling.goes_on(now + WINDOW / 2));
        assert!(polling.goes_on(now + WINDOW));
        assert!(!polling.goes_on(now + WINDOW * 2));
        assert!(!polling.goes_on(now + WINDOW * 2), "and sleeps until something comes");
        assert_eq!(polling.counts.take(), Counts { hits: 1, misses: 1 });
    }

    #[test]
    fn several_messages_at_once_make_it_sleep() {
        let (polling, now) = polling();
        message(&polling);
        assert!(polling.goes_on(now));
        polling.sent.set(2);
        assert!(!polling.goes_on(now));
        for _ in 1..CALM {
            message(&polling);
            assert!(!polling.goes_on(now), "until it is calm again");
        }
        message(&polling);
        assert!(polling.goes_on(now));
    }

    #[test]
    fn a_window_of_zero_never_polls() {
        let (polling, now) = polling();
        polling.window.set(Duration::ZERO);
        message(&polling);
        assert!(!polling.goes_on(now));
    }

    #[test]
    fn in_vain_it_polls_no_more_than_its_share() {
        let (polling, start) = polling();
        // A message every half millisecond, and never one within the window.
        let (mut polled, mut now) = (Duration::ZERO, start);
        let steps = 20_000;
        for _ in 0..steps {
            message(&polling);
            if polling.goes_on(now) {
                polled += WINDOW;
                assert!(!polling.goes_on(now + WINDOW));
            }
            now += Duration::from_micros(500);
        }
        let bound = (now - start) / VAIN + SAVED;
        assert!(polled <= bound, "{polled:?} of {:?}", now - start);
        assert!(polled >= bound * 9 / 10, "the share is used: {polled:?}");
    }

    #[test]
    fn who_was_kept_away_rests() {
        let (polling, now) = polling();
        message(&polling);
        assert!(polling.goes_on(now));
        assert!(!polling.was_away(now, AWAY));
        let away = Duration::from_millis(3);
        assert!(polling.was_away(now, away));
        message(&polling);
        assert!(!polling.goes_on(now + away * REST), "it rests");
        message(&polling);
        assert!(polling.goes_on(now + away * (REST + 1)), "and goes on");
    }
}
