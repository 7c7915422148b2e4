//! What commands print: tables for people, JSON and YAML for programs.

pub(crate) mod human;
pub(crate) mod lines;
pub(crate) mod style;
pub(crate) mod table;

use std::io::{self, Write};

use clap::ValueEnum;
use opencluster_policy::resource::yaml_of;
use serde::Serialize;

use self::style::Style;

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns for people.
    #[default]
    Table,
    /// For programs.
    Json,
    /// For people who edit it and apply it again.
    Yaml,
}

/// Where results go.
pub(crate) struct Printer<'a> {
    /// What the operator asked for.
    pub(crate) format: Format,
    /// Colours, where the output is a terminal.
    pub(crate) style: Style,
    out: &'a mut dyn Write,
    notes: &'a mut dyn Write,
}

impl<'a> Printer<'a> {
    /// Prints results to `out` and remarks that are no result to `notes` (standard error).
    pub(crate) fn new(format: Format, style: Style, out: &'a mut dyn Write, notes: &'a mut dyn Write) -> Self {
        Self { format, style, out, notes }
    }

    /// Prints `value` for programs, or what `table` makes of it for people.
    pub(crate) fn print<T: Serialize>(&mut self, value: &T, table: impl FnOnce(&T, Style) -> String) -> io::Result<()> {
        match self.format {
            Format::Table => self.text(&table(value, self.style)),
            Format::Json => self.json(value),
            Format::Yaml => {
                let value = serde_json::to_value(value)?;
                self.text(&yaml_of(&value))
            }
        }
    }

    /// Prints one JSON document, indented.
    pub(crate) fn json<T: Serialize>(&mut self, value: &T) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut self.out, value)?;
        self.out.write_all(b"\n")
    }

    /// Prints one JSON document on one line and flushes it: for streams.
    pub(crate) fn json_line<T: Serialize>(&mut self, value: &T) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, value)?;
        self.out.write_all(b"\n")?;
        self.out.flush()
    }

    /// Prints text as it is, with a newline at its end, and flushes it.
    pub(crate) fn text(&mut self, text: &str) -> io::Result<()> {
        self.out.write_all(text.as_bytes())?;
        if !text.is_empty() && !text.ends_with('\n') {
            self.out.write_all(b"\n")?;
        }
        self.out.flush()
    }

    /// A remark for people beside the result: to standard error, and only when a person reads.
    pub(crate) fn note(&mut self, text: &str) -> io::Result<()> {
        if self.format == Format::Table {
            writeln!(self.notes, "{text}")?;
        }
        Ok(())
    }
}
