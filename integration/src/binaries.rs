//! Where the programs and the rig's state are: beside each other in one target directory.

use std::env;
use std::path::{Path, PathBuf};

/// What can go wrong finding them.
#[derive(Debug, thiserror::Error)]
pub enum BinariesError {
    /// A program is not built.
    #[error(
        "{0} is not there: build the programs first with `make build` (or name their directory in OPENCLUSTER_BIN_DIR)"
    )]
    Missing(PathBuf),
    /// No directory above this program looks like a target directory.
    #[error("cannot tell the target directory from {0}: name the programs' directory in OPENCLUSTER_BIN_DIR")]
    NoTarget(PathBuf),
    /// The kernel does not tell where this program is.
    #[error("cannot find this program's own path: {0}")]
    Itself(#[from] std::io::Error),
}

/// The directory with the five programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    directory: PathBuf,
}

impl Binaries {
    /// `OPENCLUSTER_BIN_DIR`, or this program's own directory when it was built as one of the five, or the `release`
    /// directory of the target directory that this program (a test, say) was built into.
    pub fn locate() -> Result<Self, BinariesError> {
        if let Some(directory) = env::var_os("OPENCLUSTER_BIN_DIR") {
            return Ok(Self { directory: directory.into() });
        }
        let itself = env::current_exe()?;
        let beside = itself.parent().ok_or_else(|| BinariesError::NoTarget(itself.clone()))?;
        if beside.join("opencluster-rig").is_file() {
            return Ok(Self { directory: beside.to_owned() });
        }
        // A test: target/<profile>/deps/<name>.
        let target = beside.ancestors().nth(2).ok_or_else(|| BinariesError::NoTarget(itself.clone()))?;
        Ok(Self { directory: target.join("release") })
    }

    /// The path of one program.
    pub fn path(&self, program: &str) -> Result<PathBuf, BinariesError> {
        let path = self.directory.join(program);
        if path.is_file() { Ok(path) } else { Err(BinariesError::Missing(path)) }
    }

    /// The directory of all of them.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The target directory that they are in: state and reports go there.
    pub fn target(&self) -> &Path {
        self.directory.parent().unwrap_or(&self.directory)
    }
}
