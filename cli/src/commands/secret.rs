//! Tokens that are shown once: to standard output, or to a new file that only its owner can read.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::error::CliError;

/// Writes a token to a file that must not exist yet: an existing one could be readable by others, or open already.
pub(super) fn write(path: &Path, token: &str) -> Result<(), CliError> {
    let failed = |source| CliError::File { action: "write", path: path.to_owned(), source };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    file.write_all(format!("{token}\n").as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}

/// Makes sure that [`write`] can succeed before a token is made that could then be lost.
pub(super) fn check(path: Option<&Path>) -> Result<(), CliError> {
    match path {
        Some(path) if path.symlink_metadata().is_ok() => Err(CliError::failed(
            format!("{} exists already", path.display()),
            "name a new file: a token is not written over something else",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_its_owner_reads_it_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        check(Some(&path)).expect("nothing is there");
        write(&path, "oct1.a.b.c").expect("written");
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "oct1.a.b.c\n");
        assert_eq!(path.metadata().expect("metadata").permissions().mode() & 0o777, 0o600);
        assert!(check(Some(&path)).is_err());
        assert!(matches!(write(&path, "other"), Err(CliError::File { action: "write", .. })));
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "oct1.a.b.c\n", "the first one is still there");
    }
}
