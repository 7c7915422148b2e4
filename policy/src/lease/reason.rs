//! Why it is over.

use std::fmt;

/// Why a node is severed, lost, compromised or retired.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// No grant arrived in time; no heartbeat arrived in time.
    LeaseExpired,
    /// It did not apply a revocation in time, and so its lease was not renewed.
    Unacknowledged,
    /// The controller could not store and announce a verdict over another node in time, and so renewed nobody's lease.
    Unrecorded,
    /// A heartbeat carried a nonce that is not the last one: a copy or a restored snapshot.
    NonceMismatch,
    /// The node's clock and the controller's moved apart: it was paused.
    TimeStep,
    /// It started again without enrolling.
    BootChanged,
    /// Its hardware or its hypervisor is not the one that it was enrolled on: it was moved or copied.
    MachineChanged,
    /// The hypervisor said that this machine goes on from a snapshot.
    GenerationChanged,
    /// The controller started anew and does not know what it granted last.
    Forgotten,
    /// An operator or the controller said so.
    Revoked(String),
    /// It was taken out of service.
    Retired(String),
    /// A grant that does not answer what was asked.
    Protocol,
}

impl Reason {
    /// Whether it says no more than that the node was not heard, and nothing against the node itself.
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::LeaseExpired | Self::Unacknowledged | Self::Unrecorded | Self::Forgotten)
    }

    /// A stable word for machines: on the wire, in logs, in metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::LeaseExpired => "lease-expired",
            Self::Unacknowledged => "unacknowledged",
            Self::Unrecorded => "unrecorded",
            Self::NonceMismatch => "nonce-mismatch",
            Self::TimeStep => "time-step",
            Self::BootChanged => "boot-changed",
            Self::MachineChanged => "machine-changed",
            Self::GenerationChanged => "generation-changed",
            Self::Forgotten => "forgotten",
            Self::Revoked(_) => "revoked",
            Self::Retired(_) => "retired",
            Self::Protocol => "protocol",
        }
    }

    /// From its code and, for those that have one, its text. `None`: no such code (yet).
    pub fn from_code(code: &str, text: &str) -> Option<Self> {
        Some(match code {
            "lease-expired" => Self::LeaseExpired,
            "unacknowledged" => Self::Unacknowledged,
            "unrecorded" => Self::Unrecorded,
            "nonce-mismatch" => Self::NonceMismatch,
            "time-step" => Self::TimeStep,
            "boot-changed" => Self::BootChanged,
            "machine-changed" => Self::MachineChanged,
            "generation-changed" => Self::GenerationChanged,
            "forgotten" => Self::Forgotten,
            "revoked" => Self::Revoked(text.to_owned()),
            "retired" => Self::Retired(text.to_owned()),
            "protocol" => Self::Protocol,
            _ => return None,
        })
    }
}

/// For people: the log, the audit trail, the command line.
impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::LeaseExpired => "the lease ran out: heartbeats or their answers did not arrive in time",
            Self::Unacknowledged => "the lease was not renewed: the node did not apply a revocation in time",
            Self::Unrecorded => {
                "the lease was not renewed: the controller could not store and announce the end of another node in time"
            }
            Self::NonceMismatch => {
                "a heartbeat carried an old nonce: a copy of the node, or a snapshot that was restored"
            }
            Self::TimeStep => "the node's clocks and the controller's moved apart: it was paused",
            Self::BootChanged => "it started again without enrolling",
            Self::MachineChanged => "its hardware or hypervisor is another one: it was moved or copied",
            Self::GenerationChanged => {
                "its hypervisor says that it goes on from a snapshot: it was copied, restored or moved"
            }
            Self::Forgotten => "the controller was restarted and cannot know what happened meanwhile",
            Self::Revoked(why) | Self::Retired(why) => why,
            Self::Protocol => "the controller answered what was not asked",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_read_back() {
        for reason in [
            Reason::LeaseExpired,
            Reason::Unacknowledged,
            Reason::Unrecorded,
            Reason::NonceMismatch,
            Reason::TimeStep,
            Reason::BootChanged,
            Reason::MachineChanged,
            Reason::GenerationChanged,
            Reason::Forgotten,
            Reason::Revoked("stolen".to_owned()),
            Reason::Retired("too old".to_owned()),
            Reason::Protocol,
        ] {
            assert_eq!(Reason::from_code(reason.code(), &reason.to_string()).as_ref(), Some(&reason));
        }
        assert_eq!(Reason::from_code("of a later version", ""), None);
    }
}
