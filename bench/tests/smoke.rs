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
    names.filter(|n| n.starts_with(&format!("ocbench-{name}-"))).collect()
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

    let refused = bench(&["--contenders", "nginx"]);
    assert_eq!(refused.status.code(), Some(2));
}
