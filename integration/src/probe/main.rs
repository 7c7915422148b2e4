//! `opencluster-probe`: the traffic, honest and hostile, that tests and the demo send through a rig.
//!
//! Prints one JSON document a line ([`opencluster_integration::report::Event`]).

#![deny(unsafe_code)]

mod attack;
mod bypass;
mod churn;
mod echo;
mod flows;
mod identity;
mod mix;
mod pulse;
mod raw;
mod rogue;
mod scan;
mod socket;
mod transfer;
mod tunnel;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use opencluster_integration::report::Event;

/// Traffic for tests, honest and hostile.
#[derive(Debug, Parser)]
#[command(name = "opencluster-probe", version, max_term_width = 110, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Very many short flows, with ends of all kinds
    Churn(churn::Options),
    /// Echo whatever arrives, on every connection, until its end
    Echo(echo::Options),
    /// Hold many connections; every line on standard input asks all of them for an echo
    Flows(flows::Options),
    /// Many flows at once to an echo server: random sizes, half-closes, resets and stalls, every byte compared
    Mix(mix::Options),
    /// One connection with an echo every few milliseconds: tells when it lives and when it dies
    Pulse(pulse::Options),
    /// Receive, half-closed, and answer with the checksum
    Sink(transfer::SinkOptions),
    /// Send much, half-close, and compare checksums
    Transfer(transfer::Options),
    /// Try to get a marker out of this host by some way or other
    Send(raw::Options),
    /// Be a bad peer
    Attack(attack::Options),
    /// Use one enrolment token several times at the same moment
    Enrol(rogue::RaceOptions),
    /// Be a node that keeps its certificates for other purposes
    Rogue(rogue::NodeOptions),
    /// Make a tunnel to a proxy as somebody, or as somebody else
    Tunnel(tunnel::Options),
    /// Take tunnels from proxies as somebody else
    Impostor(tunnel::ImpostorOptions),
    /// Search the memory of processes for private keys and the schedules of AES keys
    Scan(scan::Options),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("opencluster-probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = match command {
        Command::Churn(options) => runtime.block_on(churn::run(&options)),
        Command::Echo(options) => runtime.block_on(echo::serve(&options)),
        Command::Flows(options) => runtime.block_on(flows::hold(options)),
        Command::Mix(options) => runtime.block_on(mix::run(&options)),
        Command::Pulse(options) => runtime.block_on(pulse::beat(&options)),
        Command::Sink(options) => runtime.block_on(transfer::sink(&options)),
        Command::Transfer(options) => runtime.block_on(transfer::send(&options)),
        Command::Send(options) => raw::send(&options),
        Command::Attack(options) => runtime.block_on(attack::attack(options)),
        Command::Enrol(options) => runtime.block_on(rogue::race(&options)),
        Command::Rogue(options) => runtime.block_on(rogue::node(&options)),
        Command::Tunnel(options) => runtime.block_on(tunnel::make(&options)),
        Command::Impostor(options) => runtime.block_on(tunnel::impostor(&options)),
        Command::Scan(options) => scan::search(&options),
    };
    // Without waiting for a thread that still reads standard input.
    runtime.shutdown_background();
    outcome
}

/// Prints an event at once: whoever reads it acts upon its time.
fn tell(event: &Event) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.flush()?;
    Ok(())
}
