//! The cluster's state: what is in the store, and the parts of it that everybody reads, in memory.
//!
//! There is one way to change it, [`State::write`]: a [`Writer`] holds the only write lock, collects what changes together
//! with the audit events that tell of it, commits all of it in one transaction, and only then publishes it to the watch
//! channels that sessions, watchers and verifiers follow. What was not committed was never seen by anyone.
//!
//! Everything here blocks for the disk: call it through [`State::run`] from asynchronous code. That also makes a change
//! whole when the request that asked for it is dropped halfway.

pub mod history;
pub mod record;
pub mod resources;
pub mod revocation;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use opencluster_policy::index::Index;
use opencluster_policy::resource::{Key, Kind, Resource};
use opencluster_policy::snapshot::Snapshot;
use opencluster_policy::spiffe::TrustDomain;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use zeroize::Zeroizing;

use crate::audit::{AuditError, Draft, Head};
use crate::store::{Batch, Expect, Store, StoreError, Table};
use history::History;
use revocation::RevocationList;

/// The version of the resources, in [`Table::Meta`].
const CONFIG_VERSION: &str = "config-version";

/// How many records are read at a time.
const PAGE: usize = 1024;

/// Why the state could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The audit trail.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// A record that the store gives back is not what this program writes.
    #[error("the record \"{key}\" in the table {table} cannot be used: {detail}")]
    Record {
        /// The table.
        table: Table,
        /// The record's key.
        key: String,
        /// What is wrong with it.
        detail: String,
    },
    /// A change before this one panicked halfway: what is in memory may differ from what is stored.
    #[error("an earlier change failed halfway: nothing is changed any more until the controller is restarted")]
    Poisoned,
    /// The program is ending.
    #[error("the controller is shutting down")]
    ShuttingDown,
}

/// Resources and what was compiled from them, at one version.
#[derive(Debug)]
pub struct Configuration {
    /// The resources.
    pub snapshot: Snapshot,
    /// Compiled.
    pub index: Index,
}

/// See the module.
#[derive(Debug)]
pub struct State {
    domain: TrustDomain,
    store: Arc<dyn Store>,
    writer: Mutex<Head>,
    configuration: watch::Sender<Arc<Configuration>>,
    revocations: watch::Sender<Arc<RevocationList>>,
    history: History,
}

impl State {
    /// Loads the state, and verifies the audit trail.
    pub fn load(domain: TrustDomain, store: Arc<dyn Store>) -> Result<Self, StateError> {
        let head = Head::verify(&*store)?;
        let mut resources = BTreeMap::new();
        for (name, value) in scan_all(&*store, Table::Resources, "")? {
            let bad = |detail: String| StateError::Record { table: Table::Resources, key: name.clone(), detail };
            let resource = Resource::from_json(&value).map_err(|faults| bad(faults.to_string()))?;
            let key = resource.key();
            if resources::table_key(&key) != name {
                return Err(bad(format!("it holds the {}", describe(&key))));
            }
            resources.insert(key, Arc::new(resource));
        }
        let version = get_number(&*store, CONFIG_VERSION)?;
        let snapshot = Snapshot { version, resources: Arc::new(resources) };
        let index = Index::compile(&domain, &snapshot);
        let revocations = RevocationList::load(&*store)?;
        Ok(Self {
            domain,
            store,
            writer: Mutex::new(head),
            configuration: watch::Sender::new(Arc::new(Configuration { snapshot, index })),
            revocations: watch::Sender::new(Arc::new(revocations)),
            history: History::starting_at(version),
        })
    }

    /// Runs something that blocks, to its end, whether or not the caller waits for it.
    pub async fn run<T, E, F>(self: &Arc<Self>, action: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StateError> + Send + 'static,
        F: FnOnce(&Self) -> Result<T, E> + Send + 'static,
    {
        let state = Arc::clone(self);
        match tokio::task::spawn_blocking(move || action(&state)).await {
            Ok(result) => result,
            Err(error) if error.is_panic() => Err(StateError::Poisoned.into()),
            Err(_) => Err(StateError::ShuttingDown.into()),
        }
    }

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The store, for reading.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// The configuration in force.
    pub fn configuration(&self) -> Arc<Configuration> {
        Arc::clone(&self.configuration.borrow())
    }

    /// Follows the configuration.
    pub fn watch_configuration(&self) -> watch::Receiver<Arc<Configuration>> {
        self.configuration.subscribe()
    }

    /// The revocations in force.
    pub fn revocations(&self) -> Arc<RevocationList> {
        Arc::clone(&self.revocations.borrow())
    }

    /// Follows the revocations.
    pub fn watch_revocations(&self) -> watch::Receiver<Arc<RevocationList>> {
        self.revocations.subscribe()
    }

    /// The changes of resources, for watchers.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// How many audit events there are; waits for a change that is being made.
    pub fn audit_events(&self) -> Result<u64, StateError> {
        Ok(self.writer.lock().map_err(|_| StateError::Poisoned)?.sequence())
    }

    /// Begins a change: see the module.
    pub fn write(&self) -> Result<Writer<'_>, StateError> {
        let head = self.writer.lock().map_err(|_| StateError::Poisoned)?;
        Ok(Writer { state: self, head, batch: Batch::default(), events: Vec::new(), now: OffsetDateTime::now_utc() })
    }

