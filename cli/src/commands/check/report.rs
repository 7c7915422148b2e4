//! What a diagnosis is made of, and how it looks.

use serde::Serialize;

use crate::output::human::printable;
use crate::output::lines::Lines;
use crate::output::style::Style;

/// A whole diagnosis.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// No check failed (warnings do not count).
    pub(super) ok: bool,
    groups: Vec<Group>,
}

/// Checks of one thing.
#[derive(Debug, Serialize)]
pub(super) struct Group {
    name: String,
    pub(super) checks: Vec<Check>,
}

/// One check.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    name: String,
    pub(super) result: Outcome,
    /// What was found.
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    hint: String,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    /// As it should be.
    Ok,
    /// Works, but somebody should look.
    Warning,
    /// Does not work.
    Failed,
}

impl Check {
    pub(super) fn ok(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), result: Outcome::Ok, detail: detail.into(), hint: String::new() }
    }

    pub(super) fn warning(name: impl Into<String>, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name: name.into(), result: Outcome::Warning, detail: detail.into(), hint: hint.into() }
    }

    pub(super) fn failed(name: impl Into<String>, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name: name.into(), result: Outcome::Failed, detail: detail.into(), hint: hint.into() }
    }

    /// Good or failed, by a condition.
    pub(super) fn require(name: &str, good: bool, detail: impl Into<String>, hint: &str) -> Self {
        if good { Self::ok(name, detail) } else { Self::failed(name, detail, hint) }
    }

    fn text(&self, style: Style, text: &mut Lines) {
        let mark = match self.result {
            Outcome::Ok => style.green("✓"),
            Outcome::Warning => style.yellow("!"),
            Outcome::Failed => style.red("✗"),
        };
        let detail = if self.detail.is_empty() { String::new() } else { format!(": {}", printable(&self.detail)) };
        text.push(format_args!("  {mark} {}{detail}", printable(&self.name)));
        if !self.hint.is_empty() {
            text.push(format_args!("    hint: {}", printable(&self.hint)));
        }
    }
}

impl Group {
    pub(super) fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), checks: Vec::new() }
    }

    pub(super) fn push(&mut self, check: Check) {
        self.checks.push(check);
    }

    pub(super) fn extend(&mut self, checks: impl IntoIterator<Item = Check>) {
        self.checks.extend(checks);
    }
}

impl Report {
    pub(super) fn new(groups: Vec<Group>) -> Self {
        let ok = !groups.iter().flat_map(|group| &group.checks).any(|check| check.result == Outcome::Failed);
        Self { ok, groups }
    }

    /// For people.
    pub(super) fn text(&self, style: Style) -> String {
        let mut text = Lines::default();
        for group in &self.groups {
            text.push(style.bold(&printable(&group.name)));
            group.checks.iter().for_each(|check| check.text(style, &mut text));
            text.push("");
        }
        let count = |outcome| {
            self.groups.iter().flat_map(|group| &group.checks).filter(|check| check.result == outcome).count()
        };
        let (failed, warnings) = (count(Outcome::Failed), count(Outcome::Warning));
        let verdict =
            if self.ok { style.green("the cluster is in order") } else { style.red("the cluster is NOT in order") };
        text.push(format_args!("{verdict}: {} ok, {warnings} warnings, {failed} failed", count(Outcome::Ok)));
        text.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_every_kind_of_check() {
        let mut group = Group::new("node a");
        group.push(Check::ok("is active", "lease left 2.8 s"));
        group.push(Check::warning("firewall was left alone", "2 repairs", "see the node's log"));
        assert!(Report::new(vec![group]).ok, "a warning is no failure");
        let mut group = Group::new("node a");
        group.push(Check::ok("is active", ""));
        group.push(Check::failed("proxy is ready", "", "look at \x1b the log"));
        let report = Report::new(vec![group]);
        let expected = "\
node a
  ✓ is active
  ✗ proxy is ready
    hint: look at \\u{1b} the log

the cluster is NOT in order: 1 ok, 0 warnings, 1 failed
";
        assert_eq!(report.text(Style::PLAIN), expected);
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["ok"], false);
        assert_eq!(json["groups"][0]["checks"][1]["result"], "failed");
    }
}
