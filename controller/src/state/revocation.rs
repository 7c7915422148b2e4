//! Identities and keys that are refused from now on, and ends of enrolments, which always revoke.

use std::collections::BTreeMap;
use std::sync::Arc;

use opencluster_api::control;
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::revocation::RevocationSet;
use opencluster_policy::spiffe::SpiffeId;
use serde_json::json;

use super::record::{EnrolmentRecord, IssuedRecord, RevocationRecord, Standing};
use super::{State, StateError, Writer, get_number, parse, scan_all};
use crate::store::{Store, Table};

const VERSION: &str = "revocation-version";

/// How long after the end of the certificates an entry is kept: for clocks that differ.
const GRACE_S: i64 = 300;

/// The revocations in force. Immutable; a change makes a new one.
#[derive(Clone, Debug, Default)]
pub struct RevocationList {
    /// Grows with each change.
    pub version: u64,
    entries: BTreeMap<String, RevocationRecord>,
}

impl RevocationList {
    pub(super) fn load(store: &dyn Store) -> Result<Self, StateError> {
        let mut entries = BTreeMap::new();
        for (key, value) in scan_all(store, Table::Revocations, "")? {
            let record: RevocationRecord = parse(Table::Revocations, &key, &value)?;
            // Found now rather than when it must be enforced.
            decode(&record).map_err(|detail| StateError::Record {
                table: Table::Revocations,
                key: key.clone(),
                detail,
            })?;
            entries.insert(key, record);
        }
        Ok(Self { version: get_number(store, VERSION)?, entries })
    }

    /// Everything that is revoked.
    pub fn entries(&self) -> impl Iterator<Item = &RevocationRecord> {
        self.entries.values()
    }

    /// Whether every key of this identity is revoked.
    pub fn identity_revoked(&self, id: &SpiffeId) -> Option<&RevocationRecord> {
        self.find(id.as_str(), "")
    }

    /// Whether this key (hexadecimal) of an identity is revoked, by itself or with all others.
    pub fn key_revoked(&self, spiffe_id: &str, key: &str) -> Option<&RevocationRecord> {
        self.find(spiffe_id, key).or_else(|| self.find(spiffe_id, ""))
    }

    fn find(&self, spiffe_id: &str, key: &str) -> Option<&RevocationRecord> {
        self.entries.get(&RevocationRecord::table_key_of(spiffe_id, key))
    }

    /// For nodes.
    pub fn to_message(&self) -> control::RevocationSet {
        let entries = self
            .entries()
            .map(|record| control::Revocation {
                spiffe_id: record.spiffe_id.clone(),
                // Checked when it was made and when it was loaded; an empty key would revoke more, never less.
                spki_sha256: hex::decode(&record.key).unwrap_or_default(),
                reason: record.reason.clone(),
            })
            .collect();
        control::RevocationSet { version: self.version, entries }
    }

    /// For the controller's own verifiers.
    pub fn to_set(&self) -> Result<RevocationSet, StateError> {
        let mut set = RevocationSet::new(self.version);
        for (key, record) in &self.entries {
            let (id, spki) = decode(record).map_err(|detail| StateError::Record {
                table: Table::Revocations,
                key: key.clone(),
                detail,
            })?;
            set.revoke(id, spki);
        }
        Ok(set)
    }
}

fn decode(record: &RevocationRecord) -> Result<(SpiffeId, Option<Sha256Digest>), String> {
    let id = SpiffeId::parse(&record.spiffe_id).map_err(|error| error.to_string())?;
    let key = match record.key.as_str() {
        "" => None,
        key => Some(Sha256Digest::from_hex(key).map_err(|error| error.to_string())?),
    };
    Ok((id, key))
}

/// An enrolment that is over.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Who said so.
    pub actor: &'a str,
    /// The node.
    pub node: &'a str,
    /// Which enrolment of it.
    pub enrolment: &'a str,
    /// What it is from now on.
    pub standing: Standing,
    /// Why.
    pub reason: &'a str,
}

