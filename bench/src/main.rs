//! `opencluster-bench`: see `--help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    opencluster_bench::args::main()
}
