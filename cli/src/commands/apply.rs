//! `opencluster apply`

use opencluster_api::rest::{Action, ApplyResult, Change, path};

use super::Context;
use crate::args::ApplyArgs;
use crate::client::Client;
use crate::documents::Documents;
use crate::error::CliError;
use crate::output::style::Style;
use crate::output::table::Table;

pub(super) async fn run(context: &mut Context<'_>, args: &ApplyArgs) -> Result<(), CliError> {
    let documents = Documents::read(&args.files.files)?;
    let result = send(&mut context.client().await?, &documents, args.dry_run).await?;
    Ok(context.printer.print(&result, table)?)
}

/// Sends documents. Faults that only the controller sees (what they refer to is not there) are shown in place, too.
pub(super) async fn send(client: &mut Client, documents: &Documents, dry_run: bool) -> Result<ApplyResult, CliError> {
    let path = format!("{}?dry_run={dry_run}", path::APPLY);
    client.post_documents(&path, &documents.text).await.map_err(|error| match error {
        CliError::Refused(problem) if !problem.fields.is_empty() => {
            CliError::Documents(documents.locate(problem.fields))
        }
        other => other,
    })
}

fn table(result: &ApplyResult, style: Style) -> String {
    let mut table = Table::new(&["RESOURCE", "ACTION"]);
    for change in &result.changes {
        table.row([&subject(change), action(change.action)]);
    }
    let count = |action| result.changes.iter().filter(|change| change.action == action).count();
    let counts = format!(
        "{} created, {} updated, {} unchanged",
        count(Action::Created),
        count(Action::Updated),
        count(Action::Unchanged)
    );
    let summary = if result.dry_run {
        format!("dry run: {counts}; nothing was changed (version {})", result.version)
    } else {
        format!("{counts}; version {}", result.version)
    };
    format!("{}{}\n", table.render(), style.bold(&summary))
}

/// For example `Policy default/a-to-echo`.
pub(super) fn subject(change: &Change) -> String {
    if change.namespace.is_empty() {
        format!("{} {}", change.kind, change.name)
    } else {
        format!("{} {}/{}", change.kind, change.namespace, change.name)
    }
}

/// In words.
pub(super) fn action(action: Action) -> &'static str {
    match action {
        Action::Created => "created",
        Action::Updated => "updated",
        Action::Unchanged => "unchanged",
        Action::Deleted => "deleted",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_happened() {
        let change = |kind: &str, namespace: &str, action| Change {
            kind: kind.into(),
            namespace: namespace.into(),
            name: "x".into(),
            action,
        };
        let changes = vec![change("Node", "", Action::Created), change("Policy", "prod", Action::Unchanged)];
        let result = ApplyResult { dry_run: true, version: 7, changes };
        let expected = "\
RESOURCE        ACTION
Node x          created
Policy prod/x   unchanged
dry run: 1 created, 0 updated, 1 unchanged; nothing was changed (version 7)
";
        assert_eq!(table(&result, Style::PLAIN), expected);
        let applied = table(&ApplyResult { dry_run: false, ..result }, Style::PLAIN);
        assert!(applied.ends_with("1 created, 0 updated, 1 unchanged; version 7\n"), "{applied}");
    }
}
