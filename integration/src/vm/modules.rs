//! The kernel modules of a guest, in the order in which they load.
//!
//! Each module says in its `.modinfo` section what it depends on, so neither `depmod` nor `modprobe` is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::{VmError, io_error};

/// What a guest needs beside what is built into Debian's cloud kernel: its network card, its random number generator, the
/// packet filter's expressions, and looking up, ending and forgetting connections.
const WANTED: [&str; 17] = [
    "virtio_net",
    "virtio_rng",
    "virtio_blk",
    "nf_tables",
    "nft_ct",
    "nft_nat",
    "nft_redir",
    "nft_chain_nat",
    "nft_tproxy",
    "nft_socket",
    "nft_reject_inet",
    "nft_limit",
    "nft_fib_inet",
    "nft_log",
    "inet_diag",
    "tcp_diag",
    "nf_conntrack_netlink",
];

/// A module, ready to be inserted.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// The wanted modules of the kernel below `modules` (its directory in lib/modules) and what they depend on, in order.
pub(super) fn closure(modules: &Path) -> Result<Vec<Module>, VmError> {
    let mut files = BTreeMap::new();
    find(modules, &mut files)?;
    let built_in = modules.join("modules.builtin");
    let built_in = fs::read_to_string(&built_in).map_err(io_error("read", &built_in))?;
    let built_in: BTreeSet<String> = built_in.lines().filter_map(|line| name_of(Path::new(line))).collect();
    let mut order = Order { files, built_in, visited: BTreeSet::new(), modules: Vec::new() };
    for wanted in WANTED {
        order.visit(wanted)?;
    }
    Ok(order.modules)
}

struct Order {
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
    visited: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Order {
    fn visit(&mut self, name: &str) -> Result<(), VmError> {
        if self.built_in.contains(name) || !self.visited.insert(name.to_owned()) {
            return Ok(());
        }
        let file = self.files.get(name).ok_or_else(|| VmError::NoModule(name.to_owned()))?;
        let content = read(file)?;
        for dependency in dependencies(&content) {
            self.visit(&dependency)?;
        }
        self.modules.push(Module { name: name.to_owned(), content });
        Ok(())
    }
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), VmError> {
    for entry in fs::read_dir(directory).map_err(io_error("list", directory))? {
        let path = entry.map_err(io_error("list", directory))?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = name_of(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `virtio_rng` of `drivers/char/hw_random/virtio-rng.ko.xz`; `None` for what is no module.
fn name_of(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// A module's own bytes: the kernel that is to load it cannot decompress them.
fn read(file: &Path) -> Result<Vec<u8>, VmError> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(file).map_err(io_error("read", file));
    }
    let mut xz = Command::new("xz");
    xz.arg("--decompress").arg("--stdout").arg(file).stdin(Stdio::null());
    super::run(&mut xz)
}

/// What the `.modinfo` section says behind `depends=`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = &module[at + KEY.len()..];
    let value = &value[..value.iter().position(|byte| *byte == 0).unwrap_or(value.len())];
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module_itself() {
        let module = b"\x7fELF..license=GPL\0depends=nf_tables,nf-conntrack\0intree=Y\0";
        assert_eq!(dependencies(module), ["nf_tables", "nf_conntrack"]);
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
    }

    #[test]
    fn a_modules_name_has_no_dashes() {
        assert_eq!(name_of(Path::new("a/virtio-rng.ko.xz")).as_deref(), Some("virtio_rng"));
        assert_eq!(name_of(Path::new("modules.builtin")), None);
    }
}
