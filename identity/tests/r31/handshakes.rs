//! Handshakes that succeed: what is negotiated, who the peer is, rotation, enrolment and the controller's clients.

use std::sync::Arc;

use opencluster_forge::ForgingCa;
use opencluster_identity::authority::Issued;
use opencluster_identity::digest::Sha256Digest;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::revocation::{RevocationError, RevocationSet};
use opencluster_identity::svid::{Svid, SvidStore};
use opencluster_identity::tls::{
    self, ClientAuth, ExpectedPeer, ServerIdentity, anonymous_client_config, client_config, controller_of,
    enrolment_client_config, enrolment_peer, peer_of, server_config,
};
use opencluster_identity::trust::Trust;
use opencluster_identity::verify::VerifyError;
use opencluster_identity::{SpiffeId, Subject, UnixTime};
use rustls::pki_types::ServerName;
use rustls::{CipherSuite, HandshakeKind, NamedGroup, ProtocolVersion, ServerConfig};

use crate::common::{
    ALPN, Cluster, HOUR, Process, connect, connect_to, domain, echo, forged_client, forged_server, leaf_params, nobody,
    ping, trust_in, workload,
};

#[tokio::test]
async fn r31_both_sides_know_each_other() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let client = cluster.process(&[&a]);
    let server = cluster.process(&[&b, &workload("c")]);
    let (near, far) = connect_to(client.client(&a), server.server(), &b).await.both();
    let now = UnixTime::now();

    let peer = peer_of(near.get_ref().1, &client.trust, now).unwrap().unwrap();
    let svid = server.svids.get(&b).unwrap();
    assert_eq!((peer.id(), peer.spki_sha256(), peer.not_after()), (&b, svid.spki_sha256(), svid.not_after()));
    let peer = peer_of(far.get_ref().1, &server.trust, now).unwrap().unwrap();
    let svid = client.svids.get(&a).unwrap();
    assert_eq!((peer.id(), peer.spki_sha256(), peer.not_after()), (&a, svid.spki_sha256(), svid.not_after()));

    // Another trust would not have verified this connection, and does not vouch for it.
    let other = Cluster::new(&domain()).trust();
    assert!(matches!(peer_of(far.get_ref().1, &other, now), Err(VerifyError::Chain(_))));
    // The proof is for now: not for a revoked peer, and not for later.
    let late = peer_of(far.get_ref().1, &server.trust, crate::common::after(now, 2 * HOUR));
    assert!(matches!(late, Err(VerifyError::Chain(webpki::Error::CertExpired { .. }))), "{late:?}");
    let mut set = RevocationSet::new(2);
    set.revoke(a.clone(), None);
    server.trust.replace_revocations(set);
    let revoked = peer_of(far.get_ref().1, &server.trust, now);
    assert!(matches!(revoked, Err(VerifyError::Revocation(RevocationError::Identity { .. }))), "{revoked:?}");
}

#[tokio::test]
async fn r31_only_strong_parameters_are_negotiated() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let client = cluster.process(&[&a]);
    let server = cluster.process(&[&b]);
    let (client_config, server_config) = (client.client(&a), server.server());
    // Twice with the same configurations: the second handshake must be as full as the first.
    for _ in 0..2 {
        let (near, far) = connect_to(Arc::clone(&client_config), Arc::clone(&server_config), &b).await.both();
        for connection in [&**near.get_ref().1 as &rustls::CommonState, far.get_ref().1] {
            assert_eq!(connection.protocol_version(), Some(ProtocolVersion::TLSv1_3));
            assert_eq!(connection.negotiated_cipher_suite().unwrap().suite(), CipherSuite::TLS13_AES_128_GCM_SHA256);
            assert_eq!(connection.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
            assert_eq!(connection.handshake_kind(), Some(HandshakeKind::Full));
            assert_eq!(connection.alpn_protocol(), Some(ALPN[0]));
        }
        assert_eq!(near.get_ref().1.tls13_tickets_received(), 0);
    }
    let provider = tls::crypto_provider();
    assert!(provider.cipher_suites.iter().all(|suite| format!("{:?}", suite.suite()).contains("AES")));
    assert_eq!(
        provider.kx_groups.iter().map(|group| group.name()).collect::<Vec<_>>(),
        [NamedGroup::X25519MLKEM768, NamedGroup::X25519]
    );
    // No common protocol, no connection.
    let other = client_config_with(&client, &a, &[b"h2"]);
    let ends = connect_to(other, server_config, &b).await;
    ends.client.expect_err("the client must be refused");
    ends.server.expect_err("the server must refuse");
}

