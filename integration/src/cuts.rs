//! How long flows outlive a loss: as a distribution, where that is asked for.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use serde_json::json;

use crate::binaries::Binaries;
use crate::figures;

/// Spans between a loss and the last byte that passed, by what was lost.
#[derive(Debug, Default)]
pub struct Cuts(BTreeMap<String, Vec<Duration>>);

impl Cuts {
    /// Adds some of one kind.
    pub fn add(&mut self, what: &str, spans: &[Duration]) {
        self.0.entry(what.to_owned()).or_default().extend_from_slice(spans);
    }
}

/// Runs a test once and records nothing: a few values are no distribution. Or `CUT_ROUNDS` times, and records what it has
/// measured, with the bound that it was held to.
pub fn measured(bound: Duration, once: impl Fn(&mut Cuts) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let rounds = match std::env::var("CUT_ROUNDS") {
        Ok(rounds) => Some(rounds.parse().context("CUT_ROUNDS")?),
        Err(std::env::VarError::NotPresent) => None,
        Err(error) => return Err(error).context("CUT_ROUNDS"),
    };
    in_rounds(rounds, Binaries::locate()?.target(), bound, once)
}

fn in_rounds(
    rounds: Option<u32>,
    target: &Path,
    bound: Duration,
    once: impl Fn(&mut Cuts) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut cuts = Cuts::default();
    for _ in 0..rounds.unwrap_or(1) {
        once(&mut cuts)?;
    }
    if rounds.is_some() {
        for (what, spans) in cuts.0 {
            let report = json!({"last_byte_ms": figures::distribution(&spans), "bound_ms": bound.as_millis() as u64});
            figures::record(target, &format!("cut_{what}"), report)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn r06_only_rounds_that_were_asked_for_are_recorded() {
        let target = std::env::temp_dir().join(format!("opencluster-cuts-{}", std::process::id()));
        let once = |cuts: &mut Cuts| {
            cuts.add("cable", &[Duration::from_millis(5), Duration::from_millis(7)]);
            Ok(())
        };
        let report = target.join("bench/report.json");
        in_rounds(None, &target, Duration::from_secs(3), once).expect("once");
        assert!(!report.exists(), "a single round was recorded as a distribution");
        in_rounds(Some(4), &target, Duration::from_secs(3), once).expect("rounds");
        let report: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(report).expect("a report")).expect("JSON");
        assert_eq!(report["failclosed"]["cut_cable"]["last_byte_ms"]["count"], 8);
        assert_eq!(report["failclosed"]["cut_cable"]["bound_ms"], 3000);
        fs::remove_dir_all(&target).expect("removed");
    }
}
