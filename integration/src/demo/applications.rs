//! nginx with curl, PostgreSQL with pgbench, Redis with redis-benchmark, iperf3: from Debian, as they are.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use opencluster_integration::poll;
use sha2::{Digest, Sha256};

use super::stage::{HERE, POLICIES, Stage, said};
use super::story::Story;

/// In every page, row and value that crosses the wire: it must not be seen there.
pub(crate) const MARKER: &str = "SECRET-OF-THE-SHOP-5f3759df";

/// PostgreSQL refuses to run as root.
const AS_NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

const LARGE: usize = 128 << 20;

/// Starts all servers, on host b.
pub(crate) fn start(story: &mut Story, stage: &mut Stage) -> anyhow::Result<()> {
    let started = Instant::now();
    web(stage)?;
    database(stage)?;
    cache(stage)?;
    let iperf = stage.workload("b", "meter", &["iperf3", "--server", "--port", "5201"])?;
    stage.serve("iperf3", "b", 5201, iperf)?;
    echo(stage)?;
    story.note(&format!(
        "nginx, PostgreSQL, Redis, iperf3 and an echo server run on host b ({:.1} s)",
        started.elapsed().as_secs_f64()
    ));
    Ok(())
}

pub(crate) fn echo(stage: &mut Stage) -> anyhow::Result<()> {
    let probe = stage.rig.binaries.path("opencluster-probe")?;
    let probe = probe.to_string_lossy();
    let echo = stage.workload("b", "meter", &[&probe, "echo", "--listen", "[::]:9000"])?;
    stage.serve("echo", "b", 9000, echo)
}

pub(crate) fn web(stage: &mut Stage) -> anyhow::Result<()> {
    let root = stage.path("web");
    fs::create_dir_all(root.join("tmp"))?;
    fs::write(root.join("index.html"), format!("<h1>The shop</h1>\n<p>{MARKER}</p>\n"))?;
    write_large(&root.join("large"))?;
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("  {kind}_temp_path {HERE}/web/tmp;\n"))
        .concat();
    let configuration = format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {HERE}/web/tmp/pid;\nerror_log stderr;\n\
         events {{ worker_connections 512; }}\n\
         http {{\n{temporary}  access_log off;\n  sendfile on;\n\
         \x20 server {{\n    listen 0.0.0.0:8080;\n    listen [::]:8080;\n    root {HERE}/web;\n  }}\n}}\n"
    );
    fs::write(root.join("nginx.conf"), configuration)?;
    let file = format!("{HERE}/web/nginx.conf");
    let nginx = stage.workload("b", "web", &["nginx", "-e", "stderr", "-p", HERE, "-c", &file])?;
    stage.serve("nginx", "b", 8080, nginx)
}

/// Not compressible, with the marker again and again.
fn write_large(path: &PathBuf) -> anyhow::Result<()> {
    let mut file = std::io::BufWriter::new(fs::File::create(path)?);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut block = vec![0; 4096];
    for _ in 0..LARGE / block.len() {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        block[..MARKER.len()].copy_from_slice(MARKER.as_bytes());
        file.write_all(&block)?;
    }
    Ok(file.flush()?)
}

fn database(stage: &mut Stage) -> anyhow::Result<()> {
    let programs = postgres_programs()?;
    let data = stage.path("postgres");
    fs::create_dir_all(&data)?;
    std::os::unix::fs::chown(&data, Some(65534), Some(65534))?;
    let there = format!("{HERE}/postgres");
    let initdb = programs.join("initdb").display().to_string();
    let arguments = ["-D", &there, "--no-sync", "-A", "trust", "-U", "shop", "-E", "UTF8", "--locale", "C"];
    let command = [&AS_NOBODY[..], &[&initdb], &arguments].concat();
    said(&mut stage.workload("b", "database", &command)?).context("initdb")?;
    // Who may connect is decided before a connection gets here.
    let mut rules = fs::OpenOptions::new().append(true).open(data.join("pg_hba.conf"))?;
    rules.write_all(b"host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n")?;
    let postgres = programs.join("postgres").display().to_string();
    let settings = ["-c", "listen_addresses=*", "-c", "unix_socket_directories=/run/demo/postgres", "-c", "fsync=off"];
    let command = [&AS_NOBODY[..], &[&postgres, "-D", &there], &settings].concat();
    let postgres = stage.workload("b", "database", &command)?;
    stage.serve("postgres", "b", 5432, postgres)
}

/// The newest of Debian's versions.
fn postgres_programs() -> anyhow::Result<PathBuf> {
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .context("PostgreSQL is not installed (Debian package postgresql)")?
        .map(|entry| Ok(entry?.path().join("bin")))
        .collect::<std::io::Result<_>>()?;
    versions.retain(|programs| programs.join("postgres").is_file());
    versions.sort();
    versions.pop().context("PostgreSQL is not installed (Debian package postgresql)")
}

fn cache(stage: &mut Stage) -> anyhow::Result<()> {
    let arguments = ["--port", "6379", "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", ""];
    let redis = stage.workload("b", "cache", &[&["redis-server"][..], &arguments, &["--dir", HERE]].concat())?;
    stage.serve("redis", "b", 6379, redis)
}

/// Applies the policies and waits until the till gets its first page.
pub(crate) fn allow(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    let started = Instant::now();
    stage.operator.apply(POLICIES)?;
    story.check("policy-opens", "Four policies let the till in", || {
        let page = || said(&mut stage.workload("a", "till", &["curl", "-sf", "-m", "2", "http://10.88.0.12:8080/"])?);
        let opened = poll::until_true(Duration::from_secs(10), || page().is_ok());
        ensure!(opened, "no page: {:#}", page().err().context("now there is one")?);
        Ok(format!("the first page came {} ms after `opencluster apply` began", started.elapsed().as_millis()))
    })
}

