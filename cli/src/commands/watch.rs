//! `opencluster watch`

use opencluster_api::rest::{WatchEvent, path};
use opencluster_policy::resource::yaml_of;

use super::Context;
use super::apply::{action, subject};
use crate::args::WatchArgs;
use crate::error::CliError;
use crate::output::Format;
use crate::output::human::printable;

pub(super) async fn run(context: &mut Context<'_>, args: &WatchArgs) -> Result<(), CliError> {
    let query = args.from.map_or(String::new(), |from| format!("?from={from}"));
    let mut client = context.client().await?;
    let mut events = client.events(&format!("{}{query}", path::WATCH)).await?;
    let mut seen = 0;
    while args.count.is_none_or(|count| seen < count) {
        let Some(event) = events.next::<WatchEvent>().await? else {
            return Err(CliError::failed(
                "the controller ended the stream",
                "it restarted, or you fell behind: list again (opencluster get) and watch from that version",
            ));
        };
        if args.kind.is_none_or(|kind| kind.name() == event.change.kind) {
            print(context, &event)?;
            seen += 1;
        }
    }
    Ok(())
}

fn print(context: &mut Context<'_>, event: &WatchEvent) -> Result<(), CliError> {
    match context.printer.format {
        Format::Table => context.printer.text(&line(event))?,
        Format::Json => context.printer.json_line(event)?,
        Format::Yaml => {
            let value = serde_json::to_value(event).map_err(|error| CliError::Output(error.into()))?;
            context.printer.text(&format!("---\n{}", yaml_of(&value)))?;
        }
    }
    Ok(())
}

/// Columns of fixed width: a stream has no last row to align with.
fn line(event: &WatchEvent) -> String {
    printable(&format!("{:>8}  {:<9}  {}", event.version, action(event.change.action), subject(&event.change)))
}

#[cfg(test)]
mod tests {
    use opencluster_api::rest::{Action, Change};

    use super::*;

    #[test]
    fn one_line_for_each_change() {
        let change = Change {
            kind: "Policy".into(),
            namespace: "default".into(),
            name: "a-to-echo".into(),
            action: Action::Updated,
        };
        let event = WatchEvent { version: 18, change, object: None };
        assert_eq!(line(&event), "      18  updated    Policy default/a-to-echo");
    }
}
