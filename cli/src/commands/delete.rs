//! `opencluster delete`

use opencluster_api::rest::{Action, ApplyResult, Change};
use opencluster_policy::resource::{Key, Kind, Resource};

use super::Context;
use super::apply::{action, subject};
use super::get::object_path;
use crate::args::DeleteArgs;
use crate::client::Client;
use crate::documents::Documents;
use crate::error::CliError;
use crate::output::table::Table;

pub(super) async fn run(context: &mut Context<'_>, args: &DeleteArgs) -> Result<(), CliError> {
    let keys = keys(args)?;
    let mut client = context.client().await?;
    let mut changes = Vec::new();
    for key in keys {
        match delete(&mut client, &key).await {
            Ok(change) => changes.push(change),
            Err(CliError::Refused(problem)) if args.ignore_not_found && problem.code == "not-found" => {
                changes.push(Change { action: Action::Unchanged, ..change(&key) });
            }
            // What was deleted before stays deleted: say so before saying what failed.
            Err(error) => {
                if !changes.is_empty() {
                    print(context, &changes)?;
                }
                return Err(error);
            }
        }
    }
    print(context, &changes)
}

/// In an order in which nothing that is left refers to what is gone: policies first, nodes last.
fn keys(args: &DeleteArgs) -> Result<Vec<Key>, CliError> {
    if let (Some(kind), Some(name)) = (args.kind, &args.name) {
        let namespace = if kind.namespaced() { name.namespace_or(&args.namespace.namespace) } else { "" };
        return Ok(vec![Key { kind, namespace: namespace.to_owned(), name: name.name.clone() }]);
    }
    let mut keys: Vec<Key> = Documents::read(&args.files)?.resources.iter().map(Resource::key).collect();
    keys.sort_by_key(|key| std::cmp::Reverse(Kind::ALL.iter().position(|&kind| kind == key.kind)));
    Ok(keys)
}

async fn delete(client: &mut Client, key: &Key) -> Result<Change, CliError> {
    let result: ApplyResult = client.delete(&object_path(key.kind, &key.namespace, &key.name)).await?;
    Ok(result.changes.into_iter().next().unwrap_or_else(|| change(key)))
}

fn change(key: &Key) -> Change {
    Change {
        kind: key.kind.name().to_owned(),
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        action: Action::Deleted,
    }
}

fn print(context: &mut Context<'_>, changes: &Vec<Change>) -> Result<(), CliError> {
    Ok(context.printer.print(changes, |changes, _| {
        let mut table = Table::new(&["RESOURCE", "ACTION"]);
        for change in changes {
            let action = if change.action == Action::Unchanged { "was not there" } else { action(change.action) };
            table.row([subject(change).as_str(), action]);
        }
        table.render()
    })?)
}
