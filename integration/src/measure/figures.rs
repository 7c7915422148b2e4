//! Bars for distributions.

use serde_json::Value;

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
    use serde_json::json;

    use super::*;

    #[test]
    fn the_bar_is_for_every_distribution_and_there_must_be_one() {
        let report = |p99: f64| json!({"rig": {"workload": {"ack": {"p99": 1.0}}, "node": {"ack": {"p99": p99}}}});
        assert!(all_below(&report(500.0), "ack", 500.0));
        assert!(!all_below(&report(500.1), "ack", 500.0));
        assert!(!all_below(&report(1.0), "nothing", 500.0));
        assert!(!all_below(&json!({"ack": {"count": 0}}), "ack", 500.0));
    }
}
