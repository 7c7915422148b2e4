//! Enrolments that are over, and that the state has not been told of yet.
//!
//! A node is out when the registry says so: from then on it gets no grant. The others take its flows until they have
//! applied the revocation of its keys, and none can before it is stored and announced. So what they owe counts from the
//! verdict: while one stays unannounced for longer than they have to apply it, nobody's lease is renewed. A store that
//! fails or hangs closes the cluster within a bound (`docs/lease.md`, S2), and opens it again when it comes back in time.

use std::collections::BTreeMap;
use std::time::Duration;

use opencluster_policy::lease::{Nanos, Reason};
use tokio::sync::oneshot;

use super::service::ControlService;
use super::standing_after;
use super::{clocks, registry::Registry};
use crate::listen::shutting_down;
use crate::state::revocation::{End, Revoked};
use crate::state::{State, StateError};
use crate::store::StoreError;

/// How long to wait after the state could not be told.
const RETRY: Duration = Duration::from_millis(200);

/// An enrolment that the state machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The node.
    pub node: String,
    /// The enrolment.
    pub enrolment: String,
    /// Who said so.
    pub actor: String,
    /// Why.
    pub reason: Reason,
}

/// Becomes what was revoked, once it is stored and announced.
pub type Recorded = oneshot::Receiver<Revoked>;

/// The ends that wait to be stored, in the order of the verdicts.
#[derive(Debug, Default)]
pub(super) struct Unrecorded {
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    ended: Ended,
    /// CLOCK_BOOTTIME of the verdict.
    since: Nanos,
    told: oneshot::Sender<Revoked>,
}

impl Unrecorded {
    pub(super) fn push(&mut self, ended: Ended, since: Nanos) -> Recorded {
        let (told, recorded) = oneshot::channel();
        self.waiting.insert(self.next, Waiting { ended, since, told });
        self.next += 1;
        recorded
    }

    /// When the oldest verdict of them was made.
    pub(super) fn since(&self) -> Option<Nanos> {
        self.waiting.values().map(|waiting| waiting.since).min()
    }

    /// All of them, with their numbers.
    pub(super) fn list(&self) -> Vec<(u64, Ended)> {
        self.waiting.iter().map(|(number, waiting)| (*number, waiting.ended.clone())).collect()
    }

    /// It is stored and announced. Who asked for it may be gone.
    pub(super) fn recorded(&mut self, number: u64, revoked: Revoked) {
        if let Some(waiting) = self.waiting.remove(&number) {
            drop(waiting.told.send(revoked));
        }
    }
}

/// Tells the state of every end, all that wait in one transaction, until the controller ends. It is the only one who does:
/// nobody else waits for the store on the way from a verdict to its effect.
pub async fn record_ends(service: ControlService) {
    let mut shutdown = service.shutdown.clone();
    let registry = &service.registry;
    loop {
        let waiting = registry.unrecorded();
        let pause = if waiting.is_empty() {
            None
        } else {
            match record(&service, waiting).await {
                Ok(()) => continue,
                Err(error) if is_final(&error) => {
                    // Ending this part ends the controller. Its next start looks at the store anew, and ends every enrolment.
                    tracing::error!(event = "node.revocation-failed", %error, "an end can never be stored: the controller stops");
                    return;
                }
                Err(error) => {
                    tracing::error!(event = "node.revocation-failed", %error, "a node that is out could not be revoked yet");
                    Some(RETRY)
                }
            }
        };
        tokio::select! {
            () = registry.another_end(), if pause.is_none() => {}
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
            () = shutting_down(&mut shutdown) => return,
        }
    }
}

async fn record(service: &ControlService, waiting: Vec<(u64, Ended)>) -> Result<(), StateError> {
    let registry = service.registry.clone();
    service
        .state
        .run(move |state| {
            store(state, &waiting, |revoked| {
                let recorded = waiting.iter().zip(revoked).map(|((number, _), revoked)| (*number, revoked.clone()));
                registry.recorded(recorded, clocks());
            })
        })
        .await
}

/// Stores ends; `then` is called while no other change can happen.
fn store(state: &State, waiting: &[(u64, Ended)], then: impl FnOnce(&[Revoked])) -> Result<(), StateError> {
    let reasons: Vec<String> = waiting.iter().map(|(_, ended)| ended.reason.to_string()).collect();
    let ends: Vec<End<'_>> = waiting
        .iter()
        .zip(&reasons)
        .map(|((_, ended), reason)| End {
            actor: &ended.actor,
            node: &ended.node,
            enrolment: &ended.enrolment,
            standing: standing_after(&ended.reason),
            reason,
        })
        .collect();
    state.end_enrolments(&ends, then)
}

/// Whether trying again is of no use.
fn is_final(error: &StateError) -> bool {
    matches!(
        error,
        StateError::Poisoned
            | StateError::ShuttingDown
            | StateError::Store(StoreError::InDoubt(_) | StoreError::Damaged { .. })
    )
}

/// Whether verdicts hold up everybody's lease: said once when it begins, and once when it is over.
#[derive(Debug, Default)]
pub(super) struct HeldUp(bool);

impl HeldUp {
    pub(super) fn look(&mut self, registry: &Registry) {
        let now = registry.held_up(clocks());
        if now && !self.0 {
            tracing::error!(
                event = "lease.all-withheld",
                "a node that is out could not be revoked in time: nobody gets a lease before that is stored"
            );
        } else if self.0 && !now {
            tracing::warn!(event = "lease.all-granted-again", "the store has taken all ends: leases are renewed again");
        }
        self.0 = now;
    }
}
