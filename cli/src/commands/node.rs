//! `opencluster node list | show | token`

use std::path::Path;
use std::time::Duration;

use opencluster_api::rest::{NodeStatus, NodeStatusList, TokenRequest, TokenResult, path};
use opencluster_policy::resource::{Kind, yaml_of};
use serde::Serialize;
use serde_json::Value;

use super::get::object_path;
use super::{Context, secret};
use crate::error::CliError;
use crate::output::Format;
use crate::output::human::{duration, printable};
use crate::output::lines::Lines;
use crate::output::style::Style;
use crate::output::table::Table;

pub(super) async fn list(context: &mut Context<'_>) -> Result<(), CliError> {
    let nodes: NodeStatusList = context.client().await?.get(path::NODE_STATUS).await?;
    Ok(context.printer.print(&nodes, |nodes, _| table(&nodes.nodes))?)
}

fn table(nodes: &[NodeStatus]) -> String {
    let mut table = Table::new(&[
        "NAME",
        "STATE",
        "LEASE LEFT",
        "LIFE LEFT",
        "HEARTBEAT",
        "FIREWALL",
        "PROXY",
        "FLOWS",
        "WORKLOADS",
        "ADDRESSES",
    ]);
    for node in nodes {
        // What a node that is not active said last is no longer so.
        let active = node.state == "active";
        table.row([
            node.name.clone(),
            state(node),
            if node.lease_left_ms == 0 { String::new() } else { milliseconds(node.lease_left_ms) },
            node.age_left_ms.map_or(String::new(), milliseconds),
            node.heartbeat_age_ms.map_or(String::new(), |age| format!("{} ago", milliseconds(age))),
            if active && node.firewall_applied { "applied".into() } else { String::new() },
            if active && node.proxy_ready { "ready".into() } else { String::new() },
            if active { node.flows.to_string() } else { String::new() },
            if active { node.workloads_ready.len().to_string() } else { String::new() },
            node.addresses.join(", "),
        ]);
    }
    table.render()
}

/// The state, and why where there is a reason.
pub(super) fn state(node: &NodeStatus) -> String {
    if node.cordoned {
        return format!("{} (cordoned)", node.state);
    }
    if node.reason.is_empty() { node.state.clone() } else { format!("{} ({})", node.state, node.reason) }
}

pub(super) fn milliseconds(milliseconds: u64) -> String {
    duration(Duration::from_millis(milliseconds))
}

/// The resource and the state of one node.
#[derive(Serialize)]
struct Node {
    resource: Value,
    status: NodeStatus,
}

pub(super) async fn show(context: &mut Context<'_>, name: &str) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let resource: Value = client.get(&object_path(Kind::Node, "", name)).await?;
    let nodes: NodeStatusList = client.get(path::NODE_STATUS).await?;
    let status = nodes.nodes.into_iter().find(|node| node.name == name).ok_or_else(|| {
        CliError::failed(format!("the controller has no state of node {name}"), "it was deleted just now: try again")
    })?;
    Ok(context.printer.print(&Node { resource, status }, description)?)
}

fn description(node: &Node, style: Style) -> String {
    let status = &node.status;
    let yes = |value: bool| if value { "yes" } else { "no" }.to_owned();
    let rows = [
        ("state", state(status)),
        ("addresses", status.addresses.join(", ")),
        ("last heartbeat", status.heartbeat_age_ms.map_or("never".into(), |age| format!("{} ago", milliseconds(age)))),
        ("lease left", milliseconds(status.lease_left_ms)),
        ("life left", status.age_left_ms.map_or("no end".into(), milliseconds)),
        ("firewall applied", yes(status.firewall_applied)),
        ("firewall repairs", status.firewall_repairs.to_string()),
        ("VM generation", if status.generation_watched { "watched" } else { "not watched" }.to_owned()),
        ("proxy ready", yes(status.proxy_ready)),
        ("proxy restarts", status.proxy_restarts.to_string()),
        ("configuration", format!("version {}", status.config_version)),
        ("revocations", format!("version {}", status.revocation_version)),
        ("live flows", status.flows.to_string()),
        (
            "identities",
            if status.workloads_ready.is_empty() { "none".into() } else { status.workloads_ready.join(", ") },
        ),
    ];
    let mut text = Lines::default();
    text.push(style.bold(&format!("Node {}", printable(&status.name))));
    for (name, value) in rows {
        text.push(format_args!("  {name:<16}  {}", printable(&value)));
    }
    text.push("  resource");
    text.push_indented(&yaml_of(&node.resource), 4);
    text.text()
}

