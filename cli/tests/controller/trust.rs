//! Whom the command talks to.

use std::process::Command;

use crate::cluster::{Cluster, outcome};

#[test]
fn the_wrong_controller_is_not_talked_to() {
    let (ours, other) = (Cluster::start(), Cluster::start());
    let status = |ca: &Cluster, server: &Cluster| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_opencluster"));
        command.arg("status").env_clear();
        command.env("OPENCLUSTER_SERVER", format!("unix:{}", server.path("api.sock").display()));
        command.env("OPENCLUSTER_CA", ca.path("ca.pem")).env("OPENCLUSTER_TOKEN_FILE", ca.path("admin.token"));
        outcome(command, "")
    };
    assert_eq!(status(&ours, &ours).code, Some(0), "positive control");
    let refused = status(&ours, &other);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("is not a controller of this cluster"), "{}", refused.stderr);
    assert!(refused.stderr.contains("do not go on"), "{}", refused.stderr);
}

#[test]
fn bad_credentials_are_told_from_missing_ones() {
    let cluster = Cluster::start();
    let missing = cluster.run_as(&["status"], "", &[]);
    assert_eq!(missing.code, Some(1));
    assert!(missing.stderr.contains("OPENCLUSTER_TOKEN_FILE names the file"), "{}", missing.stderr);
    std::fs::write(cluster.path("bad.token"), "ocb1.00.AAAA\n").expect("written");
    let bad = cluster.run_as(&["status"], "", &[("OPENCLUSTER_TOKEN_FILE", "bad.token")]);
    assert_eq!(bad.code, Some(1));
    assert!(bad.stderr.contains("unknown, ended or expired"), "{}", bad.stderr);
    let check = cluster.run_as(&["check"], "", &[("OPENCLUSTER_TOKEN_FILE", "bad.token")]);
    assert_eq!(check.code, Some(1));
    assert!(check.stdout.contains("✓ controller is verified against the cluster's root"), "{}", check.stdout);
    assert!(check.stdout.contains("✗ credentials are valid: "), "{}", check.stdout);
}
