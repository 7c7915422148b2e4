//! The clocks of this host.

use opencluster_policy::lease::Clocks;
use rustix::time::{ClockId, Timespec, clock_gettime};

/// Nanoseconds of CLOCK_BOOTTIME: the clock that leases are counted in. It goes on while the host sleeps.
pub(crate) fn boottime() -> u64 {
    nanoseconds(clock_gettime(ClockId::Boottime))
}

/// Nanoseconds since the epoch.
pub(crate) fn realtime() -> u64 {
    nanoseconds(clock_gettime(ClockId::Realtime))
}

/// All three at (nearly) the same moment.
pub(crate) fn now() -> Clocks {
    Clocks {
        monotonic_raw: nanoseconds(clock_gettime(ClockId::MonotonicRaw)),
        boottime: boottime(),
        realtime: realtime(),
    }
}

fn nanoseconds(time: Timespec) -> u64 {
    // None of these clocks is negative on a running host; a clock set before 1970 counts as 1970.
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}
