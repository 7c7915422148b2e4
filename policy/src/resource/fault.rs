//! What is wrong with a text, and where.

use std::fmt;

/// More faults than this help nobody; the rest is counted.
const MAX_FAULTS: usize = 200;

/// One fault in one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which document, from 0.
    pub document: usize,
    /// For example `spec.ports[0].port`; empty where unknown.
    pub field: String,
    /// From 1; 0 where unknown.
    pub line: usize,
    /// From 1; 0 where unknown.
    pub column: usize,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Everything that is wrong with a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "document {}", self.document + 1)?;
        if !self.field.is_empty() {
            write!(f, ", {}", self.field)?;
        }
        if self.line != 0 {
            write!(f, " (line {}, column {})", self.line, self.column)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}

impl std::error::Error for Faults {}

/// Where something stands in a text; from 1, 0 where unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) line: usize,
    pub(crate) column: usize,
}

/// Where something stands in a document. Lives on the stack of the decoder: a document without faults allocates nothing.
#[derive(Clone, Copy)]
pub(crate) enum Path<'a> {
    Root,
    Field(&'a Path<'a>, &'a str),
    Item(&'a Path<'a>, usize),
}

impl Path<'_> {
    pub(crate) fn field<'a>(&'a self, name: &'a str) -> Path<'a> {
        Path::Field(self, name)
    }

    pub(crate) fn item(&self, index: usize) -> Path<'_> {
        Path::Item(self, index)
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Field(Path::Root, name) => f.write_str(name),
            Self::Field(parent, name) => write!(f, "{parent}.{name}"),
            Self::Item(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

/// Where faults go while documents are read.
#[derive(Debug, Default)]
pub(crate) struct Sink {
    faults: Vec<Fault>,
    left_out: usize,
    document: usize,
}

impl Sink {
    /// From now on, faults are of this document.
    pub(crate) fn enter_document(&mut self, document: usize) {
        self.document = document;
    }

    pub(crate) fn fault(&mut self, path: &Path<'_>, at: Position, message: impl Into<String>) {
        if self.faults.len() >= MAX_FAULTS {
            self.left_out += 1;
            return;
        }
        self.faults.push(Fault {
            document: self.document,
            field: path.to_string(),
            line: at.line,
            column: at.column,
            message: message.into(),
        });
    }

    /// The value, if nothing was wrong; `None` only ever comes with a fault.
    pub(crate) fn finish<T>(mut self, value: Option<T>) -> Result<T, Faults> {
        match value {
            Some(value) if self.faults.is_empty() => Ok(value),
            _ => {
                // Syntax is read before content: put both into the order of the text.
                self.faults.sort_by_key(|fault| (fault.document, fault.line, fault.column));
                if self.left_out > 0 {
                    let document = self.document;
                    let message = format!("{} further faults are not shown", self.left_out);
                    self.faults.push(Fault { document, field: String::new(), line: 0, column: 0, message });
                }
                Err(Faults(self.faults))
            }
        }
    }
}
