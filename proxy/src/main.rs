//! The proxy's process. It is started by the node daemon, unprivileged, with one socket open.

use std::os::fd::RawFd;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use opencluster_api::local::Channel;
use opencluster_proxy::control::inherited::take_control_socket;
use opencluster_proxy::{access_log, control, sandbox};

/// The Opencluster data path. Started by opencluster-node.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The descriptor of the socket to the node daemon.
    #[arg(long)]
    control_fd: RawFd,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .json()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the proxy ends");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let socket = take_control_socket(arguments.control_fd)?;
    let applied = sandbox::confine_process().context("the sandbox")?;
    let (log, writer) = access_log::channel();
    let log_thread = std::thread::Builder::new()
        .name("access-log".to_owned())
        .spawn(move || {
            sandbox::confine_log()?;
            writer.run(std::io::stdout()).context("the access log could not be written")
        })
        .context("the access log's thread")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("control")
        .build()
        .context("the control thread's runtime")?;
    let result = runtime.block_on(async {
        let channel = Channel::new(socket).context("the control socket")?;
        control::run(channel, log, Some(applied)).await.map_err(anyhow::Error::from)
    });
    // The tasks of the runtime hold the last senders of the log.
    drop(runtime);
    match log_thread.join() {
        Ok(written) => written?,
        Err(_) => anyhow::bail!("the access log's thread panicked"),
    }
    result
}
