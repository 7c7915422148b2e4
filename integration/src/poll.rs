//! Waiting for something to become true, with a deadline: the only way in which the rig waits.

use std::time::{Duration, Instant};

/// Asks `probe` every few milliseconds until it answers with something or `limit` has passed.
pub fn until<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(answer) = probe() {
            return Some(answer);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        pause_for(pause.min(left));
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Like [`until`], for a condition.
pub fn until_true(limit: Duration, mut probe: impl FnMut() -> bool) -> bool {
    until(limit, || probe().then_some(())).is_some()
}

/// Whether `condition` held at every look for `span`: for what must *not* happen.
pub fn holds_for(span: Duration, mut condition: impl FnMut() -> bool) -> bool {
    until(span, || (!condition()).then_some(())).is_none()
}

#[expect(clippy::disallowed_methods, reason = "between two looks of a poll, in programs without a runtime")]
fn pause_for(span: Duration) {
    std::thread::sleep(span);
}
