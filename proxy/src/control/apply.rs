//! What arrives from the controller, turned into what is enforced. All or nothing: a message that cannot be understood
//! changes nothing, and what was in force stays in force; but for revocations, where what was in force would allow too much.

use std::sync::Arc;

use opencluster_api::control::{
    ConfigUpdate, DocumentKey, RevocationSet as WireRevocations, TrustBundle as WireBundle,
};
use opencluster_identity::bundle::{BundleError, TrustBundle};
use opencluster_identity::digest::{DigestError, Sha256Digest};
use opencluster_identity::revocation::RevocationSet;
use opencluster_identity::{CertificateDer, SpiffeError, SpiffeId};
use opencluster_policy::index::Index;
use opencluster_policy::resource::{Faults, Key, Kind, Resource};
use opencluster_policy::snapshot::{Difference, Snapshot};

use crate::shared::Shared;

/// Why something that arrived was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A delta to a version that is not ours.
    #[error("configuration {version} is a change to version {base}, but version {ours} is in force")]
    Base {
        /// The update's.
        version: u64,
        /// What it applies to.
        base: u64,
        /// What is in force.
        ours: u64,
    },
    /// A resource that this version does not understand.
    #[error("configuration {version}, {kind} {name}: {source}")]
    Resource {
        /// The update's.
        version: u64,
        /// The document's kind.
        kind: String,
        /// The document's name.
        name: String,
        /// What is wrong.
        source: Faults,
    },
    /// A key of no kind that we know.
    #[error("configuration {version} names a resource of unknown kind `{kind}`")]
    Kind {
        /// The update's.
        version: u64,
        /// What it says.
        kind: String,
    },
    /// The revocation set cannot be understood.
    #[error("revocation set {version}: {source}")]
    Revocation {
        /// The set's.
        version: u64,
        /// What is wrong.
        source: RevocationFault,
    },
    /// An older revocation set than the one in force.
    #[error("revocation set {version} is older than {ours}, which is in force")]
    Older {
        /// The set's.
        version: u64,
        /// Ours.
        ours: u64,
    },
    /// The trust bundle.
    #[error("trust bundle: {0}")]
    Bundle(#[from] BundleError),
}

/// What is wrong in a revocation set.
#[derive(Debug, thiserror::Error)]
pub enum RevocationFault {
    /// Not a SPIFFE ID.
    #[error(transparent)]
    Id(#[from] SpiffeError),
    /// Not a hash.
    #[error(transparent)]
    Digest(#[from] DigestError),
}

/// Applies a snapshot or delta.
pub(super) fn config(shared: &Shared, update: &ConfigUpdate) -> Result<(), ApplyError> {
    let version = update.version;
    let mut upserts = Vec::with_capacity(update.upserts.len());
    for document in &update.upserts {
        let resource = Resource::from_json(&document.json).map_err(|source| {
            let (kind, name) =
                document.key.as_ref().map(|key| (key.kind.clone(), key.name.clone())).unwrap_or_default();
            ApplyError::Resource { version, kind, name, source }
        })?;
        upserts.push(resource);
    }
    let current = shared.index().as_ref().map(|index| index.snapshot().clone());
    let snapshot = if update.base_version == 0 {
        Snapshot::new(version, upserts)
    } else {
        let current = current.unwrap_or_default();
        if current.version != update.base_version {
            return Err(ApplyError::Base { version, base: update.base_version, ours: current.version });
        }
        let deletes = update.deletes.iter().map(|key| wire_key(version, key)).collect::<Result<_, _>>()?;
        let upserts = upserts.into_iter().map(Arc::new).collect();
        current.apply(&Difference { upserts, deletes }, version)
    };
    shared.set_index(Arc::new(Index::compile(&shared.node.trust_domain, &snapshot)));
    Ok(())
}

fn wire_key(version: u64, key: &DocumentKey) -> Result<Key, ApplyError> {
    let kind = Kind::parse(&key.kind).ok_or_else(|| ApplyError::Kind { version, kind: key.kind.clone() })?;
    Ok(Key { kind, namespace: key.namespace.clone(), name: key.name.clone() })
}

/// Applies a revocation set. An entry that cannot be understood might be the one that matters: with such a set this node
/// does not know any more whom to refuse, so it refuses everybody until it gets one that it understands.
pub(crate) fn revocations(shared: &Shared, wire: WireRevocations) -> Result<(), ApplyError> {
    if let Some(ours) = shared.trust.revocations().version().filter(|ours| wire.version < *ours) {
        return Err(ApplyError::Older { version: wire.version, ours });
    }
    let read = read_revocations(wire);
    match &read {
        Ok(set) => {
            shared.trust.replace_revocations(set.clone());
            drop_revoked_identities(shared, set);
        }
        Err(_) => shared.trust.forget_revocations(),
    }
    shared.notify_workers();
    read.map(drop)
}

/// Our own identities are no exception: a key that nobody accepts any more is no use, and one key less to steal.
fn drop_revoked_identities(shared: &Shared, set: &RevocationSet) {
    for svid in shared.svids.all() {
        if let Err(revoked) = set.check(svid.id(), svid.spki_sha256()) {
            tracing::warn!(identity = %svid.id(), reason = %revoked, "an identity of this node was revoked: its key is dropped");
            shared.svids.remove(svid.id());
        }
    }
}

fn read_revocations(wire: WireRevocations) -> Result<RevocationSet, ApplyError> {
    let version = wire.version;
    let mut set = RevocationSet::new(version);
    for entry in wire.entries {
        let fault = |source| ApplyError::Revocation { version, source };
        let id = SpiffeId::parse(&entry.spiffe_id).map_err(|error| fault(error.into()))?;
        let key = match entry.spki_sha256.as_slice() {
            [] => None,
            bytes => Some(Sha256Digest::from_bytes(bytes).map_err(|error| fault(error.into()))?),
        };
        set.revoke(id, key);
    }
    Ok(set)
}

/// Applies a trust bundle.
pub(super) fn trust_bundle(shared: &Shared, wire: WireBundle) -> Result<(), ApplyError> {
    let bundle = TrustBundle::from_der(wire.roots_der.into_iter().map(CertificateDer::from))?;
    shared.trust.replace_bundle(bundle)?;
    shared.notify_workers();
    Ok(())
}
