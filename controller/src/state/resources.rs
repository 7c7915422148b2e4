//! Changing resources: several documents at once or none of them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use opencluster_api::rest::{Action, ApplyResult, Change, WatchEvent};
use opencluster_policy::index::Index;
use opencluster_policy::resource::{Fault, Faults, Key, Resource};
use opencluster_policy::snapshot::{Difference, Snapshot};

use super::{CONFIG_VERSION, Configuration, State, StateError, Writer, describe};
use crate::store::Table;

/// Why resources were not changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The store or the audit trail.
    #[error(transparent)]
    State(#[from] StateError),
    /// The documents say something wrong.
    #[error("{0}")]
    Invalid(Faults),
    /// Somebody was faster.
    #[error("{} was changed meanwhile: you sent resourceVersion {expected}, {}; get it again, redo your change, apply again",
        describe(key), match current { Some(version) => format!("it is {version} now"), None => "but it does not exist now".to_owned() })]
    Conflict {
        /// Which resource.
        key: Key,
        /// What the change was made for.
        expected: u64,
        /// What there is; `None`: nothing.
        current: Option<u64>,
    },
    /// It must be new, but is there.
    #[error("{} exists already (resourceVersion {current}); resourceVersion 0 asks for it to be new", describe(key))]
    Exists {
        /// Which resource.
        key: Key,
        /// Its version.
        current: u64,
    },
    /// There is no such resource.
    #[error("there is no {}", describe(.0))]
    NotFound(Key),
    /// Others need it.
    #[error("{} is still used: {}; delete or change those first", describe(key), by.join("; "))]
    Referenced {
        /// Which resource.
        key: Key,
        /// Who uses it and how.
        by: Vec<String>,
    },
}

/// The key of a resource in [`Table::Resources`].
pub(super) fn table_key(key: &Key) -> String {
    format!("{}/{}/{}", key.kind.name(), key.namespace, key.name)
}

impl State {
    /// Applies documents, all or none. With `dry_run`, only says what would happen.
    pub fn apply(&self, actor: &str, documents: Vec<Resource>, dry_run: bool) -> Result<ApplyResult, ChangeError> {
        check_distinct(&documents)?;
        let mut writer = self.write()?;
        let current = self.configuration();
        let version = current.snapshot.version + 1;

        let keys: Vec<Key> = documents.iter().map(Resource::key).collect();
        let mut changes = Vec::with_capacity(documents.len());
        let mut difference = Difference::default();
        let mut events = Vec::new();
        for (mut document, key) in documents.into_iter().zip(&keys) {
            let before = current.snapshot.resources.get(key);
            check_version(key, document.metadata().resource_version, before)?;
            let action = match before {
                None => Action::Created,
                Some(before) if same(before, &mut document) => Action::Unchanged,
                Some(_) => Action::Updated,
            };
            let change = change_of(key, action);
            if action != Action::Unchanged {
                document.metadata_mut().resource_version = Some(version);
                let after = document.to_json();
                writer.put(Table::Resources, table_key(key), &after)?;
                let before = before.map(|resource| resource.to_json());
                writer.audit(actor, "apply", describe(key), before, Some(after.clone()));
                events.push(WatchEvent { version, change: change.clone(), object: Some(after) });
                difference.upserts.push(Arc::new(document));
            }
            changes.push(change);
        }
        let snapshot = current.snapshot.apply(&difference, version);
        snapshot.check(&keys).map_err(ChangeError::Invalid)?;

        let changed = !events.is_empty();
        if changed && !dry_run {
            self.commit_resources(writer, snapshot, events)?;
        }
        let version = if changed && !dry_run { version } else { current.snapshot.version };
        Ok(ApplyResult { dry_run, version, changes })
    }