/// A resumed session would bypass revocations: neither side of ours resumes, whatever the other offers.
#[tokio::test]
async fn r31_no_session_is_ever_resumed() {
    let ca = ForgingCa::create("cluster.test", "cluster.test").unwrap();
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let ours = Process { trust: trust_in(&ca), ..cluster.process(&[&a]) };
    let forged = ca.forge(&leaf_params(b.as_str())).unwrap();
    let (their_client, their_server) = (forged_client(&forged), forged_server(&forged));
    let (our_client, our_server) = (ours.client(&a), ours.server());
    let twice = async |client: &Arc<rustls::ClientConfig>, server: &Arc<ServerConfig>, name: &SpiffeId| {
        connect_to(Arc::clone(client), Arc::clone(server), name).await.both();
        let (near, _) = connect_to(Arc::clone(client), Arc::clone(server), name).await.both();
        near.get_ref().1.handshake_kind()
    };
    // The control: those others would.
    assert_eq!(twice(&nobody(), &their_server, &b).await, Some(HandshakeKind::Resumed));
    assert_eq!(twice(&our_client, &their_server, &b).await, Some(HandshakeKind::Full));
    assert_eq!(twice(&their_client, &our_server, &a).await, Some(HandshakeKind::Full));
}

#[tokio::test]
async fn r31_rotation_keeps_old_connections_and_serves_new_ones() {
    let cluster = Cluster::new(&domain());
    let (a, b) = (workload("a"), workload("b"));
    let client = cluster.process(&[&a]);
    let server = cluster.process(&[&b]);
    let (client_config, server_config) = (client.client(&a), server.server());
    let first = connect_to(Arc::clone(&client_config), Arc::clone(&server_config), &b).await.both();
    let old = [key_of(&client, &a), key_of(&server, &b)];

    client.svids.install(cluster.svid(&a));
    server.svids.install(cluster.svid(&b));
    let new = [key_of(&client, &a), key_of(&server, &b)];
    assert!(old[0] != new[0] && old[1] != new[1]);

    let second = connect_to(client_config, Arc::clone(&server_config), &b).await.both();
    let now = UnixTime::now();
    for ((near, far), keys) in [(&first, old), (&second, new)] {
        let seen = [
            *peer_of(far.get_ref().1, &server.trust, now).unwrap().unwrap().spki_sha256(),
            *peer_of(near.get_ref().1, &client.trust, now).unwrap().unwrap().spki_sha256(),
        ];
        assert_eq!(seen, keys);
    }
    // Both are alive, the old one after the new one was made.
    for (mut near, mut far) in [second, first] {
        let (pinged, echoed) = tokio::join!(ping(&mut near), echo(&mut far));
        pinged.unwrap();
        echoed.unwrap();
    }
    // Without its identity, a server serves no new connection.
    assert!(server.svids.remove(&b));
    assert!(!server.svids.remove(&b));
    let ends = connect_to(client.client(&a), server_config, &b).await;
    ends.client.expect_err("nobody answers to this name any more");
}

#[tokio::test]
async fn r31_enrolment_trusts_the_token_s_root_only() {
    let cluster = Cluster::new(&domain());
    let controller = SpiffeId::controller(&domain(), "ctl").unwrap();
    let fingerprint = Sha256Digest::of(cluster.root.certificate());
    let server = controller_server(&cluster, &controller, true);
    let address = ServerName::try_from("10.88.0.2").unwrap();
    let enrol = |root| enrolment_client_config(root, ALPN).unwrap();

    let (near, far) = connect(enrol(fingerprint), Arc::clone(&server), address.clone()).await.both();
    let now = UnixTime::now();
    let peer = enrolment_peer(near.get_ref().1, fingerprint, now).unwrap();
    assert_eq!(peer.controller(), &controller);
    assert_eq!(peer.bundle().domain(), &domain());
    assert_eq!(peer.bundle().fingerprints().collect::<Vec<_>>(), [fingerprint]);
    // To the controller, the node is nobody yet.
    assert_eq!(peer_of(far.get_ref().1, &cluster.trust(), now).unwrap(), None);

    // Another cluster's controller, or an impostor who shows the right root but has no certificate from it.
    let foreign = Cluster::new(&domain());
    let foreign_server = controller_server(&foreign, &controller, true);
    let error = connect(enrol(fingerprint), foreign_server, address.clone()).await.refused_by_client();
    assert!(matches!(error, VerifyError::RootNotPresented(root) if root == fingerprint), "{error}");
    let impostor = foreign.svid(&controller).presenting_root(cluster.root.certificate().clone()).unwrap();
    let error =
        connect(enrol(fingerprint), fixed_server(&foreign, impostor), address.clone()).await.refused_by_client();
    assert!(matches!(error, VerifyError::Chain(_)), "{error}");
    // Somebody of the right cluster who is no controller.
    let node = SpiffeId::node(&domain(), "a").unwrap();
    let error = connect(enrol(fingerprint), controller_server(&cluster, &node, true), address.clone()).await;
    assert!(matches!(error.refused_by_client(), VerifyError::NotController(id) if id == node));
    // A leaf is not a root, even if a token named it.
    let svid = cluster.svid(&controller);
    let leaf = Sha256Digest::of(&svid.chain()[0]);
    let error = connect(enrol(leaf), fixed_server(&cluster, svid), address).await.refused_by_client();
    assert!(matches!(error, VerifyError::EnrolmentRoot(_)), "{error}");
}

