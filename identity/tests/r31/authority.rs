//! What the authorities sign, and what they refuse to.

use std::time::Duration;

use opencluster_identity::authority::{AuthorityError, Issuer, Root};
use opencluster_identity::bundle::{BundleError, TrustBundle};
use opencluster_identity::csr::{CsrError, MAX_CSR_BYTES, VerifiedCsr};
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::svid::{Svid, SvidError, SvidStore};
use opencluster_identity::verify::verify_peer;
use opencluster_identity::{SpiffeId, TrustDomain, UnixTime};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::common::{Cluster, HOUR, after, an_hour_before, domain, id, leaf_params, workload};

#[test]
fn r31_issued_certificates_follow_the_svid_profile() {
    let cluster = Cluster::new(&domain());
    let a = workload("a");
    let key = PrivateKey::generate().unwrap();
    let now = UnixTime::now();
    let issued = cluster.issuer.issue(&key.csr_der(&a).unwrap(), &a, HOUR, now).unwrap();
    assert_eq!(issued.chain.len(), 2);
    let (rest, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert!(rest.is_empty());

    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names, [GeneralName::URI(a.as_str())]);
    // RFC 5280: critical where there is no subject.
    assert!(names.critical && leaf.subject().iter().next().is_none());
    let constraints = leaf.basic_constraints().unwrap().unwrap();
    assert!(constraints.critical && !constraints.value.ca);
    let usage = leaf.key_usage().unwrap().unwrap();
    assert!(usage.critical);
    // Bit 0, digitalSignature, and no other.
    assert_eq!(usage.value.flags, 1);
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any && !usage.code_signing && usage.other.is_empty());
    assert_eq!(Sha256Digest::of(leaf.public_key().raw), key.spki_sha256());
    assert_eq!(issued.spki_sha256, key.spki_sha256());

    let not_before = leaf.validity().not_before.timestamp() as u64;
    let not_after = leaf.validity().not_after.timestamp() as u64;
    assert_eq!((not_before, not_after), (issued.not_before.as_secs(), issued.not_after.as_secs()));
    assert_eq!((not_before, not_after), (now.as_secs() - 60, now.as_secs() + 3600));

    let (_, issuer) = X509Certificate::from_der(&issued.chain[1]).unwrap();
    let (_, root) = X509Certificate::from_der(cluster.root.certificate()).unwrap();
    for (authority, path_length) in [(&issuer, 0), (&root, 1)] {
        let constraints = authority.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && constraints.value.ca);
        assert_eq!(constraints.value.path_len_constraint, Some(path_length));
        let usage = authority.key_usage().unwrap().unwrap();
        assert!(
            usage.critical && usage.value.key_cert_sign() && usage.value.crl_sign() && !usage.value.digital_signature()
        );
        let names = authority.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names, [GeneralName::URI("spiffe://cluster.test")]);
    }
}

#[test]
fn serial_numbers_are_random_128_bit() {
    let cluster = Cluster::new(&domain());
    let a = workload("a");
    let csr = PrivateKey::generate().unwrap().csr_der(&a).unwrap();
    let mut bits = 0;
    let serials: std::collections::HashSet<_> = (0..32)
        .map(|_| {
            let issued = cluster.issuer.issue(&csr, &a, HOUR, UnixTime::now()).unwrap();
            let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
            assert_eq!(leaf.serial.to_str_radix(16), issued.serial.trim_start_matches('0'));
            bits = bits.max(leaf.serial.bits());
            issued.serial
        })
        .collect();
    assert_eq!(serials.len(), 32);
    // All of 32 serial numbers under 2^124 would be a matter of 2^-128.
    assert!((125..=128).contains(&bits), "{bits}");
}