    /// Deletes a resource, if it has this version (where one is given) and nothing needs it.
    pub fn delete(&self, actor: &str, key: &Key, expected: Option<u64>) -> Result<ApplyResult, ChangeError> {
        let mut writer = self.write()?;
        let current = self.configuration();
        let Some(before) = current.snapshot.resources.get(key) else {
            return Err(ChangeError::NotFound(key.clone()));
        };
        check_version(key, expected, Some(before))?;
        let version = current.snapshot.version + 1;
        let difference = Difference { upserts: Vec::new(), deletes: vec![key.clone()] };
        let snapshot = current.snapshot.apply(&difference, version);
        let remaining: Vec<Key> = snapshot.resources.keys().cloned().collect();
        if let Err(faults) = snapshot.check(&remaining) {
            let by = faults
                .0
                .iter()
                .filter_map(|fault| {
                    remaining.get(fault.document).map(|user| format!("{}, {}", describe(user), fault.field))
                })
                .collect();
            return Err(ChangeError::Referenced { key: key.clone(), by });
        }
        let change = change_of(key, Action::Deleted);
        writer.delete(Table::Resources, table_key(key));
        writer.audit(actor, "delete", describe(key), Some(before.to_json()), None);
        let event = WatchEvent { version, change: change.clone(), object: None };
        self.commit_resources(writer, snapshot, vec![event])?;
        Ok(ApplyResult { dry_run: false, version, changes: vec![change] })
    }

    fn commit_resources(
        &self,
        mut writer: Writer<'_>,
        snapshot: Snapshot,
        events: Vec<WatchEvent>,
    ) -> Result<(), StateError> {
        writer.put(Table::Meta, CONFIG_VERSION, &snapshot.version)?;
        let index = Index::compile(&self.domain, &snapshot);
        let configuration = Arc::new(Configuration { snapshot, index });
        writer.commit_and(|state| {
            state.history.push(events);
            state.configuration.send_replace(configuration);
        })?;
        Ok(())
    }
}

fn change_of(key: &Key, action: Action) -> Change {
    Change { kind: key.kind.name().to_owned(), namespace: key.namespace.clone(), name: key.name.clone(), action }
}

/// Two documents for the same resource: which one should win?
fn check_distinct(documents: &[Resource]) -> Result<(), ChangeError> {
    let mut seen: HashMap<Key, usize> = HashMap::new();
    let mut faults = Vec::new();
    for (document, resource) in documents.iter().enumerate() {
        let key = resource.key();
        if let Some(first) = seen.get(&key) {
            let message = format!("{} is also document {}: give each resource once", describe(&key), first + 1);
            faults.push(Fault { document, field: "metadata.name".into(), line: 0, column: 0, message });
        } else {
            seen.insert(key, document);
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(ChangeError::Invalid(Faults(faults))) }
}

/// Optimistic concurrency: absent, anything goes; 0, it must not exist; otherwise exactly this version.
fn check_version(key: &Key, expected: Option<u64>, current: Option<&Arc<Resource>>) -> Result<(), ChangeError> {
    let current = current.map(|resource| resource.metadata().resource_version.unwrap_or(0));
    match (expected, current) {
        (None, _) | (Some(0), None) => Ok(()),
        (Some(0), Some(current)) => Err(ChangeError::Exists { key: key.clone(), current }),
        (Some(expected), current) if current == Some(expected) => Ok(()),
        (Some(expected), current) => Err(ChangeError::Conflict { key: key.clone(), expected, current }),
    }
}

/// Whether the document says what is there already, the version aside.
fn same(current: &Resource, document: &mut Resource) -> bool {
    document.metadata_mut().resource_version = current.metadata().resource_version;
    current == document
}

/// How many resources of each kind there are.
pub fn count(snapshot: &Snapshot) -> BTreeMap<String, usize> {
    let mut counts: BTreeMap<String, usize> =
        opencluster_policy::resource::Kind::ALL.iter().map(|kind| (kind.plural().to_owned(), 0)).collect();
    for key in snapshot.resources.keys() {
        *counts.entry(key.kind.plural().to_owned()).or_default() += 1;
    }
    counts
}
