//! Whatever bytes come from outside, parsers answer with an error and never panic; and no damaged certificate is good.

use std::sync::LazyLock;

use opencluster_identity::authority::{Issuer, Root};
use opencluster_identity::bundle::TrustBundle;
use opencluster_identity::csr::VerifiedCsr;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::verify::verify_peer;
use opencluster_identity::{CertificateDer, UnixTime};
use proptest::prelude::*;

use crate::common::{Cluster, domain, workload};

struct Samples {
    cluster: Cluster,
    chain: Vec<CertificateDer<'static>>,
    csr: Vec<u8>,
}

static SAMPLES: LazyLock<Samples> = LazyLock::new(|| {
    let cluster = Cluster::new(&domain());
    let chain = cluster.svid(&workload("a")).chain().to_vec();
    let csr = PrivateKey::generate().unwrap().csr_der(&workload("a")).unwrap();
    Samples { cluster, chain, csr }
});

/// Damage: bytes overwritten, cut out or put in.
#[derive(Clone, Debug)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index, usize),
    Insert(prop::sample::Index, Vec<u8>),
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let one = prop_oneof![
        3 => (any::<prop::sample::Index>(), 1_u8..).prop_map(|(at, with)| Damage::Flip(at, with)),
        1 => (any::<prop::sample::Index>(), 1_usize..200).prop_map(|(at, count)| Damage::Cut(at, count)),
        1 => (any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
    ];
    prop::collection::vec(one, 1..6)
}

fn apply(damage: &[Damage], bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for damage in damage {
        if bytes.is_empty() {
            break;
        }
        match damage {
            Damage::Flip(at, with) => {
                let at = at.index(bytes.len());
                bytes[at] ^= with;
            }
            Damage::Cut(at, count) => {
                let start = at.index(bytes.len());
                bytes.drain(start..bytes.len().min(start + count));
            }
            Damage::Insert(at, new) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, new.iter().copied());
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn r31_damaged_leaf_is_refused(damage in damage()) {
        let samples = &*SAMPLES;
        let leaf = apply(&damage, &samples.chain[0]);
        prop_assume!(leaf != *samples.chain[0]);
        let trust = samples.cluster.trust();
        let chain = [CertificateDer::from(leaf), samples.chain[1].clone()];
        let bundle = trust.bundle().unwrap();
        prop_assert!(verify_peer(&chain, &bundle, trust.revocations(), &domain(), UnixTime::now()).is_err());
    }

    #[test]
    fn r31_damaged_issuer_is_refused(damage in damage()) {
        let samples = &*SAMPLES;
        let issuer = apply(&damage, &samples.chain[1]);
        prop_assume!(issuer != *samples.chain[1]);
        let chain = [samples.chain[0].clone(), CertificateDer::from(issuer)];
        prop_assert!(samples.cluster.trust().verify(&chain, UnixTime::now()).is_err());
    }

    #[test]
    fn damaged_csr_is_refused(damage in damage()) {
        let csr = apply(&damage, &SAMPLES.csr);
        prop_assume!(csr != SAMPLES.csr);
        prop_assert!(VerifiedCsr::parse(&csr).is_err());
    }

    #[test]
    fn damaged_roots_and_secrets_do_not_panic(damage in damage()) {
        let root = &SAMPLES.cluster.root;
        // Nothing vouches for a root but who installs it, so it may still be one.
        let from_der = TrustBundle::from_der([CertificateDer::from(apply(&damage, root.certificate()))]);
        let from_pem = TrustBundle::from_pem(&apply(&damage, root.bundle().unwrap().to_pem().as_bytes()));
        let secret = apply(&damage, &root.danger_secret_bytes().unwrap());
        for error in [from_der.err().map(|e| e.to_string()), from_pem.err().map(|e| e.to_string())].into_iter().flatten() {
            prop_assert!(!error.is_empty());
        }
        if let Ok(root) = Root::from_secret_bytes(&secret) {
            prop_assert!(!root.certificate().is_empty());
        }
        prop_assert!(Issuer::from_secret_bytes(&secret).is_err());
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(VerifiedCsr::parse(&bytes).is_err());
        prop_assert!(PrivateKey::from_pem(&bytes).is_err());
        prop_assert!(TrustBundle::from_pem(&bytes).is_err());
        let chain = [CertificateDer::from(bytes)];
        prop_assert!(SAMPLES.cluster.trust().verify(&chain, UnixTime::now()).is_err());
    }
}

/// Every value of every byte: one damaged bit anywhere is noticed.
#[test]
fn r31_csr_with_any_one_byte_changed_is_refused() {
    for at in 0..SAMPLES.csr.len() {
        for change in 1..=u8::MAX {
            let mut csr = SAMPLES.csr.clone();
            csr[at] ^= change;
            assert!(VerifiedCsr::parse(&csr).is_err(), "byte {at} changed by {change:#x}");
        }
    }
}

#[test]
fn the_undamaged_samples_are_good() {
    let samples = &*SAMPLES;
    samples.cluster.trust().verify(&samples.chain, UnixTime::now()).unwrap();
    assert_eq!(VerifiedCsr::parse(&samples.csr).unwrap().id(), &workload("a"));
}
