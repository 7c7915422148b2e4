//! Figures that tests have measured, in `target/bench/report.json` under `failclosed`, beside what `make bench` measures.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum FiguresError {
    /// A file operation failed.
    #[error("figures: {0}")]
    Io(#[from] io::Error),
    /// What is there is no report: it is not overwritten.
    #[error("figures: {0} is no JSON object: move it away")]
    Report(String),
}

/// The member of the report that holds these figures.
pub const SECTION: &str = "failclosed";

/// Puts figures under a name, in place of what was measured before under it. Everything else stays.
pub fn record(target: &Path, name: &str, figures: Value) -> Result<(), FiguresError> {
    let directory = target.join("bench");
    fs::create_dir_all(&directory)?;
    // Tests of several programs may end at the same time. The lock goes with the file's handle.
    let lock = File::create(directory.join("report.lock"))?;
    lock.lock()?;
    let path = directory.join("report.json");
    let report = match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(|_| FiguresError::Report(path.display().to_string()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Value::Object(Map::new()),
        Err(error) => return Err(error.into()),
    };
    let report = with(report, name, figures).ok_or_else(|| FiguresError::Report(path.display().to_string()))?;
    let new = directory.join("report.json.new");
    fs::write(&new, format!("{report:#}\n"))?;
    Ok(fs::rename(&new, &path)?)
}

fn with(mut report: Value, name: &str, figures: Value) -> Option<Value> {
    let section = report.as_object_mut()?.entry(SECTION).or_insert_with(|| Value::Object(Map::new()));
    section.as_object_mut()?.insert(name.to_owned(), figures);
    Some(report)
}

/// What a series of times comes to, in milliseconds.
pub fn distribution(times: &[Duration]) -> Value {
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
    fn only_what_was_measured_is_replaced() {
        let before = json!({"ok": true, "failclosed": {"cut": 1, "machines": []}});
        let after = with(before, "machines", json!([7])).expect("a report");
        assert_eq!(after, json!({"ok": true, "failclosed": {"cut": 1, "machines": [7]}}));
        assert_eq!(with(json!({}), "cut", json!(2)), Some(json!({"failclosed": {"cut": 2}})));
        assert_eq!(with(json!([]), "cut", json!(2)), None);
    }
}
