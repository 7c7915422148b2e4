//! The command line of `opencluster-rig`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use opencluster_integration::layout::DEFAULT_RIG;
use opencluster_integration::process::ProcessId;
use opencluster_integration::up::Options;

/// Whole Opencluster clusters on one machine: real daemons on hosts that are network namespaces.
#[derive(Debug, Parser)]
#[command(name = "opencluster-rig", version, max_term_width = 110, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a rig and wait until it is ready; one of the same name is removed first
    Up(UpArgs),
    /// Run a command on a node as a workload: captured, encrypted and decided like any other
    Exec {
        /// Where
        node: String,
        /// The workload that it runs as [default: the one named like the node]
        #[arg(long = "as", value_name = "WORKLOAD")]
        workload: Option<String>,
        /// The workload's namespace
        #[arg(long, value_name = "NS", default_value = "default")]
        namespace: String,
        /// On the bare host instead, outside of every workload: a node gives it no network but loopback
        #[arg(long, conflicts_with_all = ["workload", "namespace"])]
        host: bool,
        #[command(flatten)]
        name: NameArg,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Remove a rig with everything that runs in it; works also after a crash
    Down {
        #[command(flatten)]
        name: NameArg,
    },
    /// Show the hosts, their processes and the nodes' states
    Status {
        #[command(flatten)]
        name: NameArg,
    },
    /// Capture what is on a host's link, taken at the switch, until interrupted
    Capture {
        /// Whose link
        host: String,
        /// The file to write (pcap)
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        #[command(flatten)]
        name: NameArg,
    },
    /// Show it all: real applications, the wire, policies, an intruder, a lost controller
    Demo {
        /// Leave a cluster up afterwards, and say how to play with it
        #[arg(long)]
        keep: bool,
        #[command(flatten)]
        name: NameArg,
    },
    /// Measure how fast a revocation is everywhere, on real nodes and on many simulated ones
    MeasureRevocation(crate::measure::Options),
    /// Print the log of a host's daemon (ctl is the controller)
    Logs {
        /// Whose
        host: String,
        #[command(flatten)]
        name: NameArg,
    },
    /// Keeps a host's namespaces (started by `up`)
    #[command(hide = true)]
    Hold {
        #[arg(long)]
        netns: String,
        #[arg(long)]
        cgroup: String,
        #[arg(long)]
        hosts: PathBuf,
    },
    /// Runs a program inside a host's namespaces (started by `up` and `exec`)
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        netns: String,
        #[arg(long, value_parser = process)]
        holder: ProcessId,
        #[arg(long)]
        cgroup: String,
        #[arg(long)]
        detach: bool,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

/// Which rig.
#[derive(Args, Debug)]
pub(crate) struct NameArg {
    /// The rig's name: the first part of its namespaces' names
    #[arg(long, value_name = "RIG", default_value = DEFAULT_RIG)]
    pub(crate) name: String,
}

/// See [`Command::Up`].
#[derive(Args, Debug)]
pub(crate) struct UpArgs {
    /// The nodes' names
    #[arg(long, value_delimiter = ',', default_value = "a,b", value_name = "a,b,…")]
    nodes: Vec<String>,
    /// Hosts on the same switch without Opencluster: intruders, or something to compare with
    #[arg(long, value_delimiter = ',', value_name = "x,y,…")]
    bare: Vec<String>,
    /// Resources to apply; may be repeated
    #[arg(long, value_name = "FILE")]
    apply: Vec<PathBuf>,
    /// How long a lease lasts, in milliseconds
    #[arg(long, value_name = "N", default_value_t = 3000)]
    lease_ms: u32,
    /// How often nodes send heartbeats, in milliseconds
    #[arg(long, value_name = "N", default_value_t = 500)]
    heartbeat_ms: u32,
    /// How many controllers
    #[arg(long, value_name = "N", default_value_t = 1)]
    controllers: usize,
    /// Threads of each proxy [default: one for two cores]
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// How the nodes carry flows
    #[arg(long, value_name = "HOW", default_value = "shared", value_parser = ["shared", "leased"])]
    tunnels: String,
    #[command(flatten)]
    name: NameArg,
}

impl From<UpArgs> for Options {
    fn from(arguments: UpArgs) -> Self {
        let UpArgs { nodes, bare, apply, lease_ms, heartbeat_ms, controllers, workers, tunnels, name } = arguments;
        Self { name: name.name, nodes, bare, apply, lease_ms, heartbeat_ms, controllers, workers, tunnels }
    }
}

fn process(text: &str) -> Result<ProcessId, String> {
    let (pid, started) = text.split_once(':').ok_or("expected PID:START")?;
    Ok(ProcessId {
        pid: pid.parse().map_err(|error| format!("PID: {error}"))?,
        started: started.parse().map_err(|error| format!("START: {error}"))?,
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_command_keeps_its_own_options() {
        let arguments = ["opencluster-rig", "exec", "a", "--as", "web", "--", "curl", "--name", "x"];
        let Command::Exec { node, workload, command, name, .. } = Arguments::parse_from(arguments).command else {
            panic!("not exec");
        };
        assert_eq!((node.as_str(), workload.as_deref(), name.name.as_str()), ("a", Some("web"), DEFAULT_RIG));
        assert_eq!(command, ["curl", "--name", "x"]);
    }
}
