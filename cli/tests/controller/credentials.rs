//! Who may do what: roles, tokens, certificates.

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};

use crate::cluster::Cluster;
use crate::resources::PAIR;

#[test]
fn r36_roles_are_enforced() {
    let cluster = Cluster::start();
    for role in ["viewer", "operator"] {
        let file = cluster.path(&format!("{role}.token"));
        let created = cluster.run(&["operator", "create", role, "--role", role, "--out", file.to_str().expect("text")]);
        assert_eq!(created.code, Some(0), "{}", created.stderr);
        assert!(!created.stdout.contains("ocb1."), "the token is in the file alone: {}", created.stdout);
    }
    let as_role = |role: &str, arguments: &[&str]| {
        cluster.run_as(arguments, PAIR, &[("OPENCLUSTER_TOKEN_FILE", &format!("{role}.token"))])
    };
    assert_eq!(as_role("viewer", &["get", "nodes"]).code, Some(0));
    let refused = as_role("viewer", &["apply", "-f", "-"]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("viewer has the role viewer, this needs operator"), "{}", refused.stderr);
    assert_eq!(as_role("operator", &["apply", "-f", "-"]).code, Some(0));
    assert_eq!(as_role("operator", &["operator", "list"]).code, Some(1), "administrators only");

    let listed = cluster.run(&["operator", "list"]);
    assert!(listed.stdout.contains("viewer     viewer     token"), "{}", listed.stdout);
    assert_eq!(cluster.run(&["operator", "delete", "viewer"]).code, Some(0));
    let ended = as_role("viewer", &["get", "nodes", "-o", "json"]);
    assert_eq!(ended.code, Some(1), "ended at once");
    let error: serde_json::Value = serde_json::from_str(&ended.stderr).expect("JSON");
    assert_eq!(error["error"]["code"], "unauthenticated");
}

#[test]
fn an_operator_s_certificate_is_as_good_as_a_token() {
    let cluster = Cluster::start();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    let id = "spiffe://cli.test/operator/anna".try_into().expect("ASCII");
    parameters.subject_alt_names = vec![SanType::URI(id)];
    let request = parameters.serialize_request(&key).expect("a request").pem().expect("PEM");
    std::fs::write(cluster.path("anna.csr"), request).expect("written");
    std::fs::write(cluster.path("anna.key"), key.serialize_pem()).expect("written");

    let csr = cluster.path("anna.csr");
    let arguments = ["operator", "certificate", "anna", "--role", "operator", "--csr", csr.to_str().expect("text")];
    let signed = cluster.run(&arguments);
    assert_eq!(signed.code, Some(0), "{}", signed.stderr);
    std::fs::write(cluster.path("anna.pem"), signed.stdout).expect("written");

    let pair = [("OPENCLUSTER_CERT", "anna.pem"), ("OPENCLUSTER_KEY", "anna.key")];
    let applied = cluster.run_as(&["apply", "-f", "-"], PAIR, &pair);
    assert_eq!(applied.code, Some(0), "{}", applied.stderr);
    let trail = cluster.run(&["audit", "list"]);
    assert!(trail.stdout.lines().any(|line| line.contains("anna") && line.contains("apply")), "{}", trail.stdout);
    let forbidden = cluster.run_as(&["operator", "list"], "", &pair);
    assert!(forbidden.stderr.contains("anna has the role operator, this needs admin"), "{}", forbidden.stderr);

    // Another key than the certificate's is found out before anything is sent.
    let other = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
    std::fs::write(cluster.path("other.key"), other.serialize_pem()).expect("written");
    let stolen = [("OPENCLUSTER_CERT", "anna.pem"), ("OPENCLUSTER_KEY", "other.key")];
    let refused = cluster.run_as(&["status"], "", &stolen);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("is for another key"), "{}", refused.stderr);
}

#[test]
fn nodes_get_tokens_and_are_revoked() {
    let cluster = Cluster::start();
    let unknown = cluster.run(&["node", "token", "a"]);
    assert_eq!(unknown.code, Some(1));
    assert!(unknown.stderr.contains("there is no Node a"), "{}", unknown.stderr);
    cluster.apply(PAIR);
    let token = cluster.run(&["node", "token", "a", "--ttl", "5m"]);
    assert_eq!(token.code, Some(0), "{}", token.stderr);
    assert!(token.stdout.starts_with("oct1.a.") && token.stdout.lines().count() == 1, "nothing but the token");
    assert!(token.stderr.contains("can enrol once as node a"), "{}", token.stderr);

    let nodes = cluster.json(&["node", "list"]);
    assert_eq!(nodes["nodes"][0]["state"], "new");
    let shown = cluster.run(&["node", "show", "a"]);
    assert!(shown.stdout.starts_with("Node a\n  state             new\n"), "{}", shown.stdout);
    let idle = cluster.run(&["node", "revoke", "a", "--reason", "a test"]);
    assert_eq!(idle.code, Some(1), "there is nothing to revoke yet");

    let revoked = cluster.json(&["workload", "revoke", "b", "--reason", "a test"]);
    assert_eq!(revoked["identities"], serde_json::json!(["spiffe://cli.test/ns/default/sa/b"]));
    let restored = cluster.run(&["workload", "restore", "default/b", "--reason", "50% sure & done"]);
    assert_eq!(restored.code, Some(0), "{}", restored.stderr);
    assert!(cluster.json(&["audit", "list"]).to_string().contains("50% sure & done"));
}
