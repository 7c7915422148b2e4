//! From trees to values, collecting every fault instead of stopping at the first.
//!
//! Each function returns `None` only after it has reported a fault; callers go on with the fields beside it.

use std::collections::HashMap;
use std::hash::Hash;
use std::str::FromStr;

use super::fault::{Path, Sink};
use super::suggest;
use super::tree::{Entry, Node, Value, excerpt};

/// The fields of a mapping.
pub(super) struct Fields<'t, 'p> {
    node: &'t Node,
    path: &'p Path<'p>,
    entries: &'t [Entry],
}

impl<'t, 'p> Fields<'t, 'p> {
    /// The node as a mapping with none but these fields. Unknown ones are reported and passed over.
    pub(super) fn open(node: &'t Node, path: &'p Path<'p>, known: &[&str], sink: &mut Sink) -> Option<Self> {
        let Value::Map(entries) = &node.value else {
            let expected = known.join(", ");
            sink.fault(path, node.at, format!("expected a mapping ({expected}), found {}", node.value.describe()));
            return None;
        };
        for entry in entries.iter().filter(|entry| !known.contains(&entry.name.as_str())) {
            sink.fault(&path.field(&entry.name), entry.at, suggest::unknown("field", &entry.name, known));
        }
        Some(Self { node, path, entries })
    }

    /// The field's node. A field without a value counts as absent.
    fn get(&self, name: &str) -> Option<&'t Node> {
        let entry = self.entries.iter().find(|entry| entry.name == name)?;
        (!matches!(entry.value.value, Value::Null)).then_some(&entry.value)
    }

    /// A field that must be there.
    pub(super) fn required<T>(
        &self,
        name: &str,
        sink: &mut Sink,
        read: impl FnOnce(&Node, &Path<'_>, &mut Sink) -> Option<T>,
    ) -> Option<T> {
        let path = self.path.field(name);
        if let Some(node) = self.get(name) {
            return read(node, &path, sink);
        }
        // Where the empty field stands, or else the mapping that lacks it.
        let at = self.entries.iter().find(|entry| entry.name == name).map_or(self.node.at, |entry| entry.at);
        sink.fault(&path, at, format!("`{name}` is missing"));
        None
    }

    /// A field that may be absent: then `absent`.
    pub(super) fn optional<T>(
        &self,
        name: &str,
        absent: T,
        sink: &mut Sink,
        read: impl FnOnce(&Node, &Path<'_>, &mut Sink) -> Option<T>,
    ) -> Option<T> {
        match self.get(name) {
            Some(node) => read(node, &self.path.field(name), sink),
            None => Some(absent),
        }
    }

    /// A fault of the whole mapping.
    pub(super) fn fault(&self, message: impl Into<String>, sink: &mut Sink) {
        sink.fault(self.path, self.node.at, message);
    }
}

/// A text that passes `check` (which says what is wrong with it).
pub(super) fn checked<'t>(
    node: &'t Node,
    path: &Path<'_>,
    sink: &mut Sink,
    check: impl FnOnce(&str) -> Result<(), String>,
) -> Option<&'t str> {
    let text = text(node, path, sink)?;
    check(text).map_err(|message| sink.fault(path, node.at, message)).ok().map(|()| text)
}

/// A text.
pub(super) fn text<'t>(node: &'t Node, path: &Path<'_>, sink: &mut Sink) -> Option<&'t str> {
    let message = match &node.value {
        Value::Text(text) => return Some(text),
        Value::Number(written) => {
            format!("expected a text, found the number `{0}`: quote it (\"{0}\")", excerpt(written))
        }
        Value::Bool(value) => format!("expected a text, found the truth value `{value}`: quote it (\"{value}\")"),
        other => format!("expected a text, found {}", other.describe()),
    };
    sink.fault(path, node.at, message);
    None
}

/// A text of a type's own syntax.
pub(super) fn parsed<T: FromStr>(node: &Node, path: &Path<'_>, sink: &mut Sink, what: &str) -> Option<T> {
    let text = text(node, path, sink)?;
    let parsed = text.parse().ok();
    if parsed.is_none() {
        sink.fault(path, node.at, format!("`{}` is not {what}", excerpt(text)));
    }
    parsed
}

/// A truth value.
pub(super) fn boolean(node: &Node, path: &Path<'_>, sink: &mut Sink) -> Option<bool> {
    if let Value::Bool(value) = node.value {
        return Some(value);
    }
    sink.fault(path, node.at, format!("expected true or false, found {}", node.value.describe()));
    None
}

/// A whole number within `range`.
pub(super) fn number(
    node: &Node,
    path: &Path<'_>,
    sink: &mut Sink,
    range: std::ops::RangeInclusive<u64>,
) -> Option<u64> {
    let expected = || format!("expected a whole number from {} to {}", range.start(), range.end());
    let message = match &node.value {
        Value::Number(written) if written.starts_with('0') && written.len() > 1 => {
            format!("{}, found `{}`: write it in decimal, without leading zeros", expected(), excerpt(written))
        }
        Value::Number(written) => match written.parse() {
            Ok(value) if range.contains(&value) => return Some(value),
            _ => format!("{}, found `{}`", expected(), excerpt(written)),
        },
        Value::Text(text) if text.parse::<u64>().is_ok() => {
            format!("{}, found the text `{}`: leave out the quotes", expected(), excerpt(text))
        }
        other => format!("{}, found {}", expected(), other.describe()),
    };
    sink.fault(path, node.at, message);
    None
}

/// One of a few words.
pub(super) fn choice<T: Copy>(
    node: &Node,
    path: &Path<'_>,
    sink: &mut Sink,
    what: &str,
    choices: &[(&str, T)],
) -> Option<T> {
    let text = text(node, path, sink)?;
    if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
        return Some(*value);
    }
    let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
    sink.fault(path, node.at, suggest::unknown(what, text, &words));
    None
}

/// A list of 1 to `max` values, no two with the same `key`. `None` if any of them is faulty.
pub(super) fn list<T, K: Eq + Hash>(
    node: &Node,
    path: &Path<'_>,
    sink: &mut Sink,
    max: usize,
    key: impl Fn(&T) -> K,
    mut read: impl FnMut(&Node, &Path<'_>, &mut Sink) -> Option<T>,
) -> Option<Vec<T>> {
    let Value::List(nodes) = &node.value else {
        let found = node.value.describe();
        sink.fault(path, node.at, format!("expected a list, found {found}: put a value into brackets or behind `- `"));
        return None;
    };
    if nodes.is_empty() || nodes.len() > max {
        sink.fault(path, node.at, format!("expected a list of 1 to {max}, found {}", nodes.len()));
        return None;
    }
    let mut values = Vec::with_capacity(nodes.len());
    let mut seen: HashMap<K, usize> = HashMap::with_capacity(nodes.len());
    for (index, item) in nodes.iter().enumerate() {
        let item_path = path.item(index);
        let Some(value) = read(item, &item_path, sink) else { continue };
        match seen.insert(key(&value), index) {
            None => values.push(value),
            Some(first) => sink.fault(&item_path, item.at, format!("the same as {path}[{first}]")),
        }
    }
    (values.len() == nodes.len()).then_some(values)
}