#[test]
fn r31_only_the_key_is_taken_from_a_csr() {
    let cluster = Cluster::new(&domain());
    let a = workload("a");
    let key = KeyPair::generate().unwrap();
    let mut params = leaf_params(a.as_str());
    params.distinguished_name.push(rcgen::DnType::CommonName, "root of everything");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let csr = params.serialize_request(&key).unwrap();
    let issued = cluster.issuer.issue(csr.der(), &a, HOUR, UnixTime::now()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert!(!leaf.is_ca() && leaf.subject().iter().next().is_none());
    assert_eq!(leaf.key_usage().unwrap().unwrap().value.flags, 1);
    let trust = cluster.trust();
    let bundle = trust.bundle().unwrap();
    verify_peer(&issued.chain, &bundle, trust.revocations(), &domain(), UnixTime::now()).unwrap();
}

#[test]
fn r31_csrs_that_ask_for_the_wrong_thing_are_refused() {
    let cluster = Cluster::new(&domain());
    let a = workload("a");
    let now = UnixTime::now();
    let key = KeyPair::generate().unwrap();
    let csr = |params: &CertificateParams| params.serialize_request(&key).unwrap().der().to_vec();
    let issue = |csr: &[u8], id: &SpiffeId| cluster.issuer.issue(csr, id, HOUR, now);
    let good = csr(&leaf_params(a.as_str()));
    issue(&good, &a).unwrap();

    let error = issue(&good, &workload("b")).unwrap_err();
    assert!(matches!(error, AuthorityError::WrongIdentity { .. }), "{error}");
    let foreign = id("spiffe://other.test/ns/default/sa/a");
    let error = issue(&csr(&leaf_params(foreign.as_str())), &foreign).unwrap_err();
    assert!(matches!(error, AuthorityError::TrustDomain { .. }), "{error}");
    let whole = id("spiffe://cluster.test");
    let error = issue(&csr(&leaf_params(whole.as_str())), &whole).unwrap_err();
    assert!(matches!(error, AuthorityError::NoPath(_)), "{error}");

    let with_names = |names: Vec<SanType>| {
        let mut params = leaf_params(a.as_str());
        params.subject_alt_names = names;
        csr(&params)
    };
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let dns = SanType::DnsName("a.cluster.test".try_into().unwrap());
    for (names, why) in [
        (vec![], "no name"),
        (vec![dns.clone()], "a DNS name"),
        (vec![uri(a.as_str()), uri(workload("b").as_str())], "two URIs"),
        (vec![uri(a.as_str()), dns], "a DNS name besides"),
        (vec![uri("https://cluster.test")], "not a SPIFFE ID"),
    ] {
        let error = issue(&with_names(names), &a).unwrap_err();
        assert!(matches!(error, AuthorityError::Csr(CsrError::Name(_))), "{why}: {error}");
    }

    // Another curve.
    let other = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let p384 = leaf_params(a.as_str()).serialize_request(&other).unwrap();
    let error = issue(p384.der(), &a).unwrap_err();
    assert!(matches!(error, AuthorityError::Csr(CsrError::Algorithm)), "{error}");

    // Signed by another key than the one inside: the last byte of the signature is not the key's doing any more.
    let mut unsigned = good.clone();
    *unsigned.last_mut().unwrap() ^= 1;
    let error = issue(&unsigned, &a).unwrap_err();
    assert!(matches!(error, AuthorityError::Csr(CsrError::Signature(_))), "{error}");

    let mut longer = good.clone();
    longer.push(0);
    assert!(matches!(VerifiedCsr::parse(&longer), Err(CsrError::Malformed(_))));
    assert!(matches!(VerifiedCsr::parse(&[]), Err(CsrError::Malformed(_))));
    assert!(matches!(VerifiedCsr::parse(&vec![0x30; MAX_CSR_BYTES + 1]), Err(CsrError::TooLarge(_))));
}

#[test]
fn r31_no_certificate_outlives_its_issuer() {
    let now = UnixTime::now();
    let root = Root::create(&domain(), 3 * HOUR, now).unwrap();
    let issuer = root.create_issuer(10 * HOUR, now).unwrap();
    assert_eq!(issuer.not_after(), root.not_after());
    let a = workload("a");
    let csr = PrivateKey::generate().unwrap().csr_der(&a).unwrap();
    let issued = issuer.issue(&csr, &a, 10 * HOUR, after(now, HOUR)).unwrap();
    assert_eq!(issued.not_after, root.not_after());
    // The issuer's own beginning bounds the backdating.
    assert_eq!(issuer.issue(&csr, &a, HOUR, now).unwrap().not_before.as_secs(), now.as_secs() - 60);

    for when in [after(now, 3 * HOUR), after(now, 4 * HOUR), an_hour_before(now)] {
        let error = issuer.issue(&csr, &a, HOUR, when).unwrap_err();
        assert!(matches!(error, AuthorityError::OutsideValidity { .. }), "{error}");
        let error = root.create_issuer(HOUR, when).unwrap_err();
        assert!(matches!(error, AuthorityError::OutsideValidity { .. }), "{error}");
    }
    let error = issuer.issue(&csr, &a, Duration::from_millis(900), now).unwrap_err();
    assert!(matches!(error, AuthorityError::Lifetime(_)), "{error}");
    // Lifetimes beyond the calendar are an error, not a wrap-around.
    let error = Root::create(&domain(), Duration::MAX, now).unwrap_err();
    assert!(matches!(error, AuthorityError::Time(_)), "{error}");
}

#[test]
fn r31_rotation_is_due_at_half_life_with_jitter() {
    let cluster = Cluster::new(&domain());
    let now = UnixTime::now();
    let a = workload("a");
    for ttl in [Duration::from_secs(30), Duration::from_mins(5), HOUR] {
        let due: std::collections::BTreeSet<_> = (0..50)
            .map(|_| {
                let key = PrivateKey::generate().unwrap();
                let issued = cluster.issuer.issue(&key.csr_der(&a).unwrap(), &a, ttl, now).unwrap();
                Svid::new(&a, issued.chain, key).unwrap().rotate_in(now).as_secs()
            })
            .collect();
        let ttl = ttl.as_secs();
        assert!(*due.first().unwrap() >= ttl * 3 / 10 && *due.last().unwrap() <= ttl * 6 / 10, "{ttl}: {due:?}");
        assert!(due.len() > 2, "no jitter: {due:?}");
    }
    let svid = cluster.svid(&a);
    assert_eq!(svid.rotate_in(after(now, 2 * HOUR)), Duration::ZERO);
}

#[test]
fn sealed_authorities_come_back_and_damaged_ones_do_not() {
    let cluster = Cluster::new(&domain());
    let root_secret = cluster.root.danger_secret_bytes().unwrap();
    let issuer_secret = cluster.issuer.danger_secret_bytes().unwrap();
    let root = Root::from_secret_bytes(&root_secret).unwrap();
    let issuer = Issuer::from_secret_bytes(&issuer_secret).unwrap();
    assert_eq!(root.certificate(), cluster.root.certificate());
    assert_eq!((root.domain(), root.not_after()), (cluster.root.domain(), cluster.root.not_after()));
    assert_eq!((issuer.domain(), issuer.not_after()), (cluster.issuer.domain(), cluster.issuer.not_after()));

    // What the restored ones sign is what the first ones' trust accepts.
    let now = UnixTime::now();
    let a = workload("a");
    let csr = PrivateKey::generate().unwrap().csr_der(&a).unwrap();
    let trust = cluster.trust();
    for issuer in [issuer, root.create_issuer(HOUR, now).unwrap()] {
        trust.verify(&issuer.issue(&csr, &a, HOUR, now).unwrap().chain, now).unwrap();
    }

    Root::from_secret_bytes(&issuer_secret).unwrap_err();
    Issuer::from_secret_bytes(&root_secret).unwrap_err();
    Root::from_secret_bytes(&[]).unwrap_err();
    for cut in [4, 12, 60, root_secret.len() - 1] {
        Root::from_secret_bytes(&root_secret[..cut]).unwrap_err();
    }
    // One root's key with another's certificate.
    let mut mixed = root_secret.to_vec();
    mixed[8..40].copy_from_slice(&Cluster::new(&domain()).root.danger_secret_bytes().unwrap()[8..40]);
    let error = Root::from_secret_bytes(&mixed).unwrap_err();
    assert!(error.to_string().contains("does not belong"), "{error}");
}

#[test]
fn an_svid_is_a_chain_and_its_own_key() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let key = PrivateKey::generate().unwrap();
    let chain = cluster.issuer.issue(&key.csr_der(&a).unwrap(), &a, HOUR, UnixTime::now()).unwrap().chain;
    let error = Svid::new(&a, chain.clone(), PrivateKey::generate().unwrap()).unwrap_err();
    assert!(matches!(error, SvidError::KeyMismatch { .. }), "{error}");
    let error = Svid::new(&b, chain.clone(), PrivateKey::generate().unwrap()).unwrap_err();
    assert!(matches!(error, SvidError::WrongIdentity { .. }), "{error}");
    let error = Svid::new(&a, vec![], PrivateKey::generate().unwrap()).unwrap_err();
    assert!(matches!(error, SvidError::Chain(0)), "{error}");
    let error = Svid::new(&a, vec![cluster.root.certificate().clone()], PrivateKey::generate().unwrap()).unwrap_err();
    assert!(matches!(error, SvidError::Profile(_)), "{error}");
    Svid::new(&a, chain, key).unwrap();
}

