//! A peer's certificate chain, as a handshake delivers it: each certificate behind its length in two bytes, leaf first.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use opencluster_identity::bundle::TrustBundle;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::revocation::{RevocationSet, Revocations};
use opencluster_identity::svid::Svid;
use opencluster_identity::verify::verify_peer;
use opencluster_identity::{CertificateDer, SpiffeId, UnixTime};

/// The root that signed the seed. Its certificates count at this time.
static ROOT: &[u8] = include_bytes!("peer_chain_root.der");
const NOW: Duration = Duration::from_secs(1_800_000_000);

static BUNDLE: LazyLock<TrustBundle> =
    LazyLock::new(|| TrustBundle::from_der([CertificateDer::from(ROOT)]).expect("the root beside this file is one"));

fuzz_target!(|bytes: &[u8]| {
    let chain = split(bytes);
    let revocations = Revocations::not_loaded();
    revocations.replace(RevocationSet::new(1));
    let now = UnixTime::since_unix_epoch(NOW);
    if let Ok(peer) = verify_peer(&chain, &BUNDLE, &revocations, BUNDLE.domain(), now) {
        assert_eq!(peer.id().trust_domain(), BUNDLE.domain().as_str());
        assert!(peer.not_after() >= now);
    }
    // webpki comes first above, so that only what an authority signed reaches our own reading of certificates. Here that
    // reading comes first: of a root's, and of a leaf's.
    if let Ok(bundle) = TrustBundle::from_der(chain.clone()) {
        assert!(!bundle.roots().is_empty());
    }
    let anyone = SpiffeId::parse("spiffe://fuzz.test/anyone").expect("a SPIFFE ID");
    let key = PrivateKey::generate().expect("a key");
    assert!(Svid::new(&anyone, chain, key).is_err(), "nobody has a certificate for a key that was just made");
});

fn split(mut bytes: &[u8]) -> Vec<CertificateDer<'static>> {
    let mut chain = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (certificate, rest) = rest.split_at(rest.len().min(usize::from(u16::from_be_bytes(*length))));
        chain.push(CertificateDer::from(certificate.to_vec()));
        bytes = rest;
    }
    chain
}
