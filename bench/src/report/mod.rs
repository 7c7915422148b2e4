//! The report: JSON for programs, Markdown and SVG for people, and the verdict on the bar.

pub mod bar;
pub mod flame;
mod lines;
pub mod markdown;
pub mod svg;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::BenchError;
use crate::runner::{Results, Settings};
use crate::scenario::Scenario;
use crate::stats::{Ratio, Summary, median};

/// Contenders that come first in tables and plots; the others follow in the order of the run.
const FIRST: [&str; 2] = ["direct", "us"];

/// The whole report, as in `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Whether everything that was asked for was measured and the bar is met where it applies.
    pub ok: bool,
    /// Why the run ended early, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aborted: Option<String>,
    /// Where it was measured.
    pub machine: Machine,
    /// How it was measured.
    pub settings: Settings,
    /// Versions of the contenders' programs.
    pub versions: BTreeMap<String, String>,
    /// The figures.
    pub scenarios: Vec<ScenarioReport>,
    /// The bar, row by row.
    pub bar: Vec<bar::Row>,
    /// Measurements that failed.
    pub failures: Vec<Failure>,
    /// Figures of other measurements in the same file, which a new report keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failclosed: Option<serde_json::Value>,
}

/// The machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model name of the CPU.
    pub cpu: String,
    /// Logical CPUs.
    pub cores: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// Load average of the last minute at the start: near zero on a quiet machine.
    pub load_average: f64,
}

/// One scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScenarioReport {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: String,
    /// The figures of each contender that was measured.
    pub contenders: BTreeMap<String, Figures>,
    /// `us` over each other contender, figure by figure.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ratios: BTreeMap<String, BTreeMap<String, Ratio>>,
}

/// The figures of one contender in one scenario: medians by name, beside them what they are condensed from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Medians over the rounds.
    #[serde(flatten)]
    pub medians: BTreeMap<String, f64>,
    /// Minimum, maximum, confidence interval and all rounds of every figure.
    pub spread: BTreeMap<String, Summary>,
    /// Latency distribution of all rounds together: (share, µs).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cdf_us: Vec<(f64, f64)>,
    /// Growth of its memory in bytes by the number of open flows, medians.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub memory_by_flows: Vec<(f64, f64)>,
}

/// A measurement that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The contender.
    pub contender: String,
    /// The scenario; none when the contender did not start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scenario: Option<String>,
    /// What happened.
    pub what: String,
}

impl Report {
    /// Condenses the results of a run, finished or not.
    pub fn build(settings: &Settings, machine: Machine, results: &Results, aborted: Option<String>) -> Self {
        let scenarios: Vec<ScenarioReport> =
            settings.scenarios.iter().map(|name| scenario_report(name, settings, results)).collect();
        let bar = bar::evaluate(settings, results);
        let ours_failed = results.failures.iter().any(|f| f.contender == "us");
        Self {
            ok: aborted.is_none() && !ours_failed && bar.iter().all(|row| row.met != Some(false)),
            aborted,
            machine,
            settings: settings.clone(),
            versions: results.versions.clone(),
            scenarios,
            bar,
            failures: results.failures.clone(),
            failclosed: None,
        }
    }

    /// Writes `report.json`, `report.md` and the plots into `folder`.
    pub fn write(&self, folder: &Path) -> Result<(), BenchError> {
        let save = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(BenchError::file("writing", path))
        };
        let whole = Self { failclosed: kept(&folder.join("report.json")), ..self.clone() };
        save("report.json", &(whole.to_json()? + "\n"))?;
        remove_plots(folder)?;
        let plots = svg::plots(self);
        for (name, text) in &plots {
            save(name, text)?;
        }
        save("report.md", &markdown::render(self, &plots.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>()))
    }

    /// As JSON.
    pub fn to_json(&self) -> Result<String, BenchError> {
        serde_json::to_string_pretty(self).map_err(|source| BenchError::Json { what: "the report".into(), source })
    }

    /// The contenders of the run in the order of the tables.
    fn contenders(&self) -> Vec<&str> {
        ordered(&self.settings.contenders)
    }
}

/// What another program put into the report; a report that cannot be read is replaced.
fn kept(report: &Path) -> Option<serde_json::Value> {
    let text = std::fs::read_to_string(report).ok()?;
    let mut report: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(report.get_mut("failclosed")?.take())
}

/// Removes the plots of an earlier run, which may have measured what this one did not.
fn remove_plots(folder: &Path) -> Result<(), BenchError> {
    for entry in std::fs::read_dir(folder).map_err(BenchError::file("listing", folder))? {
        let path = entry.map_err(BenchError::file("listing", folder))?.path();
        if path.file_name().and_then(|n| n.to_str()).is_some_and(svg::is_plot) {
            std::fs::remove_file(&path).map_err(BenchError::file("removing", path))?;
        }
    }
    Ok(())
}

