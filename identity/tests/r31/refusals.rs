//! R31: who is refused, on both sides of a real handshake. Each fault has its control: the same set-up, made by the same
//! forger, without the fault, is accepted.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{
    ALPN, Cluster, HOUR, Process, after, connect, connect_to, domain, forged_client, forged_server, id,
    issuer_not_after, leaf_params, nobody, trust_in, workload,
};
use opencluster_forge::{Forged, ForgingCa};
use opencluster_identity::bundle::TrustBundle;
use opencluster_identity::revocation::{RevocationError, RevocationSet, Revocations};
use opencluster_identity::svid::SvidStore;
use opencluster_identity::tls;
use opencluster_identity::trust::Trust;
use opencluster_identity::verify::{VerifyError, verify_peer};
use opencluster_identity::{CertificateDer, ProfileError, SpiffeId, UnixTime};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
use rustls::pki_types::ServerName;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Shows what a trusted but careless authority signed to our client and to our server, after the control. Returns how the
/// client and the server refused it.
async fn refuse_forged(fault: impl FnOnce(&mut CertificateParams)) -> [VerifyError; 2] {
    let ca = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let mut params = leaf_params(workload("b").as_str());
    assert_accepted(&ca, &params).await;
    fault(&mut params);
    refuse(&ca, &ca.forge(&params).unwrap()).await
}

/// Ours is a process that trusts the forger, with the SVID of workload a in its store; the forger's certificate is for
/// workload b, unless it says otherwise.
async fn refuse(ca: &ForgingCa, forged: &Forged) -> [VerifyError; 2] {
    let ours = our_process(&trust_in(ca));
    let by_client =
        connect_to(ours.client(&workload("a")), forged_server(forged), &workload("b")).await.refused_by_client();
    let by_server = connect_to(forged_client(forged), ours.server(), &workload("a")).await.refused_by_server();
    [by_client, by_server]
}

async fn assert_accepted(ca: &ForgingCa, params: &CertificateParams) {
    let forged = ca.forge(params).unwrap();
    let ours = our_process(&trust_in(ca));
    connect_to(ours.client(&workload("a")), forged_server(&forged), &workload("b")).await.both();
    connect_to(forged_client(&forged), ours.server(), &workload("a")).await.both();
}

/// Holds a's SVID from our own authority. The forging peers accept anything, so whose it is does not matter.
fn our_process(trust: &Trust) -> Process {
    let svids = SvidStore::new();
    svids.install(Cluster::new(&domain()).svid(&workload("a")));
    Process { svids, trust: trust.clone() }
}

#[tokio::test]
async fn r31_unknown_ca_is_refused() {
    let known = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let unknown = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let params = leaf_params(workload("b").as_str());
    assert_accepted(&known, &params).await;
    for error in refuse(&known, &unknown.forge(&params).unwrap()).await {
        assert!(matches!(error, VerifyError::Chain(_)), "{error}");
    }
}

#[tokio::test]
async fn r31_self_signed_leaf_is_refused() {
    let ca = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let params = leaf_params(workload("b").as_str());
    assert_accepted(&ca, &params).await;
    let mut forged = ca.forge(&params).unwrap();
    forged.chain = vec![params.self_signed(&forged.key).unwrap().der().clone()];
    for error in refuse(&ca, &forged).await {
        assert!(matches!(error, VerifyError::Chain(_)), "{error}");
    }
}

#[tokio::test]
async fn r31_expired_is_refused() {
    for error in refuse_forged(|params| params.not_after = OffsetDateTime::now_utc() - Duration::from_secs(2)).await {
        assert!(matches!(error, VerifyError::Chain(webpki::Error::CertExpired { .. })), "{error}");
    }
}

#[tokio::test]
async fn r31_not_yet_valid_is_refused() {
    for error in refuse_forged(|params| params.not_before = OffsetDateTime::now_utc() + HOUR / 4).await {
        assert!(matches!(error, VerifyError::Chain(webpki::Error::CertNotValidYet { .. })), "{error}");
    }
}

