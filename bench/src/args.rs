//! The command line.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::contender::External;
use crate::error::BenchError;
use crate::load::{self, Listeners, Outcome, Pattern, Plan};
use crate::report::flame::Profile;
use crate::report::{Machine, Report, markdown};
use crate::runner::{self, Results, Settings};
use crate::scenario::Scenario;
use crate::{contender, process, topology};

/// Refused, failed, or the bar is not met.
const FAILED: u8 = 1;
/// What clap itself exits with.
const WRONG_USAGE: u8 = 2;

/// A quick run has the first so many contenders: those that the bar needs.
const QUICK: usize = 4;

const ABOUT: &str = "\
Measures Opencluster against what one would use instead, in one interleaved run.

Every contender carries the same load between two hosts, which are network namespaces on this machine. The load \
generator is this program itself. Needs root, iproute2, and the contenders' programs (haproxy, stunnel4, nginx with its stream module, wireguard-go).";

const AFTER: &str = "\
Scenarios:
  rr-N        64-byte round trips over N connections, each sending again when it has its answer
  fixed-R     R round trips a second over 16 connections; latency counts from the moment a request
              should have left, so a stall is seen by all that it delays (coordinated omission)
  crr-N       N clients connect, make one round trip and close
  stream-N    bulk from client to server over N flows (stream-N-down: the other way)
  first-R     R new connections a second, one at a time: how long until the first answer
  open-N      how long it takes to open N flows one after another
  idle-N      memory for each of N flows that are open and silent, and the CPU time that they take
  fair-N      p99 of N small flows (at 2,000/s together) beside one bulk flow, and alone
Contenders:
  direct      no proxy and no encryption: the floor
  us          Opencluster: two nodes of a rig, and a controller
  haproxy     two haproxy in TCP mode, mutual TLS 1.3 between them
  stunnel     two stunnel, mutual TLS 1.3 between them
  nginx       two nginx with the stream module, mutual TLS 1.3 between them
  wireguard   a WireGuard tunnel in user space (wireguard-go)
  plain       two haproxy in TCP mode, nothing encrypted: what two hops cost at all
  and what --external describes

Examples:
  opencluster-bench                                    the whole report, about 20 minutes
  opencluster-bench --quick                            a first impression, about 3 minutes
  opencluster-bench --scenarios rr-16,crr-8 --rounds 9
  opencluster-bench --contenders direct,haproxy -o json | jq '.scenarios[0].contenders'

Writes report.json, report.md and SVG plots into the folder of --out, also when something failed.
Exit codes: 0 all measured and the bar met (or not part of the run), 1 failed or the bar not met, 2 wrong usage.";

#[derive(Debug, Parser)]
#[command(name = "opencluster-bench", version, about = ABOUT, after_help = AFTER, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Three short rounds instead of seven, of what the bar needs
    #[arg(long)]
    quick: bool,
    /// Only these scenarios, separated by commas [default: those of the report; quick: rr to idle-10k]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…", value_parser = parse_scenario)]
    scenarios: Vec<Scenario>,
    /// Only these contenders, separated by commas [default: all; quick: direct to stunnel]
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    contenders: Vec<String>,
    /// One more contender, as this JSON file describes it (docs/performance.md); may be given several times
    #[arg(long, value_name = "FILE")]
    external: Vec<PathBuf>,
    /// Rounds of every scenario and contender [default: 7, quick: 3]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: Option<u16>,
    /// Rounds of open-N and idle-N, which take long [default: 2, quick: 1]
    #[arg(long, value_name = "ROUNDS", value_parser = clap::value_parser!(u16).range(1..=1000))]
    heavy_rounds: Option<u16>,
    /// Measured seconds of a round [default: 1.2, quick: 0.6]
    #[arg(long, value_parser = parse_seconds, allow_negative_numbers = true)]
    seconds: Option<f64>,
    /// Where the report, its plots, and the contenders' configurations and logs go
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    out: PathBuf,
    /// What to print at the end
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// Name of the run; runs of different names can exist side by side (but disturb each other's figures)
    #[arg(long, default_value = "bench", value_parser = parse_name)]
    name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The tables of report.md
    Table,
    /// report.json
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The server of the load generator: echo, sink and source, until killed
    Serve {
        /// Where to echo
        #[arg(long, value_name = "ADDRESS:PORT")]
        echo: SocketAddr,
        /// Where to swallow bytes and count them
        #[arg(long, value_name = "ADDRESS:PORT")]
        sink: SocketAddr,
        /// Where to send bytes from
        #[arg(long, value_name = "ADDRESS:PORT")]
        source: SocketAddr,
    },
    /// One run of the load generator's client; prints its outcome as JSON
    Load(LoadArgs),
    /// A flame graph (SVG) of what `perf script -F comm,ip,sym` prints, from standard input
    Flame {
        /// What it shows
        #[arg(long, default_value = "Profile")]
        title: String,
    },
    /// Remove what a killed run left behind
    Clean {
        /// Name of the run
        #[arg(long, default_value = "bench", value_parser = parse_name)]
        name: String,
    },
    /// Run a command in a network namespace
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        net: String,
        #[arg(long)]
        parent: u32,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

