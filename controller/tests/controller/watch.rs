//! Server-sent events.

use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use opencluster_identity::tls::{self, ExpectedPeer};
use serde_json::{Value, json};

use crate::harness::{Cluster, PATIENCE, policy, request};

async fn watch(cluster: &Cluster, query: &str, token: &str) -> hyper::Response<Incoming> {
    let config =
        tls::anonymous_client_config(&cluster.trust(), ExpectedPeer::AnyController, &[b"http/1.1"]).expect("tls");
    request(cluster.api(), config, "GET", &format!("/v1/watch{query}"), Some(token), "").await
}

/// The data of the next events, up to `count`.
async fn events(body: &mut Incoming, count: usize) -> Vec<Value> {
    let mut text = String::new();
    loop {
        let found: Vec<Value> = text
            .split_inclusive("\n\n")
            .filter(|event| event.ends_with("\n\n"))
            .flat_map(str::lines)
            .filter_map(|line| line.strip_prefix("data: "))
            .map(|data| serde_json::from_str(data).expect("JSON"))
            .collect();
        if found.len() >= count {
            return found;
        }
        let frame = tokio::time::timeout(PATIENCE, body.frame()).await.expect("in time").expect("more").expect("frame");
        if let Ok(data) = frame.into_data() {
            text.push_str(std::str::from_utf8(&data).expect("UTF-8"));
        }
    }
}

#[tokio::test]
async fn r36_a_watch_gives_what_happened_since_and_what_happens() {
    let cluster = Cluster::with_resources("").await;
    let mut live = watch(&cluster, "", &cluster.admin).await;
    assert_eq!(live.headers()["content-type"], "text/event-stream");
    assert_eq!(cluster.post("/v1/apply", &policy("second", "")).await.0, 200);
    let event = events(live.body_mut(), 1).await.remove(0);
    assert_eq!(
        (&event["version"], &event["change"]["name"], &event["change"]["action"]),
        (&json!(2), &json!("second"), &json!("created"))
    );
    assert_eq!(event["object"]["metadata"]["resourceVersion"], 2);
    assert_eq!(cluster.delete("/v1/policies/default/second").await.0, 200);
    let event = events(live.body_mut(), 1).await.remove(0);
    assert_eq!(
        (&event["version"], &event["change"]["action"], &event["object"]),
        (&json!(3), &json!("deleted"), &Value::Null)
    );

    let mut replay = watch(&cluster, "?from=0", &cluster.admin).await;
    let seen = events(replay.body_mut(), 8).await;
    let versions: Vec<u64> = seen.iter().map(|event| event["version"].as_u64().expect("number")).collect();
    assert_eq!(versions, [1, 1, 1, 1, 1, 1, 2, 3]);
}

#[tokio::test]
async fn r36_a_watch_from_what_is_not_kept_is_told_to_list_again() {
    let mut cluster = Cluster::with_resources("").await;
    cluster.stop().await;
    cluster.serve().await;
    let gone = watch(&cluster, "?from=0", &cluster.admin).await;
    assert_eq!(gone.status().as_u16(), 410, "the history is not kept over a restart");
    let now = watch(&cluster, "?from=1", &cluster.admin).await;
    assert_eq!(now.status().as_u16(), 200, "positive control");
    let future = watch(&cluster, "?from=2", &cluster.admin).await;
    assert_eq!(future.status().as_u16(), 422);
}

#[tokio::test]
async fn r36_a_watch_ends_with_the_credentials_that_opened_it() {
    let cluster = Cluster::with_resources("").await;
    let (_, answer) = cluster.post("/v1/operators", r#"{"name": "brief", "role": "viewer", "ttl_s": 2}"#).await;
    let mut brief = watch(&cluster, "", answer["token"].as_str().expect("token")).await;
    assert_eq!(brief.status().as_u16(), 200);
    let end = tokio::time::timeout(Duration::from_secs(10), brief.body_mut().collect()).await.expect("it ends");
    assert!(end.is_ok());
}