#[tokio::test]
async fn r31_wrong_san_is_refused() {
    // A name that is not a SPIFFE ID: both sides.
    for error in
        refuse_forged(|params| params.subject_alt_names = vec![uri("https://cluster.test/ns/default/sa/b")]).await
    {
        assert!(matches!(error, VerifyError::Leaf(ProfileError::SpiffeId(_))), "{error}");
    }
    // The trust domain itself: an authority's name.
    for error in refuse_forged(|params| params.subject_alt_names = vec![uri("spiffe://cluster.test")]).await {
        assert!(matches!(error, VerifyError::Leaf(ProfileError::NoPath(_))), "{error}");
    }
}

#[tokio::test]
async fn r31_another_identity_than_the_one_called_is_refused() {
    let cluster = Cluster::new(&domain());
    let (a, b, c) = (workload("a"), workload("b"), workload("c"));
    let client = cluster.process(&[&a]);
    let server = cluster.process(&[&b]);
    connect_to(client.client(&a), server.server(), &b).await.both();
    // A server that answers to b's name with c's certificate: chosen by name, but not of that name.
    let impostor = cluster.process(&[&c]);
    let config = tls::server_config(
        tls::ServerIdentity::Fixed(impostor.svids.clone(), c.clone()),
        &impostor.trust,
        tls::ClientAuth::Required,
        ALPN,
    )
    .unwrap();
    let error = connect_to(client.client(&a), config, &b).await.refused_by_client();
    assert!(matches!(&error, VerifyError::UnexpectedPeer { found, .. } if *found == c), "{error}");
}

#[tokio::test]
async fn r31_two_uri_sans_are_refused() {
    let fault = |params: &mut CertificateParams| params.subject_alt_names.push(uri(workload("c").as_str()));
    for error in refuse_forged(fault).await {
        assert!(matches!(error, VerifyError::Leaf(ProfileError::UriNames(2))), "{error}");
    }
}

#[tokio::test]
async fn r31_dns_san_only_is_refused() {
    let name = workload("b").server_name().unwrap();
    let fault = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![SanType::DnsName(name.as_str().try_into().unwrap())];
    };
    for error in refuse_forged(fault).await {
        assert!(matches!(error, VerifyError::Leaf(ProfileError::UriNames(0))), "{error}");
    }
}

#[tokio::test]
async fn r31_ca_certificate_as_leaf_is_refused() {
    let fault = |params: &mut CertificateParams| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    for error in refuse_forged(fault).await {
        // webpki says so first.
        assert!(matches!(error, VerifyError::Chain(webpki::Error::CaUsedAsEndEntity)), "{error}");
    }
}

#[tokio::test]
async fn r31_wrong_key_usage_is_refused() {
    for usages in [
        vec![],
        vec![KeyUsagePurpose::KeyAgreement],
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign],
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign],
    ] {
        for error in refuse_forged(|params| params.key_usages = usages.clone()).await {
            assert!(matches!(error, VerifyError::Leaf(ProfileError::KeyUsage(_))), "{usages:?}: {error}");
        }
    }
    for usages in [vec![], vec![ExtendedKeyUsagePurpose::ClientAuth]] {
        for error in refuse_forged(|params| params.extended_key_usages = usages.clone()).await {
            assert!(matches!(error, VerifyError::Leaf(ProfileError::ExtendedKeyUsage(_))), "{usages:?}: {error}");
        }
    }
}

#[tokio::test]
async fn r31_wrong_trust_domain_is_refused() {
    // Our own authority names somebody of another trust domain.
    let fault =
        |params: &mut CertificateParams| params.subject_alt_names = vec![uri("spiffe://other.test/ns/default/sa/b")];
    for error in refuse_forged(fault).await {
        assert!(matches!(error, VerifyError::TrustDomain { .. }), "{error}");
    }
    // The root that we trust also has an issuer for another trust domain, which names somebody of ours.
    let ours = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let params = leaf_params(workload("b").as_str());
    assert_accepted(&ours, &params).await;
    let theirs = ForgingCa::create("cluster.test", "other.test").unwrap();
    for error in refuse(&theirs, &theirs.forge(&params).unwrap()).await {
        assert!(matches!(error, VerifyError::AuthorityDomain { .. }), "{error}");
    }
}

#[tokio::test]
async fn r31_authority_below_the_issuer_is_refused() {
    let ca = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let params = leaf_params(workload("b").as_str());
    assert_accepted(&ca, &params).await;
    for error in refuse(&ca, &ca.forge_below("cluster.test", &params).unwrap()).await {
        assert!(matches!(error, VerifyError::Chain(webpki::Error::PathLenConstraintViolated)), "{error}");
    }
}

