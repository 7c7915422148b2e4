//! Texts as trees in which every value knows where it stands, read under limits.
//!
//! Syntax only: what fields there may be is `schema`'s business. YAML comes from `saphyr-parser`'s event stream (it passes the
//! YAML test suite, holds no `unsafe` and does not recurse); building the tree here keeps positions and lets us refuse what
//! makes YAML dangerous: aliases (a few lines that expand to gigabytes), tags, and keys that come twice.

use std::collections::HashSet;
use std::fmt;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, StrInput};
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::fault::{Path, Position, Sink};

/// Limits of a text.
pub(super) const MAX_BYTES: usize = 4 << 20;
const MAX_DOCUMENTS: usize = 10_000;
const MAX_DEPTH: usize = 64;

/// A value and where it stands.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) at: Position,
    pub(super) value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    /// As it was written.
    Number(String),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) at: Position,
    pub(super) value: Node,
}

impl Value {
    /// For messages: "expected a list, found …".
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Null => "nothing".to_owned(),
            Self::Bool(value) => format!("the truth value `{value}`"),
            Self::Number(text) => format!("the number `{}`", excerpt(text)),
            Self::Text(text) => format!("the text `{}`", excerpt(text)),
            Self::List(_) => "a list".to_owned(),
            Self::Map(_) => "a mapping".to_owned(),
        }
    }
}

/// Enough of a text to recognize it in a message, whatever it holds.
pub(super) fn excerpt(text: &str) -> String {
    const SHOWN: usize = 64;
    let shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() { format!("{shown}…") } else { shown }
}

/// All documents of a text that are not empty; a document with faulty syntax is reported and `None`, so that those around it
/// keep their numbers.
pub(super) fn from_yaml(text: &str, sink: &mut Sink) -> Vec<Option<Node>> {
    if text.len() > MAX_BYTES {
        sink.fault(&Path::Root, Position::default(), too_large(text.len()));
        return Vec::new();
    }
    let mut documents = Vec::new();
    for (first_line, piece) in pieces(text) {
        let mut builder = Builder { parser: Parser::new_from_str(piece), first_line };
        loop {
            if documents.len() > MAX_DOCUMENTS {
                sink.fault(&Path::Root, Position::default(), format!("more than {MAX_DOCUMENTS} documents"));
                return Vec::new();
            }
            sink.enter_document(documents.len());
            match builder.next_document(sink) {
                Ok(None) => break,
                Ok(Some(Node { value: Value::Null, .. })) => {}
                Ok(Some(node)) => documents.push(Some(node)),
                Err(Refused) => {
                    documents.push(None);
                    break;
                }
            }
        }
    }
    documents
}

/// The one JSON value of `bytes`. `serde_json` tells positions for faults of syntax only.
pub(super) fn from_json(bytes: &[u8], sink: &mut Sink) -> Option<Node> {
    if bytes.len() > MAX_BYTES {
        sink.fault(&Path::Root, Position::default(), too_large(bytes.len()));
        return None;
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let parsed =
        JsonNode { depth: 0 }.deserialize(&mut deserializer).and_then(|node| deserializer.end().map(|()| node));
    parsed
        .map_err(|error| {
            let at = Position { line: error.line(), column: error.column() };
            sink.fault(&Path::Root, at, format!("not valid JSON: {error}"));
        })
        .ok()
}

fn too_large(length: usize) -> String {
    format!("{length} bytes: at most {MAX_BYTES} are read at once; apply the documents in several parts")
}

/// The text cut before each line that starts a document, with the number of lines before each piece. A fault of syntax
/// then ends one document and not all that follow. (`---` at the start of a line is a document's start wherever it stands,
/// in quotes and blocks too.)
fn pieces(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut rest = text;
    let mut lines = 0;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut end = 0;
        // Directives belong to the document that they stand before.
        let mut only_directives = true;
        for line in rest.split_inclusive('\n') {
            let starts_document = line
                .strip_prefix("---")
                .is_some_and(|after| after.is_empty() || after.starts_with([' ', '\t', '\r', '\n']));
            if starts_document && !only_directives {
                break;
            }
            only_directives &= line.starts_with('%');
            end += line.len();
        }
        let (piece, remaining) = rest.split_at(end);
        let first_line = lines;
        lines += piece.matches('\n').count();
        rest = remaining;
        Some((first_line, piece))
    })
}

/// A fault was reported: this piece of the text cannot be read further.
struct Refused;

struct Builder<'t> {
    parser: Parser<'t, StrInput<'t>>,
    first_line: usize,
}

impl<'t> Builder<'t> {
    /// The next document of this piece; `None` at its end.
    fn next_document(&mut self, sink: &mut Sink) -> Result<Option<Node>, Refused> {
        loop {
            match self.next(sink)? {
                (Event::StreamEnd, _) => return Ok(None),
                (Event::DocumentStart(_), _) => {
                    let (event, at) = self.next(sink)?;
                    return self.node(event, at, 0, sink).map(Some);
                }
                _ => {}
            }
        }
    }

    fn next(&mut self, sink: &mut Sink) -> Result<(Event<'t>, Position), Refused> {
        match self.parser.next_event() {
            Some(Ok((event, span))) => Ok((event, self.position(span.start))),
            Some(Err(error)) => Err(self.syntax(&error, sink)),
            None => Ok((Event::StreamEnd, Position::default())),
        }
    }

