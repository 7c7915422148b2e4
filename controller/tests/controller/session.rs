//! Sessions of nodes: leases, configuration, certificates, revocation.

use std::time::{Duration, Instant};

use opencluster_api::control::controller_message::Message as Down;
use opencluster_api::control::node_message::Message as Up;
use opencluster_api::control::{Acknowledgement, NodeEvent};
use opencluster_identity::key::PrivateKey;
use opencluster_identity::svid::SvidStore;
use tonic::Code;

use crate::harness::{Cluster, PATIENCE, Session, TestNode, anonymous_session, node_id, policy, svid, workload_id};

/// A short lease, so that tests of its end are short.
const SHORT: &str = "lease_ms: 800\nheartbeat_ms: 100\n";

pub(crate) async fn active(cluster: &Cluster, name: &str) -> (TestNode, Session) {
    let mut node = cluster.enrol(name).await;
    let mut session = cluster.session(&node).await.expect("session");
    node.beat(&mut session).await;
    (node, session)
}

/// Keeps a node alive in the background; it acknowledges every revocation set. Ends with the session.
fn keep_alive(mut node: TestNode, mut session: Session) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        session.send(Up::Heartbeat(node.heartbeat())).await;
        while let Ok(message) = session.next().await {
            match message {
                Down::Grant(grant) => {
                    node.granted(&grant);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    session.send(Up::Heartbeat(node.heartbeat())).await;
                }
                Down::Revocations(set) => {
                    let applied = Acknowledgement { config_version: 0, revocation_version: set.version };
                    session.send(Up::Acknowledgement(applied)).await;
                }
                _ => {}
            }
        }
    })
}