#[tokio::test]
async fn r31_controller_s_clients() {
    let cluster = Cluster::new(&domain());
    let controller = SpiffeId::controller(&domain(), "ctl").unwrap();
    let server = controller_server(&cluster, &controller, false);
    let now = UnixTime::now();
    let address = ServerName::try_from("fd88::2").unwrap();
    let node = SpiffeId::node(&domain(), "a").unwrap();
    let operator = SpiffeId::operator(&domain(), "ada").unwrap();
    assert!(matches!(operator.subject(), Subject::Operator { name: "ada" }));

    // A node and an operator, before they know any revocations: those come from the controller.
    for id in [&node, &operator] {
        let client = cluster.process(&[id]);
        let fresh = Trust::with_bundle(cluster.root.bundle().unwrap());
        let config = client_config(&client.svids, id, &fresh, ExpectedPeer::AnyController, ALPN).unwrap();
        let (near, far) = connect(config, Arc::clone(&server), address.clone()).await.both();
        assert_eq!(controller_of(near.get_ref().1, &fresh, now).unwrap().id(), &controller);
        assert_eq!(peer_of(far.get_ref().1, &cluster.trust(), now).unwrap().unwrap().id(), id);
        // But once it knows that the controller is revoked, it is.
        let mut set = RevocationSet::new(1);
        set.revoke(controller.clone(), None);
        fresh.replace_revocations(set);
        let config = client_config(&client.svids, id, &fresh, ExpectedPeer::AnyController, ALPN).unwrap();
        let error = connect(config, Arc::clone(&server), address.clone()).await.refused_by_client();
        assert!(matches!(error, VerifyError::Revocation(_)), "{error}");
    }
    // A bearer token's owner.
    let trust = Trust::with_bundle(cluster.root.bundle().unwrap());
    let anonymous = || anonymous_client_config(&trust, ExpectedPeer::AnyController, ALPN).unwrap();
    let (_, far) = connect(anonymous(), Arc::clone(&server), address.clone()).await.both();
    assert_eq!(peer_of(far.get_ref().1, &cluster.trust(), now).unwrap(), None);
    // Optional does not mean unverified.
    let foreign = Cluster::new(&domain()).process(&[&node]);
    let config = client_config(&foreign.svids, &node, &trust, ExpectedPeer::AnyController, ALPN).unwrap();
    let error = connect(config, server, address.clone()).await.refused_by_server();
    assert!(matches!(error, VerifyError::Chain(_)), "{error}");
    // A workload that plays the controller.
    let error = connect(anonymous(), controller_server(&cluster, &workload("b"), false), address).await;
    assert!(matches!(error.refused_by_client(), VerifyError::NotController(_)));
}

#[tokio::test]
async fn r31_operator_s_key_file_works() {
    let cluster = Cluster::new(&domain());
    let operator = SpiffeId::operator(&domain(), "ada").unwrap();
    let file = rcgen::KeyPair::generate().unwrap().serialize_pem();
    let key = PrivateKey::from_pem(file.as_bytes()).unwrap();
    let Issued { chain, .. } =
        cluster.issuer.issue(&key.csr_der(&operator).unwrap(), &operator, HOUR, UnixTime::now()).unwrap();
    let svids = SvidStore::new();
    svids.install(Svid::new(&operator, chain, key).unwrap());
    let controller = SpiffeId::controller(&domain(), "ctl").unwrap();
    let config = client_config(&svids, &operator, &cluster.trust(), ExpectedPeer::AnyController, ALPN).unwrap();
    let (_, far) =
        connect(config, controller_server(&cluster, &controller, false), ServerName::try_from("ctl").unwrap())
            .await
            .both();
    let peer = peer_of(far.get_ref().1, &cluster.trust(), UnixTime::now()).unwrap().unwrap();
    assert_eq!(peer.id(), &operator);
    for wrong in [
        "",
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        &rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap().serialize_pem(),
    ] {
        PrivateKey::from_pem(wrong.as_bytes()).expect_err("not a P-256 key");
    }
}

fn key_of(process: &Process, id: &SpiffeId) -> Sha256Digest {
    *process.svids.get(id).unwrap().spki_sha256()
}

fn client_config_with(process: &Process, own: &SpiffeId, alpn: &[&[u8]]) -> Arc<rustls::ClientConfig> {
    client_config(&process.svids, own, &process.trust, ExpectedPeer::ServerName, alpn).unwrap()
}

fn controller_server(cluster: &Cluster, id: &SpiffeId, presenting_root: bool) -> Arc<ServerConfig> {
    let svid = cluster.svid(id);
    let svid = if presenting_root { svid.presenting_root(cluster.root.certificate().clone()).unwrap() } else { svid };
    fixed_server(cluster, svid)
}

fn fixed_server(cluster: &Cluster, svid: Svid) -> Arc<ServerConfig> {
    let id = svid.id().clone();
    let svids = SvidStore::new();
    svids.install(svid);
    server_config(ServerIdentity::Fixed(svids, id), &cluster.trust(), ClientAuth::Optional, ALPN).unwrap()
}
