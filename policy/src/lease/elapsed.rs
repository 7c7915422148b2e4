//! Whether a node was paused: its clock against the controller's.
//!
//! A paused guest sees nothing of it: all of its clocks stand still together. But from then on they are behind, for good.
//!
//! Each new heartbeat bounds the difference between the two clocks from both sides. The node sent it after the controller had
//! made the grant before, and before the controller received it; so *controller's clock at the grant − node's clock at the
//! grant's arrival* is at most the difference, and *controller's clock at receipt − node's clock at first sending* is at
//! least the difference. Delay, loss and repetition only move the bounds apart. If the lower bound of today is above an upper
//! bound of some seconds ago, by more than what drift explains, then the difference itself has grown: the node's clock
//! stood still, and no state of the network looks like that.
//!
//! The first heartbeat after a pause has only its upper bound from after the pause, and that may as well be a delay. Such a
//! heartbeat is *suspect*: the controller asks for the next one at once, whose lower bound tells the two apart.

use super::{Nanos, Timing};

/// What is known of the controller's clock minus the node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Elapsed {
    /// When the last grant (or the answer to the enrolment) was made: the controller's CLOCK_MONOTONIC_RAW. `None`: by
    /// another controller, whose clock is not this one's.
    granted: Option<Nanos>,
    /// The tightest upper bound of all heartbeats so far, drift allowed for.
    bound: Option<Bound>,
}

/// An upper bound. It loosens with time, as the clocks may drift; so a later one, of a heartbeat that met little delay, takes
/// its place now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bound {
    difference: i128,
    /// The controller's CLOCK_MONOTONIC_RAW.
    at: Nanos,
}

impl Bound {
    /// The most that the difference can be `now`, if the node was not paused since.
    fn limit(&self, now: Nanos, timing: &Timing) -> i128 {
        self.difference + i128::from(now.saturating_sub(self.at)) * i128::from(timing.drift_ppm) / 1_000_000
    }
}

/// A node's CLOCK_MONOTONIC_RAW, as a new heartbeat tells it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told {
    /// When the grant before arrived.
    pub(super) granted: Nanos,
    /// When the heartbeat was first sent.
    pub(super) sent: Nanos,
}

/// What a heartbeat says about the time since the ones before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// The clocks went on together.
    Together,
    /// It is late: delayed, or the node was paused.
    Suspect,
    /// The node's clock stood still.
    Paused,
}

impl Elapsed {
    /// The answer to the enrolment is about to be sent.
    pub(super) fn since(now: Nanos) -> Self {
        Self { granted: Some(now), bound: None }
    }

    /// Another clock takes over: nothing that was measured with the one before says anything about it.
    pub(super) fn unknown() -> Self {
        Self { granted: None, bound: None }
    }

    /// What a new heartbeat says that is received now.
    pub(super) fn judge(&self, told: Told, now: Nanos, timing: &Timing) -> Finding {
        let Some(limit) = self.bound.map(|bound| bound.limit(now, timing)) else { return Finding::Together };
        let step = i128::from(timing.step);
        let lower = self.granted.map(|granted| i128::from(granted) - i128::from(told.granted));
        if lower.is_some_and(|lower| lower > limit + step) {
            Finding::Paused
        } else if upper(told, now) > limit + step / 2 {
            Finding::Suspect
        } else {
            Finding::Together
        }
    }

    /// The heartbeat is granted now.
    pub(super) fn granted(&mut self, told: Told, now: Nanos, timing: &Timing) {
        let upper = upper(told, now);
        if self.bound.is_none_or(|bound| upper <= bound.limit(now, timing)) {
            self.bound = Some(Bound { difference: upper, at: now });
        }
        self.granted = Some(now);
    }
}

fn upper(told: Told, now: Nanos) -> i128 {
    i128::from(now) - i128::from(told.sent)
}
