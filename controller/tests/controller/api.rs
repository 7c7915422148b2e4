//! The policy API.

use opencluster_api::rest::path;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::svid::SvidStore;
use opencluster_identity::tls::{self, ExpectedPeer};
use opencluster_identity::{CertificateDer, SpiffeId};
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{Cluster, RESOURCES, policy};

#[tokio::test]
async fn r36_every_operation_asks_for_its_role_and_nothing_works_without_credentials() {
    let cluster = Cluster::with_resources("").await;
    let viewer = cluster.operator("vera", "viewer").await;
    let operator = cluster.operator("olga", "operator").await;
    let apply = policy("by-role", "");
    // Method, path, body, and what viewer, operator and administrator get.
    let reason = r#"{"reason": "test"}"#;
    let csr = r#"{"role": "viewer", "csr_pem": "x"}"#;
    let matrix: &[(&str, &str, &str, [u16; 3])] = &[
        ("GET", "/v1/nodes", "", [200, 200, 200]),
        ("GET", "/v1/nodes/a", "", [200, 200, 200]),
        ("GET", "/v1/policies/default/a-to-echo", "", [200, 200, 200]),
        ("GET", "/v1/status", "", [200, 200, 200]),
        ("GET", "/v1/node-status", "", [200, 200, 200]),
        ("GET", "/v1/audit", "", [200, 200, 200]),
        ("GET", "/v1/whoami", "", [200, 200, 200]),
        ("POST", "/v1/explain/flow", r#"{"from": "a", "to": "echo:9000"}"#, [200, 200, 200]),
        ("POST", "/v1/apply", &apply, [403, 200, 200]),
        ("POST", "/v1/apply?dry_run=true", &apply, [403, 200, 200]),
        ("DELETE", "/v1/policies/default/none", "", [403, 404, 404]),
        ("DELETE", "/v1/nodes/none", "", [403, 404, 404]),
        ("POST", "/v1/nodes/a/token", "{}", [403, 200, 200]),
        ("POST", "/v1/nodes/a/revoke", reason, [403, 404, 404]),
        ("POST", "/v1/workloads/default/none/revoke", reason, [403, 404, 404]),
        ("DELETE", "/v1/workloads/default/none/revoke?reason=x", "", [403, 404, 404]),
        ("GET", "/v1/operators", "", [403, 403, 200]),
        ("POST", "/v1/operators", r#"{"name": "eve", "role": "admin"}"#, [403, 403, 200]),
        ("DELETE", "/v1/operators/none", "", [403, 403, 404]),
        ("POST", "/v1/operators/eve/certificate", csr, [403, 403, 422]),
    ];
    for (method, path, body, expected) in matrix {
        for (token, expected) in [&viewer, &operator, &cluster.admin].into_iter().zip(expected) {
            let (status, answer) = cluster.call(method, path, Some(token), body).await;
            assert_eq!(status, *expected, "{method} {path}: {answer}");
        }
    }
    for (method, path, body, _) in matrix.iter().take(9) {
        let (status, answer) = cluster.call(method, path, None, body).await;
        assert_eq!((status, &answer["code"]), (401, &json!("unauthenticated")), "{method} {path}");
    }
    assert_eq!(cluster.call("GET", "/v1/watch", None, "").await.0, 401);
    assert_eq!(cluster.call("GET", "/healthz", None, "").await.0, 200);
    assert_eq!(cluster.call("GET", "/openapi.json", None, "").await.0, 200);
}

#[tokio::test]
async fn r36_tokens_expire_and_end_and_guesses_are_limited() {
    let cluster = Cluster::start().await;
    let (status, answer) = cluster.post("/v1/operators", r#"{"name": "brief", "role": "admin", "ttl_s": 1}"#).await;
    assert_eq!(status, 200, "{answer}");
    let brief = answer["token"].as_str().expect("token").to_owned();
    tokio::time::sleep(std::time::Duration::from_millis(2100)).await;
    assert_eq!(cluster.call("GET", "/v1/whoami", Some(&brief), "").await.0, 401, "expired");

    let fired = cluster.operator("fired", "admin").await;
    assert_eq!(cluster.call("GET", "/v1/whoami", Some(&fired), "").await.0, 200);
    assert_eq!(cluster.delete("/v1/operators/fired").await.0, 200);
    assert_eq!(cluster.call("GET", "/v1/whoami", Some(&fired), "").await.0, 401, "ended at once");

    let mut guess = cluster.admin.clone();
    let at = guess.len() - 5;
    let flipped = if &guess[at..=at] == "A" { "E" } else { "A" };
    guess.replace_range(at..=at, flipped);
    assert_ne!(guess, cluster.admin);
    let mut statuses = Vec::new();
    for _ in 0..12 {
        statuses.push(cluster.call("GET", "/v1/whoami", Some(&guess), "").await.0);
    }
    assert_eq!((statuses[0], statuses[11]), (401, 429), "{statuses:?}");
    assert_eq!(cluster.get("/v1/whoami").await.0, 200, "who shares the address is not locked out");
}

#[tokio::test]
async fn r36_an_operator_with_a_client_certificate_has_the_role_that_was_given_and_loses_it_at_once() {
    let cluster = Cluster::start().await;
    let id = SpiffeId::parse("spiffe://rig.test/operator/carla").expect("id");
    let key = PrivateKey::generate().expect("key");
    let csr = pem("CERTIFICATE REQUEST", &key.csr_der(&id).expect("csr"));
    let body = json!({"role": "viewer", "csr_pem": csr}).to_string();
    let (status, answer) = cluster.post("/v1/operators/carla/certificate", &body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(cluster.post("/v1/operators/other/certificate", &body).await.0, 422, "the CSR names carla");

    let chain = CertificateDer::pem_slice_iter(answer["certificate_pem"].as_str().expect("text").as_bytes());
    let chain = chain.map(|certificate| certificate.expect("PEM")).collect();
    let svids = SvidStore::new();
    svids.install(opencluster_identity::svid::Svid::new(&id, chain, key).expect("svid"));
    let config = tls::client_config(&svids, &id, &cluster.trust(), ExpectedPeer::AnyController, &[b"http/1.1"])
        .expect("client configuration");
    let (status, who) = cluster.call_with(config.clone(), "GET", "/v1/whoami", None, "").await;
    assert_eq!((status, &who["name"], &who["role"]), (200, &json!("carla"), &json!("viewer")), "{who}");
    assert_eq!(cluster.call_with(config.clone(), "POST", "/v1/apply", None, &policy("x", "")).await.0, 403);

    assert_eq!(cluster.delete("/v1/operators/carla").await.0, 200);
    assert_eq!(
        cluster.call_with(config, "GET", "/v1/whoami", None, "").await.0,
        401,
        "the certificate alone is not enough"
    );
}

#[tokio::test]
async fn r36_changes_are_made_against_the_version_that_was_read() {
    let cluster = Cluster::with_resources("").await;
    let (_, read) = cluster.get("/v1/policies/default/a-to-echo").await;
    assert_eq!(read["metadata"]["resourceVersion"], 1);
    let mut mine = read.clone();
    mine["metadata"]["labels"] = json!({"by": "me"});
    let mut theirs = read;
    theirs["metadata"]["labels"] = json!({"by": "them"});
    assert_eq!(cluster.post("/v1/apply", &theirs.to_string()).await.0, 200);
    let (status, problem) = cluster.post("/v1/apply", &mine.to_string()).await;
    assert_eq!((status, &problem["code"]), (409, &json!("conflict")), "{problem}");
    assert_eq!(problem["current"]["metadata"]["labels"]["by"], "them", "the answer says what there is");

    let (status, problem) = cluster.delete("/v1/policies/default/a-to-echo?resource_version=1").await;
    assert_eq!(status, 409, "{problem}");
    assert_eq!(
        cluster.post("/v1/apply", &policy("a-to-echo", r#", "resourceVersion": 0"#)).await.0,
        409,
        "0: must be new"
    );
    assert_eq!(cluster.post("/v1/apply", &policy("fresh", r#", "resourceVersion": 0"#)).await.0, 200);
    assert_eq!(cluster.post("/v1/apply", &policy("gone", r#", "resourceVersion": 5"#)).await.0, 409);

    mine["metadata"]["resourceVersion"] = json!(2);
    assert_eq!(cluster.post("/v1/apply", &mine.to_string()).await.0, 200, "against what is there now");
    assert_eq!(cluster.delete("/v1/policies/default/a-to-echo?resource_version=4").await.0, 200);
}

#[tokio::test]
async fn r36_an_apply_is_done_whole_or_not_at_all() {
    let cluster = Cluster::with_resources("").await;
    let state = |cluster: &Cluster| {
        let store = cluster.store_path();
        move || std::fs::read(&store).expect("read")
    };
    let file = state(&cluster);
    let before = (cluster.get("/v1/policies").await.1, cluster.audit().await.len(), file());
    let bad_reference = policy("bad", "").replace("\"echo\"", "\"nowhere\"");
    let bad_field = policy("bad", "").replace("\"from\"", "\"form\"");
    for bad in [&bad_reference, &bad_field, &policy("good", "")] {
        let documents = format!("{}\n---\n{bad}", policy("good", ""));
        let (status, problem) = cluster.post("/v1/apply", &documents).await;
        assert_eq!((status, &problem["code"]), (422, &json!("invalid")), "{problem}");
        assert_eq!(problem["fields"][0]["document"], 1, "{problem}");
        assert!(!problem["fields"][0]["message"].as_str().expect("text").is_empty());
    }
    let after = (cluster.get("/v1/policies").await.1, cluster.audit().await.len(), file());
    assert!(before == after, "nothing was changed");

    let (status, dry) = cluster.post("/v1/apply?dry_run=true", &policy("good", "")).await;
    assert_eq!((status, &dry["dry_run"], &dry["changes"][0]["action"]), (200, &json!(true), &json!("created")));
    let after = (cluster.get("/v1/policies").await.1, cluster.audit().await.len(), file());
    assert!(before == after, "nothing was changed by a dry run");

    let (status, applied) = cluster.post("/v1/apply", &policy("good", "")).await;
    assert_eq!((status, &applied["version"]), (200, &json!(2)), "positive control");
    assert_eq!(cluster.post("/v1/apply", RESOURCES).await.1["version"], 2, "what is there already changes nothing");
}

#[tokio::test]
async fn r36_what_others_need_is_not_deleted() {
    let cluster = Cluster::with_resources("").await;
    let (status, problem) = cluster.delete("/v1/services/default/echo").await;
    assert_eq!((status, &problem["code"]), (409, &json!("in-use")), "{problem}");
    assert!(problem["detail"].as_str().expect("text").contains("Policy default/a-to-echo"), "{problem}");
    assert_eq!(cluster.delete("/v1/policies/default/a-to-echo").await.0, 200);
    assert_eq!(cluster.delete("/v1/services/default/echo").await.0, 200);
    assert_eq!(cluster.get("/v1/services/default/echo").await.0, 404);
}

#[tokio::test]
async fn r36_explain_tells_the_rule_and_the_nearest_rule() {
    let cluster = Cluster::with_resources("").await;
    let explain = |from: &str, to: &str| json!({"from": from, "to": to}).to_string();
    let (_, allowed) = cluster.post("/v1/explain/flow", &explain("a", "echo:9000")).await;
    assert_eq!(
        (&allowed["allowed"], &allowed["rule"]),
        (&json!(true), &json!("default/a-to-echo, from[0]")),
        "{allowed}"
    );
    assert_eq!(allowed["backends"], json!(["spiffe://rig.test/ns/default/sa/b"]));
    let (_, denied) = cluster.post("/v1/explain/flow", &explain("default/b", "default/echo:9000")).await;
    assert_eq!((&denied["allowed"], &denied["rule"]), (&json!(false), &json!("")), "{denied}");
    assert!(denied["reasons"].as_array().is_some_and(|reasons| !reasons.is_empty()));
    assert_eq!(cluster.post("/v1/explain/flow", &explain("a", "echo:1")).await.0, 404);
    assert_eq!(cluster.post("/v1/explain/flow", &explain("a", "echo")).await.0, 422);
    assert_eq!(cluster.post("/v1/explain/flow", &explain("spiffe://", "echo:9000")).await.0, 422);
}

#[tokio::test]
async fn r36_every_change_is_in_the_audit_chain_with_who_what_before_and_after() {
    let cluster = Cluster::with_resources("").await;
    let olga = cluster.operator("olga", "operator").await;
    let changed = policy("a-to-echo", r#", "labels": {"x": "y"}"#);
    assert_eq!(cluster.call("POST", "/v1/apply", Some(&olga), &changed).await.0, 200);
    assert_eq!(cluster.call("DELETE", "/v1/policies/default/a-to-echo", Some(&olga), "").await.0, 200);
    let events = cluster.audit().await;
    let [.., apply, delete] = &events[..] else { panic!("{events:?}") };
    assert_eq!(
        (&apply["actor"], &apply["action"], &apply["subject"]),
        (&json!("olga"), &json!("apply"), &json!("Policy default/a-to-echo"))
    );
    assert_eq!(apply["before"]["metadata"]["resourceVersion"], 1);
    assert_eq!(apply["after"]["metadata"]["labels"]["x"], "y");
    assert_eq!((&delete["action"], &delete["after"]), (&json!("delete"), &Value::Null));

    // As documented, by somebody who has nothing but the answers.
    let mut previous = "0".repeat(64);
    for (position, event) in events.iter().enumerate() {
        assert_eq!(event["sequence"], position + 1);
        assert_eq!(event["previous"], previous.as_str());
        let mut canonical = event.as_object().expect("object").clone();
        canonical.remove("hash");
        let canonical: std::collections::BTreeMap<_, _> = canonical.into_iter().collect();
        let mut hasher = Sha256::new();
        hasher.update(hex::decode(&previous).expect("hexadecimal"));
        hasher.update(serde_json::to_vec(&canonical).expect("JSON"));
        previous = hex::encode(hasher.finalize());
        assert_eq!(event["hash"], previous.as_str(), "event {position}");
    }
    let text = serde_json::to_string(&events).expect("JSON");
    assert!(!text.contains(&cluster.admin) && !text.contains(&olga), "no secret in the trail");

    let (_, page) = cluster.get("/v1/audit?from=2&limit=2").await;
    assert_eq!((&page["events"][0]["sequence"], &page["next"]), (&json!(2), &json!(4)));
    assert_eq!(cluster.get("/v1/audit?limit=0").await.0, 422);
    let (_, end) = cluster.get("/v1/audit?from=999").await;
    assert_eq!((end["events"].as_array().map(Vec::len), &end["next"]), (Some(0), &Value::Null));
}

#[tokio::test]
async fn r36_the_api_describes_every_path_with_schemas_and_security() {
    let cluster = Cluster::start().await;
    let (_, document) = cluster.call("GET", path::OPENAPI, None, "").await;
    assert!(document["openapi"].as_str().expect("version").starts_with("3.1"), "{}", document["openapi"]);
    let all = [
        path::LIST,
        path::NAMESPACED,
        path::GLOBAL,
        path::APPLY,
        path::WATCH,
        path::EXPLAIN_FLOW,
        path::NODE_TOKEN,
        path::NODE_REVOKE,
        path::WORKLOAD_REVOKE,
        path::NODE_STATUS,
        path::STATUS,
        path::AUDIT,
        path::OPERATORS,
        path::OPERATOR,
        path::OPERATOR_CERTIFICATE,
        path::REVOCATIONS,
        path::WORKLOAD_STATUS,
        path::WHOAMI,
        path::OPENAPI,
        path::HEALTH,
    ];
    let paths = document["paths"].as_object().expect("paths");
    for expected in all {
        assert!(paths.contains_key(expected), "{expected} is not described");
    }
    assert_eq!(paths.len(), all.len(), "{:?}", paths.keys());
    let mut schemes: Vec<_> = document["components"]["securitySchemes"].as_object().expect("schemes").keys().collect();
    schemes.sort();
    assert_eq!(schemes, ["certificate", "token"]);
    assert_eq!(document["security"].as_array().map(Vec::len), Some(2), "credentials are the rule");

    // Every reference leads somewhere, and every success is described.
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#").skip(1) {
        let pointer = reference.split('"').next().expect("a quoted text");
        assert!(document.pointer(pointer).is_some(), "{pointer}");
    }
    for (path, operations) in paths {
        for (method, operation) in operations.as_object().expect("operations") {
            let success = &operation["responses"]["200"]["content"];
            assert!(success.as_object().is_some_and(|content| !content.is_empty()), "{method} {path}");
        }
    }
}

#[tokio::test]
async fn r36_mistakes_are_answered_with_a_problem_that_says_what_and_where() {
    let cluster = Cluster::start().await;
    for (method, path, body, status, code) in [
        ("GET", "/nowhere", "", 404, "not-found"),
        ("GET", "/v1/nonsense", "", 404, "not-found"),
        ("GET", "/v1/policies/only-a-name", "", 404, "not-found"),
        ("PATCH", "/v1/apply", "", 405, "method-not-allowed"),
        ("GET", "/v1/audit?form=1", "", 400, "invalid-query"),
        ("POST", "/v1/apply?dry_run=perhaps", "", 400, "invalid-query"),
        ("POST", "/v1/operators", "{", 422, "invalid"),
        ("POST", "/v1/operators", r#"{"name": "x", "role": "king"}"#, 422, "invalid"),
        ("POST", "/v1/operators", r#"{"name": "Not A Name", "role": "viewer"}"#, 422, "invalid"),
        ("POST", "/v1/apply", "kind: [", 422, "invalid"),
    ] {
        let (got, problem) = cluster.call(method, path, Some(&cluster.admin), body).await;
        assert_eq!((got, &problem["code"]), (status, &json!(code)), "{method} {path} {body}: {problem}");
        assert!(!problem["detail"].as_str().expect("text").is_empty());
    }
}

#[tokio::test]
async fn r36_the_unix_socket_serves_the_same_api() {
    let cluster = Cluster::with("api_socket: api.sock\n").await;
    let path = cluster.directory.path().join("api.sock");
    let config =
        tls::anonymous_client_config(&cluster.trust(), ExpectedPeer::AnyController, &[b"http/1.1"]).expect("tls");
    let stream = tokio::net::UnixStream::connect(&path).await.expect("connect");
    let name = rustls::pki_types::ServerName::try_from("controller").expect("name");
    let mut stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await.expect("TLS");
    let request = format!(
        "GET /v1/whoami HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {}\r\n\r\n",
        cluster.admin
    );
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"admin\""), "{answer}");
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = body.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("ASCII")).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}
