//! `opencluster audit list | verify`

use opencluster_api::rest::{AuditEvent, AuditPage, path};
use serde::Serialize;

use super::Context;
use crate::client::Client;
use crate::error::CliError;
use crate::output::human::printable;
use crate::output::style::Style;
use crate::output::table::Table;

mod chain;

use chain::Chain;

/// Events in one request.
const PAGE: u64 = 1000;

pub(super) async fn list(context: &mut Context<'_>, from: Option<u64>, last: u64) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let mut events = Vec::new();
    let mut next = Some(from.unwrap_or(1));
    while let Some(sequence) = next {
        let page = page(&mut client, sequence).await?;
        events.extend(page.events);
        if from.is_none() {
            let excess = events.len().saturating_sub(usize::try_from(last).unwrap_or(usize::MAX));
            events.drain(..excess);
        }
        next = page.next;
    }
    Ok(context.printer.print(&events, |events, _| table(events))?)
}

async fn page(client: &mut Client, from: u64) -> Result<AuditPage, CliError> {
    let page: AuditPage = client.get(&format!("{}?from={from}&limit={PAGE}", path::AUDIT)).await?;
    match page.next {
        // A page that leads nowhere or back would keep us here for ever.
        Some(next) if next <= from => Err(CliError::failed(
            format!("the controller says that the audit events after {from} begin at {next}"),
            "the controller's answer is wrong: look at its log",
        )),
        _ => Ok(page),
    }
}

fn table(events: &[AuditEvent]) -> String {
    let mut table = Table::new(&["SEQUENCE", "TIME", "ACTOR", "ACTION", "SUBJECT"]);
    for event in events {
        table.row([&event.sequence.to_string(), &event.time, &event.actor, &event.action, &event.subject]);
    }
    table.render()
}

#[derive(Serialize)]
struct Verification {
    ok: bool,
    events: u64,
    /// The last hash that was verified: note it elsewhere, and a later rewrite of the trail can be found out.
    head: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<String>,
}

pub(super) async fn verify(context: &mut Context<'_>) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let mut chain = Chain::default();
    let mut fault = None;
    let mut next = Some(1);
    while let (Some(sequence), None) = (next, &fault) {
        let page = page(&mut client, sequence).await?;
        fault = page.events.iter().find_map(|event| chain.append(event).err());
        next = page.next;
    }
    let fault = fault.map(|fault| fault.to_string());
    let verification = Verification { ok: fault.is_none(), events: chain.length(), head: chain.head(), fault };
    context.printer.print(&verification, text)?;
    if verification.ok { Ok(()) } else { Err(CliError::Reported) }
}

fn text(verification: &Verification, style: Style) -> String {
    let Verification { events, head, .. } = verification;
    match &verification.fault {
        None => format!("{}: {events} events, head {head}\n", style.green("the audit chain is intact")),
        Some(fault) => format!(
            "{}: {}\n  the {events} events before are intact, up to hash {head}\n",
            style.red("the audit chain is BROKEN"),
            printable(fault)
        ),
    }
}
