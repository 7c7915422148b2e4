//! `opencluster diff`: field by field, what apply would change.

use opencluster_api::rest::{Action, Change};
use serde::Serialize;
use serde_json::Value;

use super::Context;
use super::apply::{self, subject};
use super::get::object_path;
use crate::args::DiffArgs;
use crate::documents::Documents;
use crate::error::CliError;
use crate::output::human::printable;
use crate::output::lines::Lines;
use crate::output::style::Style;

/// One resource and what would become of it.
#[derive(Debug, Serialize)]
struct Difference {
    #[serde(flatten)]
    change: Change,
    fields: Vec<FieldChange>,
}

/// One field that differs.
#[derive(Debug, PartialEq, Serialize)]
struct FieldChange {
    /// For example `spec.ports[0].port`.
    field: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<Value>,
}

pub(super) async fn run(context: &mut Context<'_>, args: &DiffArgs) -> Result<(), CliError> {
    let documents = Documents::read(&args.files.files)?;
    let mut client = context.client().await?;
    let planned = apply::send(&mut client, &documents, true).await?;
    let mut differences = Vec::new();
    for (resource, change) in documents.resources.iter().zip(planned.changes) {
        let key = resource.key();
        let before = match change.action {
            Action::Updated => client.get(&object_path(key.kind, &key.namespace, &key.name)).await?,
            _ => Value::Null,
        };
        let fields = match change.action {
            Action::Created | Action::Updated => compare(before, resource.to_json()),
            Action::Unchanged | Action::Deleted => Vec::new(),
        };
        differences.push(Difference { change, fields });
    }
    Ok(context.printer.print(&differences, |differences, style| text(differences, style))?)
}

fn compare(mut before: Value, mut after: Value) -> Vec<FieldChange> {
    // The version differs always, and says nothing.
    for object in [&mut before, &mut after] {
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("resourceVersion");
        }
    }
    let mut fields = Vec::new();
    for part in ["metadata", "spec"] {
        descend(part, before.get(part), after.get(part), &mut fields);
    }
    fields
}

fn descend(field: &str, before: Option<&Value>, after: Option<&Value>, fields: &mut Vec<FieldChange>) {
    if before == after {
        return;
    }
    match (before.unwrap_or(&Value::Null), after.unwrap_or(&Value::Null)) {
        (Value::Object(old), Value::Object(new)) => {
            let added = new.keys().filter(|&name| !old.contains_key(name));
            for name in old.keys().chain(added) {
                descend(&format!("{field}.{name}"), old.get(name), new.get(name), fields);
            }
        }
        (Value::Array(old), Value::Array(new)) => {
            for position in 0..old.len().max(new.len()) {
                descend(&format!("{field}[{position}]"), old.get(position), new.get(position), fields);
            }
        }
        // Something new or gone is shown down to its leaves.
        (Value::Null, Value::Object(new)) => {
            new.iter().for_each(|(name, value)| descend(&format!("{field}.{name}"), None, Some(value), fields));
        }
        _ => fields.push(FieldChange { field: field.to_owned(), before: before.cloned(), after: after.cloned() }),
    }
}

fn text(differences: &[Difference], style: Style) -> String {
    let mut text = Lines::default();
    let mut changed = 0;
    for difference in differences {
        let action = match difference.change.action {
            Action::Created => "would be created",
            Action::Updated => "would be updated",
            Action::Unchanged | Action::Deleted => continue,
        };
        changed += 1;
        text.push(style.bold(&format!("{} {action}", printable(&subject(&difference.change)))));
        for field in &difference.fields {
            let mut line = |sign: &str, value: &Value, paint: fn(Style, &str) -> String| {
                let line = printable(&format!("{sign} {}: {value}", field.field));
                text.push(format_args!("  {}", paint(style, &line)));
            };
            if let Some(before) = &field.before {
                line("-", before, Style::red);
            }
            if let Some(after) = &field.after {
                line("+", after, Style::green);
            }
        }
    }
    text.push(format_args!("{changed} of {} documents would change something", differences.len()));
    text.text()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_that_differ_and_no_others() {
        let before = json!({"kind": "Service", "metadata": {"name": "echo", "resourceVersion": 3},
            "spec": {"ports": [{"port": 9000}, {"port": 9001}], "workloads": ["b"]}});
        let after = json!({"kind": "Service", "metadata": {"name": "echo", "labels": {"team": "x"}},
            "spec": {"ports": [{"port": 9009}], "workloads": ["b"]}});
        let change = Change {
            kind: "Service".into(),
            namespace: "default".into(),
            name: "echo".into(),
            action: Action::Updated,
        };
        let difference = Difference { change, fields: compare(before, after) };
        let expected = "\
Service default/echo would be updated
  + metadata.labels.team: \"x\"
  - spec.ports[0].port: 9000
  + spec.ports[0].port: 9009
  - spec.ports[1]: {\"port\":9001}
1 of 1 documents would change something
";
        assert_eq!(text(&[difference], Style::PLAIN), expected);
    }

    #[test]
    fn the_version_is_no_difference() {
        let object = |version: u64| json!({"metadata": {"name": "x", "resourceVersion": version}, "spec": {}});
        assert_eq!(compare(object(1), object(2)), []);
    }
}
