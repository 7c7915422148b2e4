//! Resources, as operators work with them.

use serde_json::json;

use crate::cluster::Cluster;

pub(crate) const PAIR: &str = "\
apiVersion: opencluster/v1
kind: Node
metadata: {name: a}
spec: {addresses: [10.88.0.11, 'fd88::11']}
---
apiVersion: opencluster/v1
kind: Node
metadata: {name: b}
spec: {addresses: [10.88.0.12]}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {name: a}
spec: {nodes: [a]}
---
apiVersion: opencluster/v1
kind: Workload
metadata: {name: b}
spec: {nodes: [b]}
---
apiVersion: opencluster/v1
kind: Service
metadata: {name: echo}
spec: {ports: [{port: 9000}], workloads: [b]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo}
spec: {to: {service: echo, ports: [9000]}, from: [{workload: a}]}
";

#[test]
fn r36_apply_get_diff_delete() {
    let cluster = Cluster::start();
    let dry = cluster.run_with(&["apply", "-f", "-", "--dry-run"], PAIR);
    assert!(dry.stdout.contains("dry run: 6 created, 0 updated, 0 unchanged; nothing was changed"), "{}", dry.stdout);
    assert_eq!(cluster.json(&["get", "nodes"])["items"], json!([]), "a dry run changes nothing");

    let applied = cluster.apply(PAIR);
    assert!(applied.stdout.contains("Policy default/a-to-echo   created\n"), "{}", applied.stdout);
    assert!(cluster.apply(PAIR).stdout.contains("0 created, 0 updated, 6 unchanged"), "applying again changes nothing");

    let services = cluster.run(&["get", "svc"]);
    let mut lines = services.stdout.lines();
    assert_eq!(lines.next(), Some("NAME   PORTS   WORKLOADS   VERSION"));
    assert!(lines.next().is_some_and(|line| line.starts_with("echo   9000    b           ")), "{}", services.stdout);
    assert_eq!(cluster.json(&["get", "node", "a"])["spec"]["addresses"], json!(["10.88.0.11", "fd88::11"]));
    let none = cluster.run(&["get", "policy", "-n", "elsewhere"]);
    assert_eq!((none.code, none.stdout.as_str()), (Some(0), ""));
    assert_eq!(none.stderr, "no policies in namespace elsewhere (-A: in all)\n");
    assert!(cluster.run(&["get", "policy", "-A"]).stdout.contains("default     a-to-echo"));

    // What get prints as YAML can be applied as it is.
    let policies = cluster.run(&["get", "policies", "-o", "yaml"]);
    assert!(cluster.apply(&policies.stdout).stdout.contains("1 unchanged"), "{}", policies.stdout);

    let changed = PAIR.replace(", ports: [9000]", "").replace("port: 9000", "port: 9001");
    let diff = cluster.run_with(&["diff", "-f", "-"], &changed);
    assert_eq!(diff.code, Some(0), "{}", diff.stderr);
    let expected = "\
Service default/echo would be updated
  - spec.ports[0].port: 9000
  + spec.ports[0].port: 9001
Policy default/a-to-echo would be updated
  - spec.to.ports: [9000]
2 of 6 documents would change something
";
    assert_eq!(diff.stdout, expected);

    let used = cluster.run(&["delete", "service", "echo"]);
    assert_eq!(used.code, Some(1), "a policy needs it");
    assert!(used.stderr.contains("a-to-echo"), "{}", used.stderr);
    assert_eq!(cluster.run(&["delete", "policy", "a-to-echo"]).code, Some(0));
    let gone = cluster.run(&["delete", "policy", "a-to-echo"]);
    assert_eq!((gone.code, gone.stdout.as_str()), (Some(1), ""));
    assert_eq!(gone.stderr, "error: there is no Policy default/a-to-echo\n");
    let all = cluster.run_with(&["delete", "-f", "-", "--ignore-not-found"], PAIR);
    assert_eq!(all.code, Some(0), "{}", all.stderr);
    assert!(all.stdout.contains("Policy default/a-to-echo   was not there\n"), "{}", all.stdout);
    assert!(all.stdout.contains("Node a                     deleted\n"), "{}", all.stdout);
}

