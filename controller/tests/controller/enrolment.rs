//! Tokens and enrolment.

use std::time::Duration;

use opencluster_identity::key::PrivateKey;
use tonic::Code;

use crate::harness::{Cluster, node_id, workload_id};

#[tokio::test(flavor = "multi_thread")]
async fn r36_of_two_concurrent_uses_of_a_token_one_wins() {
    let cluster = Cluster::with_resources("").await;
    for _ in 0..3 {
        let token = cluster.token("a").await;
        let keys: Vec<PrivateKey> = (0..4).map(|_| PrivateKey::generate().expect("key")).collect();
        let attempts = keys.iter().map(|key| cluster.try_enrol("a", &token, key));
        let results = futures_util::future::join_all(attempts).await;
        let won = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!(won, 1, "{results:?}");
        let lost = results.iter().filter_map(|result| result.as_ref().err());
        assert!(
            lost.clone()
                .all(|status| status.code() == Code::Unauthenticated || status.code() == Code::ResourceExhausted)
        );
    }
    let enrolments = cluster.audit().await.iter().filter(|event| event["action"] == "node.enrol").count();
    assert!(enrolments >= 1);
}

#[tokio::test]
async fn r36_a_token_is_good_once_for_its_node_and_for_its_time() {
    let cluster = Cluster::with_resources("").await;
    let key = || PrivateKey::generate().expect("key");

    let token = cluster.token("a").await;
    let refused = cluster.try_enrol("b", &token, &key()).await.expect_err("another node's");
    assert_eq!(refused.code(), Code::Unauthenticated);
    cluster.try_enrol("a", &token, &key()).await.expect("positive control: its own node");
    let reused = cluster.try_enrol("a", &token, &key()).await.expect_err("used");
    assert_eq!(reused.code(), Code::Unauthenticated);
    assert_eq!(reused.message(), refused.message(), "the caller is not told why");

    let (status, answer) = cluster.post("/v1/nodes/a/token", r#"{"ttl_s": 1}"#).await;
    assert_eq!(status, 200, "{answer}");
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let expired = cluster.try_enrol("a", answer["token"].as_str().expect("token"), &key()).await.expect_err("expired");
    assert_eq!(expired.code(), Code::Unauthenticated);

    assert_eq!(cluster.post("/v1/nodes/nobody/token", "{}").await.0, 404, "a node without a resource gets no token");
    assert_eq!(cluster.post("/v1/nodes/a/token", r#"{"ttl_s": 100000}"#).await.0, 422);
}

#[tokio::test]
async fn r36_a_mistaken_request_does_not_burn_the_token() {
    let cluster = Cluster::with_resources("").await;
    let token = cluster.token("a").await;
    let key = PrivateKey::generate().expect("key");
    for csr in [key.csr_der(&workload_id("a")).expect("csr"), key.csr_der(&node_id("b")).expect("csr"), vec![1, 2, 3]] {
        let refused = cluster.try_enrol_with("a", &token, csr).await.expect_err("not this node's identity");
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    cluster.try_enrol("a", &token, &key).await.expect("the token is still good");
}

#[tokio::test]
async fn r36_guessing_tokens_is_limited_by_address() {
    let cluster = Cluster::with_resources("").await;
    let token = cluster.token("a").await;
    let mut guess = token.clone();
    let secret_at = "oct1.a.".len();
    guess.replace_range(secret_at..secret_at + 8, "AAAAAAAA");
    let key = PrivateKey::generate().expect("key");
    let mut codes = Vec::new();
    for _ in 0..12 {
        codes.push(cluster.try_enrol("a", &guess, &key).await.expect_err("a guess").code());
    }
    assert_eq!(codes[0], Code::Unauthenticated);
    assert_eq!(codes[11], Code::ResourceExhausted);
    let limited = cluster.try_enrol("a", &token, &key).await.expect_err("not looked at now");
    assert_eq!(limited.code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn r31_a_controller_with_another_root_is_not_believed() {
    let cluster = Cluster::with_resources("").await;
    let token = cluster.token("a").await;
    let (head, fingerprint) = token.rsplit_once('.').expect("four parts");
    let other = format!("{head}.{}", "0".repeat(fingerprint.len()));
    let key = PrivateKey::generate().expect("key");
    let refused = cluster.try_enrol("a", &other, &key).await.expect_err("another root");
    assert_eq!(refused.code(), Code::Unavailable, "the node ends the handshake: {refused}");
    cluster.try_enrol("a", &token, &key).await.expect("positive control: nothing was sent to the impostor");
}

#[tokio::test]
async fn r06_a_new_enrolment_replaces_the_old_one_and_revokes_its_keys() {
    let cluster = Cluster::with_resources("").await;
    let mut old = cluster.enrol("a").await;
    let mut session = cluster.session(&old).await.expect("session");
    old.beat(&mut session).await;
    let workload = PrivateKey::generate().expect("key");
    session.certify(&workload_id("a"), &workload).await.expect("its own workload");

    let mut new = cluster.enrol("a").await;
    let reason = session.end().await.expect("told why");
    assert!(reason.contains("enrolled again"), "{reason}");
    cluster.session(&old).await.expect_err("the old key is revoked");

    let mut session = cluster.session(&new).await.expect("the new one");
    let revoked = session
        .until(|message| match message {
            opencluster_api::control::controller_message::Message::Revocations(set) => Some(set),
            _ => None,
        })
        .await;
    let revoked: Vec<&[u8]> = revoked.entries.iter().map(|entry| entry.spki_sha256.as_slice()).collect();
    assert!(revoked.contains(&old.spki.as_bytes().as_slice()), "the node's old key");
    assert!(revoked.contains(&workload.spki_sha256().as_bytes().as_slice()), "its workload's old key");
    assert!(!revoked.contains(&new.spki.as_bytes().as_slice()), "not the new one");
    new.beat(&mut session).await;
    assert_eq!(cluster.node_status("a").await["state"], "active");
}