#[tokio::test]
async fn r31_oversized_chains_are_refused() {
    let ca = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let params = leaf_params(workload("b").as_str());
    assert_accepted(&ca, &params).await;
    let mut forged = ca.forge(&params).unwrap();
    forged.chain.extend(std::iter::repeat_n(ca.issuer().clone(), 3));
    for error in refuse(&ca, &forged).await {
        assert!(matches!(error, VerifyError::ChainTooLong(5)), "{error}");
    }
    let mut forged = ca.forge(&params).unwrap();
    forged.chain.push(CertificateDer::from(vec![0x30; 9000]));
    for error in refuse(&ca, &forged).await {
        assert!(matches!(error, VerifyError::CertificateTooLarge(9000)), "{error}");
    }
}

#[tokio::test]
async fn r31_revoked_identity_and_key_are_refused() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let client = cluster.process(&[&a]);
    let server = cluster.process(&[&b]);
    let attempt = || connect_to(client.client(&a), server.server(), &b);
    let set = |id: &SpiffeId, key| {
        let mut set = RevocationSet::new(2);
        set.revoke(id.clone(), key);
        set
    };
    attempt().await.both();

    client.trust.replace_revocations(set(&b, None));
    let error = attempt().await.refused_by_client();
    assert!(matches!(&error, VerifyError::Revocation(RevocationError::Identity { id }) if *id == b), "{error}");
    // The control for the key: another key of b is revoked, not this one.
    client.trust.replace_revocations(set(&b, Some(*cluster.svid(&b).spki_sha256())));
    attempt().await.both();
    client.trust.replace_revocations(set(&b, Some(*server.svids.get(&b).unwrap().spki_sha256())));
    let error = attempt().await.refused_by_client();
    assert!(matches!(error, VerifyError::Revocation(RevocationError::Key { .. })), "{error}");
    client.trust.replace_revocations(RevocationSet::new(3));

    server.trust.replace_revocations(set(&a, None));
    let error = attempt().await.refused_by_server();
    assert!(matches!(&error, VerifyError::Revocation(RevocationError::Identity { id }) if *id == a), "{error}");
    server.trust.replace_revocations(set(&a, Some(*cluster.svid(&a).spki_sha256())));
    attempt().await.both();
    server.trust.replace_revocations(set(&a, Some(*client.svids.get(&a).unwrap().spki_sha256())));
    let error = attempt().await.refused_by_server();
    assert!(matches!(error, VerifyError::Revocation(RevocationError::Key { .. })), "{error}");
    // A new key for the same identity is welcome.
    client.svids.install(cluster.svid(&a));
    attempt().await.both();
}

#[tokio::test]
async fn r31_nobody_is_accepted_before_revocations_and_bundle_are_loaded() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let mut client = cluster.process(&[&a]);
    let mut server = cluster.process(&[&b]);
    let not_loaded = |error: &VerifyError| matches!(error, VerifyError::Revocation(RevocationError::NotLoaded));

    let good = std::mem::replace(&mut client.trust, Trust::with_bundle(cluster.root.bundle().unwrap()));
    let error = connect_to(client.client(&a), server.server(), &b).await.refused_by_client();
    assert!(not_loaded(&error), "{error}");
    client.trust.replace_revocations(RevocationSet::new(0));
    connect_to(client.client(&a), server.server(), &b).await.both();

    client.trust = Trust::new(domain());
    let error = connect_to(client.client(&a), server.server(), &b).await.refused_by_client();
    assert!(matches!(error, VerifyError::BundleNotLoaded), "{error}");
    client.trust = good;

    server.trust = Trust::with_bundle(cluster.root.bundle().unwrap());
    let error = connect_to(client.client(&a), server.server(), &b).await.refused_by_server();
    assert!(not_loaded(&error), "{error}");
    server.trust.replace_revocations(RevocationSet::new(0));
    connect_to(client.client(&a), server.server(), &b).await.both();

    server.trust = Trust::new(domain());
    let error = connect_to(client.client(&a), server.server(), &b).await.refused_by_server();
    assert!(matches!(error, VerifyError::BundleNotLoaded), "{error}");
}

