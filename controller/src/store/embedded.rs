//! The embedded store: one redb file, every value sealed.
//!
//! A file is opened in two steps. First it is looked at through an [`Overlay`], which cannot change it: the database's
//! checksums are verified, the key is tried, and every value is opened. Only then is it opened for writing. So a wrong key
//! or a damaged file is refused with the file as it was.
//!
//! Commits are two-phase: after a crash the last acknowledged commit is there, or the file is refused as damaged; the
//! database never falls back to an older state quietly. After a failure of the file the database takes nothing any more: it
//! is opened again then, by the next call, and used if it is what the last acknowledged commit left. What nothing on this
//! machine alone can notice is somebody putting an older copy of the whole file back: that is what shipping the audit chain
//! elsewhere is for.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::OpenOptionsExt as _;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use redb::{
    Database, ReadableDatabase as _, ReadableTable as _, ReadableTableMetadata as _, TableDefinition, TableError,
};
use zeroize::Zeroizing;

use super::key::StoreKey;
use super::overlay::Overlay;
use super::seal::{FORMAT, Sealer, Unopened};
use super::{Batch, Entry, Expect, Store, StoreError, Table};

/// What must be readable without the key: the format and which key it is.
const HEADER: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("header");
const HEADER_FORMAT: &str = "format";
const HEADER_KEY_ID: &str = "key-id";

/// The store's revision, and proof that the key fits.
const REVISION: &str = "revision";

fn definition(table: Table) -> TableDefinition<'static, &'static str, &'static [u8]> {
    TableDefinition::new(table.name())
}

/// See the module.
pub struct EmbeddedStore {
    path: PathBuf,
    /// `None`: it failed, and could not be opened again yet.
    database: RwLock<Option<Opened>>,
    /// It must be opened again before it is used.
    failed: AtomicBool,
    sealer: Sealer,
    revision: AtomicU64,
    /// Held for as long as the store is open. redb has a lock of its own, which the look before it does not take.
    _lock: File,
}

struct Opened {
    database: Database,
    /// `false`: what is written to it is lost.
    writable: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Read,
    Commit,
}

impl std::fmt::Debug for EmbeddedStore {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("EmbeddedStore").field("path", &self.path).finish_non_exhaustive()
    }
}

