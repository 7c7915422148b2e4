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
    /// The oldest verdict that is not announced yet: nobody can acknowledge it, and it counts all the same.
    unannounced: Option<Nanos>,
}

/// A version that must be acknowledged in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Owed {
    version: u64,
    /// The controller's CLOCK_BOOTTIME at the verdict, or at the announcement where that is not known.
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
        // A verdict that waited for its announcement waits no shorter for its acknowledgement.
        let since = self.unannounced.map_or(now, |verdict| verdict.min(now));
        if self.owed.is_none() {
            self.owed = Some(Owed { version, since });
        } else if self.then.is_none() {
            self.then = Some(since);
        }
    }

    /// The oldest verdict over another node that is not announced yet; `None`: all are.
    pub(super) fn unannounced(&mut self, since: Option<Nanos>) {
        self.unannounced = since;
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

    /// Whether a verdict is without the node's acknowledgement for so long that it gets no grant.
    pub(super) fn overdue(&self, now: Nanos, timing: &Timing) -> bool {
        self.held_up(now, timing)
            || [self.owed.map(|owed| owed.since), self.then]
                .into_iter()
                .flatten()
                .any(|since| timing.is_late(since, now))
    }

    /// Whether that is so because a verdict could not be announced to anybody.
    pub(super) fn held_up(&self, now: Nanos, timing: &Timing) -> bool {
        self.unannounced.is_some_and(|since| timing.is_late(since, now))
    }

    /// Another clock takes over: what is owed counts from now.
    pub(super) fn rebase(&mut self, now: Nanos) {
        self.owed = self.owed.map(|owed| Owed { since: now, ..owed });
        self.then = self.then.map(|_| now);
        self.unannounced = self.unannounced.map(|_| now);
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
    fn a_verdict_counts_from_when_it_was_made_and_not_from_its_announcement() {
        let mut duty = Duty::default();
        duty.unannounced(Some(100));
        assert!(!duty.overdue(109, &TIMING));
        assert!(duty.overdue(110, &TIMING) && duty.held_up(110, &TIMING), "nobody can have applied it");
        duty.announced(1, 107);
        duty.unannounced(None);
        assert!(!duty.held_up(110, &TIMING));
        assert!(duty.overdue(110, &TIMING), "that it waited for its announcement does not make it newer");
        duty.acknowledged(1);
        assert!(!duty.overdue(Nanos::MAX, &TIMING));
        duty.announced(2, 200);
        duty.unannounced(Some(195));
        duty.announced(3, 203);
        duty.unannounced(None);
        assert!(duty.overdue(205, &TIMING), "also when something newer was announced before it");
        duty.acknowledged(3);
        assert!(!duty.overdue(Nanos::MAX, &TIMING));
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
