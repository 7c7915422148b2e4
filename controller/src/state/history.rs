//! The last changes of resources, for those who watch. Bounded: who falls behind it lists again.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use opencluster_api::rest::WatchEvent;

/// How many changes are kept.
const CAPACITY: usize = 4096;

/// See the module.
#[derive(Debug)]
pub struct History(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    /// Changes after this version are all here.
    complete_after: u64,
    events: VecDeque<Arc<WatchEvent>>,
}

/// The wanted changes are no longer kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone {
    /// Changes after this version are kept.
    pub complete_after: u64,
}

impl History {
    /// Nothing is known of what was before `version`.
    pub fn starting_at(version: u64) -> Self {
        Self(Mutex::new(Kept { complete_after: version, events: VecDeque::new() }))
    }

    /// The first changes after `version`, at most `limit` and never part of a version only.
    pub fn after(&self, version: u64, limit: usize) -> Result<Vec<Arc<WatchEvent>>, Gone> {
        let kept = self.kept();
        if version < kept.complete_after {
            return Err(Gone { complete_after: kept.complete_after });
        }
        let start = kept.events.partition_point(|event| event.version <= version);
        let mut page: Vec<Arc<WatchEvent>> = Vec::new();
        for event in kept.events.range(start..) {
            if page.len() >= limit && page.last().is_some_and(|last| last.version != event.version) {
                break;
            }
            page.push(Arc::clone(event));
        }
        Ok(page)
    }

    /// Adds the changes of one version.
    pub(super) fn push(&self, events: impl IntoIterator<Item = WatchEvent>) {
        let mut kept = self.kept();
        kept.events.extend(events.into_iter().map(Arc::new));
        while kept.events.len() > CAPACITY {
            let Some(version) = kept.events.front().map(|event| event.version) else { break };
            // A version is kept whole or not at all.
            while kept.events.front().is_some_and(|event| event.version == version) {
                kept.events.pop_front();
            }
            kept.complete_after = version;
        }
    }

    /// Every change of it is a whole one, so a panic elsewhere has left it sound.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use opencluster_api::rest::{Action, Change};

    use super::*;

    fn events(version: u64, count: usize) -> Vec<WatchEvent> {
        (0..count)
            .map(|number| WatchEvent {
                version,
                change: Change {
                    kind: "Policy".into(),
                    namespace: "default".into(),
                    name: format!("p{number}"),
                    action: Action::Created,
                },
                object: None,
            })
            .collect()
    }

    #[test]
    fn it_gives_whole_versions_and_says_what_is_gone() {
        let history = History::starting_at(7);
        history.push(events(8, 3));
        history.push(events(9, 1));
        let versions =
            |after| history.after(after, 2).map(|page| page.iter().map(|event| event.version).collect::<Vec<_>>());
        assert_eq!(versions(6), Err(Gone { complete_after: 7 }));
        assert_eq!(versions(7), Ok(vec![8, 8, 8]));
        assert_eq!(versions(8), Ok(vec![9]));
        assert_eq!(versions(9), Ok(vec![]));

        for version in 10..20 {
            history.push(events(version, CAPACITY / 4));
        }
        let Err(Gone { complete_after }) = history.after(9, 1) else { panic!("it is bounded") };
        assert_eq!(
            history.after(complete_after, 1).expect("kept").first().map(|event| event.version),
            Some(complete_after + 1)
        );
    }
}
