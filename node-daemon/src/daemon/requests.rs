//! Certificate requests on their way: the proxy's and our own, under numbers of one sequence, sent again when the session
//! is a new one.

use std::collections::BTreeMap;

use opencluster_api::control::{Certificate, CertificateRequest};
use opencluster_identity::key::PrivateKey;

/// A proxy that asks for more at once than this is broken.
const MAX_OPEN: usize = 2048;

/// Whose request it is.
#[derive(Debug)]
pub(crate) enum Origin {
    /// The proxy's, under its own number.
    Proxy { generation: u64, request_id: u64 },
    /// The node's own; the key that is to be certified.
    Node(PrivateKey),
}

/// Requests without an answer.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    last: u64,
    open: BTreeMap<u64, (CertificateRequest, Origin)>,
}

impl Requests {
    /// Takes a request and returns it with the number that it is sent under; `None`: too many are open.
    pub(crate) fn add(&mut self, mut request: CertificateRequest, origin: Origin) -> Option<CertificateRequest> {
        if self.open.len() >= MAX_OPEN {
            return None;
        }
        self.last += 1;
        request.request_id = self.last;
        self.open.insert(self.last, (request.clone(), origin));
        Some(request)
    }

    /// The request that this answers.
    pub(crate) fn answered(&mut self, certificate: &Certificate) -> Option<Origin> {
        self.open.remove(&certificate.request_id).map(|(_, origin)| origin)
    }

    /// All that have to be sent in a new session.
    pub(crate) fn open(&self) -> impl Iterator<Item = &CertificateRequest> {
        self.open.values().map(|(request, _)| request)
    }

    /// Whether the node has asked for itself.
    pub(crate) fn node_has_asked(&self) -> bool {
        self.open.values().any(|(_, origin)| matches!(origin, Origin::Node(_)))
    }

    /// The proxy that asked is gone, and its keys with it.
    pub(crate) fn forget_proxy(&mut self) {
        self.open.retain(|_, (_, origin)| matches!(origin, Origin::Node(_)));
    }

    /// Drops everything, keys included.
    pub(crate) fn clear(&mut self) {
        self.open.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(request_id: u64) -> (CertificateRequest, Origin) {
        (CertificateRequest { request_id, ..Default::default() }, Origin::Proxy { generation: 1, request_id })
    }

    #[test]
    fn numbers_are_translated_and_answers_count_once() {
        let mut requests = Requests::default();
        let (request, origin) = proxy(77);
        let sent = requests.add(request, origin).expect("room");
        assert_ne!(sent.request_id, 77);
        assert_eq!(requests.open().count(), 1);
        let answer = Certificate { request_id: sent.request_id, ..Default::default() };
        assert!(matches!(requests.answered(&answer), Some(Origin::Proxy { generation: 1, request_id: 77 })));
        assert!(requests.answered(&answer).is_none());
    }

    #[test]
    fn a_flood_of_requests_is_bounded() {
        let mut requests = Requests::default();
        for id in 0..MAX_OPEN as u64 {
            let (request, origin) = proxy(id);
            requests.add(request, origin).expect("room");
        }
        let (request, origin) = proxy(0);
        assert!(requests.add(request, origin).is_none());
        requests.forget_proxy();
        assert_eq!(requests.open().count(), 0);
    }
}
