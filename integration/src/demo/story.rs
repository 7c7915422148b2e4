//! What is told on the terminal, and what goes into the report.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, bail};
use serde::Serialize;

/// One claim, and whether it was observed.
#[derive(Clone, Debug, Serialize)]
struct Check {
    id: String,
    ok: bool,
    detail: String,
    /// When, from the beginning.
    seconds: f64,
    #[serde(skip)]
    claim: String,
}

#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    seconds: f64,
    checks: &'a [Check],
}

/// The story as it is being told.
pub(crate) struct Story {
    directory: PathBuf,
    checks: Vec<Check>,
    started: Instant,
    colours: bool,
    interrupted: Arc<AtomicBool>,
}

impl Story {
    /// Begins in an empty directory.
    pub(crate) fn begin(directory: &Path, interrupted: Arc<AtomicBool>) -> anyhow::Result<Self> {
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", directory.display()));
            }
            _ => {}
        }
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let colours = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Ok(Self { directory: directory.to_owned(), checks: Vec::new(), started: Instant::now(), colours, interrupted })
    }

    /// Where files of the story go.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// True once somebody pressed Ctrl-C.
    pub(crate) fn interruption(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.interrupted)
    }

    /// A new chapter.
    pub(crate) fn chapter(&self, title: &str) {
        self.print(&format!("\n{}", self.coloured("1", title)));
    }

    /// Something worth knowing that is no claim.
    pub(crate) fn note(&self, text: &str) {
        self.print(&if text.is_empty() { String::new() } else { format!("  {}", self.coloured("2", text)) });
    }

    /// A claim: observed, or not. The story goes on either way, unless it was interrupted.
    pub(crate) fn check(
        &mut self,
        id: &str,
        claim: &str,
        observe: impl FnOnce() -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        let outcome = observe();
        if self.interrupted.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        match outcome {
            Ok(detail) => self.record(id, true, claim, detail),
            Err(error) => self.record(id, false, claim, format!("{error:#}")),
        }
        Ok(())
    }

    /// Something that is not a claim went wrong.
    pub(crate) fn fail(&mut self, id: &str, why: &str) {
        self.record(id, false, "the story could not be told to its end", why.to_owned());
    }

    fn record(&mut self, id: &str, ok: bool, claim: &str, detail: String) {
        let mark = if ok { self.coloured("32", "✓") } else { self.coloured("31", "✗") };
        self.print(&format!("  {mark} {claim}: {detail}"));
        let (id, claim, seconds) = (id.to_owned(), claim.to_owned(), self.started.elapsed().as_secs_f64());
        self.checks.push(Check { id, ok, detail, seconds, claim });
    }

    /// The summary and the report: true if everything was observed.
    pub(crate) fn end(&self) -> anyhow::Result<bool> {
        let ok = !self.checks.is_empty() && self.checks.iter().all(|check| check.ok);
        let seconds = self.started.elapsed().as_secs_f64();
        self.chapter("Summary");
        for Check { ok, claim, detail, .. } in &self.checks {
            let (mark, colour) = if *ok { ("✓", "32") } else { ("✗", "31") };
            self.print(&format!("  {} {claim:<66} {}", self.coloured(colour, mark), shortened(detail)));
        }
        let report = Report { ok, seconds: (seconds * 10.0).round() / 10.0, checks: &self.checks };
        let path = self.directory.join("report.json");
        fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
        let observed = self.checks.iter().filter(|check| check.ok).count();
        let verdict = format!("{observed} of {} claims observed in {seconds:.0} s", self.checks.len());
        self.print(&format!("\n{}  {}", self.coloured(if ok { "1;32" } else { "1;31" }, &verdict), path.display()));
        Ok(ok)
    }

    fn coloured(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A reader that went away does not end the story: the report is still to be written.
    fn print(&self, line: &str) {
        let mut out = io::stdout().lock();
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            self.interrupted.store(true, Ordering::Relaxed);
        }
    }
}

fn shortened(text: &str) -> String {
    let first = text.lines().next().unwrap_or_default();
    if first.chars().count() <= 70 { first.to_owned() } else { first.chars().take(69).chain(['…']).collect() }
}