    fn position(&self, marker: saphyr_parser::Marker) -> Position {
        Position { line: self.first_line + marker.line(), column: marker.col() + 1 }
    }

    fn syntax(&self, error: &ScanError, sink: &mut Sink) -> Refused {
        sink.fault(&Path::Root, self.position(*error.marker()), format!("not valid YAML: {}", error.info()));
        Refused
    }

    /// The value that starts with `event`. Recursion is bounded by `MAX_DEPTH`.
    fn node(&mut self, event: Event<'t>, at: Position, depth: usize, sink: &mut Sink) -> Result<Node, Refused> {
        if depth >= MAX_DEPTH && matches!(event, Event::SequenceStart(..) | Event::MappingStart(..)) {
            sink.fault(&Path::Root, at, format!("nested more than {MAX_DEPTH} deep"));
            return Err(Refused);
        }
        let (anchor, tagged) = match &event {
            Event::Scalar(_, _, anchor, tag) | Event::SequenceStart(anchor, tag) | Event::MappingStart(anchor, tag) => {
                (*anchor, tag.is_some())
            }
            _ => (0, false),
        };
        if anchor != 0 {
            sink.fault(&Path::Root, at, "anchors (`&name`) are not accepted: write the value where it is needed");
        }
        if tagged {
            sink.fault(&Path::Root, at, "tags (`!name`) are not accepted: leave it out");
        }
        let value = match event {
            Event::Scalar(text, style, ..) => scalar(text.into_owned(), style),
            Event::SequenceStart(..) => self.list(depth, sink)?,
            Event::MappingStart(..) => self.map(depth, sink)?,
            Event::Alias(_) => {
                sink.fault(&Path::Root, at, "aliases (`*name`) are not accepted: write the value out");
                return Err(Refused);
            }
            // Values start with no other event; an empty one is a scalar.
            _ => Value::Null,
        };
        Ok(Node { at, value })
    }

    fn list(&mut self, depth: usize, sink: &mut Sink) -> Result<Value, Refused> {
        let mut items = Vec::new();
        loop {
            match self.next(sink)? {
                (Event::SequenceEnd, _) => return Ok(Value::List(items)),
                (event, at) => items.push(self.node(event, at, depth + 1, sink)?),
            }
        }
    }

    fn map(&mut self, depth: usize, sink: &mut Sink) -> Result<Value, Refused> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut names = HashSet::new();
        loop {
            let (event, at) = self.next(sink)?;
            let name = match event {
                Event::MappingEnd => return Ok(Value::Map(entries)),
                Event::Scalar(name, _, 0, None) => name.into_owned(),
                _ => {
                    sink.fault(&Path::Root, at, "a field's name must be a plain text");
                    return Err(Refused);
                }
            };
            let (event, value_at) = self.next(sink)?;
            let value = self.node(event, value_at, depth + 1, sink)?;
            if names.insert(name.clone()) {
                entries.push(Entry { name, at, value });
            } else {
                sink.fault(&Path::Root, at, twice(&name));
            }
        }
    }
}

fn twice(name: &str) -> String {
    format!("the field `{}` is given twice", excerpt(name))
}

/// A scalar by YAML 1.2's core schema.
fn scalar(text: String, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return Value::Text(text);
    }
    match text.as_str() {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ if is_number(&text) => Value::Number(text),
        _ => Value::Text(text),
    }
}

fn is_number(text: &str) -> bool {
    if let Some(digits) = text.strip_prefix("0x") {
        return !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return !digits.is_empty() && digits.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return true;
    }
    let (mantissa, exponent) = unsigned.split_once(['e', 'E']).map_or((unsigned, None), |(m, e)| (m, Some(e)));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent_fits = exponent.is_none_or(|e| {
        let e = e.strip_prefix(['+', '-']).unwrap_or(e);
        !e.is_empty() && digits(e)
    });
    (!whole.is_empty() || !fraction.is_empty()) && digits(whole) && digits(fraction) && exponent_fits
}

/// Reads JSON into a [`Node`], refusing what `serde_json::Value` would let pass: fields that come twice.
#[derive(Clone, Copy)]
struct JsonNode {
    depth: usize,
}

impl JsonNode {
    fn deeper<E: de::Error>(self) -> Result<Self, E> {
        if self.depth >= MAX_DEPTH {
            return Err(E::custom(format_args!("nested more than {MAX_DEPTH} deep")));
        }
        Ok(Self { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for JsonNode {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self).map(|value| Node { at: Position::default(), value })
    }
}

impl<'de> Visitor<'de> for JsonNode {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Number(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let seed = self.deeper()?;
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(seed)? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let seed = self.deeper()?;
        let mut entries = Vec::new();
        let mut names = HashSet::new();
        while let Some(name) = access.next_key::<String>()? {
            let value = access.next_value_seed(seed)?;
            if !names.insert(name.clone()) {
                return Err(de::Error::custom(twice(&name)));
            }
            entries.push(Entry { name, at: Position::default(), value });
        }
        Ok(Value::Map(entries))
    }
}
