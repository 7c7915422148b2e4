//! What a node owes before it gets another grant: to have applied the revocations that it was told of.

use super::{Nanos, Timing};

/// The revocation sets that one node has applied, and those that it still has to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Duty {
    /// The newest version that it acknowledged.
    applied: u64,
    /// The newest version that there is.
    newest: u64,
    /// The oldest announcement that it may not have applied yet.
    owed: Option<Owed>,
    /// When the first version after the one that is owed was announced.
    then: Option<Nanos>,
}

/// A version that must be acknowledged in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Owed {
    version: u64,
    /// The controller's CLOCK_BOOTTIME at the announcement, or before.
    since: Nanos,
}

impl Duty {
    /// A version is about to be sent to the node.
    pub(super) fn announced(&mut self, version: u64, now: Nanos) {
        if version <= self.newest {
            return;
        }
        self.newest = version;
        if version <= self.applied {
            return;
        }
        if self.owed.is_none() {
            self.owed = Some(Owed { version, since: now });
        } else if self.then.is_none() {
            self.then = Some(now);
        }
    }

    /// The node has applied a version, and with it all before.
    pub(super) fn acknowledged(&mut self, version: u64) {
        self.applied = self.applied.max(version);
        if self.owed.is_none_or(|owed| self.applied < owed.version) {
            return;
        }
        // Of the versions after it, the first announcement counts for all: rather too strict than too late.
        self.owed =
            self.then.take().filter(|_| self.applied < self.newest).map(|since| Owed { version: self.newest, since });
    }

    /// Whether an announcement is unanswered for so long that the node gets no grant.
    pub(super) fn overdue(&self, now: Nanos, timing: &Timing) -> bool {
        self.owed.is_some_and(|owed| now >= owed.since.saturating_add(timing.patience))
    }

    /// Another clock takes over: what is owed counts from now.
    pub(super) fn rebase(&mut self, now: Nanos) {
        self.owed = self.owed.map(|owed| Owed { since: now, ..owed });
        self.then = self.then.map(|_| now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: Timing = Timing { patience: 10, ..Timing::new(100, 10) };

    #[test]
    fn nothing_is_owed_before_there_is_something() {
        assert!(!Duty::default().overdue(Nanos::MAX, &TIMING));
    }

    #[test]
    fn each_announcement_has_its_own_time_limit() {
        let mut duty = Duty::default();
        duty.announced(1, 100);
        duty.announced(2, 105);
        duty.announced(3, 106);
        assert!(!duty.overdue(109, &TIMING));
        assert!(duty.overdue(110, &TIMING));
        duty.acknowledged(1);
        assert!(!duty.overdue(114, &TIMING), "2 and 3 count from the announcement of 2");
        assert!(duty.overdue(115, &TIMING));
        duty.acknowledged(2);
        assert!(duty.overdue(115, &TIMING), "3 counts from the announcement of 2 as well: never too late");
        duty.acknowledged(3);
        assert!(!duty.overdue(Nanos::MAX, &TIMING));
        duty.announced(4, 200);
        assert!(duty.overdue(210, &TIMING));
    }

    #[test]
    fn old_news_changes_nothing() {
        let mut duty = Duty::default();
        duty.acknowledged(7);
        duty.announced(5, 1);
        duty.announced(6, 2);
        assert!(!duty.overdue(Nanos::MAX, &TIMING));
        duty.announced(8, 3);
        duty.acknowledged(6);
        assert!(duty.overdue(13, &TIMING));
    }
}