#[derive(Debug, Args)]
struct LoadArgs {
    /// What to do
    #[arg(value_enum)]
    pattern: PatternArg,
    /// The server's address
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// Connections, flows or clients
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    connections: u32,
    /// Measured seconds
    #[arg(long, default_value_t = 2.0, value_parser = parse_seconds, allow_negative_numbers = true)]
    seconds: f64,
    /// Seconds before measuring
    #[arg(long, default_value_t = 0.2, value_parser = parse_seconds, allow_negative_numbers = true)]
    warmup: f64,
    /// Requests or connections a second, for fixed and first
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// For hold: wait for a line also when so many are open; may be given several times
    #[arg(long, value_name = "CONNECTIONS")]
    mark: Vec<usize>,
    /// Bytes of a request
    #[arg(long, default_value_t = 64, value_parser = parse_size)]
    size: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PatternArg {
    /// Round trips, closed loop
    Rr,
    /// Round trips at a fixed rate
    Fixed,
    /// Connect, round trip, close
    Crr,
    /// The same, one connection at a time, so many a second
    First,
    /// Bulk to the server
    Stream,
    /// Bulk from the server
    StreamDown,
    /// Open connections and hold them until a line comes on standard input
    Hold,
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        None => run(&cli.run),
        Some(Command::Serve { echo, sink, source }) => {
            load::serve(&Listeners { echo, sink, source }, || print_line("ready")).map(|()| ExitCode::SUCCESS)
        }
        Some(Command::Load(args)) => client(&args).map(|()| ExitCode::SUCCESS),
        Some(Command::Flame { title }) => flame(&title).map(|()| ExitCode::SUCCESS),
        Some(Command::Clean { name }) => runtime().and_then(|rt| rt.block_on(clean(&name))).map(|()| ExitCode::SUCCESS),
        Some(Command::Enter { net, parent, command }) => Err(process::enter(&net, parent, &command)),
    };
    result.unwrap_or_else(|error| {
        eprintln!("opencluster-bench: {error}");
        ExitCode::from(if matches!(error, BenchError::Usage(_)) { WRONG_USAGE } else { FAILED })
    })
}

