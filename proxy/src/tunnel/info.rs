//! What is known of a tunnel: who is at either end, and until when that counts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::svid::Svid;
use opencluster_identity::trust::Trust;
use opencluster_identity::verify::PeerVerified;
use opencluster_identity::{SpiffeId, UnixTime};

use super::tls::handshake::Agreed;

/// One end's identity and key.
#[derive(Clone, Debug)]
pub struct Party {
    /// Who.
    pub id: Arc<SpiffeId>,
    /// SHA-256 of the public key, which revocations name.
    pub key: Sha256Digest,
    /// Until when the certificate counts.
    pub not_after: UnixTime,
}

impl Party {
    /// Ourselves.
    pub fn local(id: &Arc<SpiffeId>, svid: &Svid) -> Self {
        Self { id: Arc::clone(id), key: *svid.spki_sha256(), not_after: svid.not_after() }
    }

    /// The other side, which was verified.
    pub fn remote(peer: &PeerVerified) -> Self {
        Self { id: Arc::new(peer.id().clone()), key: *peer.spki_sha256(), not_after: peer.not_after() }
    }
}

/// Both ends of a tunnel, and its TLS parameters.
#[derive(Clone, Debug)]
pub struct TunnelInfo {
    /// This proxy's workload.
    pub local: Party,
    /// The other proxy's workload, verified.
    pub remote: Party,
    /// The other proxy's address.
    pub address: SocketAddr,
    /// The TLS suite.
    pub suite: &'static str,
    /// The key exchange group.
    pub group: &'static str,
}

impl TunnelInfo {
    /// From a finished handshake.
    pub fn new(local: Party, remote: &PeerVerified, address: SocketAddr, agreed: &Agreed) -> Self {
        Self { local, remote: Party::remote(remote), address, suite: agreed.suite, group: agreed.group }
    }

    /// Whether a new flow may still use it.
    pub fn is_current(&self, now: UnixTime) -> bool {
        now < self.local.not_after && now < self.remote.not_after
    }

    /// Why it may not be used any more, if an identity of it was revoked.
    pub fn revoked(&self, trust: &Trust) -> Option<String> {
        [&self.local, &self.remote]
            .into_iter()
            .find_map(|party| trust.revocations().check(&party.id, &party.key).err())
            .map(|error| error.to_string())
    }
}

/// The wall clock, as certificates see it.
pub fn wall_clock() -> UnixTime {
    UnixTime::since_unix_epoch(
        // A clock before 1970 verifies no certificate: that is the answer to give.
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO),
    )
}
