//! Certificates: keys are made here, and never leave.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use opencluster_api::control::{Certificate, CertificateRequest};
use opencluster_identity::key::{KeyError, PrivateKey};
use opencluster_identity::svid::{Svid, SvidError};
use opencluster_identity::{CertificateDer, SpiffeId};

use crate::shared::Shared;
use crate::tunnel::info::wall_clock;

/// How long an answer may take before the request is made again, with a new key.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait after a refusal.
const AFTER_REFUSAL: Duration = Duration::from_secs(2);

/// Why an identity could not be asked for or installed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// No key.
    #[error("key for {id}: {source}")]
    Key {
        /// Whose.
        id: SpiffeId,
        /// Why.
        source: KeyError,
    },
    /// The controller refused.
    #[error("the controller refused a certificate for {id}: {reason}")]
    Refused {
        /// Whose.
        id: SpiffeId,
        /// Why.
        reason: String,
    },
    /// What was issued does not fit what was asked for.
    #[error("certificate for {id}: {source}")]
    Svid {
        /// Whose.
        id: SpiffeId,
        /// Why.
        source: SvidError,
    },
    /// An answer to no question.
    #[error("a certificate arrived that was not asked for (request {0})")]
    Unasked(u64),
}

struct Pending {
    id: SpiffeId,
    key: PrivateKey,
    since: Instant,
}

/// What is wanted, and what was asked for.
#[derive(Default)]
pub(super) struct Identities {
    wanted: BTreeSet<SpiffeId>,
    pending: HashMap<u64, Pending>,
    not_before: HashMap<SpiffeId, Instant>,
    last_request: u64,
}

impl Identities {
    /// Replaces the list; the keys of all others are dropped.
    pub(super) fn want(&mut self, shared: &Shared, wanted: BTreeSet<SpiffeId>) {
        self.pending.retain(|_, pending| wanted.contains(&pending.id));
        self.not_before.clear();
        shared.svids.retain(|id| wanted.contains(id));
        self.wanted = wanted;
        shared.notify_workers();
    }

    /// Identities that are wanted but not there yet.
    pub(super) fn missing(&self, shared: &Shared) -> Vec<&SpiffeId> {
        self.wanted.iter().filter(|id| !shared.holds(id)).collect()
    }

    /// Everything is dropped: severed.
    pub(super) fn clear(&mut self) {
        *self = Self { last_request: self.last_request, ..Self::default() };
    }

    /// Requests that are due: for identities that are missing, or past half of their life.
    pub(super) fn due(&mut self, shared: &Shared, now: Instant) -> (Vec<CertificateRequest>, Vec<IdentityError>) {
        let wall = wall_clock();
        self.pending.retain(|_, pending| now.duration_since(pending.since) < PATIENCE);
        let (mut requests, mut errors) = (Vec::new(), Vec::new());
        let revocations = shared.trust.revocations().current();
        for id in &self.wanted {
            // No certificate would come; when the revocation is lifted, a new set says so, and this is asked again.
            if revocations.as_ref().is_some_and(|set| set.revokes_every_key_of(id)) {
                continue;
            }
            let due = shared.svids.get(id).is_none_or(|svid| svid.rotate_at() <= wall);
            let asked = self.pending.values().any(|pending| pending.id == *id);
            let held_back = self.not_before.get(id).is_some_and(|at| now < *at);
            if !due || asked || held_back {
                continue;
            }
            match PrivateKey::generate().and_then(|key| Ok((key.csr_der(id)?, key))) {
                Ok((csr_der, key)) => {
                    self.last_request += 1;
                    let request_id = self.last_request;
                    self.pending.insert(request_id, Pending { id: id.clone(), key, since: now });
                    requests.push(CertificateRequest { request_id, spiffe_id: id.to_string(), csr_der });
                }
                Err(source) => {
                    self.not_before.insert(id.clone(), now + AFTER_REFUSAL);
                    errors.push(IdentityError::Key { id: id.clone(), source });
                }
            }
        }
        (requests, errors)
    }

    /// An answer arrived.
    pub(super) fn answered(&mut self, shared: &Shared, answer: Certificate) -> Result<SpiffeId, IdentityError> {
        let pending = self.pending.remove(&answer.request_id).ok_or(IdentityError::Unasked(answer.request_id))?;
        let Pending { id, key, .. } = pending;
        if answer.chain_der.is_empty() {
            self.not_before.insert(id.clone(), Instant::now() + AFTER_REFUSAL);
            return Err(IdentityError::Refused { id, reason: answer.refusal });
        }
        let chain = answer.chain_der.into_iter().map(CertificateDer::from).collect();
        match Svid::new(&id, chain, key) {
            Ok(svid) if !shared.is_severed() => {
                shared.svids.install(svid);
                Ok(id)
            }
            Ok(_) => Err(IdentityError::Refused { id, reason: "this node is severed".to_owned() }),
            Err(source) => {
                self.not_before.insert(id.clone(), Instant::now() + AFTER_REFUSAL);
                Err(IdentityError::Svid { id, source })
            }
        }
    }
}
