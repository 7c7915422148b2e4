//! What a guest boots: Debian's cloud kernel, and an initramfs made here of busybox, the kernel's modules, our programs and
//! the shared libraries that these need. There is no disk.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::cpio::Archive;
use super::error::{VmError, io_error};
use super::modules;
use crate::binaries::Binaries;

/// What runs in a guest.
const PROGRAMS: [&str; 3] = ["opencluster-node", "opencluster-proxy", "opencluster-probe"];

/// Where the programs are in a guest.
pub(super) const PROGRAM_DIRECTORY: &str = "/opt/opencluster";

const INIT: &str = include_str!("init.sh");

/// Directories of the initramfs, each after its parent.
const DIRECTORIES: [&str; 14] = [
    "bin",
    "dev",
    "etc",
    "lib64",
    "modules",
    "opt",
    "opt/opencluster",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "var",
    "etc/opencluster",
];

/// A kernel and the common part of every guest's initramfs.
#[derive(Debug)]
pub struct Image {
    /// The kernel.
    pub(super) kernel: PathBuf,
    /// Everything but what one guest has for itself.
    common: Vec<u8>,
}

impl Image {
    /// Puts it together from the kernel that `scripts/guest-packages` fetched and the programs as they are now.
    pub fn build(binaries: &Binaries) -> Result<Self, VmError> {
        let packages = binaries.target().join("vm/packages");
        let absent = || VmError::NoPackages(packages.clone());
        let kernel = only_entry(&packages.join("boot"), "vmlinuz-").ok_or_else(absent)?;
        let modules = only_entry(&packages.join("lib/modules"), "").ok_or_else(absent)?;
        let mut builder = Builder { archive: Archive::new(Vec::new()), directories: BTreeSet::new() };
        for directory in DIRECTORIES {
            builder.parents(&format!("/{directory}/x"))?;
        }
        builder.archive.character_device("dev/console", 5, 1).map_err(in_memory)?;
        builder.archive.file("init", 0o755, INIT.as_bytes()).map_err(in_memory)?;
        // Statically linked.
        builder.copy(&packages.join("bin/busybox"), "/bin/busybox")?;
        let mut order = String::new();
        for module in modules::closure(&modules)? {
            builder.archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.content).map_err(in_memory)?;
            order.extend([&module.name, "\n"]);
        }
        builder.archive.file("modules/order", 0o644, order.as_bytes()).map_err(in_memory)?;
        let mut libraries = BTreeSet::new();
        for program in PROGRAMS {
            let path = binaries.path(program)?;
            builder.copy(&path, &format!("{PROGRAM_DIRECTORY}/{program}"))?;
            libraries.extend(libraries_of(&path)?);
        }
        for library in libraries {
            builder.copy(Path::new(&library), &library)?;
        }
        Ok(Self { kernel, common: builder.archive.finish().map_err(in_memory)? })
    }

    /// Writes a guest's initramfs: the common part and these files of its own.
    pub(super) fn write_initramfs(&self, path: &Path, own: &[(&str, String)]) -> Result<(), VmError> {
        let failed = || io_error("write", path);
        let mut out = BufWriter::new(File::create(path).map_err(failed())?);
        out.write_all(&self.common).map_err(failed())?;
        let mut archive = Archive::new(out);
        for (name, content) in own {
            archive.file(name, 0o600, content.as_bytes()).map_err(failed())?;
        }
        archive.finish().and_then(|mut out| out.flush()).map_err(failed())
    }
}

struct Builder {
    archive: Archive<Vec<u8>>,
    directories: BTreeSet<String>,
}

impl Builder {
    /// Adds a file of this machine, and the directories above it.
    fn copy(&mut self, from: &Path, to: &str) -> Result<(), VmError> {
        self.parents(to)?;
        let content = fs::read(from).map_err(io_error("read", from))?;
        self.archive.file(to, 0o755, &content).map_err(in_memory)
    }

    fn parents(&mut self, path: &str) -> Result<(), VmError> {
        let mut ends: Vec<usize> = path.match_indices('/').map(|(at, _)| at).collect();
        ends.retain(|at| *at > 0);
        for end in ends {
            if self.directories.insert(path[..end].to_owned()) {
                self.archive.directory(&path[..end]).map_err(in_memory)?;
            }
        }
        Ok(())
    }
}

/// The one entry of a directory whose name begins so.
fn only_entry(directory: &Path, prefix: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?;
    let mut found = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path());
    let entry = found.next()?;
    found.next().is_none().then_some(entry)
}

/// The paths of a program's shared libraries and of its loader, as `ldd` prints them.
fn libraries_of(program: &Path) -> Result<Vec<String>, VmError> {
    let mut ldd = Command::new("ldd");
    ldd.arg(program).stdin(Stdio::null());
    Ok(parse_ldd(&String::from_utf8_lossy(&super::run(&mut ldd)?)))
}

fn parse_ldd(text: &str) -> Vec<String> {
    text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect()
}

fn in_memory(source: std::io::Error) -> VmError {
    VmError::Io { action: "add to the archive", path: PathBuf::from("initramfs"), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_with_a_path() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(parse_ldd(text), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }
}