/// What a revocation did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// The version of the set that holds it.
    pub version: u64,
    /// The identities that it refuses.
    pub identities: Vec<String>,
}

impl State {
    /// Ends enrolments: the nodes' keys, and every key that their sessions got certificates for, are revoked, all in one
    /// transaction. An enrolment that is not in force (any more) is left as it is. `then` is called while no other change can
    /// happen, with what came of each.
    pub fn end_enrolments(&self, ends: &[End<'_>], then: impl FnOnce(&[Revoked])) -> Result<(), StateError> {
        let mut writer = self.write()?;
        let (mut records, mut identities) = (Vec::new(), Vec::new());
        for End { actor, node, enrolment, standing, reason } in ends {
            let before = self.get::<EnrolmentRecord>(Table::Enrolments, node)?.map(|(record, _)| record);
            let Some(before) = before.filter(|it| it.standing == Standing::Active && it.id == *enrolment) else {
                identities.push(Vec::new());
                continue;
            };
            let revoked = self.revoke_keys_of(&mut writer, node, reason)?;
            let after = EnrolmentRecord { standing: *standing, reason: (*reason).to_owned(), ..before.clone() };
            writer.put(Table::Enrolments, *node, &after)?;
            let names = distinct_identities(&revoked);
            writer.audit(
                actor,
                match standing {
                    Standing::Lost => "node.lost",
                    Standing::Retired => "node.retire",
                    Standing::Active | Standing::Compromised => "node.revoke",
                },
                format!("Node {node}"),
                Some(json!({"enrolment": before.id, "standing": before.standing})),
                Some(json!({"standing": standing, "reason": reason, "revoked": names})),
            );
            records.extend(revoked);
            identities.push(names);
        }
        let then = |version| {
            let of = |identities| Revoked { version, identities };
            then(&identities.into_iter().map(of).collect::<Vec<_>>());
        };
        if writer.batch.is_empty() {
            then(self.revocations().version);
            return Ok(());
        }
        self.commit_revocations(writer, records, &[], then)?;
        Ok(())
    }

    /// Revokes an identity with all its keys until that is lifted, or one key of it for good. `None`: no certificate of the
    /// identity for that key is in force.
    pub fn revoke_identity(
        &self,
        actor: &str,
        id: &SpiffeId,
        key: Option<Sha256Digest>,
        reason: &str,
    ) -> Result<Option<Revoked>, StateError> {
        let mut writer = self.write()?;
        let current = self.revocations();
        let identities = vec![id.to_string()];
        let key = key.map(|key| key.to_string()).unwrap_or_default();
        if current.key_revoked(id.as_str(), &key).is_some() {
            return Ok(Some(Revoked { version: current.version, identities }));
        }
        let until = if key.is_empty() { None } else { self.end_of_key(id, &key)? };
        if until.is_none() && !key.is_empty() {
            return Ok(None);
        }
        let mut after = json!({"reason": reason});
        if !key.is_empty() {
            after["key"] = key.clone().into();
        }
        let record = RevocationRecord {
            spiffe_id: id.to_string(),
            key,
            reason: reason.to_owned(),
            since: Some(writer.now().unix_timestamp()),
            until,
        };
        writer.audit(actor, "workload.revoke", id.as_str(), None, Some(after));
        let version = self.commit_revocations(writer, vec![record], &[], |_| ())?;
        Ok(Some(Revoked { version, identities }))
    }

    /// When the last certificate for a key has ended for everybody; `None`: there is none in force.
    fn end_of_key(&self, id: &SpiffeId, key: &str) -> Result<Option<i64>, StateError> {
        let issued = self.scan::<IssuedRecord>(Table::Issued, "")?;
        let ends = issued.into_iter().filter(|(_, issued, _)| issued.spiffe_id == id.as_str() && issued.key == key);
        Ok(ends.map(|(_, issued, _)| issued.not_after + GRACE_S).max())
    }

    /// Lifts the revocation of an identity with all its keys. (A single key is never taken back: a new one costs nothing.)
    /// `None`: it is not revoked.
    pub fn restore_identity(&self, actor: &str, id: &SpiffeId, reason: &str) -> Result<Option<Revoked>, StateError> {
        let mut writer = self.write()?;
        let current = self.revocations();
        let Some(record) = current.identity_revoked(id) else { return Ok(None) };
        let before = json!({"reason": record.reason});
        writer.audit(actor, "workload.restore", id.as_str(), Some(before), Some(json!({"reason": reason})));
        let version = self.commit_revocations(writer, Vec::new(), &[record.table_key()], |_| ())?;
        Ok(Some(Revoked { version, identities: vec![id.to_string()] }))
    }

    /// Forgets what has no effect any more: revocations of keys, records of keys and tokens whose time is over.
    pub fn prune(&self) -> Result<(), StateError> {
        let mut writer = self.write()?;
        let now = writer.now().unix_timestamp() - GRACE_S;
        for (key, record, _) in self.scan::<IssuedRecord>(Table::Issued, "")? {
            if record.not_after < now {
                writer.delete(Table::Issued, key);
            }
        }
        for (key, record, _) in self.scan::<super::record::TokenRecord>(Table::Tokens, "")? {
            if record.expires < now {
                writer.delete(Table::Tokens, key);
            }
        }
        for (key, record, _) in self.scan::<super::record::OperatorRecord>(Table::Operators, "")? {
            if record.expires < now {
                writer.delete(Table::Operators, key);
            }
        }
        let current = self.revocations();
        let over: Vec<String> = current
            .entries()
            .filter(|record| record.until.is_some_and(|until| until < now))
            .map(RevocationRecord::table_key)
            .collect();
        if over.is_empty() && writer.batch.is_empty() {
            return Ok(());
        }
        if over.is_empty() {
            writer.commit()?;
        } else {
            self.commit_revocations(writer, Vec::new(), &over, |_| ())?;
        }
        Ok(())
    }

    /// Every key that a node's sessions got certificates for and that could still be used; their records are removed.
    pub(crate) fn revoke_keys_of(
        &self,
        writer: &mut Writer<'_>,
        node: &str,
        reason: &str,
    ) -> Result<Vec<RevocationRecord>, StateError> {
        let now = writer.now().unix_timestamp();
        let mut records = Vec::new();
        for (key, issued, _) in self.scan::<IssuedRecord>(Table::Issued, &format!("{node}/"))? {
            writer.delete(Table::Issued, key);
            if issued.not_after + GRACE_S >= now {
                records.push(RevocationRecord {
                    spiffe_id: issued.spiffe_id,
                    key: issued.key,
                    reason: reason.to_owned(),
                    since: Some(now),
                    until: Some(issued.not_after + GRACE_S),
                });
            }
        }
        Ok(records)
    }

    /// Commits a change that adds and lifts revocations; the new version. `then` is called with it while no other change can
    /// happen.
    pub(crate) fn commit_revocations(
        &self,
        mut writer: Writer<'_>,
        records: Vec<RevocationRecord>,
        lifted: &[String],
        then: impl FnOnce(u64),
    ) -> Result<u64, StateError> {
        if records.is_empty() && lifted.is_empty() {
            let version = self.revocations().version;
            writer.commit_and(|_| then(version))?;
            return Ok(version);
        }
        let mut list = RevocationList::clone(&self.revocations());
        list.version += 1;
        for key in lifted {
            writer.delete(Table::Revocations, key.clone());
            list.entries.remove(key);
        }
        for record in records {
            let key = record.table_key();
            writer.put(Table::Revocations, key.clone(), &record)?;
            list.entries.insert(key, record);
        }
        let version = list.version;
        writer.put(Table::Meta, VERSION, &version)?;
        writer.commit_and(|state| {
            state.revocations.send_replace(Arc::new(list));
            then(version);
        })?;
        Ok(version)
    }
}

fn distinct_identities(records: &[RevocationRecord]) -> Vec<String> {
    let mut identities: Vec<String> = records.iter().map(|record| record.spiffe_id.clone()).collect();
    identities.sort();
    identities.dedup();
    identities
}
