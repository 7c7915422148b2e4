//! `opencluster get`

use std::collections::BTreeSet;

use opencluster_api::rest::ObjectList;
use opencluster_policy::resource::{Kind, yaml_of};
use serde_json::Value;

use super::Context;
use super::workload::statuses;
use crate::args::GetArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::output::Format;
use crate::output::table::Table;

pub(super) async fn run(context: &mut Context<'_>, args: &GetArgs) -> Result<(), CliError> {
    let mut client = context.client().await?;
    if let Some(name) = &args.name {
        let path = object_path(args.kind, name.namespace_or(&args.namespace.namespace), &name.name);
        let object: Value = client.get(&path).await?;
        let revoked = revoked(&mut client, args.kind, context.printer.format).await?;
        return Ok(context
            .printer
            .print(&object, |object, _| table(args.kind, std::slice::from_ref(object), false, &revoked))?);
    }
    let namespace = (args.kind.namespaced() && !args.all_namespaces).then_some(args.namespace.namespace.as_str());
    let list = list(&mut client, args.kind, namespace).await?;
    match context.printer.format {
        Format::Json => context.printer.json(&list)?,
        // As documents, so that they can be edited and applied.
        Format::Yaml => {
            let documents: Vec<_> = list.items.iter().map(yaml_of).collect();
            context.printer.text(&documents.join("---\n"))?;
        }
        Format::Table if list.items.is_empty() => {
            let place = namespace.map_or(String::new(), |namespace| format!(" in namespace {namespace} (-A: in all)"));
            context.printer.note(&format!("no {}{place}", args.kind.plural()))?;
        }
        Format::Table => {
            let revoked = revoked(&mut client, args.kind, Format::Table).await?;
            context.printer.text(&table(args.kind, &list.items, args.all_namespaces, &revoked))?;
        }
    }
    Ok(())
}

/// Namespaces and names of workloads whose identity is revoked, where a table of workloads is to show it.
async fn revoked(client: &mut Client, kind: Kind, format: Format) -> Result<BTreeSet<(String, String)>, CliError> {
    if kind != Kind::Workload || format != Format::Table {
        return Ok(BTreeSet::new());
    }
    let workloads = statuses(client).await?.workloads.into_iter();
    let revoked = workloads.filter(|workload| workload.revoked.is_some());
    Ok(revoked.map(|workload| (workload.namespace, workload.name)).collect())
}

/// All resources of a kind, or those of one namespace.
pub(super) async fn list(client: &mut Client, kind: Kind, namespace: Option<&str>) -> Result<ObjectList, CliError> {
    let query = namespace.map_or(String::new(), |namespace| format!("?namespace={namespace}"));
    client.get(&format!("/v1/{}{query}", kind.plural())).await
}

/// The path of one resource in the API.
pub(super) fn object_path(kind: Kind, namespace: &str, name: &str) -> String {
    if kind.namespaced() {
        format!("/v1/{}/{namespace}/{name}", kind.plural())
    } else {
        format!("/v1/{}/{name}", kind.plural())
    }
}