impl EmbeddedStore {
    /// Makes a new store; refuses to touch anything that is there.
    pub fn create(path: &Path, key: &StoreKey) -> Result<Self, StoreError> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        match file {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(StoreError::Exists(path.to_owned()));
            }
            Err(error) => return Err(failed(path, &error)),
        }
        let lock = lock(path)?;
        let sealer = Sealer::new(key);
        let database = guarded(path, || Database::create(path))?;
        let store = Self::with(path, database, sealer, 0, lock);
        store.initialize()?;
        Ok(store)
    }

    /// Opens an existing store: see the module.
    pub fn open(path: &Path, key: &StoreKey) -> Result<Self, StoreError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StoreError::Missing(path.to_owned())),
            Err(error) => return Err(failed(path, &error)),
        };
        let lock = lock(path)?;
        let sealer = Sealer::new(key);
        let revision = inspect(path, file, &sealer)?;
        let database = guarded(path, || Database::open(path))?;
        Ok(Self::with(path, database, sealer, revision, lock))
    }

    fn with(path: &Path, database: Database, sealer: Sealer, revision: u64, lock: File) -> Self {
        Self {
            path: path.to_owned(),
            database: RwLock::new(Some(Opened { database, writable: true })),
            failed: AtomicBool::new(false),
            sealer,
            revision: AtomicU64::new(revision),
            _lock: lock,
        }
    }

    fn initialize(&self) -> Result<(), StoreError> {
        self.on_database(Purpose::Commit, |database| self.initialize_in(database))
    }

    fn on_database<T>(
        &self,
        purpose: Purpose,
        action: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if self.failed.load(Ordering::Acquire) {
            self.open_again(purpose)?;
        }
        // What the database panics with while it is opened is caught: the lock is never poisoned halfway.
        let opened = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let Some(opened) = opened.as_ref() else { return Err(failed(&self.path, &"it is closed")) };
        if purpose == Purpose::Commit && !opened.writable {
            return Err(failed(&self.path, &"it can only be read at the moment"));
        }
        let result = action(&opened.database);
        if matches!(result, Err(StoreError::Io { .. })) {
            self.failed.store(true, Ordering::Release);
        }
        result
    }

    /// Opens a database that failed. If it cannot be written to, it can at least be read, through an overlay, until the next
    /// commit is tried: operators are still known.
    fn open_again(&self, purpose: Purpose) -> Result<(), StoreError> {
        let mut opened = self.database.write().unwrap_or_else(PoisonError::into_inner);
        let readable = opened.as_ref().is_some_and(|opened| !opened.writable);
        if !self.failed.load(Ordering::Acquire) || (readable && purpose == Purpose::Read) {
            // Somebody else did meanwhile.
            return Ok(());
        }
        drop(opened.take());
        let path = &self.path;
        match guarded(path, || Database::open(path)).and_then(|database| self.as_left(database)) {
            Ok(database) => {
                *opened = Some(Opened { database, writable: true });
                self.failed.store(false, Ordering::Release);
                Ok(())
            }
            Err(error @ StoreError::Io { .. }) => {
                let file = File::open(path).map_err(|error| failed(path, &error))?;
                let overlay = Overlay::new(file).map_err(|error| failed(path, &error))?;
                let database = guarded(path, || Database::builder().create_with_backend(overlay))?;
                *opened = Some(Opened { database: self.as_left(database)?, writable: false });
                if purpose == Purpose::Read { Ok(()) } else { Err(error) }
            }
            Err(error) => Err(error),
        }
    }

    /// The database, if it is what the last acknowledged commit left.
    fn as_left(&self, database: Database) -> Result<Database, StoreError> {
        let stored = guard(&self.path, || self.stored_revision(&database))?;
        if stored == self.revision.load(Ordering::Acquire) {
            Ok(database)
        } else {
            Err(StoreError::InDoubt(self.path.clone()))
        }
    }

    fn stored_revision(&self, database: &Database) -> Result<u64, StoreError> {
        let entry = self.get_in(database, Table::Meta, REVISION)?;
        let revision = entry.and_then(|entry| <[u8; 8]>::try_from(entry.value.as_slice()).ok()).map(u64::from_be_bytes);
        revision.ok_or_else(|| damaged(&self.path, "it has no revision"))
    }

    fn initialize_in(&self, database: &Database) -> Result<(), StoreError> {
        let path = &self.path;
        let mut transaction = database.begin_write().map_err(|error| failed(path, &error))?;
        transaction.set_two_phase_commit(true);
        {
            let mut header = transaction.open_table(HEADER).map_err(|error| failed(path, &error))?;
            let format = FORMAT.to_be_bytes();
            for (name, value) in [(HEADER_FORMAT, format.as_slice()), (HEADER_KEY_ID, self.sealer.id().as_slice())] {
                header.insert(name, value).map_err(|error| failed(path, &error))?;
            }
            for table in Table::ALL {
                transaction.open_table(definition(table)).map_err(|error| failed(path, &error))?;
            }
            let mut meta = transaction.open_table(definition(Table::Meta)).map_err(|error| failed(path, &error))?;
            let sealed = self.seal(Table::Meta, REVISION, 0, &0_u64.to_be_bytes())?;
            meta.insert(REVISION, sealed.as_slice()).map_err(|error| failed(path, &error))?;
        }
        transaction.commit().map_err(|error| failed(path, &error))
    }

    fn seal(&self, table: Table, key: &str, revision: u64, value: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.sealer
            .seal(table, key, revision, value)
            .map_err(|Unopened| failed(&self.path, &"the system gave no random bytes for sealing"))
    }

    fn unseal(&self, table: Table, key: &str, sealed: &[u8]) -> Result<Entry, StoreError> {
        unseal(&self.path, &self.sealer, table, key, sealed)
    }

    fn get_in(&self, database: &Database, table: Table, key: &str) -> Result<Option<Entry>, StoreError> {
        let transaction = database.begin_read().map_err(|error| failed(&self.path, &error))?;
        let values = transaction.open_table(definition(table)).map_err(|error| failed(&self.path, &error))?;
        let found = values.get(key).map_err(|error| failed(&self.path, &error))?;
        found.map(|sealed| self.unseal(table, key, sealed.value())).transpose()
    }

    fn scan_in(
        &self,
        database: &Database,
        table: Table,
        prefix: &str,
        from: &str,
        limit: usize,
    ) -> Result<Vec<(String, Entry)>, StoreError> {
        let transaction = database.begin_read().map_err(|error| failed(&self.path, &error))?;
        let values = transaction.open_table(definition(table)).map_err(|error| failed(&self.path, &error))?;
        let start = from.max(prefix);
        let range = values
            .range::<&str>((Bound::Included(start), Bound::Unbounded))
            .map_err(|error| failed(&self.path, &error))?;
        let mut found = Vec::new();
        for item in range.take(limit) {
            let (key, sealed) = item.map_err(|error| failed(&self.path, &error))?;
            if !key.value().starts_with(prefix) {
                break;
            }
            found.push((key.value().to_owned(), self.unseal(table, key.value(), sealed.value())?));
        }
        Ok(found)
    }

    fn commit_in(&self, database: &Database, batch: &Batch) -> Result<u64, StoreError> {
        let path = &self.path;
        let mut transaction = database.begin_write().map_err(|error| failed(path, &error))?;
        transaction.set_two_phase_commit(true);
        // There is one writer at a time, so nobody else changes it between here and the commit.
        let revision = self.revision.load(Ordering::Acquire) + 1;
        for (table, key, expect) in &batch.conditions {
            let values = transaction.open_table(definition(*table)).map_err(|error| failed(path, &error))?;
            let found = match values.get(key.as_str()).map_err(|error| failed(path, &error))? {
                Some(sealed) => Expect::Revision(self.unseal(*table, key, sealed.value())?.revision),
                None => Expect::Absent,
            };
            if found != *expect {
                // Dropping the transaction undoes it: nothing was written.
                return Err(StoreError::Conflict { table: *table, key: key.clone() });
            }
        }
        let revision_record = (Table::Meta, REVISION.to_owned(), Some(Zeroizing::new(revision.to_be_bytes().to_vec())));
        for (table, key, value) in batch.writes.iter().chain([&revision_record]) {
            let mut values = transaction.open_table(definition(*table)).map_err(|error| failed(path, &error))?;
            match value {
                Some(value) => {
                    let sealed = self.seal(*table, key, revision, value)?;
                    values.insert(key.as_str(), sealed.as_slice()).map_err(|error| failed(path, &error))?;
                }
                None => {
                    values.remove(key.as_str()).map_err(|error| failed(path, &error))?;
                }
            }
        }
        transaction.commit().map_err(|error| failed(path, &error))?;
        self.revision.store(revision, Ordering::Release);
        Ok(revision)
    }
}

