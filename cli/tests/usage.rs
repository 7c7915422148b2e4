//! The command as a person or a script meets it, as far as no controller is needed: help, exit codes, faults in place.

use std::io::Write;
use std::process::{Command, Output, Stdio};

fn opencluster(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_opencluster"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    opencluster(arguments).output().expect("the command runs")
}

fn with_input(arguments: &[&str], input: &[u8]) -> Output {
    let mut command = opencluster(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the command starts");
    child.stdin.take().expect("piped").write_all(input).expect("written");
    child.wait_with_output().expect("the command ends")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("text")
}

#[test]
fn mistakes_of_usage_exit_with_2() {
    for arguments in [
        &[][..],
        &["no-such-command"],
        &["get"],
        &["get", "gadget"],
        &["get", "policy", "Not_A_Name"],
        &["get", "policy", "name", "-A"],
        &["apply"],
        &["delete", "policy"],
        &["delete", "policy", "name", "-f", "file"],
        &["explain", "flow"],
        &["explain", "flow", "--from", "a"],
        &["node", "token", "a", "--ttl", "soon"],
        &["node", "revoke", "a"],
        &["operator", "create", "anna"],
        &["completion", "tcsh"],
        &["status", "-o", "xml"],
        &["status", "--cert", "only-half"],
        // Nobody says which controller, or whom to trust.
        &["status"],
        &["status", "--server", "unix:/nowhere"],
        &["status", "--server", "http://controller:7480", "--ca", "/dev/null"],
        &["status", "--server", "unix:/nowhere", "--ca", "/dev/null", "--token", "not a token"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stdout(&output).is_empty(), "{arguments:?}: results only go to standard output");
        assert!(!stderr(&output).is_empty(), "{arguments:?}");
    }
}

#[test]
fn help_and_version_exit_with_0() {
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    let text = stdout(&help);
    for word in [
        "apply",
        "get",
        "delete",
        "diff",
        "explain",
        "node",
        "workload",
        "check",
        "status",
        "audit",
        "operator",
        "watch",
        "completion",
        "version",
        "OPENCLUSTER_SERVER",
        "Exit codes: 0 done, 1 refused or failed, 2 usage",
    ] {
        assert!(text.contains(word), "{word} is missing in:\n{text}");
    }
    assert_eq!(stdout(&run(&["--version"])), concat!("opencluster ", env!("CARGO_PKG_VERSION"), "\n"));
    let version = run(&["version"]);
    assert_eq!(
        stdout(&version),
        concat!("opencluster  ", env!("CARGO_PKG_VERSION"), "\ncontroller   no controller is named\n")
    );
    let json: serde_json::Value = serde_json::from_slice(&run(&["version", "-o", "json"]).stdout).expect("JSON");
    assert_eq!(json, serde_json::json!({ "client": env!("CARGO_PKG_VERSION") }));
}

#[test]
fn secrets_are_not_echoed() {
    let arguments = ["status", "--server", "unix:/nowhere", "--ca", "/dev/null", "--token", "s3cret with a space"];
    let output = run(&arguments);
    assert!(!stderr(&output).contains("s3cret"), "{}", stderr(&output));
    let help = opencluster(&["--help"]).env("OPENCLUSTER_TOKEN", "s3cret").output().expect("the command runs");
    assert!(!stdout(&help).contains("s3cret"));
}

#[test]
fn faults_are_shown_in_place_without_a_controller() {
    let documents = b"apiVersion: opencluster/v1
kind: Service
metadata: {name: echo}
spec: {ports: [{port: 9000}], workloads: [b]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo}
spec:
  to: {service: echo, prots: [9000]}
  from: [{workload: a}]
";
    let output = with_input(&["apply", "-f", "-"], documents);
    assert_eq!(output.status.code(), Some(1), "refused, not usage");
    let text = stderr(&output);
    assert!(text.contains("  --> -:10:23\n"), "{text}");
    assert!(text.contains(" 10 |   to: {service: echo, prots: [9000]}\n    |                       ^\n"), "{text}");
    assert!(text.contains("ports"), "a suggestion: {text}");
    assert!(text.ends_with("error: 1 fault; nothing was changed\n"), "{text}");

    let output = with_input(&["apply", "-f", "-", "-o", "json"], documents);
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).expect("JSON");
    assert_eq!(error["error"]["code"], "invalid");
    let fault = &error["error"]["faults"][0];
    assert_eq!((&fault["file"], &fault["line"], &fault["column"]), (&"-".into(), &10.into(), &23.into()));
}

#[test]
fn what_is_no_document_is_refused_with_its_place() {
    for (input, expected) in [
        (&b""[..], "no documents in -"),
        (b"# only a comment\n", "no documents in -"),
        (b"a: 1\nb: \xff\n", "-:2: this is not UTF-8 text"),
        (b"kind: [", "--> -:1:"),
        (b"just words", "--> -:1:"),
        (&b"#".repeat(4 * 1024 * 1024 + 1), "- is larger than 4 MiB"),
    ] {
        let output = with_input(&["apply", "-f", "-"], input);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(expected), "{expected}: {}", stderr(&output));
    }
    let output = run(&["apply", "-f", "/no/such/file"]);
    assert_eq!(stderr(&output), "error: cannot read /no/such/file: No such file or directory (os error 2)\n");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_controller_that_is_not_there_is_said_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let ca = directory.path().join("ca.pem");
    std::fs::write(&ca, "not a certificate").expect("written");
    let server = format!("unix:{}", directory.path().join("api.sock").display());
    let status = ["status", "--server", &server, "--ca", ca.to_str().expect("text")];
    let output = run(&status);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("ca.pem: "), "{}", stderr(&output));
    assert!(stderr(&output).contains("hint: OPENCLUSTER_CA must name"), "{}", stderr(&output));
}

#[test]
fn kinds_are_explained() {
    let output = run(&["explain", "policy"]);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    assert!(text.starts_with("Policy\nWho may connect to what."), "{text}");
    assert!(text.contains("spec.to.service"), "{text}");
    let json: serde_json::Value = serde_json::from_slice(&run(&["explain", "svc", "-o", "json"]).stdout).expect("JSON");
    assert_eq!(json["kind"], "Service");
    assert_eq!(json["fields"][0]["field"], "metadata.name");
}

#[test]
fn every_shell_gets_its_completion() {
    for (shell, sign) in [("bash", "complete -F"), ("zsh", "#compdef opencluster"), ("fish", "complete -c opencluster")]
    {
        let output = run(&["completion", shell]);
        assert_eq!(output.status.code(), Some(0));
        assert!(stdout(&output).contains(sign), "{shell}");
    }
}

#[test]
fn a_reader_that_has_enough_is_no_failure() {
    let mut child = opencluster(&["completion", "bash"]).stdout(Stdio::piped()).spawn().expect("the command starts");
    drop(child.stdout.take());
    assert!(child.wait().expect("the command ends").success());
}
