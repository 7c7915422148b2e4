//! How fast a revocation is everywhere: on real nodes, and on many simulated ones. The figures go into the report of the
//! benchmarks, under `failclosed`.

mod api;
mod figures;
mod real;
mod simulated;

use anyhow::ensure;
use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use opencluster_integration::binaries::Binaries;
use serde_json::json;

/// See [`revocation`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Real nodes: daemons and proxies in namespaces of their own; 0: none
    #[arg(long, value_name = "N", default_value_t = 50)]
    nodes: usize,
    /// Revocations of a workload there
    #[arg(long, value_name = "N", default_value_t = 60)]
    rounds: usize,
    /// Revocations of a node there
    #[arg(long, value_name = "N", default_value_t = 10)]
    node_rounds: usize,
    /// Simulated nodes: real sessions with a real controller, nothing behind them; 0: none
    #[arg(long, value_name = "N", default_value_t = 1000)]
    simulated: usize,
    /// Revocations there, of workloads and of nodes
    #[arg(long, value_name = "N", default_value_t = 100)]
    simulated_rounds: usize,
    /// How long it may take from the command to the last acknowledgement, and to the last byte, 99 of 100 times
    #[arg(long, value_name = "MS", default_value_t = 500.0)]
    bar_ms: f64,
}

/// Measures, prints and reports.
pub(crate) fn revocation(options: &Options) -> anyhow::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let bar = options.bar_ms;
    let mut report = json!({"bar": {"last_acknowledgement_p99_ms": bar, "last_byte_p99_ms": bar}});
    if options.simulated > 0 {
        report["simulation"] = simulated::measure(options.simulated, options.simulated_rounds)?;
    }
    if options.nodes > 0 {
        report["rig"] = real::measure(options.nodes, options.rounds, options.node_rounds)?;
    }
    // Bytes flow between real nodes only.
    let mut met = figures::all_below(&report, "last_acknowledgement_ms", bar);
    if options.nodes > 0 {
        met &= figures::all_below(&report, "last_byte_ms", bar);
    }
    let whole = options.nodes > 0 && options.simulated > 0;
    report["ok"] = (met && whole).into();
    println!("{}", serde_json::to_string_pretty(&report)?);
    if whole {
        let target = Binaries::locate()?.target().to_owned();
        opencluster_integration::figures::record(&target, "revocation", report)?;
        eprintln!("written to {}", target.join("bench/report.json").display());
    } else {
        eprintln!("a part of it only: not written to the report");
    }
    ensure!(
        met,
        "the bar is not met: p99 from the command to the last acknowledgement and the last byte at most {bar} ms"
    );
    Ok(())
}
