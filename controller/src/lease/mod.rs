//! Leases: who may carry traffic right now, and the sessions that nodes keep with the controller.
//!
//! The rules are `opencluster-policy`'s [`PeerLease`](opencluster_policy::lease::PeerLease); this module brings the clock,
//! the randomness and the streams.
//!
//! **A restart of the controller.** Nonces of granted leases live in memory only: writing each to disk would cost a
//! synchronous write for every heartbeat of every node. A controller that starts therefore cannot tell a node that kept
//! running from a copy of it that was made meanwhile, and does not guess: every enrolment that was in force is ended as
//! lost, its keys are revoked, and its node must be wiped and enrolled again. For a node that is what losing its controller
//! means in any case (R06); with one controller, a restart of it is such a loss.

pub mod ends;
mod peers;
pub mod registry;
pub mod service;
mod session;

use opencluster_identity::digest::Sha256Digest;
use opencluster_policy::lease::{Clocks, Host, Reason};
use rustix::time::{ClockId, clock_gettime};

use crate::state::record::{EnrolmentRecord, Standing};
use crate::state::revocation::End;
use crate::state::{State, StateError};
use crate::store::Table;

/// The controller's clocks now.
pub fn clocks() -> Clocks {
    let nanos = |clock| {
        let time = clock_gettime(clock);
        // None of these clocks shows a time before its epoch.
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    };
    Clocks {
        monotonic_raw: nanos(ClockId::MonotonicRaw),
        boottime: nanos(ClockId::Boottime),
        realtime: nanos(ClockId::Realtime),
    }
}

/// What a node says that it is, as the state machine compares it. An empty `machine` is one of its own: not measured.
pub(crate) fn host(boot_id: &str, machine: &[u8]) -> Host {
    Host { boot: *Sha256Digest::of(boot_id.as_bytes()).as_bytes(), machine: *Sha256Digest::of(machine).as_bytes() }
}

/// What an enrolment that ended for this reason is.
pub(crate) fn standing_after(reason: &Reason) -> Standing {
    match reason {
        Reason::Retired(_) => Standing::Retired,
        loss if loss.is_loss() => Standing::Lost,
        _ => Standing::Compromised,
    }
}

/// Ends what was in force when the controller stopped: see the module.
pub fn end_enrolments_of_the_last_run(state: &State) -> Result<usize, StateError> {
    let records = state.scan::<EnrolmentRecord>(Table::Enrolments, "")?;
    let reason = Reason::Forgotten.to_string();
    let ends: Vec<End<'_>> = records
        .iter()
        .filter(|(_, record, _)| record.standing == Standing::Active)
        .map(|(node, record, _)| End {
            actor: "controller",
            node,
            enrolment: &record.id,
            standing: standing_after(&Reason::Forgotten),
            reason: &reason,
        })
        .collect();
    state.end_enrolments(&ends, |_| ())?;
    for End { node, .. } in &ends {
        tracing::warn!(event = "node.lost", node, reason, "the node must enrol again");
    }
    Ok(ends.len())
}
