//! Text that is made line by line.

use std::fmt::Display;

/// Lines, each with its newline.
#[derive(Debug, Default)]
pub(crate) struct Lines(String);

impl Lines {
    /// Adds a line.
    pub(crate) fn push(&mut self, line: impl Display) {
        self.0.push_str(&line.to_string());
        self.0.push('\n');
    }

    /// Adds lines, indented by this many spaces.
    pub(crate) fn push_indented(&mut self, lines: &str, indent: usize) {
        lines.lines().for_each(|line| self.push(format_args!("{:indent$}{line}", "")));
    }

    /// The text.
    pub(crate) fn text(self) -> String {
        self.0
    }
}
