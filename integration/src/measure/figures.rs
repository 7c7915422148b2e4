//! Distributions.

use std::time::Duration;

use serde_json::{Value, json};

/// What a series of times comes to, in milliseconds.
pub(crate) fn distribution(times: &[Duration]) -> Value {
    let mut sorted: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1000.0).collect();
    sorted.sort_by(f64::total_cmp);
    let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else { return json!({"count": 0}) };
    let round = |value: f64| (value * 1000.0).round() / 1000.0;
    let at = |share: f64| round(sorted[rank(sorted.len(), share)]);
    json!({
        "count": sorted.len(), "min": round(*min), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": round(*max),
    })
}

/// The smallest rank that at least this share of all values does not exceed.
fn rank(count: usize, share: f64) -> usize {
    ((count as f64 * share).ceil() as usize).clamp(1, count) - 1
}

/// Whether the 99th percentile of every distribution of this name, anywhere in a report, is at most `bar`; there must be one.
pub(crate) fn all_below(report: &Value, name: &str, bar: f64) -> bool {
    let mut seen = Vec::new();
    collect(report, name, &mut seen);
    !seen.is_empty() && seen.iter().all(|p99| p99.is_some_and(|p99| p99 <= bar))
}

fn collect(value: &Value, name: &str, seen: &mut Vec<Option<f64>>) {
    for (key, inner) in value.as_object().into_iter().flatten() {
        if key == name {
            seen.push(inner["p99"].as_f64());
        } else {
            collect(inner, name, seen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let times: Vec<_> = (1..=100).map(Duration::from_millis).collect();
        let expected = json!({"count": 100, "min": 1.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0});
        assert_eq!(distribution(&times), expected);
        assert_eq!(distribution(&times[..1])["p99"], 1.0);
        assert_eq!(distribution(&[]), json!({"count": 0}));
    }

    #[test]
    fn the_bar_is_for_every_distribution_and_there_must_be_one() {
        let report = |p99: f64| json!({"rig": {"workload": {"ack": {"p99": 1.0}}, "node": {"ack": {"p99": p99}}}});
        assert!(all_below(&report(500.0), "ack", 500.0));
        assert!(!all_below(&report(500.1), "ack", 500.0));
        assert!(!all_below(&report(1.0), "nothing", 500.0));
        assert!(!all_below(&json!({"ack": {"count": 0}}), "ack", 500.0));
    }
}
