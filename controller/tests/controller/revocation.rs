//! R31: revocation by identity and by key, what is shown of it, and who cannot come back.

use opencluster_api::control::controller_message::Message as Down;
use opencluster_identity::key::PrivateKey;
use serde_json::{Value, json};

use crate::harness::{Cluster, Session, TestNode, workload_id};

/// Long enough that nobody is lost who sends no heartbeats, and waits for no acknowledgements.
const LONG: &str = "lease_ms: 60000\n";

async fn active(cluster: &Cluster, name: &str) -> (TestNode, Session) {
    let mut node = cluster.enrol(name).await;
    let mut session = cluster.session(&node).await.expect("session");
    node.beat(&mut session).await;
    (node, session)
}

fn by_id(id: &str, key: Option<&str>) -> String {
    json!({"spiffe_id": id, "key": key, "reason": "leaked"}).to_string()
}

async fn workload(cluster: &Cluster, name: &str) -> Value {
    let (status, answer) = cluster.get("/v1/workload-status").await;
    assert_eq!(status, 200, "{answer}");
    let workloads = answer["workloads"].as_array().expect("workloads");
    workloads.iter().find(|workload| workload["name"] == name).expect("the workload").clone()
}

#[tokio::test]
async fn r31_one_key_of_a_workload_is_revoked_for_good_and_the_identity_goes_on() {
    let cluster = Cluster::with_resources(LONG).await;
    let (_node, mut session) = active(&cluster, "a").await;
    let stolen = PrivateKey::generate().expect("key");
    session.certify(&workload_id("a"), &stolen).await.expect("positive control");
    let key = stolen.spki_sha256().to_string();
    let id = workload_id("a").to_string();
    assert_eq!(workload(&cluster, "a").await["keys"][0]["key"], key);

    let unknown = "0".repeat(64);
    assert_eq!(cluster.post("/v1/revocations", &by_id(&id, Some(&unknown))).await.0, 404, "a mistyped key");
    let other = workload_id("b").to_string();
    assert_eq!(cluster.post("/v1/revocations", &by_id(&other, Some(&key))).await.0, 404, "another identity's key");
    let (status, answer) = cluster.post("/v1/revocations", &by_id(&id, Some(&key))).await;
    assert_eq!(status, 200, "{answer}");

    let set = session.until(|message| if let Down::Revocations(set) = message { Some(set) } else { None }).await;
    let digest = stolen.spki_sha256();
    assert!(set.entries.iter().any(|entry| entry.spiffe_id == id && entry.spki_sha256 == digest.as_bytes()));
    let refusal = session.certify(&workload_id("a"), &stolen).await.expect_err("a new certificate for the old key");
    assert!(refusal.contains("revoked"), "{refusal}");
    session.certify(&workload_id("a"), &PrivateKey::generate().expect("key")).await.expect("another key");

    let shown = workload(&cluster, "a").await;
    assert_eq!(shown["revoked"], Value::Null, "{shown}");
    let keys = shown["keys"].as_array().expect("keys");
    assert_eq!(keys.iter().filter(|key| key["revoked"] == "leaked").count(), 1, "{shown}");
    let (_, list) = cluster.get("/v1/revocations").await;
    let entry = &list["revocations"][0];
    assert_eq!((&entry["key"], &entry["spiffe_id"]), (&json!(key), &json!(id)), "{list}");
    assert!(entry["since"].is_string() && entry["until"].is_string(), "it goes with the key's certificates: {entry}");
    let lifting = format!("/v1/revocations?spiffe_id={id}&reason=x");
    assert_eq!(cluster.delete(&lifting).await.0, 404, "a key is not taken back");
}

#[tokio::test]
async fn r31_an_identity_is_revoked_by_its_id_also_when_its_workload_is_gone() {
    let cluster = Cluster::with_resources(LONG).await;
    let extra = r#"{"apiVersion": "opencluster/v1", "kind": "Workload", "metadata": {"name": "gone"}, "spec": {"nodes": ["a"]}}"#;
    assert_eq!(cluster.post("/v1/apply", extra).await.0, 200);
    let (_node, mut session) = active(&cluster, "a").await;
    session.certify(&workload_id("gone"), &PrivateKey::generate().expect("key")).await.expect("positive control");
    assert_eq!(cluster.delete("/v1/workloads/default/gone").await.0, 200);

    let reason = r#"{"reason": "left"}"#;
    assert_eq!(cluster.post("/v1/workloads/default/gone/revoke", reason).await.0, 404, "there is no such resource");
    let id = workload_id("gone").to_string();
    let (status, answer) = cluster.post("/v1/revocations", &by_id(&id, None)).await;
    assert_eq!((status, &answer["identities"]), (200, &json!([id])), "{answer}");
    let (_, list) = cluster.get("/v1/revocations").await;
    assert_eq!(list["revocations"][0]["key"], Value::Null, "every key: {list}");
    assert_eq!(cluster.delete(&format!("/v1/revocations?spiffe_id={id}&reason=back")).await.0, 200);
    assert_eq!(cluster.get("/v1/revocations").await.1["revocations"], json!([]));
}