#[test]
fn a_store_finds_svids_by_id_and_by_server_name() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let operator = SpiffeId::operator(&domain(), "ada").unwrap();
    let store = SvidStore::new();
    for id in [&a, &b, &operator] {
        store.install(cluster.svid(id));
    }
    assert_eq!(store.by_server_name(&b.server_name().unwrap()).unwrap().id(), &b);
    assert_eq!(store.get(&operator).unwrap().id(), &operator);
    assert_eq!(store.all().len(), 3);
    store.retain(|id| *id == b);
    assert!(store.get(&a).is_none() && store.by_server_name(&a.server_name().unwrap()).is_none());
    assert_eq!(store.all().len(), 1);
    let held = std::sync::Arc::downgrade(&store.get(&b).unwrap());
    store.clear();
    assert!(store.by_server_name(&b.server_name().unwrap()).is_none());
    assert_eq!(held.strong_count(), 0, "the key must die with its last user");
}

#[test]
fn bundles_round_trip_through_pem_and_refuse_what_is_no_root() {
    let cluster = Cluster::new(&domain());
    let bundle = cluster.root.bundle().unwrap();
    let pem = bundle.to_pem();
    let again = TrustBundle::from_pem(format!("# the root\n{pem}").as_bytes()).unwrap();
    assert_eq!((again.roots(), again.domain()), (bundle.roots(), &domain()));
    assert_eq!(again.fingerprints().next(), Some(Sha256Digest::of(cluster.root.certificate())));

    assert!(matches!(TrustBundle::from_pem(b""), Err(BundleError::Empty)));
    assert!(matches!(TrustBundle::from_pem(b"-----BEGIN CERTIFICATE-----\n!"), Err(BundleError::Pem(_))));
    assert!(matches!(TrustBundle::from_pem(&vec![b' '; 1 << 20]), Err(BundleError::TooLarge(_))));
    let leaf = cluster.svid(&workload("a")).chain()[0].clone();
    assert!(matches!(TrustBundle::from_der([leaf]), Err(BundleError::Root { index: 1, .. })));
    let root = cluster.root.certificate();
    let other = Cluster::new(&TrustDomain::parse("other.test").unwrap());
    let two = TrustBundle::from_der([root.clone(), other.root.certificate().clone()]);
    assert!(matches!(two, Err(BundleError::TwoDomains { .. })));
    let many = TrustBundle::from_der(std::iter::repeat_n(root.clone(), 9));
    assert!(matches!(many, Err(BundleError::TooMany(9))));
    let error = cluster.trust().replace_bundle(other.root.bundle().unwrap()).unwrap_err();
    assert!(matches!(error, BundleError::TwoDomains { .. }), "{error}");
}