impl Store for EmbeddedStore {
    fn get(&self, table: Table, key: &str) -> Result<Option<Entry>, StoreError> {
        self.on_database(Purpose::Read, |database| self.get_in(database, table, key))
    }

    fn scan(&self, table: Table, prefix: &str, from: &str, limit: usize) -> Result<Vec<(String, Entry)>, StoreError> {
        self.on_database(Purpose::Read, |database| self.scan_in(database, table, prefix, from, limit))
    }

    fn commit(&self, batch: Batch) -> Result<u64, StoreError> {
        self.on_database(Purpose::Commit, |database| self.commit_in(database, &batch))
    }

    fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }
}

/// Looks at everything without changing anything; the store's revision.
fn inspect(path: &Path, file: File, sealer: &Sealer) -> Result<u64, StoreError> {
    let length = file.metadata().map_err(|error| failed(path, &error))?.len();
    if length == 0 {
        // redb would take an empty file for a new database.
        return Err(damaged(path, "the file is empty"));
    }
    let overlay = Overlay::new(file).map_err(|error| failed(path, &error))?;
    let database =
        guarded(path, || Database::builder().set_check_integrity_on_open(true).create_with_backend(overlay))?;
    guard(path, || {
        let transaction = database.begin_read().map_err(|error| failed(path, &error))?;
        {
            let header = transaction.open_table(HEADER).map_err(|error| not_ours(path, error))?;
            let read = |name| header.get(name).map_err(|error| failed(path, &error));
            let format = read(HEADER_FORMAT)?
                .and_then(|value| <[u8; 4]>::try_from(value.value()).ok())
                .map(u32::from_be_bytes)
                .ok_or_else(|| damaged(path, "its format is not readable"))?;
            if format != FORMAT {
                return Err(StoreError::Format { path: path.to_owned(), found: format, known: FORMAT });
            }
            let same_key = read(HEADER_KEY_ID)?.is_some_and(|value| value.value() == sealer.id());
            if !same_key {
                return Err(StoreError::WrongKey(path.to_owned()));
            }
        }
        let mut revision = None;
        for table in Table::ALL {
            let values = transaction.open_table(definition(table)).map_err(|error| not_ours(path, error))?;
            let mut seen = 0;
            for item in values.iter().map_err(|error| failed(path, &error))? {
                let (key, sealed) = item.map_err(|error| failed(path, &error))?;
                let entry = unseal(path, sealer, table, key.value(), sealed.value())?;
                if table == Table::Meta && key.value() == REVISION {
                    revision = <[u8; 8]>::try_from(entry.value.as_slice()).ok().map(u64::from_be_bytes);
                }
                seen += 1;
            }
            if values.len().map_err(|error| failed(path, &error))? != seen {
                return Err(damaged(path, format_args!("the table {table} does not have as many records as it says")));
            }
        }
        revision.ok_or_else(|| damaged(path, "it has no revision"))
    })
}