/// Names in the order of tables and plots.
fn ordered(names: &[String]) -> Vec<&str> {
    let first = FIRST.into_iter().filter(|name| names.iter().any(|n| n == name));
    first.chain(names.iter().map(String::as_str).filter(|name| !FIRST.contains(name))).collect()
}

fn scenario_report(name: &str, settings: &Settings, results: &Results) -> ScenarioReport {
    let mut contenders = BTreeMap::new();
    let mut ratios = BTreeMap::new();
    for contender in &settings.contenders {
        let Some(measured) = results.get(name, contender) else { continue };
        let memory = measured.memory.iter().filter_map(|(flows, bytes)| Some((*flows as f64, median(bytes)?)));
        let mut figures =
            Figures { cdf_us: measured.latencies.cdf(), memory_by_flows: memory.collect(), ..Figures::default() };
        for figure in measured.figures() {
            let values: Vec<f64> = measured.rounds(figure).into_iter().flatten().collect();
            if let Some(summary) = Summary::of(&values) {
                figures.medians.insert(figure.to_owned(), summary.median);
                figures.spread.insert(figure.to_owned(), summary);
            }
        }
        let against: BTreeMap<String, Ratio> = measured
            .figures()
            .into_iter()
            .filter_map(|figure| Some((figure.to_owned(), results.ratio(name, figure, "us", contender)?)))
            .collect();
        if contender != "us" && !against.is_empty() {
            ratios.insert(contender.clone(), against);
        }
        contenders.insert(contender.clone(), figures);
    }
    let description = name.parse().map(Scenario::describe).unwrap_or_default();
    ScenarioReport { name: name.to_owned(), description, contenders, ratios }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::test_support::results;

    #[test]
    fn r37_the_report_has_the_shape_of_the_contract() {
        let (settings, results) = results(&[("rr-16", "us", "rate", &[200.0, 210.0, 190.0])]);
        let report = Report::build(&settings, Machine::default(), &results, None);
        let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
        let scenario = &json["scenarios"][0];
        assert_eq!(scenario["name"], "rr-16");
        assert_eq!(scenario["contenders"]["us"]["rate"], 200.0);
        assert_eq!(scenario["contenders"]["us"]["spread"]["rate"]["min"], 190.0);
        assert_eq!(scenario["contenders"]["us"]["spread"]["rate"]["values"].as_array().unwrap().len(), 3);
        let back: Report = serde_json::from_value(json).unwrap();
        assert_eq!(back, report);
    }

    #[test]
    fn ratios_are_of_us_over_each_other() {
        let (settings, results) = results(&[
            ("rr-16", "us", "rate", &[200.0, 220.0, 180.0]),
            ("rr-16", "haproxy", "rate", &[100.0, 110.0, 90.0]),
        ]);
        let report = Report::build(&settings, Machine::default(), &results, None);
        let ratio = &report.scenarios[0].ratios["haproxy"]["rate"];
        assert!((ratio.ratio - 2.0).abs() < 1e-9 && (ratio.ci95[0] - 2.0).abs() < 1e-9);
        assert!(!report.scenarios[0].ratios.contains_key("us"));
    }

    #[test]
    fn an_aborted_run_or_a_failure_of_ours_is_not_ok() {
        let (settings, mut results) = results(&[("rr-1", "us", "rate", &[1.0])]);
        let build = |results: &Results, aborted| Report::build(&settings, Machine::default(), results, aborted).ok;
        assert!(build(&results, None));
        assert!(!build(&results, Some("interrupted".into())));
        let failure = |contender: &str| Failure { contender: contender.into(), scenario: None, what: "x".into() };
        results.failures.push(failure("stunnel"));
        assert!(build(&results, None), "a peer's failure is noted");
        results.failures.push(failure("us"));
        assert!(!build(&results, None));
    }

    #[test]
    fn files_are_written_even_for_an_empty_run() {
        let (settings, results) = results(&[]);
        let report = Report::build(&settings, Machine::default(), &results, Some("nothing worked".into()));
        let folder = tempfile::tempdir().unwrap();
        for name in ["latency-rr-9.svg", "somebody-elses.svg"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        report.write(folder.path()).unwrap();
        let json = std::fs::read_to_string(folder.path().join("report.json")).unwrap();
        assert!(json.contains("nothing worked"));
        assert!(std::fs::read_to_string(folder.path().join("report.md")).unwrap().contains("nothing worked"));
        assert!(!folder.path().join("latency-rr-9.svg").exists(), "of another run");
        assert!(folder.path().join("somebody-elses.svg").exists());
    }
}
