//! Nodes that are virtual machines: real daemons on Debian's cloud kernel in QEMU, on the switch of a rig whose controller is
//! in a namespace as ever. Only a machine can be stopped, copied, rolled back and moved from outside.
//!
//! QEMU emulates the processor (TCG): it needs no virtualisation of the machine that it runs on, and behaves the same
//! everywhere. A guest is for what happens to machines, not for how fast they are.
//!
//! | module | what it owns |
//! |---|---|
//! | [`image`] | kernel and initramfs |
//! | [`machine`] | one QEMU: its devices, its monitor, its shell |
//! | [`guest`] | a node in a machine, and its copies |
//! | [`network`] | a guest's link to the switch: what it forwards, what is lost |
//! | [`qmp`] | QEMU's monitor |
//! | [`trial`] | what comes of things that are done to a guest |

mod cpio;
mod error;
pub mod guest;
pub mod image;
pub mod machine;
mod modules;
pub mod network;
pub mod qmp;
mod shell;
pub mod trial;

use std::io::Write;
use std::process::{Command, Stdio};

pub use self::error::VmError;
pub use self::guest::{Guest, Options};
pub use self::image::Image;
pub use self::shell::Done;

/// Runs a program to its end: its standard output.
fn run(command: &mut Command) -> Result<Vec<u8>, VmError> {
    run_with_input(command, "")
}

fn run_with_input(command: &mut Command, input: &str) -> Result<Vec<u8>, VmError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let start = |source| VmError::Start { program: program.clone(), source };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(start)?;
    let fed = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().map_err(start)?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(VmError::Failed { program, message });
    }
    fed.map_err(start)?;
    Ok(output.stdout)
}
