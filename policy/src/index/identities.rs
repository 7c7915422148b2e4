//! Identities by their text: most of what a decision costs is waiting for memory here, twice.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};

use super::table::Source;
use super::{FastMap, NONE};
use crate::resource::Protocol;
use crate::spiffe::{SpiffeId, TrustDomain};

/// Every workload, and every identity that a policy names.
#[derive(Debug)]
pub(super) struct Identities {
    domain: TrustDomain,
    /// Those of our own trust domain, by path.
    own: FastMap<Text, Identity>,
    /// The rest, by the whole ID.
    foreign: FastMap<Text, Identity>,
}

/// What compiling found out about an identity.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    /// Its number, as a source and as a destination.
    pub(super) number: u32,
    /// As in [`Source`].
    pub(super) group: u32,
    pub(super) namespace: u32,
    pub(super) member: bool,
    /// As a destination: the scope of one of its ports (most have one port), or `NONE`.
    pub(super) scope: u32,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
}

impl Identity {
    pub(super) fn new(number: u32) -> Self {
        let (port, protocol) = (0, Protocol::Tcp);
        Self { number, group: NONE, namespace: NONE, member: false, scope: NONE, port, protocol }
    }

    pub(super) fn source(&self) -> Source {
        Source { identity: self.number, group: self.group, namespace: self.namespace, member: self.member }
    }
}

impl Identities {
    pub(super) fn new(domain: &TrustDomain) -> Self {
        Self { domain: domain.clone(), own: FastMap::default(), foreign: FastMap::default() }
    }

    pub(super) fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    pub(super) fn len(&self) -> usize {
        self.own.len() + self.foreign.len()
    }

    pub(super) fn get(&self, id: &SpiffeId) -> Option<&Identity> {
        if id.is_of(&self.domain) {
            self.own.get(id.path().as_bytes())
        } else {
            self.foreign.get(id.as_str().as_bytes())
        }
    }

    pub(super) fn get_mut(&mut self, id: &SpiffeId) -> Option<&mut Identity> {
        if id.is_of(&self.domain) {
            self.own.get_mut(id.path().as_bytes())
        } else {
            self.foreign.get_mut(id.as_str().as_bytes())
        }
    }

    pub(super) fn insert(&mut self, id: &SpiffeId, identity: Identity) {
        if id.is_of(&self.domain) {
            self.own.insert(Text::new(id.path()), identity);
        } else {
            self.foreign.insert(Text::new(id.as_str()), identity);
        }
    }
}

/// With an [`Identity`] behind it, 64 bytes: one line of the cache, or two that lie side by side.
const IN_PLACE: usize = 38;

/// A text that lies in the map itself if it is short, as the paths of workloads mostly are: comparing it then reads no memory
/// that finding it did not. (Measured with 100,000 identities: half of a decision's time was that one read.)
#[derive(Debug)]
enum Text {
    Short(u8, [u8; IN_PLACE]),
    Long(Box<[u8]>),
}

impl Text {
    fn new(text: &str) -> Self {
        let mut place = [0; IN_PLACE];
        match place.get_mut(..text.len()) {
            Some(start) => {
                start.copy_from_slice(text.as_bytes());
                Self::Short(text.len() as u8, place)
            }
            None => Self::Long(text.as_bytes().into()),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Short(length, place) => &place[..usize::from(*length)],
            Self::Long(text) => text,
        }
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Text {}

// As the bytes do, by which maps are asked.
impl Hash for Text {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.bytes().hash(state);
    }
}

impl Borrow<[u8]> for Text {
    fn borrow(&self) -> &[u8] {
        self.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_cache_line() {
        assert_eq!(size_of::<(Text, Identity)>(), 64);
    }

    #[test]
    fn short_and_long_texts_are_found() {
        let domain = TrustDomain::parse("rig.test").unwrap();
        let mut identities = Identities::new(&domain);
        let ids: Vec<SpiffeId> = (1..=100)
            .flat_map(|length| {
                ["rig.test", "other.test"].map(|domain| format!("spiffe://{domain}/{}", "x".repeat(length)))
            })
            .map(|text| SpiffeId::parse(&text).unwrap())
            .collect();
        for (number, id) in ids.iter().enumerate() {
            assert!(identities.get(id).is_none());
            identities.insert(id, Identity::new(number as u32));
        }
        assert_eq!(identities.len(), ids.len());
        for (number, id) in ids.iter().enumerate() {
            assert_eq!(identities.get(id).unwrap().number, number as u32);
            assert_eq!(identities.get_mut(id).unwrap().number, number as u32);
        }
    }
}
