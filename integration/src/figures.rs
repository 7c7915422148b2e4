//! Figures that tests have measured, in `target/bench/report.json` under `failclosed`, beside what `make bench` measures.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde_json::{Map, Value};

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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_was_measured_is_replaced() {
        let before = json!({"ok": true, "failclosed": {"cut": 1, "machines": []}});
        let after = with(before, "machines", json!([7])).expect("a report");
        assert_eq!(after, json!({"ok": true, "failclosed": {"cut": 1, "machines": [7]}}));
        assert_eq!(with(json!({}), "cut", json!(2)), Some(json!({"failclosed": {"cut": 2}})));
        assert_eq!(with(json!([]), "cut", json!(2)), None);
    }
}
