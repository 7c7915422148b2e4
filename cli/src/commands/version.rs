//! `opencluster version`

use opencluster_api::rest::{ClusterStatus, path};
use serde::Serialize;

use super::Context;
use crate::error::CliError;
use crate::output::human::printable;

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    /// Absent when no controller is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    controller: Option<String>,
}

pub(super) async fn run(context: &mut Context<'_>) -> Result<(), CliError> {
    let controller = if context.connection.names_server() {
        Some(context.client().await?.get::<ClusterStatus>(path::STATUS).await?.version)
    } else {
        None
    };
    let versions = Versions { client: env!("CARGO_PKG_VERSION"), controller };
    Ok(context.printer.print(&versions, |versions, _| {
        let controller = versions.controller.as_deref().map_or("no controller is named".into(), printable);
        format!("opencluster  {}\ncontroller   {controller}\n", versions.client)
    })?)
}
