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

use super::Nanos;

/// A permanent step above this is a pause. The drift since the bound it is compared to comes on top.
pub(super) const STEP: i128 = 50_000_000;

/// The most that two clocks drift apart, in parts in a million: an ordinary oscillator is within 100.
const DRIFT_PPM: i128 = 500;

/// What is known of the controller's clock minus the node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Elapsed {
    /// When the last grant (or the answer to the enrolment) was made: the controller's CLOCK_MONOTONIC_RAW.
    granted: Nanos,
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
    fn limit(&self, now: Nanos) -> i128 {
        self.difference + i128::from(now.saturating_sub(self.at)) * DRIFT_PPM / 1_000_000
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

impl Elapsed {
    /// The answer to the enrolment is about to be sent.
    pub(super) fn since(now: Nanos) -> Self {
        Self { granted: now, bound: None }
    }

    /// Takes a new heartbeat, received (and granted) now, into account. Whether the node was paused.
    pub(super) fn paused(&mut self, told: Told, now: Nanos) -> bool {
        let lower = i128::from(self.granted) - i128::from(told.granted);
        let upper = i128::from(now) - i128::from(told.sent);
        let paused = self.bound.is_some_and(|bound| lower > bound.limit(now) + STEP);
        if self.bound.is_none_or(|bound| upper <= bound.limit(now)) {
            self.bound = Some(Bound { difference: upper, at: now });
        }
        self.granted = now;
        paused
    }
}