/// A page over both families, and a large file with its checksum.
pub(crate) fn http(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    story.check("http", "nginx and curl, HTTP/1.1", || {
        for url in ["http://10.88.0.12:8080/", "http://[fd88::12]:8080/", "http://b:8080/"] {
            let page = said(&mut stage.workload("a", "till", &["curl", "-sf", "--http1.1", "-m", "10", url])?)?;
            ensure!(page.contains(MARKER), "{url} answered {page:?}");
        }
        Ok("by IPv4, by IPv6 and by name".to_owned())
    })?;
    story.check("http-large", "A large file arrives as it is", || {
        let started = Instant::now();
        let script = "curl -sf -m 120 http://10.88.0.12:8080/large | sha256sum";
        let sum = said(&mut stage.workload("a", "till", &["sh", "-c", script])?)?;
        let took = started.elapsed().as_secs_f64();
        let expected = hex::encode(Sha256::digest(fs::read(stage.path("web/large"))?));
        ensure!(sum.starts_with(&expected), "SHA-256 {sum}, expected {expected}");
        let rate = LARGE as f64 * 8.0 / took / 1e9;
        Ok(format!("{} MiB in {took:.2} s ({rate:.1} Gbit/s), SHA-256 {}…", LARGE >> 20, &expected[..12]))
    })
}

/// pgbench, and a row with the marker.
pub(crate) fn postgres(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    let pgbench = postgres_programs()?.join("pgbench").display().to_string();
    story.check("postgres", "PostgreSQL and pgbench", || {
        let server = ["-h", "10.88.0.12", "-p", "5432", "-U", "shop", "postgres"];
        let fill = [&[&pgbench, "-i", "-q", "-s", "3"][..], &server].concat();
        said(&mut stage.workload("a", "till", &fill)?)?;
        let run = [&[&pgbench, "-n", "-c", "8", "-j", "2", "-T", "6"][..], &server].concat();
        let printed = said(&mut stage.workload("a", "till", &run)?)?;
        let figure = |name: &str| {
            let line = printed.lines().find(|line| line.starts_with(name))?;
            line.split(['=', ':']).nth(1)?.split_whitespace().next().map(str::to_owned)
        };
        let (rate, latency) = (figure("tps"), figure("latency average"));
        let (Some(rate), Some(latency)) = (rate, latency) else { bail!("pgbench said {printed:?}") };
        let failed = figure("number of failed transactions").unwrap_or_default();
        ensure!(failed == "0", "{failed} transactions failed");
        let rate = rate.parse::<f64>()?;
        Ok(format!("{rate:.0} transactions/s over 8 connections, {latency} ms each, none failed"))
    })
}

/// The marker as a row and as a value, for the wire to hide.
pub(crate) fn say_marker(stage: &Stage) -> anyhow::Result<()> {
    let query = format!("select '{MARKER}'");
    let row = said(&mut stage.workload(
        "a",
        "till",
        &["psql", "-h", "10.88.0.12", "-U", "shop", "-At", "-c", &query, "postgres"],
    )?)?;
    ensure!(row.trim() == MARKER, "psql: {row:?}");
    let redis = |arguments: &[&str]| {
        let command = [&["redis-cli", "-h", "10.88.0.12"][..], arguments].concat();
        said(&mut stage.workload("a", "till", &command)?)
    };
    redis(&["SET", "secret", MARKER])?;
    let value = redis(&["GET", "secret"])?;
    ensure!(value.trim() == MARKER, "redis-cli: {value:?}");
    for url in ["http://10.88.0.12:8080/large", "http://[fd88::12]:8080/"] {
        said(&mut stage.workload("a", "till", &["curl", "-sf", "-o", "/dev/null", "-m", "60", url])?)?;
    }
    Ok(())
}

/// redis-benchmark.
pub(crate) fn redis(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    story.check("redis", "Redis and redis-benchmark", || {
        let command =
            ["redis-benchmark", "-h", "10.88.0.12", "-t", "set,get", "-n", "60000", "-c", "32", "-d", "64", "--csv"];
        let printed = said(&mut stage.workload("a", "till", &command)?)?;
        let rate = |test: &str| {
            let line = printed.lines().find(|line| line.starts_with(&format!("\"{test}\"")))?;
            line.split(',').nth(1)?.trim_matches('"').parse::<f64>().ok()
        };
        let (Some(set), Some(get)) = (rate("SET"), rate("GET")) else { bail!("redis-benchmark said {printed:?}") };
        Ok(format!("{set:.0} SET/s, {get:.0} GET/s over 32 connections"))
    })
}

/// iperf3.
pub(crate) fn iperf(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    story.check("iperf3", "iperf3", || {
        let command = ["iperf3", "--client", "10.88.0.12", "--port", "5201", "-t", "5", "-P", "4", "--json"];
        let printed = said(&mut stage.workload("a", "till", &command)?)?;
        let result: serde_json::Value = serde_json::from_str(&printed)?;
        let rate = result.pointer("/end/sum_received/bits_per_second").and_then(serde_json::Value::as_f64);
        let rate = rate.context("iperf3 names no rate")? / 1e9;
        ensure!(rate > 0.0, "nothing arrived");
        Ok(format!("{rate:.1} Gbit/s over 4 connections"))
    })
}