#[tokio::test]
async fn r31_client_without_certificate_is_refused() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let client = cluster.process(&[&a]);
    let server = cluster.process(&[&b]);
    connect_to(client.client(&a), server.server(), &b).await.both();
    let ends = connect_to(nobody(), server.server(), &b).await;
    ends.client.expect_err("the client must be refused");
    let error = ends.server.expect_err("the server must refuse");
    assert!(error.to_string().contains("no certificates"), "{error}");
    // And a client of ours that has lost its SVID does not even try.
    client.svids.remove(&a);
    let error = connect_to(client.client(&a), server.server(), &b).await.refused_by_client();
    assert!(matches!(error, VerifyError::NoOwnSvid(_)), "{error}");
}

#[tokio::test]
async fn r31_wrong_or_missing_server_name_is_refused() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let client = cluster.process(&[&a]);
    let server = cluster.process(&[&b]);
    connect_to(client.client(&a), server.server(), &b).await.both();
    for name in [
        tls::server_name(&workload("c")).unwrap(),
        ServerName::try_from("localhost").unwrap(),
        // No name is sent with an address.
        ServerName::try_from("10.88.0.12").unwrap(),
    ] {
        let ends = connect(client.client(&a), server.server(), name.clone()).await;
        ends.client.expect_err("the client must not get a connection");
        ends.server.expect_err("the server must not present another identity");
        // A forger's server answers to any name; the client does not mind the name but the identity.
        let ca = ForgingCa::create("cluster.test", "cluster.test").unwrap();
        let ours = our_process(&trust_in(&ca));
        let forged = ca.forge(&leaf_params(b.as_str())).unwrap();
        connect_to(ours.client(&a), forged_server(&forged), &b).await.both();
        let error = connect(ours.client(&a), forged_server(&forged), name).await.refused_by_client();
        assert!(matches!(error, VerifyError::UnexpectedPeer { .. }), "{error}");
    }
}

#[tokio::test]
async fn r31_replaced_bundle_refuses_the_old_root_at_once() {
    let (old, new) = (Cluster::new(&domain()), Cluster::new(&domain()));
    let (a, b) = (workload("a"), workload("b"));
    let client = old.process(&[&a]);
    let server = old.process(&[&b]);
    // Twice: the second time from the cache of verified chains.
    connect_to(client.client(&a), server.server(), &b).await.both();
    connect_to(client.client(&a), server.server(), &b).await.both();
    server.trust.replace_bundle(new.root.bundle().unwrap()).unwrap();
    let error = connect_to(client.client(&a), server.server(), &b).await.refused_by_server();
    assert!(matches!(error, VerifyError::Chain(_)), "{error}");
    // Both roots, during a rotation of roots.
    let roots = [old.root.certificate().clone(), new.root.certificate().clone()];
    server.trust.replace_bundle(TrustBundle::from_der(roots).unwrap()).unwrap();
    connect_to(client.client(&a), server.server(), &b).await.both();
}

/// An issuer's end is the end of what it signed, also for a chain that was verified before.
#[test]
fn r31_expired_issuer_is_refused() {
    let ca = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let mut params = leaf_params(workload("b").as_str());
    params.not_after += 10 * HOUR;
    let chain = ca.forge(&params).unwrap().chain;
    let (trust, now) = (trust_in(&ca), UnixTime::now());
    for _ in 0..2 {
        assert_eq!(trust.verify(&chain, now).unwrap().not_after(), issuer_not_after(&ca));
    }
    let error = trust.verify(&chain, after(now, HOUR)).unwrap_err();
    assert!(matches!(error, VerifyError::Chain(webpki::Error::CertExpired { .. })), "{error}");
}

/// The bare function does all that the handle does.
#[test]
fn r31_verify_peer_consults_the_revocations() {
    let cluster = Cluster::new(&domain());
    let svid = cluster.svid(&workload("b"));
    let (bundle, revocations) = (cluster.root.bundle().unwrap(), Revocations::not_loaded());
    let verify = || verify_peer(svid.chain(), &bundle, &revocations, &domain(), UnixTime::now());
    assert!(matches!(verify(), Err(VerifyError::Revocation(RevocationError::NotLoaded))));
    let mut set = RevocationSet::new(1);
    revocations.replace(set.clone());
    assert_eq!(verify().unwrap().id(), &workload("b"));
    set.revoke(workload("b"), Some(*svid.spki_sha256()));
    revocations.replace(set);
    assert!(matches!(verify(), Err(VerifyError::Revocation(RevocationError::Key { .. }))));
}