    /// Reads a record.
    pub fn get<T: DeserializeOwned>(&self, table: Table, key: &str) -> Result<Option<(T, u64)>, StateError> {
        let Some(entry) = self.store.get(table, key)? else { return Ok(None) };
        Ok(Some((parse(table, key, &entry.value)?, entry.revision)))
    }

    /// Reads all records whose key starts with `prefix`, with key and revision.
    pub fn scan<T: DeserializeOwned>(&self, table: Table, prefix: &str) -> Result<Vec<(String, T, u64)>, StateError> {
        let mut found = Vec::new();
        let mut from = prefix.to_owned();
        loop {
            let page = self.store.scan(table, prefix, &from, PAGE)?;
            for (key, entry) in &page {
                found.push((key.clone(), parse(table, key, &entry.value)?, entry.revision));
            }
            match page.last() {
                Some((last, _)) if page.len() == PAGE => from = format!("{last}\0"),
                _ => return Ok(found),
            }
        }
    }
}

/// A change in the making; dropped without [`Writer::commit`], it never was.
pub struct Writer<'a> {
    state: &'a State,
    head: MutexGuard<'a, Head>,
    batch: Batch,
    events: Vec<Draft>,
    now: OffsetDateTime,
}

impl Writer<'_> {
    /// The time of this change.
    pub fn now(&self) -> OffsetDateTime {
        self.now
    }

    /// Writes a record.
    pub fn put<T: Serialize>(&mut self, table: Table, key: impl Into<String>, record: &T) -> Result<(), StateError> {
        let key = key.into();
        let value = serde_json::to_vec(record).map_err(|error| StateError::Record {
            table,
            key: key.clone(),
            detail: error.to_string(),
        })?;
        self.batch.put(table, key, value);
        Ok(())
    }

    /// Deletes a record.
    pub fn delete(&mut self, table: Table, key: impl Into<String>) {
        self.batch.delete(table, key);
    }

    /// The commit fails unless the record is as expected.
    pub fn require(&mut self, table: Table, key: impl Into<String>, expect: Expect) {
        self.batch.require(table, key, expect);
    }

    /// Adds an audit event.
    pub fn audit(
        &mut self,
        actor: &str,
        action: &'static str,
        subject: impl Into<String>,
        before: Option<Value>,
        after: Option<Value>,
    ) {
        self.events.push(Draft { actor: actor.to_owned(), action, subject: subject.into(), before, after });
    }

    /// Commits all of it, durably.
    pub fn commit(self) -> Result<u64, StateError> {
        self.commit_and(|_| ())
    }

    /// Commits, then publishes while the lock is still held, so that versions are published in their order.
    fn commit_and(mut self, publish: impl FnOnce(&State)) -> Result<u64, StateError> {
        let head = self.head.append(&mut self.batch, std::mem::take(&mut self.events), self.now)?;
        let revision = self.state.store.commit(self.batch)?;
        *self.head = head;
        publish(self.state);
        Ok(revision)
    }
}

/// RFC 3339, in UTC, to the second.
pub fn timestamp(time: OffsetDateTime) -> String {
    let time = time.replace_nanosecond(0).unwrap_or(time);
    time.format(&Rfc3339).unwrap_or_else(|_| time.unix_timestamp().to_string())
}

/// RFC 3339 of Unix seconds.
pub fn timestamp_of(unix: i64) -> String {
    OffsetDateTime::from_unix_timestamp(unix).map_or_else(|_| unix.to_string(), timestamp)
}

/// For people: `Policy default/a-to-echo`, `Node a`.
pub fn describe(key: &Key) -> String {
    if key.kind.namespaced() {
        format!("{} {}/{}", key.kind.name(), key.namespace, key.name)
    } else {
        format!("{} {}", key.kind.name(), key.name)
    }
}

/// The key of a node's resource.
pub fn node_key(name: &str) -> Key {
    Key { kind: Kind::Node, namespace: String::new(), name: name.to_owned() }
}

fn parse<T: DeserializeOwned>(table: Table, key: &str, value: &[u8]) -> Result<T, StateError> {
    serde_json::from_slice(value).map_err(|error| StateError::Record {
        table,
        key: key.to_owned(),
        detail: error.to_string(),
    })
}

fn get_number(store: &dyn Store, key: &str) -> Result<u64, StateError> {
    match store.get(Table::Meta, key)? {
        Some(entry) => parse(Table::Meta, key, &entry.value),
        None => Ok(0),
    }
}

/// A record as it is stored: key and value.
type RawRecord = (String, Zeroizing<Vec<u8>>);

fn scan_all(store: &dyn Store, table: Table, prefix: &str) -> Result<Vec<RawRecord>, StateError> {
    let mut found = Vec::new();
    let mut from = prefix.to_owned();
    loop {
        let page = store.scan(table, prefix, &from, PAGE)?;
        let full = page.len() == PAGE;
        found.extend(page.into_iter().map(|(key, entry)| (key, entry.value)));
        match found.last() {
            Some((last, _)) if full => from = format!("{last}\0"),
            _ => return Ok(found),
        }
    }
}
