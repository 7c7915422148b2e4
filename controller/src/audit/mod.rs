//! The audit trail: who changed what, before and after, as a hash chain in the store.
//!
//! Each event holds the hash of the one before it; its own hash is SHA-256 over that hash and the event's canonical JSON
//! (keys sorted, no spaces, without `hash`). Events are written in the transaction of the change that they tell of: there
//! is no change without its event and no event without its change. The head of the chain is stored beside it, so that
//! events cannot be cut off at the end either; the sealed store keeps everybody without its key from writing any of it.

use opencluster_api::rest::AuditEvent;
use serde::Serialize as _;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::store::{Batch, Entry, Expect, Store, StoreError, Table};

/// The record of the head in [`Table::Meta`].
const HEAD: &str = "audit-head";

/// How many events are read at a time.
const PAGE: usize = 512;

/// Why the chain cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The chain is not whole.
    #[error(
        "the audit trail is broken at event {sequence}: {detail}. The controller does not serve on a trail that was tampered with: keep this store as evidence and restore a backup"
    )]
    Broken {
        /// Where.
        sequence: u64,
        /// What was found.
        detail: String,
    },
    /// An event could not be made.
    #[error("an audit event could not be made: {0}")]
    Event(String),
}

/// Something that happened, before it has a place in the chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// The operator, `controller`, or `node/<name>`.
    pub actor: String,
    /// For example `apply`.
    pub action: &'static str,
    /// For example `Policy default/a-to-echo`.
    pub subject: String,
    /// Before, where there was something.
    pub before: Option<Value>,
    /// After, where there is something.
    pub after: Option<Value>,
}

/// The end of the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    sequence: u64,
    hash: [u8; 32],
}

impl Head {
    /// Of a chain without events.
    pub fn empty() -> Self {
        Self { sequence: 0, hash: [0; 32] }
    }

    /// How many events there are.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Adds the events to the batch, and the new head; the head after it. The batch fails if somebody else added an event.
    pub fn append(&self, batch: &mut Batch, drafts: Vec<Draft>, now: OffsetDateTime) -> Result<Self, AuditError> {
        let time = now.format(&Rfc3339).map_err(|error| AuditError::Event(error.to_string()))?;
        let mut head = self.clone();
        for draft in drafts {
            let mut event = AuditEvent {
                sequence: head.sequence + 1,
                time: time.clone(),
                actor: draft.actor,
                action: draft.action.to_owned(),
                subject: draft.subject,
                before: draft.before,
                after: draft.after,
                previous: hex::encode(head.hash),
                hash: String::new(),
            };
            head = Self { sequence: event.sequence, hash: hash_of(&event)? };
            event.hash = hex::encode(head.hash);
            let key = key_of(event.sequence);
            batch.require(Table::Audit, key.clone(), Expect::Absent);
            batch.put(Table::Audit, key, to_json(&event)?);
        }
        batch.put(Table::Meta, HEAD, format!("{} {}", head.sequence, hex::encode(head.hash)).into_bytes());
        Ok(head)
    }

    /// Reads the whole chain and checks every link of it.
    pub fn verify(store: &dyn Store) -> Result<Self, AuditError> {
        let mut head = Self::empty();
        loop {
            let page = store.scan(Table::Audit, "", &key_of(head.sequence + 1), PAGE)?;
            for (key, entry) in &page {
                let sequence = head.sequence + 1;
                let broken = |detail: &str| AuditError::Broken { sequence, detail: detail.to_owned() };
                if *key != key_of(sequence) {
                    return Err(broken("it is missing"));
                }
                let event = parse(entry).map_err(|error| broken(&format!("it cannot be read ({error})")))?;
                if event.sequence != sequence || event.previous != hex::encode(head.hash) {
                    return Err(broken("it does not follow the event before it"));
                }
                let hash = hash_of(&event)?;
                if event.hash != hex::encode(hash) {
                    return Err(broken("its content does not have its hash"));
                }
                head = Self { sequence, hash };
            }
            if page.len() < PAGE {
                break;
            }
        }
        let stored = store.get(Table::Meta, HEAD)?;
        let expected = format!("{} {}", head.sequence, hex::encode(head.hash));
        let same = match &stored {
            Some(entry) => entry.value.as_slice() == expected.as_bytes(),
            None => head == Self::empty(),
        };
        if same {
            Ok(head)
        } else {
            Err(AuditError::Broken {
                sequence: head.sequence + 1,
                detail: "the trail ends here, but its recorded end is another: events were cut off".into(),
            })
        }
    }
}

/// Events from a sequence on.
pub fn page(store: &dyn Store, from: u64, limit: usize) -> Result<Vec<AuditEvent>, AuditError> {
    store
        .scan(Table::Audit, "", &key_of(from), limit)?
        .iter()
        .map(|(key, entry)| {
            parse(entry).map_err(|error| AuditError::Event(format!("event {key} cannot be read: {error}")))
        })
        .collect()
}

fn key_of(sequence: u64) -> String {
    format!("{sequence:020}")
}

fn parse(entry: &Entry) -> Result<AuditEvent, serde_json::Error> {
    serde_json::from_slice(&entry.value)
}

fn to_json(event: &AuditEvent) -> Result<Vec<u8>, AuditError> {
    serde_json::to_vec(event).map_err(|error| AuditError::Event(error.to_string()))
}

fn hash_of(event: &AuditEvent) -> Result<[u8; 32], AuditError> {
    let failed = |error: serde_json::Error| AuditError::Event(error.to_string());
    let mut value = event.serialize(serde_json::value::Serializer).map_err(failed)?;
    if let Value::Object(fields) = &mut value {
        fields.remove("hash");
    }
    let mut hasher = Sha256::new();
    hasher.update(hex::decode(&event.previous).map_err(|error| AuditError::Event(error.to_string()))?);
    hasher.update(serde_json::to_vec(&sorted(value)).map_err(failed)?);
    Ok(hasher.finalize().into())
}

/// The same with the keys of every object sorted, whatever order the JSON library keeps.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<(String, Value)> = fields.into_iter().collect();
            fields.sort_by(|(left, _), (right, _)| left.cmp(right));
            Value::Object(fields.into_iter().map(|(key, value)| (key, sorted(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests;