#[tokio::test]
async fn r06_a_session_brings_what_must_be_enforced_before_the_first_lease() {
    let cluster = Cluster::with_resources("").await;
    let mut node = cluster.enrol("a").await;
    assert_eq!(cluster.node_status("a").await["state"], "enrolling");
    let mut session = cluster.session(&node).await.expect("session");
    session.send(Up::Heartbeat(node.heartbeat())).await;

    let mut order = Vec::new();
    let grant = loop {
        match session.next().await.expect("the session goes on") {
            Down::TrustBundle(bundle) => {
                assert_eq!(bundle.roots_der.len(), 1);
                order.push("bundle");
            }
            Down::Revocations(_) => order.push("revocations"),
            Down::Config(update) => {
                assert_eq!((update.base_version, update.version, update.upserts.len()), (0, 1, 6));
                order.push("configuration");
            }
            Down::Grant(grant) => break grant,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(order, ["bundle", "revocations", "configuration"]);
    assert_eq!((grant.sequence, grant.lease_ms), (1, 3000));
    node.granted(&grant);
    let status = cluster.node_status("a").await;
    assert_eq!(status["state"], "active");
    assert!(status["lease_left_ms"].as_u64().expect("number") <= 3000);

    let next = node.beat(&mut session).await;
    assert_eq!(next.sequence, 2);
    assert_ne!(next.nonce, grant.nonce);
}

#[tokio::test]
async fn r36_a_policy_change_reaches_nodes_in_well_under_a_second() {
    let cluster = Cluster::with_resources("").await;
    let (_node, mut session) = active(&cluster, "a").await;
    let applied = Instant::now();
    assert_eq!(cluster.post("/v1/apply", &policy("second", "")).await.0, 200);
    let delta = session.until(|message| if let Down::Config(update) = message { Some(update) } else { None }).await;
    assert!(applied.elapsed() < Duration::from_millis(700), "{:?}", applied.elapsed());
    assert_eq!((delta.base_version, delta.version), (1, 2));
    assert_eq!(delta.upserts[0].key.as_ref().expect("key").name, "second");

    assert_eq!(cluster.delete("/v1/policies/default/second").await.0, 200);
    let delta = session.until(|message| if let Down::Config(update) = message { Some(update) } else { None }).await;
    assert_eq!((delta.base_version, delta.version, delta.deletes.len()), (2, 3, 1));
}

#[tokio::test]
async fn r31_a_node_gets_certificates_for_its_own_workloads_only() {
    let cluster = Cluster::with_resources("").await;
    let (_node, mut session) = active(&cluster, "a").await;
    let key = PrivateKey::generate().expect("key");

    let chain = session.certify(&workload_id("a"), &key).await.expect("positive control: its own");
    let issued = svid(&workload_id("a"), chain, PrivateKey::generate().map(|_| key).expect("key"));
    assert!(issued.not_after().as_secs() > 0);

    let key = PrivateKey::generate().expect("key");
    for id in [workload_id("b"), workload_id("nobody"), node_id("b")] {
        let refusal = session.certify(&id, &key).await.expect_err("not its own");
        assert!(refusal.contains(&id.to_string()) && refusal.contains("node a"), "{refusal}");
    }
    let controller = opencluster_identity::SpiffeId::parse("spiffe://rig.test/controller/ctl").expect("id");
    session.certify(&controller, &key).await.expect_err("never");
    let operator = opencluster_identity::SpiffeId::parse("spiffe://rig.test/operator/admin").expect("id");
    session.certify(&operator, &key).await.expect_err("never");
    let stranger = opencluster_identity::SpiffeId::parse("spiffe://other.test/ns/default/sa/a").expect("id");
    session.certify(&stranger, &key).await.expect_err("another trust domain");
}

#[tokio::test]
async fn r31_a_csr_must_ask_for_the_identity_of_the_request() {
    let cluster = Cluster::with_resources("").await;
    let (_node, mut session) = active(&cluster, "a").await;
    let key = PrivateKey::generate().expect("key");
    let csr_der = key.csr_der(&workload_id("b")).expect("csr");
    let request = opencluster_api::control::CertificateRequest {
        request_id: 1,
        spiffe_id: workload_id("a").to_string(),
        csr_der,
    };
    session.send(Up::CertificateRequest(request)).await;
    let answer = session.until(|message| if let Down::Certificate(it) = message { Some(it) } else { None }).await;
    assert!(answer.chain_der.is_empty() && answer.refusal.contains("csr"), "{answer:?}");
}

#[tokio::test]
async fn r06_only_the_enrolled_key_opens_a_session() {
    let cluster = Cluster::with_resources("").await;
    let refused = anonymous_session(&cluster).await.expect_err("nobody");
    assert_eq!(refused.code(), Code::Unauthenticated);

    let (_node, mut session) = active(&cluster, "a").await;
    let key = PrivateKey::generate().expect("key");
    let chain = session.certify(&workload_id("a"), &key).await.expect("its own workload");
    let svids = SvidStore::new();
    svids.install(svid(&workload_id("a"), chain, key));
    let mut workload = cluster.enrol("b").await;
    workload.svids = svids;
    workload.id = workload_id("a");
    let refused = cluster.session(&workload).await.expect_err("a workload is not a node");
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
}

#[tokio::test]
async fn r31_a_node_rotates_its_key_and_the_old_one_opens_no_session_any_more() {
    let cluster = Cluster::with_resources("").await;
    let (mut node, mut session) = active(&cluster, "a").await;
    let key = PrivateKey::generate().expect("key");
    let chain = session.certify(&node_id("a"), &key).await.expect("its own identity");

    // Until the new key was used, an answer that was lost does no harm: the old one still opens a session.
    let mut session = cluster.session(&node).await.expect("the old key");
    node.beat(&mut session).await;
    let old = std::mem::take(&mut node.svids);
    node.svids.install(svid(&node_id("a"), chain, key));
    let mut session = cluster.session(&node).await.expect("the new key");
    node.beat(&mut session).await;

    let new = std::mem::replace(&mut node.svids, old);
    let refused = cluster.session(&node).await.expect_err("the old key is over");
    assert!(refused.message().contains("not the one"), "{refused}");
    node.svids = new;
    node.beat(&mut session).await;
    assert_eq!(cluster.node_status("a").await["state"], "active");
}

#[tokio::test]
async fn r06_a_new_session_replaces_the_one_before() {
    let cluster = Cluster::with_resources("").await;
    let (mut node, mut first) = active(&cluster, "a").await;
    let mut second = cluster.session(&node).await.expect("another");
    let ended = first.end().await.expect_err("replaced");
    assert_eq!(ended.code(), Code::Aborted, "{ended}");
    node.beat(&mut second).await;
}

#[tokio::test]
async fn r06_a_silent_node_is_lost_and_all_its_identities_are_revoked_everywhere() {
    let cluster = Cluster::with_resources(SHORT).await;
    let (watcher, mut watching) = active(&cluster, "b").await;
    let (node, mut session) = active(&cluster, "a").await;
    let workload = PrivateKey::generate().expect("key");
    session.certify(&workload_id("a"), &workload).await.expect("its own workload");

    let revoked = tokio::spawn(async move {
        let mut watcher = watcher;
        let mut beat = tokio::time::interval(Duration::from_millis(100));
        loop {
            tokio::select! {
                _ = beat.tick() => watching.send(Up::Heartbeat(watcher.heartbeat())).await,
                message = watching.next() => match message.expect("the session goes on") {
                    Down::Grant(grant) => { watcher.granted(&grant); }
                    Down::Revocations(set) if !set.entries.is_empty() => return set,
                    _ => {}
                },
            }
        }
    });
    let silent_since = Instant::now();
    let reason = session.end().await.expect("told why");
    assert!(reason.contains("lease ran out"), "{reason}");
    assert!(silent_since.elapsed() < Duration::from_secs(5));

    let set = tokio::time::timeout(Duration::from_secs(5), revoked).await.expect("in time").expect("no panic");
    let has =
        |id: String, key: &[u8]| set.entries.iter().any(|entry| entry.spiffe_id == id && entry.spki_sha256 == key);
    assert!(has(node.id.to_string(), node.spki.as_bytes()), "{set:?}");
    assert!(has(workload_id("a").to_string(), workload.spki_sha256().as_bytes()), "{set:?}");

    let status = cluster.until_state("a", "lost").await;
    assert!(status["reason"].as_str().expect("text").contains("lease"), "{status}");
    cluster.session(&node).await.expect_err("terminal");
    let audit = cluster.audit().await;
    let lost =
        audit.iter().find(|event| event["action"] == "node.lost" && event["subject"] == "Node a").expect("audited");
    assert_eq!(lost["actor"], "controller");
}

#[tokio::test]
async fn r13_a_replayed_heartbeat_of_a_copy_severs_the_node() {
    let cluster = Cluster::with_resources("").await;
    let (mut node, mut session) = active(&cluster, "a").await;
    let mut copy =
        TestNode { id: node.id.clone(), svids: node.svids.clone(), lease: node.lease.clone(), spki: node.spki };
    node.beat(&mut session).await;

    let mut stolen = cluster.session(&copy).await.expect("the copy has the key");
    stolen.send(Up::Heartbeat(copy.heartbeat())).await;
    // The heartbeat that the copy makes now has the nonce of the one that was granted already.
    let outcome = async {
        loop {
            match stolen.next().await {
                Ok(Down::Sever(sever)) => return sever.reason,
                Ok(_) => {}
                Err(status) => return status.to_string(),
            }
        }
    };
    let reason = outcome.await;
    assert!(reason.contains("nonce"), "{reason}");
    assert_eq!(cluster.until_state("a", "compromised").await["lease_left_ms"], 0);
}

#[tokio::test]
async fn r06_another_boot_with_the_same_key_is_severed() {
    let cluster = Cluster::with_resources("").await;
    let (mut node, mut session) = active(&cluster, "a").await;
    let mut heartbeat = node.heartbeat();
    heartbeat.boot_id = "0ther".into();
    session.send(Up::Heartbeat(heartbeat)).await;
    let reason = session.end().await.expect("told why");
    assert!(reason.contains("started again"), "{reason}");
    cluster.until_state("a", "compromised").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r36_revoking_a_node_says_who_has_applied_it_and_who_has_not() {
    let cluster = Cluster::with_resources("").await;
    let (node, mut session) = active(&cluster, "a").await;
    let (b, b_session) = active(&cluster, "b").await;
    let keeping = keep_alive(b, b_session);

    let (status, answer) = cluster.post("/v1/nodes/a/revoke", r#"{"reason": "stolen"}"#).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["identities"], serde_json::json!(["spiffe://rig.test/node/a"]));
    assert_eq!(answer["acknowledged"], serde_json::json!(["b"]), "{answer}");
    assert_eq!(answer["pending"], serde_json::json!([]));
    assert_eq!(session.end().await.expect("told why"), "stolen");
    cluster.session(&node).await.expect_err("revoked");
    assert_eq!(cluster.until_state("a", "compromised").await["reason"], "stolen");
    assert_eq!(cluster.post("/v1/nodes/a/revoke", r#"{"reason": "again"}"#).await.0, 404);
    keeping.abort();
}

#[tokio::test]
async fn r36_a_node_that_does_not_acknowledge_is_pending() {
    let cluster = Cluster::with_resources("lease_ms: 20000\nheartbeat_ms: 500\n").await;
    let (_a, _a_session) = active(&cluster, "a").await;
    let (_b, _b_session) = active(&cluster, "b").await;
    let (status, answer) = cluster.post("/v1/nodes/a/revoke", r#"{"reason": "stolen"}"#).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["pending"], serde_json::json!(["b"]), "{answer}");
}

#[tokio::test]
async fn r36_a_revoked_workload_gets_no_certificate_until_it_is_restored() {
    // Each revocation waits for acknowledgements, which this node does not send.
    let cluster = Cluster::with_resources("lease_ms: 60000\n").await;
    let (_node, mut session) = active(&cluster, "a").await;
    let key = PrivateKey::generate().expect("key");
    session.certify(&workload_id("a"), &key).await.expect("positive control");

    let (status, answer) = cluster.post("/v1/workloads/default/a/revoke", r#"{"reason": "leaked"}"#).await;
    assert_eq!(status, 200, "{answer}");
    let set = session.until(|message| if let Down::Revocations(set) = message { Some(set) } else { None }).await;
    assert!(
        set.entries.iter().any(|entry| entry.spiffe_id == workload_id("a").as_str() && entry.spki_sha256.is_empty())
    );
    let refusal = session.certify(&workload_id("a"), &PrivateKey::generate().expect("key")).await.expect_err("revoked");
    assert!(refusal.contains("leaked"), "{refusal}");

    assert_eq!(cluster.delete("/v1/workloads/default/a/revoke?reason=rotated").await.0, 200);
    session.certify(&workload_id("a"), &PrivateKey::generate().expect("key")).await.expect("restored");
    assert_eq!(cluster.post("/v1/workloads/default/nobody/revoke", r#"{"reason": "x"}"#).await.0, 404);
}

#[tokio::test]
async fn r06_after_a_restart_everything_is_there_but_no_lease() {
    let mut cluster = Cluster::with_resources("").await;
    let (node, session) = active(&cluster, "a").await;
    let unused = cluster.token("b").await;
    assert_eq!(cluster.post("/v1/workloads/default/b/revoke", r#"{"reason": "kept"}"#).await.0, 200);
    drop(session);
    cluster.stop().await;
    cluster.serve().await;

    assert_eq!(cluster.get("/v1/policies/default/a-to-echo").await.0, 200, "resources and operators survive");
    let status = cluster.node_status("a").await;
    assert_eq!(status["state"], "lost");
    assert!(status["reason"].as_str().expect("text").contains("restarted"), "{status}");
    cluster.session(&node).await.expect_err("its key is revoked");

    let key = PrivateKey::generate().expect("key");
    cluster.try_enrol("b", &unused, &key).await.expect("tokens survive");
    let mut again = cluster.enrol("a").await;
    let mut session = cluster.session(&again).await.expect("a new enrolment");
    let set = session.until(|message| if let Down::Revocations(set) = message { Some(set) } else { None }).await;
    assert!(set.entries.iter().any(|entry| entry.reason == "kept"), "revocations survive");
    assert!(
        set.entries.iter().any(|entry| entry.spki_sha256 == node.spki.as_bytes()),
        "the lost node's key is among them"
    );
    again.beat(&mut session).await;
}

#[tokio::test]
async fn r36_deleting_a_node_takes_it_out_of_service() {
    let cluster = Cluster::with_resources("").await;
    let (status, answer) = cluster.delete("/v1/nodes/a").await;
    assert_eq!((status, &answer["code"]), (409, &serde_json::json!("in-use")), "{answer}");
    let extra = r#"{"apiVersion": "opencluster/v1", "kind": "Node", "metadata": {"name": "spare"}, "spec": {"addresses": ["10.88.0.99"]}}"#;
    assert_eq!(cluster.post("/v1/apply", extra).await.0, 200);
    let (node, mut session) = active(&cluster, "spare").await;
    assert_eq!(cluster.delete("/v1/nodes/spare").await.0, 200);
    session.end().await.expect("told");
    cluster.session(&node).await.expect_err("revoked");
}

#[tokio::test]
async fn r36_what_nodes_report_is_audited_and_bounded() {
    let cluster = Cluster::with_resources("").await;
    let (mut node, mut session) = active(&cluster, "a").await;
    for number in 0..80 {
        let detail = format!("{number} {}", "x".repeat(4000));
        session.send(Up::Event(NodeEvent { kind: "firewall.changed".into(), detail, realtime_ns: 1 })).await;
    }
    // Its heartbeat does not wait for all that to be written.
    node.beat(&mut session).await;
    let deadline = Instant::now() + PATIENCE;
    let events = loop {
        let mut audit = cluster.audit().await;
        audit.retain(|event| event["action"] == "node.event");
        if audit.len() >= 50 || Instant::now() > deadline {
            break audit;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!((50..80).contains(&events.len()), "{}", events.len());
    assert_eq!(events[0]["actor"], "node/a");
    assert!(events[0]["after"]["detail"].as_str().expect("text").len() <= 1024);
}

#[tokio::test]
async fn r36_oversized_and_meaningless_messages_end_the_session_only() {
    let cluster = Cluster::with_resources("").await;
    let (mut node, mut session) = active(&cluster, "a").await;
    let huge = NodeEvent { kind: "k".into(), detail: "x".repeat(2 * 1024 * 1024), realtime_ns: 0 };
    session.send(Up::Event(huge)).await;
    session.end().await.expect_err("too large");
    let mut session = cluster.session(&node).await.expect("again");
    node.beat(&mut session).await;

    let mut heartbeat = node.heartbeat();
    heartbeat.nonce = vec![1, 2, 3];
    session.send(Up::Heartbeat(heartbeat)).await;
    let ended = session.end().await.expect_err("malformed");
    assert_eq!(ended.code(), Code::InvalidArgument, "{ended}");
    let mut session = cluster.session(&node).await.expect("again");
    node.beat(&mut session).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r36_a_node_that_does_not_read_is_disconnected_and_nobody_waits_for_it() {
    let cluster = Cluster::with_resources("lease_ms: 1000\nheartbeat_ms: 100\n").await;
    let (_deaf, deaf_session) = active(&cluster, "a").await;
    let (b, b_session) = active(&cluster, "b").await;
    let keeping = keep_alive(b, b_session);
    // Much more than all the buffers between them hold.
    let filler = "x".repeat(1000);
    for number in 0..40 {
        let labels: Vec<String> = (0..10).map(|label| format!(r#""l{label}": "{number}{filler}""#)).collect();
        let labels = format!(r#", "labels": {{{}}}"#, labels.join(", "));
        let body: Vec<String> = (0..80).map(|document| policy(&format!("big{document}"), &labels)).collect();
        let body = body.join("\n---\n");
        let (status, answer) = cluster.post("/v1/apply", &body).await;
        assert_eq!(status, 200, "{answer}");
    }
    cluster.until_state("a", "lost").await;
    assert_eq!(cluster.node_status("b").await["state"], "active");
    // Its session is over, not waiting.
    tokio::time::timeout(Duration::from_secs(10), deaf_session.up.closed()).await.expect("closed by the controller");
    keeping.abort();
}

#[tokio::test]
async fn r06_no_grant_for_a_node_that_does_not_apply_a_revocation() {
    let cluster = Cluster::with_resources("lease_ms: 6000\nheartbeat_ms: 500\n").await;
    let (mut node, mut session) = active(&cluster, "a").await;
    let (status, answer) = cluster.post("/v1/workloads/default/a/revoke", r#"{"reason": "leaked"}"#).await;
    assert_eq!(status, 200, "{answer}");
    let set = session.until(|message| if let Down::Revocations(set) = message { Some(set) } else { None }).await;
    // The command waited two of the three seconds that the controller has. It is granted, and acknowledges nothing.
    let announced = Instant::now();
    let mut granted = announced;
    loop {
        session.send(Up::Heartbeat(node.heartbeat())).await;
        let Ok(grant) = tokio::time::timeout(Duration::from_millis(300), session.grant()).await else { break };
        granted = Instant::now();
        node.granted(&grant);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let patience = granted.duration_since(announced);
    assert!(patience < Duration::from_millis(1200), "granted for {patience:?} after the command had waited for it");
    // The heartbeat that waits is answered when the node has applied it.
    let applied = Acknowledgement { config_version: 0, revocation_version: set.version };
    session.send(Up::Acknowledgement(applied)).await;
    let grant = session.grant().await;
    node.granted(&grant);
    assert_eq!(cluster.node_status("a").await["state"], "active");
}