/// A heading, and what stands under it, from a `spec`.
type Column = (&'static str, fn(&Value) -> String);

/// Reads the values loosely: a newer controller's additional fields do not matter for a table.
fn table(kind: Kind, objects: &[Value], all_namespaces: bool, revoked: &BTreeSet<(String, String)>) -> String {
    let columns: &[Column] = match kind {
        Kind::Node => {
            &[("ADDRESSES", |spec| words(&spec["addresses"])), ("TUNNEL PORT", |spec| word(&spec["tunnelPort"]))]
        }
        Kind::Workload => &[("NODES", |spec| words(&spec["nodes"])), ("PORTS", |spec| words(&spec["ports"]))],
        Kind::Service => &[("PORTS", service_ports), ("WORKLOADS", |spec| words(&spec["workloads"]))],
        Kind::Policy => &[
            ("ACTION", |spec| word(&spec["action"])),
            ("FROM", |spec| list_of(&spec["from"], source, " or ")),
            ("TO", |spec| word(&spec["to"]["service"])),
            ("PORTS", |spec| if spec["to"]["ports"].is_array() { words(&spec["to"]["ports"]) } else { "all".into() }),
            ("DRY RUN", |spec| if spec["dryRun"] == true { "yes".into() } else { String::new() }),
        ],
    };
    let namespaces = all_namespaces && kind.namespaced();
    let mut headings = if namespaces { vec!["NAMESPACE", "NAME"] } else { vec!["NAME"] };
    headings.extend(columns.iter().map(|(heading, _)| *heading));
    if kind == Kind::Workload {
        headings.push("REVOKED");
    }
    headings.push("VERSION");
    let mut table = Table::new(&headings);
    for object in objects {
        let metadata = &object["metadata"];
        let mut row = if namespaces { vec![word(&metadata["namespace"])] } else { Vec::new() };
        row.push(word(&metadata["name"]));
        row.extend(columns.iter().map(|(_, cell)| cell(&object["spec"])));
        if kind == Kind::Workload {
            let found = revoked.contains(&(word(&metadata["namespace"]), word(&metadata["name"])));
            row.push(if found { "revoked".to_owned() } else { String::new() });
        }
        row.push(word(&metadata["resourceVersion"]));
        table.row(row);
    }
    table.render()
}

fn word(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn words(value: &Value) -> String {
    list_of(value, word, ", ")
}

fn list_of(value: &Value, item: fn(&Value) -> String, separator: &str) -> String {
    value.as_array().map(|items| items.iter().map(item).collect::<Vec<_>>().join(separator)).unwrap_or_default()
}

fn service_ports(spec: &Value) -> String {
    let port = |port: &Value| {
        let protocol = if port["protocol"] == "udp" { "/udp" } else { "" };
        let name = port["name"].as_str().map_or(String::new(), |name| format!(" ({name})"));
        format!("{}{protocol}{name}", word(&port["port"]))
    };
    list_of(&spec["ports"], port, ", ")
}

/// Everything in one source must match: `workload a and node b`.
fn source(value: &Value) -> String {
    let fields = value.as_object().into_iter().flatten();
    fields.map(|(name, value)| format!("{name} {}", word(value))).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn none() -> BTreeSet<(String, String)> {
        BTreeSet::new()
    }

    #[test]
    fn tables_of_every_kind() {
        let node = json!({"metadata": {"name": "a", "resourceVersion": 3}, "spec": {"addresses": ["10.88.0.11", "fd88::11"], "tunnelPort": 15443}});
        let expected = "\
NAME   ADDRESSES              TUNNEL PORT   VERSION
a      10.88.0.11, fd88::11   15443         3
";
        assert_eq!(table(Kind::Node, &[node], true, &none()), expected);

        let workload = |name: &str| json!({"metadata": {"name": name, "namespace": "prod", "resourceVersion": 4}, "spec": {"nodes": ["b"]}});
        let expected = "\
NAMESPACE   NAME   NODES   PORTS   REVOKED   VERSION
prod        b      b       -       -         4
prod        c      b       -       revoked   4
";
        let revoked = BTreeSet::from([("prod".to_owned(), "c".to_owned()), ("default".to_owned(), "b".to_owned())]);
        assert_eq!(table(Kind::Workload, &[workload("b"), workload("c")], true, &revoked), expected);

        let service = json!({"metadata": {"name": "echo", "namespace": "default", "resourceVersion": 5},
            "spec": {"ports": [{"port": 9000, "name": "http", "protocol": "tcp"}, {"port": 53, "protocol": "udp"}], "workloads": ["b", "prod/c"]}});
        let expected = "\
NAME   PORTS                 WORKLOADS   VERSION
echo   9000 (http), 53/udp   b, prod/c   5
";
        assert_eq!(table(Kind::Service, &[service], false, &none()), expected);

        let policy = json!({"metadata": {"name": "p", "namespace": "default", "resourceVersion": 6},
            "spec": {"action": "deny", "to": {"service": "echo"}, "from": [{"node": "a"}, {"workload": "a"}], "dryRun": true}});
        let expected = "\
NAME   ACTION   FROM                   TO     PORTS   DRY RUN   VERSION
p      deny     node a or workload a   echo   all     yes       6
";
        assert_eq!(table(Kind::Policy, &[policy], false, &none()), expected);
    }

    #[test]
    fn a_table_of_nonsense_is_a_table() {
        for kind in Kind::ALL {
            let nonsense =
                [json!(null), json!([1]), json!({"metadata": 7, "spec": {"ports": {"x": 1}, "from": [3], "to": []}})];
            assert_eq!(table(kind, &nonsense, true, &none()).lines().count(), 4);
        }
    }
}