#[test]
fn faults_that_only_the_controller_sees_are_shown_in_their_file() {
    let cluster = Cluster::start();
    let (first, second) = (cluster.path("first.yaml"), cluster.path("second.yaml"));
    std::fs::write(&first, PAIR.split("---\n").next().expect("a document")).expect("written");
    let policy = "# A comment.\napiVersion: opencluster/v1\nkind: Policy\nmetadata: {name: p}\nspec:\n  to: {service: nowhere}\n  from: [{workload: a}]\n";
    std::fs::write(&second, policy).expect("written");
    let arguments = ["apply", "-f", first.to_str().expect("text"), "-f", second.to_str().expect("text")];
    let refused = cluster.run(&arguments);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("nowhere"), "{}", refused.stderr);
    let place =
        format!("  --> {}:6:17\n   |\n 6 |   to: {{service: nowhere}}\n   |                 ^\n", second.display());
    assert!(refused.stderr.contains(&place), "{place}\n{}", refused.stderr);
    assert!(!refused.stderr.contains(&format!("  --> {}", first.display())), "{}", refused.stderr);
    assert_eq!(cluster.json(&["get", "nodes"])["items"], json!([]), "all or nothing");
}

#[test]
fn who_was_slower_is_told() {
    let cluster = Cluster::start();
    cluster.apply(PAIR);
    let mut policy = cluster.json(&["get", "policy", "a-to-echo"]);
    policy["spec"]["action"] = json!("deny");
    assert_eq!(cluster.run_with(&["apply", "-f", "-"], &policy.to_string()).code, Some(0), "the first is in time");
    policy["spec"]["action"] = json!("allow");
    let late = cluster.run_with(&["apply", "-f", "-"], &policy.to_string());
    assert_eq!(late.code, Some(1));
    assert!(late.stderr.contains("hint: somebody else changed it"), "{}", late.stderr);
}

#[test]
fn r36_flows_are_explained() {
    let cluster = Cluster::start();
    cluster.apply(PAIR);
    let allowed = cluster.run(&["explain", "flow", "--from", "a", "--to", "echo:9000"]);
    assert_eq!(allowed.code, Some(0), "{}", allowed.stderr);
    let first = "allowed: spiffe://cli.test/ns/default/sa/a -> default/echo:9000\n";
    assert!(allowed.stdout.starts_with(first), "{}", allowed.stdout);
    assert!(allowed.stdout.contains("default/a-to-echo"), "{}", allowed.stdout);
    let denied = cluster.json(&["explain", "flow", "--from", "spiffe://cli.test/ns/default/sa/b", "--to", "echo:9000"]);
    assert_eq!(denied["allowed"], false);
    let nonsense = cluster.run(&["explain", "flow", "--from", "a", "--to", "echo"]);
    assert_eq!(nonsense.code, Some(1), "{}", nonsense.stdout);
}

#[test]
fn changes_are_watched_from_a_version() {
    let cluster = Cluster::start();
    let start = cluster.json(&["get", "policies"])["version"].to_string();
    cluster.apply(PAIR);
    let watched = cluster.run(&["watch", "--from", &start, "--count", "6", "-o", "json"]);
    assert_eq!(watched.code, Some(0), "{}", watched.stderr);
    let events: Vec<serde_json::Value> =
        watched.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON on each line")).collect();
    assert_eq!(events.len(), 6);
    assert!(events.iter().all(|event| event["change"]["action"] == "created"));
    let policies = cluster.run(&["watch", "policy", "--from", &start, "--count", "1"]);
    assert!(policies.stdout.ends_with("created    Policy default/a-to-echo\n"), "{}", policies.stdout);
    let future = cluster.run(&["watch", "--from", "999999"]);
    assert_eq!(future.code, Some(1));
    assert!(future.stderr.contains("in the future"), "{}", future.stderr);
}