fn run(args: &RunArgs) -> Result<ExitCode, BenchError> {
    let settings = settings(args)?;
    let machine = machine()?;
    if machine.load_average > 0.7 {
        eprintln!(
            "the load average of this machine is {:.2}: other work on it will distort the figures",
            machine.load_average
        );
    }
    let mut results = Results::new(contender::versions(&settings.contenders, &settings.externals));
    let outcome = runtime()?.block_on(until_signal(&settings, &mut results));
    let report = Report::build(&settings, machine, &results, outcome.as_ref().err().map(ToString::to_string));
    report.write(&settings.folder)?;
    match args.output {
        Format::Json => print_line(&report.to_json()?)?,
        Format::Table => print_line(&markdown::render(&report, &[]))?,
    }
    eprintln!("the report is in {}", settings.folder.display());
    outcome?;
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// The run, which a signal ends; the namespaces are removed either way.
async fn until_signal(settings: &Settings, results: &mut Results) -> Result<(), BenchError> {
    let topology = topology::Topology::up(&settings.name).await?;
    contender::clean(&settings.name).await?;
    let listen = |kind| tokio::signal::unix::signal(kind).map_err(BenchError::file("listening for", "signals"));
    let mut terminate = listen(tokio::signal::unix::SignalKind::terminate())?;
    let mut interrupt = listen(tokio::signal::unix::SignalKind::interrupt())?;
    let outcome = tokio::select! {
        outcome = runner::run(settings, &topology, results) => outcome,
        _ = terminate.recv() => Err(BenchError::Interrupted),
        _ = interrupt.recv() => Err(BenchError::Interrupted),
    };
    // Dropping the run killed its programs. Of several errors the first matters most.
    let removed = topology.remove_all().await;
    let cleaned = contender::clean(&settings.name).await;
    outcome.and(removed).and(cleaned)
}

fn flame(title: &str) -> Result<(), BenchError> {
    let profile = Profile::read(std::io::stdin().lock()).map_err(BenchError::file("reading", "standard input"))?;
    if profile.samples() == 0 {
        return Err(BenchError::Usage(
            "there are no samples on standard input: is it the output of `perf script -F comm,ip,sym`?".into(),
        ));
    }
    print_line(&profile.svg(title))
}

async fn clean(name: &str) -> Result<(), BenchError> {
    topology::clean(name).await?;
    contender::clean(name).await
}

fn settings(args: &RunArgs) -> Result<Settings, BenchError> {
    fs::create_dir_all(&args.out).map_err(BenchError::file("creating", &args.out))?;
    let folder = fs::canonicalize(&args.out).map_err(BenchError::file("finding", &args.out))?;
    let scenarios = match &args.scenarios {
        named if !named.is_empty() => named.clone(),
        _ if args.quick => Scenario::contract(),
        _ => Scenario::report(),
    };
    let externals =
        args.external.iter().map(|f| External::read(f).map(Arc::new)).collect::<Result<Vec<_>, BenchError>>()?;
    let contenders = if args.contenders.is_empty() {
        let described = externals.iter().map(|e| e.name.clone());
        let built_in = contender::NAMES.into_iter().take(if args.quick { QUICK } else { contender::NAMES.len() });
        built_in.map(String::from).chain(described).collect()
    } else {
        args.contenders.clone()
    };
    for name in &contenders {
        contender::Kind::from_name(name, &externals)?;
    }
    let rounds = usize::from(args.rounds.unwrap_or(if args.quick { 3 } else { 7 }));
    Ok(Settings {
        scenarios: unique(scenarios.iter().map(ToString::to_string)),
        contenders: unique(contenders.into_iter()),
        externals,
        rounds,
        heavy_rounds: args.heavy_rounds.map_or_else(|| rounds.min(if args.quick { 1 } else { 2 }), usize::from),
        seconds: args.seconds.unwrap_or(if args.quick { 0.6 } else { 1.2 }),
        warmup_seconds: 0.2,
        open_files: process::raise_open_files()?,
        name: args.name.clone(),
        folder,
    })
}

fn unique(names: impl Iterator<Item = String>) -> Vec<String> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

fn client(args: &LoadArgs) -> Result<(), BenchError> {
    let pattern = match args.pattern {
        PatternArg::Hold => {
            let count = args.connections as usize;
            return load::hold(args.to, count, args.size, &args.mark, |outcome| {
                print_json(outcome)?;
                let mut line = [0; 1];
                // The end of the input is as good as a line: whoever held it is gone.
                std::io::stdin().read(&mut line).map(|_| ()).map_err(BenchError::file("reading", "standard input"))
            })
            .map(|_| ());
        }
        PatternArg::Rr => Pattern::RoundTrip,
        PatternArg::Fixed => Pattern::Fixed(args.rate),
        PatternArg::Crr => Pattern::Crr,
        PatternArg::First => Pattern::First(args.rate),
        PatternArg::Stream => Pattern::Stream,
        PatternArg::StreamDown => Pattern::StreamDown,
    };
    print_json(&load::run(&Plan {
        pattern,
        to: args.to,
        connections: args.connections as usize,
        length: Duration::from_secs_f64(args.seconds),
        warmup: Duration::from_secs_f64(args.warmup),
        size: args.size,
    })?)
}

fn print_json(outcome: &Outcome) -> Result<(), BenchError> {
    let text = serde_json::to_string(outcome)
        .map_err(|source| BenchError::Json { what: "the outcome of the load".into(), source })?;
    print_line(&text)
}

fn print_line(text: &str) -> Result<(), BenchError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(BenchError::file("writing", "standard output"))
}