pub(super) async fn token(
    context: &mut Context<'_>,
    name: &str,
    ttl: Option<Duration>,
    out: Option<&Path>,
) -> Result<(), CliError> {
    secret::check(out)?;
    let request = TokenRequest { ttl_s: ttl.map(|ttl| ttl.as_secs()) };
    let path = path::NODE_TOKEN.replace("{name}", name);
    let result: TokenResult = context.client().await?.post(&path, &request).await?;
    print_secret(context, &result, &result.token, out)?;
    let expires = printable(&result.expires);
    context.printer.note(&format!("a host can enrol once as node {name} with this token until {expires}"))?;
    Ok(())
}

/// Prints a result that holds a secret, or writes the secret to a file instead of printing it.
pub(super) fn print_secret<T: Serialize>(
    context: &mut Context<'_>,
    result: &T,
    token: &str,
    out: Option<&Path>,
) -> Result<(), CliError> {
    if let Some(path) = out {
        secret::write(path, token)?;
        let mut result = serde_json::to_value(result).map_err(|error| CliError::Output(error.into()))?;
        if let Some(fields) = result.as_object_mut() {
            fields.remove("token");
            fields.insert("file".to_owned(), path.display().to_string().into());
        }
        return Ok(context.printer.print(&result, |_, _| format!("written to {}\n", path.display()))?);
    }
    match context.printer.format {
        // Nothing but the token, so that $(opencluster node token NAME) works.
        Format::Table => context.printer.text(&printable(token))?,
        _ => context.printer.print(result, |_, _| String::new())?,
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A node in good order.
    pub(crate) fn healthy(name: &str) -> NodeStatus {
        NodeStatus {
            name: name.into(),
            state: "active".into(),
            reason: String::new(),
            addresses: vec!["10.88.0.11".into(), "fd88::11".into()],
            age_left_ms: Some(90_000_000),
            cordoned: false,
            heartbeat_age_ms: Some(210),
            heartbeats: 1207,
            lease_left_ms: 2790,
            config_version: 17,
            revocation_version: 2,
            firewall_applied: true,
            generation_watched: true,
            proxy_ready: true,
            firewall_repairs: 0,
            proxy_restarts: 0,
            flows: 12,
            workloads_ready: vec![format!("spiffe://rig.test/ns/default/sa/{name}")],
        }
    }

    #[test]
    fn the_table_of_nodes() {
        let lost = NodeStatus {
            state: "lost".into(),
            reason: "the lease ran out".into(),
            age_left_ms: None,
            lease_left_ms: 0,
            heartbeat_age_ms: Some(95_000),
            heartbeats: 88,
            ..healthy("b")
        };
        let expected = "\
NAME   STATE                      LEASE LEFT   LIFE LEFT   HEARTBEAT      FIREWALL   PROXY   FLOWS   WORKLOADS   ADDRESSES
a      active                     2.8 s        1 d 1 h     0.2 s ago      applied    ready   12      1           10.88.0.11, fd88::11
b      lost (the lease ran out)   -            -           1 m 35 s ago   -          -       -       -           10.88.0.11, fd88::11
";
        assert_eq!(table(&[healthy("a"), lost]), expected);
    }

    #[test]
    fn one_node_in_full() {
        let resource = serde_json::json!({"kind": "Node"});
        let text = description(&Node { resource, status: healthy("a") }, Style::PLAIN);
        assert!(text.starts_with("Node a\n  state             active\n"), "{text}");
        assert!(text.ends_with("  resource\n    kind: Node\n"), "{text}");
    }
}
