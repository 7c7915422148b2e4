//! Where the controller keeps what must survive it.
//!
//! [`Store`] is the seam: a key-value store with tables, and one write operation, [`Store::commit`], that applies a
//! [`Batch`] only if every one of its conditions holds, all or nothing. That is what an embedded database and etcd's
//! transactions have in common, so a second implementation for several controllers changes nothing above this line.
//! Everything that must happen once (a token is used, an audit event gets the next number) is a condition.

pub mod embedded;
pub mod key;
mod overlay;
mod seal;

use std::fmt;
use std::path::PathBuf;

use zeroize::Zeroizing;

pub use embedded::EmbeddedStore;
pub use key::{StoreKey, StoreKeyError};

/// The tables. The name is part of what a value is sealed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// Single records: counters, the head of the audit chain.
    Meta,
    /// Certificates and private keys of the authorities.
    Ca,
    /// Resources, by `kind/namespace/name`.
    Resources,
    /// Enrolment tokens, hashed, by `node/id`.
    Tokens,
    /// Enrolments, by node.
    Enrolments,
    /// Keys that certificates were issued for, by `node/key hash`.
    Issued,
    /// Revocations, by `identity|key hash`.
    Revocations,
    /// Operators' credentials, hashed, by ID.
    Operators,
    /// Audit events, by sequence.
    Audit,
}

impl Table {
    /// All tables.
    pub const ALL: [Self; 9] = [
        Self::Meta,
        Self::Ca,
        Self::Resources,
        Self::Tokens,
        Self::Enrolments,
        Self::Issued,
        Self::Revocations,
        Self::Operators,
        Self::Audit,
    ];

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Ca => "ca",
            Self::Resources => "resources",
            Self::Tokens => "tokens",
            Self::Enrolments => "enrolments",
            Self::Issued => "issued",
            Self::Revocations => "revocations",
            Self::Operators => "operators",
            Self::Audit => "audit",
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A stored value.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// What was stored.
    pub value: Zeroizing<Vec<u8>>,
    /// The store's revision that wrote it.
    pub revision: u64,
}

impl fmt::Debug for Entry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Entry({} bytes at revision {})", self.value.len(), self.revision)
    }
}

/// What a condition wants of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The key does not exist.
    Absent,
    /// The key exists and was last written by this revision.
    Revision(u64),
}

/// Conditions and writes that are applied together or not at all. Conditions are checked against the state before it.
#[derive(Default)]
pub struct Batch {
    conditions: Vec<(Table, String, Expect)>,
    writes: Vec<Write>,
}

/// Table, key, and the new value; `None` deletes.
type Write = (Table, String, Option<Zeroizing<Vec<u8>>>);

impl Batch {
    /// Adds a condition.
    pub fn require(&mut self, table: Table, key: impl Into<String>, expect: Expect) -> &mut Self {
        self.conditions.push((table, key.into(), expect));
        self
    }

    /// Writes a value.
    pub fn put(&mut self, table: Table, key: impl Into<String>, value: impl Into<Zeroizing<Vec<u8>>>) -> &mut Self {
        self.writes.push((table, key.into(), Some(value.into())));
        self
    }

    /// Deletes a key; fine if it does not exist.
    pub fn delete(&mut self, table: Table, key: impl Into<String>) -> &mut Self {
        self.writes.push((table, key.into(), None));
        self
    }

    /// Nothing would be written.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Batch({} conditions, {} writes)", self.conditions.len(), self.writes.len())
    }
}

/// What can go wrong with a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is none.
    #[error("there is no store at {0}: create one with `opencluster-controller init`")]
    Missing(PathBuf),
    /// `init` found one.
    #[error("{0} exists already and is not overwritten: to start a new cluster, move it away first")]
    Exists(PathBuf),
    /// Somebody else has it open.
    #[error("{0} is in use by another process: is a controller running already?")]
    InUse(PathBuf),
    /// The key is not the one that the store was created with.
    #[error(
        "the store {0} was sealed with another key: give the key that it was created with (store_key in the configuration); nothing was changed"
    )]
    WrongKey(PathBuf),
    /// The file is not what was written.
    #[error("the store {path} is damaged: {detail}; nothing was changed: restore it from a backup")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// The store is of a newer program.
    #[error("the store {path} has format {found}, this program reads format {known}: run the program that wrote it")]
    Format {
        /// Which file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// A condition of a batch does not hold: somebody else was faster.
    #[error("{table} {key} was changed by somebody else meanwhile")]
    Conflict {
        /// The table.
        table: Table,
        /// The key.
        key: String,
    },
    /// A commit failed, and was stored all the same, at least for now: what is in memory is older.
    #[error("the store {0} has a change that had failed: the controller must be started again, to look at it anew")]
    InDoubt(PathBuf),
    /// Reading or writing failed.
    #[error("the store {path}: {detail}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What failed.
        detail: String,
    },
}

/// A store. Calls block (an embedded store waits for the disk): make them where blocking is fine. After one that failed
/// the next tries anew.
pub trait Store: fmt::Debug + Send + Sync {
    /// One value.
    fn get(&self, table: Table, key: &str) -> Result<Option<Entry>, StoreError>;

    /// Up to `limit` values whose key is at least `from` and starts with `prefix`, in the order of their keys.
    fn scan(&self, table: Table, prefix: &str, from: &str, limit: usize) -> Result<Vec<(String, Entry)>, StoreError>;

    /// Applies a batch durably, and returns the store's new revision.
    fn commit(&self, batch: Batch) -> Result<u64, StoreError>;

    /// The revision of the last commit.
    fn revision(&self) -> u64;
}
