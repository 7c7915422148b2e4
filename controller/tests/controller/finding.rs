//! What nodes find out about themselves.

use opencluster_api::control::Finding;
use opencluster_identity::key::PrivateKey;
use tonic::Code;

use crate::harness::{Cluster, anonymous_channel, report, svid};
use crate::session::active;

#[tokio::test]
async fn r13_what_a_node_finds_out_about_itself_ends_its_enrolment() {
    let cluster = Cluster::with_resources("").await;
    let (_node, session) = active(&cluster, "a").await;
    let found = Finding { code: "generation-changed".into(), detail: String::new() };
    let reason = session.report(found).await.expect("answered on the session's own connection");
    assert!(reason.contains("snapshot"), "{reason}");
    assert!(cluster.until_state("a", "compromised").await["reason"].as_str().is_some_and(|kept| kept == reason));

    let (_node, session) = active(&cluster, "b").await;
    let unknown = Finding { code: "of-a-later-version".into(), detail: "who knows".into() };
    let reason = session.report(unknown).await.expect("answered");
    assert!(reason.contains("who knows"), "what is not understood counts all the same");
    cluster.until_state("b", "compromised").await;
}

/// A copy has the original's key and not its session, which goes on: both are out, and the controller knows why.
#[tokio::test]
async fn r13_a_copy_that_knows_itself_ends_the_original_too() {
    let cluster = Cluster::with_resources("").await;
    let (mut node, mut session) = active(&cluster, "a").await;
    let copy = cluster.channel(&node).await.expect("a connection of its own");
    // The positive control: that there is another connection does the original no harm.
    node.beat(&mut session).await;
    let found = Finding { code: "generation-changed".into(), detail: String::new() };
    let reason = report(copy.clone(), found.clone()).await.expect("answered beside the session");
    assert_eq!(session.end().await.expect("the original is told why"), reason);
    let status = cluster.until_state("a", "compromised").await;
    assert!(reason.contains("snapshot") && status["reason"] == reason.as_str(), "{reason}: {status}");
    // Whoever did not hear the answer may ask again, and changes nothing by it.
    let again = Finding { code: "protocol".into(), ..found };
    assert_eq!(report(copy, again).await.expect("answered"), reason);
}

/// A machine that was restored from before a rotation has the key before; nobody else can report.
#[tokio::test]
async fn r13_only_the_holders_of_a_nodes_keys_report_for_it() {
    let cluster = Cluster::with_resources("").await;
    let (node, mut session) = active(&cluster, "a").await;
    let (other, _other_session) = active(&cluster, "b").await;
    let found = Finding { code: "generation-changed".into(), detail: String::new() };

    let old = cluster.channel(&node).await.expect("connected");
    let next = PrivateKey::generate().expect("key");
    let chain = session.certify(&node.id, &next).await.expect("rotated");
    node.svids.install(svid(&node.id, chain, next));
    let mut session = cluster.session(&node).await.expect("session with the next key");

    let anonymous = anonymous_channel(&cluster).await;
    assert_eq!(report(anonymous, found.clone()).await.expect_err("nobody").code(), Code::Unauthenticated);
    let reason = report(cluster.channel(&other).await.expect("connected"), found.clone()).await.expect("answered");
    cluster.until_state("b", "compromised").await;
    assert_eq!(cluster.node_status("a").await["state"], "active", "another node speaks for itself alone");

    assert_eq!(report(old, found).await.expect("answered"), reason);
    assert_eq!(session.end().await.expect("told why"), reason);
    cluster.until_state("a", "compromised").await;
}
