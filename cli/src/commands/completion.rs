//! `opencluster completion`

use clap::CommandFactory;
use clap_complete::Shell;
use serde_json::json;

use super::Context;
use crate::args::Arguments;
use crate::error::CliError;

pub(super) fn run(context: &mut Context<'_>, shell: Shell) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "opencluster", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    let result = json!({ "shell": shell.to_string(), "script": script });
    Ok(context.printer.print(&result, |_, _| script)?)
}
