//! The whole tool, for a fraction of a second, in namespaces of its own.

use std::path::Path;
use std::process::{Command, Output};

const BENCH: &str = env!("CARGO_BIN_EXE_opencluster-bench");

fn bench(args: &[&str]) -> Output {
    Command::new(BENCH).args(args).output().unwrap()
}

fn namespaces(name: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.starts_with(&format!("ocbench-{name}"))).collect()
}

#[test]
fn r37_direct_and_haproxy_are_measured_in_one_run_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let name = format!("smoke{}", std::process::id() % 100_000);
    let args =
        ["--name", &name, "--out", out, "--contenders", "direct,haproxy", "--scenarios", "rr-1", "--rounds", "2"];
    let output = bench(&[&args[..], &["--seconds", "0.1", "-o", "json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rate = |contender: &str| report["scenarios"][0]["contenders"][contender]["rate"].as_f64().unwrap();
    assert!(rate("direct") > 100.0 && rate("haproxy") > 50.0, "{report}");
    assert_eq!(
        report["scenarios"][0]["contenders"]["haproxy"]["spread"]["p99_us"]["values"].as_array().unwrap().len(),
        2
    );
    assert!(Path::new(out).join("rates.svg").exists() && Path::new(out).join("report.md").exists());
    assert_eq!(namespaces(&name), [""; 0], "left behind");

    let refused = bench(&["--out", out, "--contenders", "envoy"]);
    assert_eq!(refused.status.code(), Some(2), "{}", String::from_utf8_lossy(&refused.stderr));
}

#[test]
fn r37_a_described_contender_takes_part_on_hosts_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("peer.json");
    std::fs::write(
        &file,
        r#"{"name": "peer", "version": "7", "programs": [{"host": "server", "command": ["sleep", "600"]}],
            "prepare": [{"host": "client", "command": ["ip", "addr", "add", "10.89.0.99/24", "dev", "eth0"]}],
            "targets": {"echo": "10.89.0.12:9000", "sink": "10.89.0.12:9001", "source": "10.89.0.12:9002"}}"#,
    )
    .unwrap();
    let (out, file) = (folder.path().to_str().unwrap(), file.to_str().unwrap());
    let name = format!("ext{}", std::process::id() % 100_000);
    let args = ["--name", &name, "--out", out, "--external", file, "--contenders", "direct,peer", "-o", "json"];
    let output = bench(&[&args[..], &["--scenarios", "rr-1,open-20", "--rounds", "1", "--seconds", "0.1"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["versions"]["peer"], "7");
    let peer = &report["scenarios"][0]["contenders"]["peer"];
    assert!(peer["rate"].as_f64().unwrap() > 100.0 && peer["cpu_us_per_op"].as_f64().is_some(), "{report}");
    let opened = &report["scenarios"][1]["contenders"]["peer"];
    assert!(opened["seconds"].as_f64().unwrap() > 0.0 && opened["flows"] == 20.0, "{report}");
    assert!(report["failures"].as_array().unwrap().is_empty(), "{report}");
    assert_eq!(namespaces(&name), [""; 0], "left behind");
}
