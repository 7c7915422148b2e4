//! Documents from files and standard input: read, checked before anything is sent, and their faults shown in place.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use opencluster_api::rest::FieldProblem;
use opencluster_policy::resource::{Fault, Faults, Resource};
use serde::Serialize;

use crate::error::CliError;
use crate::output::human::{printable, shortened};
use crate::output::lines::Lines;
use crate::output::style::Style;

/// The controller takes no more than this in one request.
const MAX_BYTES: u64 = 4 * 1024 * 1024;

/// What separates the files in a request.
const SEPARATOR: &str = "---\n";

/// All documents of one command.
#[derive(Debug)]
pub(crate) struct Documents {
    /// What they say.
    pub(crate) resources: Vec<Resource>,
    /// The text that is sent.
    pub(crate) text: String,
    sources: Vec<Source>,
}

/// One file's share of the text.
#[derive(Debug)]
struct Source {
    name: String,
    /// The line of the joined text (from 0) where it begins.
    first_line: usize,
    lines: usize,
    /// The number of the first document in it, from 0.
    first_document: usize,
}

/// One fault, with its place in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct SourceFault {
    /// The file's name; `-` for standard input.
    pub(crate) file: String,
    /// From 1; 0 where unknown.
    pub(crate) line: usize,
    /// From 1; 0 where unknown.
    pub(crate) column: usize,
    /// For example `spec.ports[0].port`; empty where unknown.
    pub(crate) field: String,
    /// What is wrong and what would be right.
    pub(crate) message: String,
    #[serde(skip)]
    source_line: String,
}

impl Documents {
    /// Reads and checks files; `-` is standard input.
    pub(crate) fn read(paths: &[PathBuf]) -> Result<Self, CliError> {
        let texts = paths.iter().map(|path| Ok((path.display().to_string(), read(path)?)));
        Self::parse(texts.collect::<Result<_, CliError>>()?)
    }

    fn parse(texts: Vec<(String, String)>) -> Result<Self, CliError> {
        let mut documents = Self { resources: Vec::new(), text: String::new(), sources: Vec::new() };
        let mut faults = Vec::new();
        for (name, text) in texts {
            if !documents.text.is_empty() {
                documents.text.push_str(SEPARATOR);
            }
            documents.sources.push(Source {
                name,
                first_line: documents.text.lines().count(),
                lines: text.lines().count(),
                first_document: documents.resources.len(),
            });
            documents.text.push_str(&text);
            if !text.is_empty() && !text.ends_with('\n') {
                documents.text.push('\n');
            }
            match Resource::parse_documents(&text) {
                Ok(resources) => documents.resources.extend(resources),
                Err(found) => faults.extend(found.0.into_iter().map(|fault| documents.local(fault))),
            }
        }
        if !faults.is_empty() {
            return Err(CliError::Documents(faults));
        }
        if documents.resources.is_empty() {
            let names: Vec<_> = documents.sources.iter().map(|source| source.name.as_str()).collect();
            return Err(CliError::failed(
                format!("no documents in {}", names.join(", ")),
                "a document begins with `apiVersion: opencluster/v1`; see: opencluster explain policy",
            ));
        }
        Ok(documents)
    }

    /// Where the faults that the controller found in [`Self::text`] are in the files. What it found wrong between
    /// resources has no line yet: the field has.
    pub(crate) fn locate(&self, problems: Vec<FieldProblem>) -> Vec<SourceFault> {
        let fault =
            |FieldProblem { document, field, line, column, message }| Fault { document, field, line, column, message };
        let mut faults = Faults(problems.into_iter().map(fault).collect());
        faults.locate(&self.text);
        faults.0.into_iter().map(|fault| self.place(fault)).collect()
    }

    /// A fault of the file that was added last.
    fn local(&self, fault: Fault) -> SourceFault {
        let (first_line, first_document) =
            self.sources.last().map_or((0, 0), |source| (source.first_line, source.first_document));
        let line = if fault.line == 0 { 0 } else { fault.line + first_line };
        self.place(Fault { document: fault.document + first_document, line, ..fault })
    }

    /// By line where there is one, else by document.
    fn place(&self, fault: Fault) -> SourceFault {
        let holds_line = |source: &&Source| fault.line > source.first_line;
        let holds_document = |source: &&Source| fault.document >= source.first_document;
        let source = if fault.line > 0 {
            self.sources.iter().rfind(holds_line)
        } else {
            self.sources.iter().rfind(holds_document)
        };
        let (file, first_line, lines) =
            source.map_or((String::new(), 0, 0), |source| (source.name.clone(), source.first_line, source.lines));
        // A fault at the very end of a text may be one line behind its last.
        let line = if fault.line == 0 { 0 } else { (fault.line - first_line).min(lines.max(1)) };
        let source_line = self.text.lines().nth(fault.line.wrapping_sub(1)).unwrap_or_default().to_owned();
        SourceFault { file, line, column: fault.column, field: fault.field, message: fault.message, source_line }
    }
}

impl SourceFault {
    /// The fault, its place, the line in question and a caret under it.
    pub(crate) fn render(&self, style: Style, text: &mut Lines) {
        let field = if self.field.is_empty() { String::new() } else { format!("{}: ", printable(&self.field)) };
        text.push(format_args!("{}: {field}{}", style.red("error"), printable(&self.message)));
        if self.line == 0 {
            text.push(format_args!("  --> {}", printable(&self.file)));
            return;
        }
        text.push(format_args!("  --> {}:{}:{}", printable(&self.file), self.line, self.column.max(1)));
        let number = self.line.to_string();
        let margin = " ".repeat(number.len());
        // Tabs and other control characters get wider when they are made visible: so must the way to the caret.
        let before: String = self.source_line.chars().take(self.column.saturating_sub(1)).collect();
        let indent = " ".repeat(printable(&before).chars().count());
        let line = shortened(printable(&self.source_line).trim_end(), 160);
        text.push(format_args!(" {margin} |"));
        text.push(format_args!(" {number} | {line}"));
        if self.column > 0 && indent.len() <= 160 {
            text.push(format_args!(" {margin} | {indent}{}", style.red("^")));
        }
    }
}

fn read(path: &Path) -> Result<String, CliError> {
    let failed = |source| CliError::File { action: "read", path: path.to_owned(), source };
    let mut bytes = Vec::new();
    if path == Path::new("-") {
        io::stdin().lock().take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)).map_err(failed)?;
    }
    if bytes.len() as u64 > MAX_BYTES {
        return Err(CliError::failed(
            format!("{} is larger than 4 MiB", path.display()),
            "apply it in parts: one apply is one transaction, and is limited",
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let bytes = error.as_bytes();
        let valid = &bytes[..error.utf8_error().valid_up_to()];
        let line = String::from_utf8_lossy(valid).matches('\n').count() + 1;
        CliError::failed(format!("{}:{line}: this is not UTF-8 text", path.display()), "")
    })
}
