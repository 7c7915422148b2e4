//! The program from outside: where it refuses to run, what it says about a configuration, what the proxy starts with.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_opencluster-node");

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("opencluster-program-{}-{name}", std::process::id()));
        fs::create_dir(&path).expect("directory");
        Self(path)
    }

    fn config(&self, more: &str) -> PathBuf {
        let directory = self.0.display();
        let path = self.0.join("node.yaml");
        let text = format!(
            "node: a\ncontrollers: ['127.0.0.1:1']\ntoken_file: {directory}/token\nrun_dir: {directory}/run\n\
             cgroup: opencluster-test/program-{}\n{more}",
            std::process::id()
        );
        fs::write(&path, text).expect("write");
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("remove");
    }
}

fn run(program: &str, arguments: &[&str]) -> (Output, String) {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().expect(program);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, text)
}

/// In a network namespace of its own, so that nothing would be lost if it did not refuse; but one namespace is not enough.
#[test]
fn the_daemon_refuses_to_cut_off_a_machine_that_is_not_its_own() {
    let directory = Directory::new("refuses");
    for command in ["serve", "block"] {
        let config = directory.config("");
        let config = config.to_str().expect("text");
        let (output, text) = run("unshare", &["-n", PROGRAM, command, "--config", config]);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("refusing to run here"), "{text}");

        let config = directory.config("secure_mode: true\nmachine_id: 0123456789abcdef0123456789abcdef\n");
        let config = config.to_str().expect("text");
        let (output, text) = run("unshare", &["-n", PROGRAM, command, "--config", config]);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("Was a configuration copied from another host?"), "{text}");
    }
}

#[test]
fn r03_block_closes_the_network_and_leaves_it_closed() {
    let directory = Directory::new("block");
    let config = directory.config("");
    let script = format!("ip link set lo up && {PROGRAM} block --config {} && nft list ruleset", config.display());
    let (output, text) = run("unshare", &["-n", "-m", "sh", "-c", &script]);
    assert!(output.status.success(), "{text}");
    let listing = String::from_utf8_lossy(&output.stdout);
    assert_eq!(listing.matches("policy drop").count(), 3, "{listing}");
}

#[test]
fn a_daemon_without_a_token_says_what_to_do() {
    let directory = Directory::new("token");
    let config = directory.config("");
    let script = format!("ip link set lo up && exec {PROGRAM} serve --config {}", config.display());
    let (output, text) = run("unshare", &["-n", "-m", "sh", "-c", &script]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("opencluster node token a"), "{text}");
    fs::remove_file(directory.0.join("run/node.sock")).expect("its socket");
    remove_cgroups();
}

fn remove_cgroups() {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let mount = mounts.lines().find(|line| line.contains(" cgroup2 ")).and_then(|line| line.split(' ').nth(1));
    let base = PathBuf::from(mount.expect("cgroup2")).join(format!("opencluster-test/program-{}", std::process::id()));
    for directory in ["daemon", "proxy", ""] {
        fs::remove_dir(base.join(directory)).expect("an empty cgroup");
    }
}

#[test]
fn faults_in_a_configuration_are_named() {
    let directory = Directory::new("faults");
    let good = directory.config("");
    let (output, text) = run(PROGRAM, &["check-config", "--config", good.to_str().expect("text")]);
    assert!(output.status.success(), "{text}");
    let bad = directory.config("protxy: /x\n");
    let (output, text) = run(PROGRAM, &["check-config", "--config", bad.to_str().expect("text")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("unknown field `protxy`"), "{text}");
}

#[test]
fn status_without_a_daemon_says_so() {
    let (output, text) = run(PROGRAM, &["status", "--socket", "/nonexistent/node.sock"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("Is it running"), "{text}");
}

/// A script in the proxy's place tells what it finds.
#[test]
fn r30_the_proxy_starts_with_nothing_but_its_control_socket() {
    let directory = Directory::new("proxy");
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let mount = mounts.lines().find(|line| line.contains(" cgroup2 ")).and_then(|line| line.split(' ').nth(1));
    let cgroup = PathBuf::from(mount.expect("cgroup2")).join(format!("opencluster-test-exec-{}", std::process::id()));
    fs::create_dir(&cgroup).expect("cgroup");
    let script = directory.0.join("proxy.sh");
    fs::write(&script, "#!/bin/sh\necho \"$@\"\ncat /proc/self/status\nls -l /proc/$$/fd\ncat /proc/self/cgroup\n")
        .expect("script");
    Command::new("chmod").args(["-R", "a+rx"]).arg(&directory.0).status().expect("chmod");

    let (control, _daemon) = std::os::unix::net::UnixStream::pair().expect("socketpair");
    let output = Command::new(PROGRAM)
        .args(["exec-proxy", "--user", "65533", "--cgroup"])
        .arg(&cgroup)
        .args(["--parent", &std::process::id().to_string(), "--program"])
        .arg(&script)
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(control)))
        .output()
        .expect("exec-proxy");
    fs::remove_dir(&cgroup).expect("the cgroup is empty again");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.starts_with("--control-fd 3\n"), "{text}");
    assert!(text.contains("Uid:\t65533\t65533\t65533\t65533"), "{text}");
    assert!(text.contains("NoNewPrivs:\t1"), "{text}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(text.contains(&format!("{set}:\t0000000000000000")), "{set}: {text}");
    }
    assert!(text.contains(" 0 -> /dev/null"), "{text}");
    assert!(text.contains(" 3 -> socket:"), "{text}");
    assert!(text.contains("opencluster-test-exec"), "{text}");
}

#[test]
fn the_proxy_does_not_start_without_its_daemon() {
    let arguments =
        ["exec-proxy", "--user", "65533", "--cgroup", "/nonexistent", "--parent", "1", "--program", "/bin/true"];
    let (output, text) = run(PROGRAM, &arguments);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("/nonexistent"), "{text}");
}