fn runtime() -> Result<tokio::runtime::Runtime, BenchError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(BenchError::file("starting", "the runtime"))
}

fn machine() -> Result<Machine, BenchError> {
    let read = |path: &str| fs::read_to_string(path).map_err(BenchError::file("reading", path));
    let after = |text: &str, name: &str| {
        let line = text.lines().find(|l| l.starts_with(name));
        line.and_then(|l| l.split_once(':')).map_or_else(|| "unknown".into(), |(_, value)| value.trim().to_owned())
    };
    let memory = after(&read("/proc/meminfo")?, "MemTotal");
    Ok(Machine {
        cpu: after(&read("/proc/cpuinfo")?, "model name"),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        memory_bytes: memory.split(' ').next().and_then(|k| k.parse::<u64>().ok()).unwrap_or(0) * 1024,
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        load_average: read("/proc/loadavg")?.split(' ').next().and_then(|l| l.parse().ok()).unwrap_or(0.0),
    })
}

fn parse_scenario(text: &str) -> Result<Scenario, String> {
    text.parse()
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be a number of seconds between 0 and 3600".into()),
    }
}

fn parse_size(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(size) if (1..=load::MAX_SIZE).contains(&size) => Ok(size),
        _ => Err(format!("must be a number of bytes between 1 and {}", load::MAX_SIZE)),
    }
}

fn parse_name(text: &str) -> Result<String, String> {
    // What the rig takes as a name.
    if (1..=12).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
        Ok(text.to_owned())
    } else {
        Err("must be 1 to 12 lower-case letters and digits".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, String> {
        Cli::try_parse_from(line.split(' ')).map_err(|e| e.to_string())
    }

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn wrong_arguments_say_what_is_possible() {
        for (line, hint) in [
            ("b --scenarios rr-1,ping", "rr-16"),
            ("b --rounds 0", "1..=1000"),
            ("b --seconds -1", "between 0 and 3600"),
            ("b --seconds nan", "between 0 and 3600"),
            ("b --name ../x", "lower-case"),
            ("b load rr", "--to"),
            ("b load rr --to nowhere", "--to"),
            ("b load rr --to 127.0.0.1:1 --size 0", "between 1 and"),
            ("b --quick load rr --to 127.0.0.1:1", "cannot be used with"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(hint), "{line}: {error}");
        }
    }

    #[test]
    fn an_unknown_contender_is_refused_before_anything_starts() {
        let folder = tempfile::tempdir().unwrap();
        let cli = parse(&format!("b --out {} --contenders envoy", folder.path().display())).unwrap();
        assert!(settings(&cli.run).unwrap_err().to_string().contains("haproxy"));
    }

    #[test]
    fn defaults_are_the_contract_and_quick_is_shorter() {
        let folder = tempfile::tempdir().unwrap();
        let of = |extra: &str| {
            let line = format!("b --out {}{extra}", folder.path().display());
            settings(&parse(&line).unwrap().run).unwrap()
        };
        let (full, quick) = (of(""), of(" --quick"));
        assert_eq!(quick.scenarios, crate::scenario::CONTRACT);
        assert!(quick.scenarios.iter().all(|s| full.scenarios.contains(s)));
        assert_eq!((full.contenders.len(), &quick.contenders[..]), (7, &full.contenders[..QUICK]));
        assert!(["us", "haproxy", "stunnel"].iter().all(|c| quick.contenders.iter().any(|q| q == c)), "for the bar");
        assert!(full.rounds >= 7 && quick.rounds < full.rounds && quick.seconds < full.seconds);
        assert_eq!(of(" --scenarios rr-1,rr-1").scenarios, ["rr-1"]);
        assert_eq!(of(" --quick --rounds 5").rounds, 5);
        let heavy = ["", " --quick", " --rounds 1", " --heavy-rounds 7"].map(|extra| of(extra).heavy_rounds);
        assert_eq!(heavy, [2, 1, 1, 7]);
    }
}