fn unseal(path: &Path, sealer: &Sealer, table: Table, key: &str, sealed: &[u8]) -> Result<Entry, StoreError> {
    match sealer.open(table, key, sealed) {
        Ok((revision, value)) => Ok(Entry { value, revision }),
        Err(Unopened) => {
            Err(damaged(path, format_args!("the sealed record \"{key}\" in the table {table} is not what was written")))
        }
    }
}

/// One controller at a time.
fn lock(path: &Path) -> Result<File, StoreError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(Path::new(&name))
        .map_err(|error| failed(path, &format_args!("its lock file: {error}")))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse(path.to_owned())),
        Err(TryLockError::Error(error)) => Err(failed(path, &error)),
    }
}

/// Opens a database. redb panics on some kinds of damage: that is damage too, not a crash of ours.
fn guarded(path: &Path, open: impl FnOnce() -> Result<Database, redb::DatabaseError>) -> Result<Database, StoreError> {
    guard(path, || {
        open().map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(path.to_owned()),
            redb::DatabaseError::Storage(redb::StorageError::Corrupted(detail)) => damaged(path, detail),
            redb::DatabaseError::Storage(redb::StorageError::Io(error))
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                damaged(path, error)
            }
            redb::DatabaseError::RepairAborted => damaged(path, "the database could not be repaired"),
            redb::DatabaseError::UpgradeRequired(version) => damaged(
                path,
                format_args!("the database has the file format {version}, which this program does not read"),
            ),
            error => failed(path, &error),
        })
    })
}

fn guard<T>(path: &Path, action: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    std::panic::catch_unwind(AssertUnwindSafe(action))
        .unwrap_or_else(|_| Err(damaged(path, "the database found itself inconsistent")))
}

fn failed(path: &Path, detail: &dyn std::fmt::Display) -> StoreError {
    StoreError::Io { path: path.to_owned(), detail: detail.to_string() }
}

fn damaged(path: &Path, detail: impl std::fmt::Display) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), detail: detail.to_string() }
}

fn not_ours(path: &Path, error: TableError) -> StoreError {
    match error {
        TableError::Storage(error) => failed(path, &error),
        error => damaged(path, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r36_a_failed_database_is_opened_again_only_if_it_is_what_was_left() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("store");
        let store = EmbeddedStore::create(&path, &StoreKey::parse(&"11".repeat(32)).expect("key")).expect("create");
        let commit = |value: &[u8]| {
            let mut batch = Batch::default();
            batch.put(Table::Meta, "record", value.to_vec());
            store.commit(batch)
        };
        commit(b"one").expect("commit");
        store.failed.store(true, Ordering::Release);
        commit(b"two").expect("it is opened again");
        let entry = store.get(Table::Meta, "record").expect("get").expect("there");
        assert_eq!((entry.value.as_slice(), store.revision()), (&b"two"[..], 2));

        // The last commit was reported as failed: then it must not be there.
        store.revision.store(1, Ordering::Release);
        store.failed.store(true, Ordering::Release);
        for _ in 0..2 {
            let error = commit(b"three").expect_err("in doubt");
            assert!(matches!(error, StoreError::InDoubt(_)), "{error}");
        }
        store.get(Table::Meta, "record").expect_err("nor is it read");
    }
}
