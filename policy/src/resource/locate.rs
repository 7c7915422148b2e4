//! Places for faults that were found without a text: what resources say of each other is checked on resources, not on what
//! they were read from.

use super::fault::{Fault, Faults, Position, Sink};
use super::tree::{self, Node, Value};

impl Faults {
    /// Fills in line and column where they are unknown. `text` is what the documents were read from. A field that is not
    /// there has the place of the nearest value around it.
    pub fn locate(&mut self, text: &str) {
        if self.0.iter().all(|fault| fault.line != 0) {
            return;
        }
        // What is wrong with the text itself is not the question here.
        let documents = tree::from_yaml(text, &mut Sink::default());
        for fault in &mut self.0 {
            if let (0, Some(Some(document))) = (fault.line, documents.get(fault.document)) {
                let Position { line, column } = find(document, &fault.field);
                *fault = Fault { line, column, ..fault.clone() };
            }
        }
    }
}

/// The place of `spec.ports[0].port` and the like, as far as it exists.
fn find(document: &Node, field: &str) -> Position {
    let mut node = document;
    for part in field.split('.') {
        let (name, items) = part.split_once('[').map_or((part, ""), |(name, items)| (name, items));
        let Some(value) = entry(node, name) else { break };
        node = value;
        for index in items.split('[').filter_map(|item| item.strip_suffix(']')?.parse::<usize>().ok()) {
            let Some(item) = item(node, index) else { return node.at };
            node = item;
        }
    }
    node.at
}

fn entry<'a>(node: &'a Node, name: &str) -> Option<&'a Node> {
    match &node.value {
        Value::Map(entries) => entries.iter().find(|entry| entry.name == name).map(|entry| &entry.value),
        _ => None,
    }
}

fn item(node: &Node, index: usize) -> Option<&Node> {
    match &node.value {
        Value::List(items) => items.get(index),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str, document: usize, field: &str) -> (usize, usize) {
        let fault = Fault { document, field: field.to_owned(), line: 0, column: 0, message: String::new() };
        let mut faults = Faults(vec![fault]);
        faults.locate(text);
        (faults.0[0].line, faults.0[0].column)
    }

    const TEXT: &str = "\
# Nothing here.
---
kind: Policy
spec:
  to: {service: echo}
  from: [{workload: a}, {node: b}]
---
kind: Node
";

    #[test]
    fn fields_have_places_and_what_is_missing_that_of_what_is_around_it() {
        assert_eq!(place(TEXT, 0, "spec.to.service"), (5, 17));
        assert_eq!(place(TEXT, 0, "spec.from[1].node"), (6, 32));
        assert_eq!(place(TEXT, 0, "spec.from[1].workload"), (6, 25));
        assert_eq!(place(TEXT, 0, "spec.from[7].workload"), (6, 9));
        assert_eq!(place(TEXT, 1, "spec.addresses[0]"), (8, 1));
        assert_eq!(place(TEXT, 1, ""), (8, 1));
        assert_eq!(place(TEXT, 2, "kind"), (0, 0), "there is no such document");
    }

    #[test]
    fn known_places_stay() {
        let fault = Fault { document: 0, field: "kind".into(), line: 7, column: 7, message: String::new() };
        let mut faults = Faults(vec![fault.clone()]);
        faults.locate(TEXT);
        assert_eq!(faults.0, [fault]);
    }
}
