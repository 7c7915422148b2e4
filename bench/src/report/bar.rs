//! The bar: what `us` must reach against the better of haproxy and stunnel in the same run.

use std::cmp::Ordering;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::runner::{Results, Settings};
use crate::stats::{Ratio, median};

struct Rule {
    scenario: &'static str,
    figure: &'static str,
    claim: Claim,
}

enum Claim {
    /// Higher is better, and the median ratio is at least this.
    AtLeast(f64),
    /// Lower is better, and that the peer is the lower one is not shown: an interval that lies above 1 refutes it, not a
    /// median, or two contenders that are equally good would fail every second run.
    NoWorse,
}

const RULES: [Rule; 4] = [
    Rule { scenario: "rr-16", figure: "rate", claim: Claim::AtLeast(1.3) },
    Rule { scenario: "stream-4", figure: "gbit_s", claim: Claim::AtLeast(1.2) },
    Rule { scenario: "crr-8", figure: "rate", claim: Claim::AtLeast(3.0) },
    Rule { scenario: "fixed-4k", figure: "p99_us", claim: Claim::NoWorse },
];

impl Claim {
    fn is_met(&self, ratio: &Ratio) -> bool {
        match self {
            Self::AtLeast(need) => ratio.ratio >= *need,
            Self::NoWorse => ratio.ci95[0] <= 1.0,
        }
    }

    /// Orders figures: the better one is the greater.
    fn compare(&self, a: f64, b: f64) -> Ordering {
        match self {
            Self::AtLeast(_) => a.total_cmp(&b),
            Self::NoWorse => b.total_cmp(&a),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::AtLeast(need) => format!("≥ {need:.2}×"),
            Self::NoWorse => "no worse".into(),
        }
    }
}

const PEERS: [&str; 2] = ["haproxy", "stunnel"];

/// One row of the bar.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The scenario.
    pub scenario: String,
    /// The figure.
    pub figure: String,
    /// What is needed, as text: `≥ 1.30×`.
    pub need: String,
    /// The better peer, if one was measured.
    pub peer: Option<String>,
    /// `us` over that peer.
    pub measured: Option<Ratio>,
    /// Whether it is met; none when this run was not asked to measure it.
    pub met: Option<bool>,
    /// Why there is no verdict, or why it is "not met" without a ratio.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Judges every rule. Whoever is to be *better* shows it by the median ratio; the interval beside it says how sure that is.
pub fn evaluate(settings: &Settings, results: &Results) -> Vec<Row> {
    RULES.iter().map(|rule| row(rule, settings, results)).collect()
}

fn row(rule: &Rule, settings: &Settings, results: &Results) -> Row {
    let mut row = Row {
        scenario: rule.scenario.into(),
        figure: rule.figure.into(),
        need: rule.claim.text(),
        peer: None,
        measured: None,
        met: None,
        note: None,
    };
    let asked = |names: &[String], name: &str| names.iter().any(|n| n == name);
    if !asked(&settings.scenarios, rule.scenario)
        || !asked(&settings.contenders, "us")
        || !PEERS.iter().any(|peer| asked(&settings.contenders, peer))
    {
        row.note = Some("not part of this run".into());
        return row;
    }
    let figure = |contender: &str| {
        let rounds = results.get(rule.scenario, contender)?.rounds(rule.figure);
        median(&rounds.into_iter().flatten().collect::<Vec<_>>())
    };
    let best =
        PEERS.into_iter().filter_map(|p| Some((p, figure(p)?))).max_by(|(_, a), (_, b)| rule.claim.compare(*a, *b));
    let Some((peer, _)) = best else {
        row.met = Some(false);
        row.note = Some("neither haproxy nor stunnel could be measured".into());
        return row;
    };
    row.peer = Some(peer.into());
    row.measured = results.ratio(rule.scenario, rule.figure, "us", peer);
    row.met = Some(row.measured.as_ref().is_some_and(|ratio| rule.claim.is_met(ratio)));
    if row.measured.is_none() {
        row.note = Some("us could not be measured".into());
    }
    row
}

