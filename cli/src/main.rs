//! The operator's command.

#![forbid(unsafe_code)]

mod args;
mod client;
mod commands;
mod documents;
mod error;
mod output;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;

use crate::args::Arguments;
use crate::commands::Context;
use crate::error::CliError;
use crate::output::style::Style;
use crate::output::{Format, Printer};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let format = arguments.global.output;
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let told = if error.silent() { Ok(()) } else { tell(&error, format) };
            // Where not even standard error can be written, only the exit code is left to say so.
            if told.is_ok() { error.exit_code() } else { ExitCode::FAILURE }
        }
    }
}

fn run(arguments: Arguments) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (stdout, stderr) = (io::stdout(), io::stderr());
    let style = Style::for_stream(stdout.is_terminal());
    let (mut out, mut notes) = (io::BufWriter::new(stdout.lock()), stderr.lock());
    let printer = Printer::new(arguments.global.output, style, &mut out, &mut notes);
    let context = Context { printer, connection: arguments.global.connection };
    let done = runtime.block_on(commands::run(context, arguments.command));
    out.flush()?;
    done
}

fn tell(error: &CliError, format: Format) -> io::Result<()> {
    let stderr = io::stderr();
    let style = Style::for_stream(stderr.is_terminal());
    let mut stderr = stderr.lock();
    match format {
        Format::Json => {
            serde_json::to_writer_pretty(&mut stderr, &error.to_json())?;
            stderr.write_all(b"\n")
        }
        Format::Table | Format::Yaml => stderr.write_all(error.render(style).as_bytes()),
    }
}
