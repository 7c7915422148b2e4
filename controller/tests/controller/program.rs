//! The program: exit codes, files, signals.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

fn program(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_opencluster-controller"));
    command.current_dir(directory).args(arguments).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn run(directory: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = program(directory, arguments).output().expect("run");
    (status.code(), String::from_utf8(stdout).expect("UTF-8"), String::from_utf8(stderr).expect("UTF-8"))
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    let key = directory.path().join("store.key");
    std::fs::write(&key, "5a".repeat(32)).expect("write");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    let config = "trust_domain: rig.test\nname: ctl\nstate: store.redb\nstore_key: {file: store.key}\n\
                  node_listen: [\"127.0.0.1:0\"]\napi_listen: [\"127.0.0.1:0\"]\nlog: {json: true}\n";
    std::fs::write(directory.path().join("c.yaml"), config).expect("write");
    directory
}

#[test]
fn r36_the_program_makes_a_cluster_once_and_serves_it_until_it_is_told_to_stop() {
    let directory = directory();
    let init = ["init", "--config", "c.yaml", "--admin-token-file", "admin.token", "--ca-file", "ca.pem"];
    let (code, out, err) = run(directory.path(), &init);
    assert_eq!(code, Some(0), "{err}");
    let token = std::fs::read_to_string(directory.path().join("admin.token")).expect("token");
    assert!(token.starts_with("ocb1.") && !out.contains(token.trim()), "{out}");
    let mode = std::fs::metadata(directory.path().join("admin.token")).expect("metadata").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let (code, _, err) = run(directory.path(), &init);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("exists already and is not overwritten"), "{err}");
    let left: Vec<_> =
        std::fs::read_dir(directory.path()).expect("list").map(|entry| entry.expect("entry").file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("init-")), "{left:?}");

    let (code, pem, _) = run(directory.path(), &["ca", "--config", "c.yaml"]);
    assert_eq!(
        (code, pem.as_str()),
        (Some(0), std::fs::read_to_string(directory.path().join("ca.pem")).expect("ca").as_str())
    );

    let mut serving =
        program(directory.path(), &["serve", "--config", "c.yaml"]).stderr(Stdio::piped()).spawn().expect("serve");
    let mut log = BufReader::new(serving.stderr.take().expect("piped")).lines().map(|line| line.expect("UTF-8"));
    let ready = log.find(|line| line.contains("\"event\":\"ready\"")).expect("ready");
    serde_json::from_str::<serde_json::Value>(&ready).expect("JSON");
    let (code, _, err) = run(directory.path(), &["serve", "--config", "c.yaml"]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("in use by another process"), "{err}");
    kill_process(Pid::from_child(&serving), Signal::TERM).expect("SIGTERM");
    assert!(log.any(|line| line.contains("\"event\":\"stopped\"")));
    assert_eq!(serving.wait().expect("wait").code(), Some(0));
}

#[test]
fn r36_mistakes_in_usage_and_configuration_exit_with_2_and_say_what_is_wrong() {
    let directory = directory();
    let (code, _, err) = run(directory.path(), &["serve"]);
    assert_eq!(code, Some(2), "{err}");
    let (code, _, err) = run(directory.path(), &["serve", "--config", "none.yaml"]);
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("none.yaml"), "{err}");
    std::fs::write(directory.path().join("bad.yaml"), "trust_domain: t.test\nnmae: x\n").expect("write");
    let (code, _, err) = run(directory.path(), &["serve", "--config", "bad.yaml"]);
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("nmae"), "{err}");
    let (code, out, _) = run(directory.path(), &["--help"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("store_key") && out.contains("Exit codes"), "{out}");
    let (code, _, err) = run(directory.path(), &["serve", "--config", "c.yaml"]);
    assert_eq!(code, Some(1), "no store yet");
    assert!(err.contains("opencluster-controller init"), "{err}");
}