#[tokio::test]
async fn r31_stolen_certificate_without_its_key_is_refused() {
    let ca = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let params = leaf_params(workload("b").as_str());
    assert_accepted(&ca, &params).await;
    let mut forged = ca.forge(&params).unwrap();
    let thief = ca.forge(&params).unwrap();
    forged.key = thief.key;
    let ours = our_process(&trust_in(&ca));
    // rustls will not even configure a mismatched key, so the thief brings its own resolver.
    let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&forged.private_key()).unwrap();
    let certified = Arc::new(rustls::sign::CertifiedKey::new(forged.chain.clone(), key));
    let resolver = Arc::new(rustls::sign::SingleCertAndKey::from(certified));
    let config = rustls::ServerConfig::builder_with_provider(tls::crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    let ends = connect_to(ours.client(&workload("a")), Arc::new(config), &workload("b")).await;
    let error = ends.client.expect_err("the client must refuse");
    assert!(error.to_string().contains("BadSignature"), "{error}");
}

#[tokio::test]
async fn r31_tls12_peers_are_refused() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let client = cluster.process(&[&a]);
    let server = cluster.process(&[&b]);
    connect_to(client.client(&a), server.server(), &b).await.both();

    // A client that knows nothing newer than TLS 1.2.
    let (mut peer, far) = tokio::io::duplex(64 * 1024);
    peer.write_all(&tls12_client_hello(&b.server_name().unwrap())).await.unwrap();
    let error = TlsAcceptor::from(server.server()).accept(far).await.expect_err("TLS 1.2 must be refused");
    assert!(error.to_string().contains("SupportedVersionsExtensionRequired"), "{error}");
    // The alert is protocol_version (70).
    let mut alert = [0; 7];
    peer.read_exact(&mut alert).await.unwrap();
    assert_eq!(alert, [21, 3, 3, 0, 2, 2, 70]);

    // A server that answers in TLS 1.2.
    let (near, mut peer) = tokio::io::duplex(64 * 1024);
    peer.write_all(&tls12_server_hello()).await.unwrap();
    let name = tls::server_name(&b).unwrap();
    let error = TlsConnector::from(client.client(&a)).connect(name, near).await.expect_err("TLS 1.2 must be refused");
    assert!(error.to_string().contains("ServerTlsVersionIsDisabledByOurConfig"), "{error}");
}

/// A ClientHello of 2008: AES-GCM suites of TLS 1.2, X25519 and P-256, ECDSA, a server name, and no supported_versions.
fn tls12_client_hello(server_name: &str) -> Vec<u8> {
    let name = server_name.as_bytes();
    let mut extensions = Vec::new();
    let sni = length(&[&[0], &*length(name)].concat());
    for (kind, body) in [(0_u16, sni), (10, vec![0, 4, 0, 29, 0, 23]), (11, vec![1, 0]), (13, vec![0, 2, 4, 3])] {
        extensions.extend(kind.to_be_bytes());
        extensions.extend(length(&body));
    }
    let mut body = vec![3, 3];
    body.extend([0x42; 32]);
    body.extend([0]);
    body.extend(length(&[0xc0, 0x2b, 0xc0, 0x2c]));
    body.extend([1, 0]);
    body.extend(length(&extensions));
    handshake_record(1, &body)
}

fn tls12_server_hello() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0x42; 32]);
    // No session, ECDHE-ECDSA with AES-128-GCM, no compression.
    body.extend([0, 0xc0, 0x2b, 0]);
    handshake_record(2, &body)
}

fn handshake_record(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, 0];
    message.extend(length(body));
    [&[22, 3, 3][..], &length(&message)].concat()
}

/// `body` behind its length in two bytes.
fn length(body: &[u8]) -> Vec<u8> {
    [&u16::try_from(body.len()).unwrap().to_be_bytes(), body].concat()
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

#[test]
fn ids_of_the_tests_have_server_names() {
    assert_eq!(tls::server_name(&workload("a")).unwrap().to_str(), "a.default.sa.cluster.test");
    assert!(tls::server_name(&id("spiffe://cluster.test/operator/eve")).is_err());
}