#[tokio::test]
async fn r31_only_workloads_of_this_trust_domain_are_revoked_by_id() {
    let cluster = Cluster::with_resources(LONG).await;
    for id in [
        "spiffe://rig.test/node/a",
        "spiffe://rig.test/controller/ctl",
        "spiffe://rig.test/operator/admin",
        "spiffe://other.test/ns/default/sa/a",
        "https://rig.test/ns/default/sa/a",
    ] {
        let (status, answer) = cluster.post("/v1/revocations", &by_id(id, None)).await;
        assert_eq!(status, 422, "{id}: {answer}");
        assert_eq!(answer["fields"][0]["field"], "spiffe_id", "{answer}");
    }
    let id = workload_id("a").to_string();
    let (status, answer) = cluster.post("/v1/revocations", &by_id(&id, Some("abc"))).await;
    assert_eq!((status, &answer["fields"][0]["field"]), (422, &json!("key")), "{answer}");
    let viewer = cluster.operator("vera", "viewer").await;
    assert_eq!(cluster.call("POST", "/v1/revocations", Some(&viewer), &by_id(&id, None)).await.0, 403);
    assert_eq!(cluster.call("GET", "/v1/revocations", Some(&viewer), "").await.0, 200);
    assert_eq!(cluster.call("GET", "/v1/workload-status", Some(&viewer), "").await.0, 200);
    assert_eq!(cluster.post("/v1/revocations", &by_id(&id, None)).await.0, 200, "positive control");
}

#[tokio::test]
async fn r06_a_host_that_was_not_restarted_does_not_enrol_again() {
    let cluster = Cluster::with_resources("require_new_boot: true\n").await;
    let _first = cluster.enrol("a").await;
    let token = cluster.token("a").await;
    let key = PrivateKey::generate().expect("key");
    let refused = cluster.try_enrol("a", &token, &key).await.expect_err("the same boot");
    assert!(refused.message().contains("wipe and restart"), "{refused}");
    // Another node's first enrolment is no return, and the token was not used up by the refusal.
    cluster.enrol("b").await;
    let csr_der = key.csr_der(&crate::harness::node_id("a")).expect("csr");
    cluster.try_enrol_in_boot("a", &token, csr_der, "b0072").await.expect("after a restart");
    // A snapshot of the first boot, put back.
    let token = cluster.token("a").await;
    let key = PrivateKey::generate().expect("key");
    let refused = cluster.try_enrol("a", &token, &key).await.expect_err("an earlier boot");
    assert!(refused.message().contains("wipe and restart"), "{refused}");
}

#[tokio::test]
async fn r06_the_old_key_and_a_used_token_are_refused_after_a_revocation() {
    let cluster = Cluster::with_resources(LONG).await;
    let token = cluster.token("a").await;
    let key = PrivateKey::generate().expect("key");
    cluster.try_enrol("a", &token, &key).await.expect("positive control");
    assert_eq!(cluster.post("/v1/nodes/a/revoke", r#"{"reason": "stolen"}"#).await.0, 200);
    cluster.try_enrol("a", &token, &PrivateKey::generate().expect("key")).await.expect_err("a used token");
    let fresh = cluster.token("a").await;
    let refused = cluster.try_enrol("a", &fresh, &key).await.expect_err("the old key");
    assert!(refused.message().contains("make a new one"), "{refused}");
    cluster.try_enrol("a", &fresh, &PrivateKey::generate().expect("key")).await.expect("a new key");
}

/// With the shortest validity that there is.
#[tokio::test]
async fn r06_a_node_enrols_again_when_every_certificate_of_it_has_expired() {
    let cluster = Cluster::with_resources("svid_ttl_s: 60\nlease_ms: 300000\n").await;
    let (mut node, session) = active(&cluster, "a").await;
    drop(session);
    let mut session = cluster.session(&node).await.expect("positive control");
    node.beat(&mut session).await;
    drop(session);
    tokio::time::sleep(std::time::Duration::from_secs(62)).await;
    cluster.session(&node).await.expect_err("its certificate has expired");
    let mut again = cluster.enrol("a").await;
    let mut session = cluster.session(&again).await.expect("a new enrolment");
    again.beat(&mut session).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r04_a_node_is_cordoned_and_retired_at_the_end_of_its_life() {
    let cluster = Cluster::with_resources("node_max_age_s: 10\nnode_drain_s: 4\nlease_ms: 60000\n").await;
    let (node, mut session) = active(&cluster, "a").await;
    let status = cluster.node_status("a").await;
    let left = status["age_left_ms"].as_u64().expect("a number");
    assert!((5000..=10_000).contains(&left) && status["cordoned"] == false, "{status}");
    let reason = session.end().await.expect("told why");
    assert!(reason.contains("life"), "{reason}");
    let status = cluster.until_state("a", "retired").await;
    assert_eq!(status["age_left_ms"], Value::Null, "{status}");
    cluster.session(&node).await.expect_err("its key is revoked");
    // It is out before that is written down.
    crate::ends::audited(&cluster, "node.retire", "Node a").await;
    let actions: Vec<Value> = cluster.audit().await.into_iter().map(|event| event["action"].clone()).collect();
    let at = |action: &str| actions.iter().position(|found| found == action);
    assert!(at("node.cordon").expect("cordoned") < at("node.retire").expect("retired"), "{actions:?}");
}
