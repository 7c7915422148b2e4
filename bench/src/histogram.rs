//! Latencies, kept in a high dynamic range histogram (3 digits, 1 ns to 60 s).
//!
//! **Coordinated omission.** A generator that waits for an answer before it sends the next request sends nothing while
//! the system stalls, and so records one bad latency where a user would have seen hundreds. The fixed-rate scenario
//! therefore fixes the moment at which every request *should* leave before the run starts ([`Schedule`]), and counts
//! latency from that moment, whether or not the connection was free. Requests still unanswered at the end are recorded
//! with the time that they have waited so far. Closed-loop scenarios (rr, crr) ask a different question, how fast can
//! it go with N users who wait, and need no correction.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::error::BenchError;

const HIGHEST_NS: u64 = 60_000_000_000;

/// A histogram of latencies in nanoseconds.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

impl Latencies {
    /// An empty histogram.
    pub fn new() -> Result<Self, BenchError> {
        Histogram::new_with_bounds(1, HIGHEST_NS, 3).map(Self).map_err(|e| BenchError::Histogram(e.to_string()))
    }

    /// Records one latency; anything above a minute counts as a minute.
    pub fn record(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(HIGHEST_NS).max(1));
    }

    /// How many latencies were recorded.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The latency in microseconds below which the share `quantile` (0 to 1) lies.
    pub fn quantile_us(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1000.0
    }

    /// The non-empty buckets as (nanoseconds, count), for the way between processes.
    pub fn buckets(&self) -> Vec<(u64, u64)> {
        self.0.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect()
    }

    /// Adds buckets that another process counted.
    pub fn add_buckets(&mut self, buckets: &[(u64, u64)]) -> Result<(), BenchError> {
        for &(value, count) in buckets {
            self.0.record_n(value.clamp(1, HIGHEST_NS), count).map_err(|e| BenchError::Histogram(e.to_string()))?;
        }
        Ok(())
    }

    /// Points of the cumulative distribution, (share, microseconds), denser towards the tail.
    pub fn cdf(&self) -> Vec<(f64, f64)> {
        if self.count() == 0 {
            return Vec::new();
        }
        let body = (0..=49).map(|i| f64::from(i) * 0.02);
        let quantiles = body.chain([0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999]);
        quantiles.map(|q| (q, self.quantile_us(q))).collect()
    }
}

/// The moments at which the requests of a fixed-rate run should leave.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    start: Instant,
    rate: u32,
    total: u64,
}

impl Schedule {
    /// `rate` requests a second from `start` on, for `length`.
    pub fn new(start: Instant, rate: u32, length: Duration) -> Self {
        let rate = rate.max(1);
        Self { start, rate, total: (length.as_secs_f64() * f64::from(rate)).floor() as u64 }
    }

    /// How many requests there are.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// When request `index` should leave. Computed from the start each time, so that rounding never adds up to drift.
    pub fn intended(&self, index: u64) -> Instant {
        let rate = u64::from(self.rate);
        let nanos = (index % rate) * 1_000_000_000 / rate;
        self.start + Duration::from_secs(index / rate) + Duration::from_nanos(nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_known_distribution() {
        let mut l = Latencies::new().unwrap();
        for us in 1..=1000 {
            l.record(Duration::from_micros(us));
        }
        assert_eq!(l.count(), 1000);
        assert!((l.quantile_us(0.5) - 500.0).abs() < 1.0, "{}", l.quantile_us(0.5));
        assert!((l.quantile_us(0.99) - 990.0).abs() < 1.5, "{}", l.quantile_us(0.99));
    }

    #[test]
    fn buckets_survive_the_way_between_processes() {
        let mut a = Latencies::new().unwrap();
        for us in [3, 70, 70, 900, 120_000] {
            a.record(Duration::from_micros(us));
        }
        let mut b = Latencies::new().unwrap();
        b.add_buckets(&a.buckets()).unwrap();
        assert_eq!(b.count(), 5);
        for q in [0.1, 0.5, 0.99] {
            let (left, right) = (a.quantile_us(q), b.quantile_us(q));
            assert!((left - right).abs() <= left * 0.002, "{q}: {left} {right}");
        }
    }

    #[test]
    fn the_schedule_has_no_drift() {
        let start = Instant::now();
        // 3 a second does not divide a second: every third request must still fall on a whole second.
        let s = Schedule::new(start, 3, Duration::from_secs(1000));
        assert_eq!(s.total(), 3000);
        assert_eq!(s.intended(2997), start + Duration::from_secs(999));
        assert_eq!(s.intended(1), start + Duration::from_nanos(333_333_333));
    }

    #[test]
    fn the_cdf_is_monotone_and_ends_in_the_tail() {
        let mut l = Latencies::new().unwrap();
        for us in 1..=10_000 {
            l.record(Duration::from_micros(us));
        }
        let cdf = l.cdf();
        assert!(cdf.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1));
        assert!(cdf.last().unwrap().0 >= 0.9999);
    }

    proptest::proptest! {
        #[test]
        fn intended_times_never_go_back(rate in 1u32..2_000_000, index in 0u64..10_000_000) {
            let s = Schedule::new(Instant::now(), rate, Duration::from_secs(1));
            proptest::prop_assert!(s.intended(index) <= s.intended(index + 1));
        }
    }
}
