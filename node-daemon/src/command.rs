//! The command line.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::workload::protocol::{Answer, Request};
use crate::{daemon, supervise, workload};

/// The node daemon of Opencluster Secure Mode.
#[derive(Debug, Parser)]
#[command(name = "opencluster-node", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Enrol this node and carry traffic while its controller wants it to.
    Serve {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Close this host's network, and leave it closed: for early boot, before `serve`.
    Block {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Run a command as a workload of this node.
    Run(workload::run::Arguments),
    /// Show how this node is.
    Status {
        /// The daemon's socket.
        #[arg(long, default_value = "/run/opencluster/node.sock")]
        socket: PathBuf,
        /// One JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Read a configuration file and say what is wrong with it.
    CheckConfig {
        /// The configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Become the proxy (for the daemon itself).
    #[command(hide = true)]
    ExecProxy(supervise::exec::Arguments),
}

/// Does what the command line says; the exit code is the command's own where it became one.
pub fn run() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve { config } => report(serve(&config)),
        Command::Block { config } => report(block(&config)),
        Command::Run(arguments) => match workload::run::run(&arguments) {
            Ok(never) => match never {},
            Err(error) => {
                complain(&error);
                ExitCode::from(error.exit_code())
            }
        },
        Command::Status { socket, json } => report(status(&socket, json)),
        Command::CheckConfig { config } => report(check_config(&config)),
        Command::ExecProxy(arguments) => match supervise::exec::run(&arguments) {
            Ok(never) => match never {},
            Err(error) => {
                complain(&error);
                ExitCode::FAILURE
            }
        },
    }
}

fn report(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn complain(error: &dyn std::fmt::Display) {
    eprintln!("opencluster-node: {error}");
}

fn serve(path: &std::path::Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    start_log(config.log.json)?;
    let result = daemon::run(config);
    if let Err(error) = &result {
        tracing::error!(%error, "ending");
    }
    Ok(result?)
}

fn block(path: &std::path::Path) -> anyhow::Result<()> {
    daemon::block(&Config::load(path)?)?;
    writeln!(std::io::stdout(), "The network is closed until opencluster-node serve takes over.")?;
    Ok(())
}

fn status(socket: &std::path::Path, json: bool) -> anyhow::Result<()> {
    match workload::run::ask(socket, &Request::Status)? {
        Answer::Status { status } if json => writeln!(std::io::stdout(), "{}", serde_json::to_string(&status)?)?,
        Answer::Status { status } => write!(std::io::stdout(), "{status}")?,
        Answer::Refused { reason } => anyhow::bail!(reason),
        Answer::Admitted => anyhow::bail!("the daemon gave an answer to another question"),
    }
    Ok(())
}

fn check_config(path: &std::path::Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    writeln!(std::io::stdout(), "{}: node {}: no faults found", path.display(), config.node)?;
    Ok(())
}

fn start_log(json: bool) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let started = if json { log.json().try_init() } else { log.try_init() };
    started.map_err(|error| anyhow::anyhow!(error)).context("cannot start the log")
}