/// The bar as a table of text.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "| scenario | figure | needed | measured (95 % interval) | against | met |\n|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let measured = row.measured.as_ref().map_or_else(
            || row.note.clone().unwrap_or_default(),
            |r| format!("{:.2}× ({:.2}–{:.2})", r.ratio, r.ci95[0], r.ci95[1]),
        );
        let met = match row.met {
            Some(true) => "yes",
            Some(false) => "**NO**",
            None => "–",
        };
        let peer = row.peer.as_deref().unwrap_or("–");
        // Writing to a String cannot fail.
        writeln!(out, "| {} | {} | {} | {measured} | {peer} | {met} |", row.scenario, row.figure, row.need)
            .unwrap_or_default();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::test_support::results;

    fn verdicts(data: &[(&str, &str, &'static str, &[f64])]) -> Vec<(String, Option<bool>)> {
        let (settings, results) = results(data);
        evaluate(&settings, &results).into_iter().map(|r| (r.scenario, r.met)).collect()
    }

    fn verdict(data: &[(&str, &str, &'static str, &[f64])], scenario: &str) -> Option<bool> {
        verdicts(data).into_iter().find(|(s, _)| s == scenario).unwrap().1
    }

    #[test]
    fn r37_the_better_of_the_peers_is_the_measure() {
        let data = |us: f64| {
            vec![("rr-16", "us", vec![us]), ("rr-16", "haproxy", vec![100.0]), ("rr-16", "stunnel", vec![120.0])]
        };
        let judge = |us: f64| {
            let owned = data(us);
            let borrowed: Vec<_> = owned.iter().map(|(s, c, v)| (*s, *c, "rate", v.as_slice())).collect();
            verdict(&borrowed, "rr-16")
        };
        assert_eq!(judge(156.0), Some(true), "1.3 times stunnel");
        assert_eq!(judge(150.0), Some(false), "1.5 times haproxy, but only 1.25 times stunnel");
    }

    #[test]
    fn r37_for_latency_the_lower_peer_is_the_better_one() {
        let judge = |us: &[f64]| {
            verdict(
                &[
                    ("fixed-4k", "us", "p99_us", us),
                    ("fixed-4k", "haproxy", "p99_us", &[300.0]),
                    ("fixed-4k", "stunnel", "p99_us", &[500.0]),
                ],
                "fixed-4k",
            )
        };
        assert_eq!(judge(&[300.0]), Some(true));
        assert_eq!(judge(&[301.0]), Some(false), "worse than haproxy, if better than stunnel");
    }

    #[test]
    fn r37_no_worse_is_refuted_by_an_interval_that_lies_above_and_not_by_a_noisy_median() {
        let judge = |us: &[f64]| {
            verdict(
                &[
                    ("fixed-4k", "us", "p99_us", us),
                    ("fixed-4k", "haproxy", "p99_us", &[300.0, 900.0, 310.0, 1500.0, 305.0, 400.0, 320.0]),
                ],
                "fixed-4k",
            )
        };
        assert_eq!(judge(&[350.0, 320.0, 1400.0, 290.0, 800.0, 330.0, 310.0]), Some(true), "as noisy, as good");
        assert_eq!(judge(&[450.0, 1350.0, 470.0, 2300.0, 460.0, 600.0, 480.0]), Some(false), "half as much again");
    }

    #[test]
    fn what_was_asked_for_but_not_measured_is_not_met_and_what_was_not_asked_for_is_open() {
        let (mut settings, results) = results(&[("crr-8", "us", "rate", &[1.0])]);
        settings.contenders = vec!["us".into(), "haproxy".into()];
        let rows = evaluate(&settings, &results);
        let of = |s: &str| rows.iter().find(|r| r.scenario == s).unwrap().met;
        assert_eq!(of("crr-8"), Some(false), "haproxy was asked for and is missing");
        assert_eq!(of("rr-16"), None);
        settings.contenders = vec!["us".into()];
        assert_eq!(evaluate(&settings, &results).iter().find(|r| r.scenario == "crr-8").unwrap().met, None);
        assert!(table(&rows).contains("**NO**"));
    }
}
