//! Between the state machine's words and the wire's.

use opencluster_api::control;
use opencluster_identity::SpiffeId;
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::revocation::RevocationSet;
use opencluster_policy::lease::{Clocks, Grant, Heartbeat};

use super::host::Measured;

/// What the node says of itself beside the heartbeat proper.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) host: Measured,
    pub(crate) config_version: u64,
    pub(crate) revocation_version: u64,
    pub(crate) health: control::NodeHealth,
}

/// The wire form of a heartbeat that is sent for the first time.
pub(crate) fn heartbeat(heartbeat: &Heartbeat, report: Report) -> control::Heartbeat {
    control::Heartbeat {
        sequence: heartbeat.sequence,
        nonce: heartbeat.nonce.to_vec(),
        monotonic_raw_ns: heartbeat.clocks.monotonic_raw,
        boottime_ns: heartbeat.clocks.boottime,
        realtime_ns: heartbeat.clocks.realtime,
        granted_monotonic_raw_ns: heartbeat.granted,
        boot_id: report.host.boot_id,
        machine: report.host.machine.to_vec(),
        config_version: report.config_version,
        revocation_version: report.revocation_version,
        health: Some(report.health),
    }
}

/// The state machine's form of a grant; `None` if it cannot be one.
pub(crate) fn grant(grant: &control::Grant) -> Option<Grant> {
    Some(Grant {
        sequence: grant.sequence,
        sent: Clocks {
            monotonic_raw: grant.monotonic_raw_ns,
            boottime: grant.boottime_ns,
            realtime: grant.realtime_ns,
        },
        nonce: grant.nonce.as_slice().try_into().ok()?,
        lease: u64::from(grant.lease_ms) * 1_000_000,
        confirm: grant.confirm,
    })
}

/// A revocation set, and what in it could not be read (an identity that is not one cannot be anybody's either).
pub(crate) fn revocations(set: &control::RevocationSet) -> (RevocationSet, Vec<String>) {
    let mut revocations = RevocationSet::new(set.version);
    let mut faults = Vec::new();
    for entry in &set.entries {
        let id = match SpiffeId::parse(&entry.spiffe_id) {
            Ok(id) => id,
            Err(error) => {
                faults.push(format!("revocation of {:?}: {error}", entry.spiffe_id));
                continue;
            }
        };
        // A key that cannot be read revokes all keys: rather too much than too little.
        let key = match entry.spki_sha256.as_slice() {
            [] => None,
            bytes => Sha256Digest::from_bytes(bytes)
                .inspect_err(|error| faults.push(format!("revocation of {id}: {error}")))
                .ok(),
        };
        revocations.revoke(id, key);
    }
    (revocations, faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_with_a_short_nonce_is_none() {
        let wire = control::Grant {
            sequence: 1,
            nonce: vec![0; 15],
            lease_ms: 3000,
            confirm: true,
            monotonic_raw_ns: 5,
            boottime_ns: 6,
            realtime_ns: 7,
        };
        assert_eq!(grant(&wire), None);
        let wire = control::Grant { nonce: vec![7; 16], ..wire };
        let sent = Clocks { monotonic_raw: 5, boottime: 6, realtime: 7 };
        let expected = Grant { sequence: 1, sent, nonce: [7; 16], lease: 3_000_000_000, confirm: true };
        assert_eq!(grant(&wire), Some(expected));
    }

    #[test]
    fn an_unreadable_key_revokes_every_key() {
        let entry = control::Revocation {
            spiffe_id: "spiffe://example.org/node/b".to_owned(),
            spki_sha256: vec![1, 2, 3],
            reason: String::new(),
        };
        let (set, faults) = revocations(&control::RevocationSet { version: 4, entries: vec![entry] });
        assert_eq!((set.version(), faults.len()), (4, 1));
        let id = SpiffeId::parse("spiffe://example.org/node/b").expect("id");
        set.check(&id, &Sha256Digest::of(b"any key")).expect_err("revoked");
    }
}
