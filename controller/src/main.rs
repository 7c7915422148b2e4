//! The controller's program: see `opencluster-controller --help`.

#![forbid(unsafe_code)]

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use opencluster_controller::config::{Config, ConfigError};
use opencluster_controller::init::init;
use opencluster_controller::serve::Controller;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The controller of an Opencluster cluster: certificate authority, enrolment, leases, policy API, revocation, audit.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "\
To start a cluster:
  (umask 077; openssl rand -hex 32 > store.key)      the key that the store is sealed with: keep a copy elsewhere
  cat > controller.yaml <<EOF
  trust_domain: prod.example.org
  name: ctl                                          spiffe://prod.example.org/controller/ctl
  state: /var/lib/opencluster/controller.redb
  store_key: {file: /etc/opencluster/store.key}      or {env: NAME} or {credential: NAME} (systemd)
  node_listen: [\"[::]:7443\"]                         gRPC for nodes
  api_listen: [\"127.0.0.1:7480\"]                     HTTPS for operators
  api_socket: /run/opencluster/api.sock              the same on a Unix socket
  lease_ms: 3000
  heartbeat_ms: 500
  svid_ttl_s: 3600
  log: {json: true}
  EOF
  opencluster-controller init --config controller.yaml --admin-token-file admin.token
  opencluster-controller serve --config controller.yaml

The log goes to standard error; RUST_LOG chooses what is in it (default: info).
Exit codes: 0 done, 1 refused or failed, 2 usage or configuration."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a new cluster: store, certificate authority and the first administrator's token. Overwrites nothing.
    Init {
        /// The configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Where the administrator's token goes (mode 0600); to standard output when absent.
        #[arg(long, value_name = "FILE")]
        admin_token_file: Option<PathBuf>,
        /// Where the root certificate goes too (PEM).
        #[arg(long, value_name = "FILE")]
        ca_file: Option<PathBuf>,
    },
    /// Serves until SIGTERM or SIGINT.
    Serve {
        /// The configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Prints the root certificate (PEM), which operators need: OPENCLUSTER_CA.
    Ca {
        /// The configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A standard error that cannot be written to leaves nobody to tell.
            drop(writeln!(std::io::stderr(), "opencluster-controller: {error:#}"));
            ExitCode::from(if error.is::<ConfigError>() { 2 } else { 1 })
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Init { config, admin_token_file, ca_file } => {
            let config = Config::load(&config)?;
            start_log(&config);
            let made = init(&config, admin_token_file.as_deref(), ca_file.as_deref())?;
            let mut out = std::io::stdout().lock();
            writeln!(out, "cluster of {} made; root certificate SHA-256 {}", config.trust_domain, made.fingerprint)?;
            match (made.admin_token, admin_token_file) {
                (Some(token), _) => writeln!(out, "administrator's token, shown once:\n{}", *token)?,
                (None, Some(path)) => writeln!(out, "administrator's token: {}", path.display())?,
                (None, None) => {}
            }
            Ok(())
        }
        Command::Serve { config } => {
            let config = Config::load(&config)?;
            start_log(&config);
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("tokio")?;
            let served = runtime.block_on(serve(&config));
            // What waits for a disk that hangs does not keep the program from ending.
            runtime.shutdown_timeout(Duration::from_secs(1));
            served
        }
        Command::Ca { config } => {
            let path = Config::load(&config)?.root_certificate_path();
            let pem = std::fs::read(&path).with_context(|| {
                format!(
                    "{}: init writes it beside the store: is this the configuration of the cluster?",
                    path.display()
                )
            })?;
            std::io::stdout().write_all(&pem)?;
            Ok(())
        }
    }
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    // From here on the signals are ours: none ends the program halfway.
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let controller = Controller::start(config).await?;
    tracing::info!(
        event = "ready",
        nodes = ?controller.node_addresses,
        api = ?controller.api_addresses,
        version = env!("CARGO_PKG_VERSION"),
        "ready"
    );
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!(event = "stopping", signal = "SIGTERM", "stopping"),
            _ = interrupt.recv() => tracing::info!(event = "stopping", signal = "SIGINT", "stopping"),
        }
    };
    controller.run_until(stop).await?;
    tracing::info!(event = "stopped", "stopped");
    Ok(())
}

fn start_log(config: &Config) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if config.log.json {
        log.json().flatten_event(true).init();
    } else {
        log.init();
    }
}
