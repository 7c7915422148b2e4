//! `opencluster workload list | show`

use opencluster_api::rest::{WorkloadStatus, WorkloadStatusList, path};

use super::Context;
use crate::client::Client;
use crate::error::CliError;
use crate::output::human::printable;
use crate::output::lines::Lines;
use crate::output::style::Style;
use crate::output::table::Table;

pub(super) async fn list(context: &mut Context<'_>, namespace: Option<&str>) -> Result<(), CliError> {
    let mut list = statuses(&mut context.client().await?).await?;
    list.workloads.retain(|workload| namespace.is_none_or(|namespace| workload.namespace == namespace));
    Ok(context.printer.print(&list, |list, _| table(&list.workloads))?)
}

pub(super) async fn show(context: &mut Context<'_>, namespace: &str, name: &str) -> Result<(), CliError> {
    let list = statuses(&mut context.client().await?).await?;
    let found = list.workloads.into_iter().find(|workload| workload.namespace == namespace && workload.name == name);
    let workload = found.ok_or_else(|| {
        CliError::failed(format!("there is no workload {namespace}/{name}"), "opencluster workload list -A shows all")
    })?;
    Ok(context.printer.print(&workload, description)?)
}

/// How all workloads stand.
pub(super) async fn statuses(client: &mut Client) -> Result<WorkloadStatusList, CliError> {
    client.get(path::WORKLOAD_STATUS).await
}

fn table(workloads: &[WorkloadStatus]) -> String {
    let mut table = Table::new(&["NAMESPACE", "NAME", "STATE", "NODES", "READY ON", "KEYS"]);
    for workload in workloads {
        table.row([
            workload.namespace.clone(),
            workload.name.clone(),
            state(workload),
            workload.nodes.join(", "),
            workload.ready_on.join(", "),
            keys(workload),
        ]);
    }
    table.render()
}

/// `revoked (why)`, `ready` or `waiting`.
pub(super) fn state(workload: &WorkloadStatus) -> String {
    match &workload.revoked {
        Some(reason) => format!("revoked ({reason})"),
        None if workload.ready_on.is_empty() => "waiting".to_owned(),
        None => "ready".to_owned(),
    }
}

fn keys(workload: &WorkloadStatus) -> String {
    let revoked = workload.keys.iter().filter(|key| key.revoked.is_some()).count();
    if revoked == 0 { workload.keys.len().to_string() } else { format!("{}, {revoked} revoked", workload.keys.len()) }
}

fn description(workload: &WorkloadStatus, style: Style) -> String {
    let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { printable(&names.join(", ")) };
    let mut text = Lines::default();
    text.push(style.bold(&printable(&format!("Workload {}/{}", workload.namespace, workload.name))));
    text.push(format_args!("  identity   {}", printable(&workload.spiffe_id)));
    text.push(format_args!("  state      {}", printable(&state(workload))));
    text.push(format_args!("  nodes      {}", list(&workload.nodes)));
    text.push(format_args!("  ready on   {}", list(&workload.ready_on)));
    text.push("  keys with certificates in force");
    for key in &workload.keys {
        let verdict = key.revoked.as_ref().map_or(String::new(), |reason| format!(", revoked ({reason})"));
        let line = format!("{} of node {} until {}{verdict}", key.key, key.node, key.not_after);
        text.push(format_args!("    {}", printable(&line)));
    }
    text.text()
}

#[cfg(test)]
pub(super) mod tests {
    use opencluster_api::rest::WorkloadKey;

    use super::*;

    /// A workload in good order, with two keys.
    pub(crate) fn ready(name: &str) -> WorkloadStatus {
        let key = |key: &str| WorkloadKey {
            key: key.repeat(32),
            node: name.into(),
            not_after: "2026-11-25T00:00:00Z".into(),
            revoked: None,
        };
        WorkloadStatus {
            namespace: "default".into(),
            name: name.into(),
            spiffe_id: format!("spiffe://rig.test/ns/default/sa/{name}"),
            nodes: vec![name.into()],
            ready_on: vec![name.into()],
            revoked: None,
            keys: vec![key("a1"), key("b2")],
        }
    }

    #[test]
    fn r31_a_revoked_workload_and_a_revoked_key_are_shown_as_such() {
        let mut revoked = ready("b");
        revoked.revoked = Some("stolen laptop".into());
        revoked.ready_on.clear();
        let mut one_key = ready("c");
        one_key.keys[0].revoked = Some("in a core dump".into());
        let expected = "\
NAMESPACE   NAME   STATE                     NODES   READY ON   KEYS
default     a      ready                     a       a          2
default     b      revoked (stolen laptop)   b       -          2
default     c      ready                     c       c          2, 1 revoked
";
        assert_eq!(table(&[ready("a"), revoked, one_key.clone()]), expected);
        let text = description(&one_key, Style::PLAIN);
        let line = format!("    {} of node c until 2026-11-25T00:00:00Z, revoked (in a core dump)\n", "a1".repeat(32));
        assert!(text.contains(&line), "{text}");
    }
}
