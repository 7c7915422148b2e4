//! The program `opencluster-node`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    opencluster_node::command::run()
}
