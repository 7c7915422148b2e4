//! Bad peers on every port: they get a closed connection, and everybody else gets service.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::ensure;
use opencluster_integration::harness::{A_TO_B, Cluster, PATIENCE, Wanted, Who};
use opencluster_integration::report::Event;

const KINDS: [&str; 7] = ["garbage", "plaintext", "oversized", "endless-hello", "slow", "silent", "huge-frame"];

/// How long a bad peer may hold a connection before it is put out.
const HOLD: &str = "40000";

#[test]
fn r09_bad_peers_on_every_port_are_put_out_and_service_goes_on() -> anyhow::Result<()> {
    let wanted = Wanted { bare: &["x"], resources: A_TO_B, ..Wanted::default() };
    let cluster = Cluster::up("r09_bad_peers", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    let mut pulse =
        cluster.start(Who::Workload("a"), &["pulse", "--patience-ms", "5000", "--to", "10.88.0.12:9000"])?;
    pulse.expect_up()?;
    let failures = cluster.metric("b", "opencluster_proxy_tls_handshake_failures_total")?;

    let api = format!("unix:{}", cluster.rig.state.api_socket().display());
    let targets = [
        (Who::Host("x"), "10.88.0.12:15443"),
        (Who::Host("x"), "[fd88::12]:15443"),
        (Who::Host("x"), "10.88.0.2:7443"),
        (Who::Host("x"), "10.88.0.2:7480"),
        (Who::Host("ctl"), api.as_str()),
        (Who::Host("a"), "unix:/run/opencluster/node.sock"),
        (Who::Host("a"), "unix:/run/opencluster/proxy.sock"),
    ];
    let mut attacks = Vec::new();
    for (who, to) in targets {
        for kind in KINDS {
            let arguments = ["attack", kind, "--to", to, "--connections", "8", "--patience-ms", HOLD];
            attacks.push((kind, to, cluster.start(who, &arguments)?));
        }
    }
    // While all of them are at it: new connections, the operator, and a certificate for a new node.
    let started = Instant::now();
    ensure!(cluster.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "no new connections meanwhile");
    cluster.operator.status()?;
    cluster.operator.token("a")?;
    ensure!(started.elapsed() < Duration::from_secs(10), "all that took {:?}", started.elapsed());

    for (kind, to, mut attack) in attacks {
        match attack.event(Duration::from_mins(1))?.1 {
            Event::Attacked { connected, ended_by_peer, longest_ms, .. } => {
                eprintln!("{kind} on {to}: {connected} connected, {ended_by_peer} put out within {longest_ms} ms");
                ensure!(connected == ended_by_peer, "{kind} on {to}: {ended_by_peer} of {connected} were put out");
            }
            event => anyhow::bail!("{kind} on {to}: {event:?}"),
        }
    }
    ensure!(pulse.told()?.is_empty(), "the flow that was there before broke");
    ensure!(cluster.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "no new connections afterwards");
    for node in ["a", "b"] {
        let node = cluster.node(node)?;
        ensure!(node.state == "active" && node.proxy_restarts == 0, "{node:?}");
    }
    ensure!(cluster.metric("b", "opencluster_proxy_tls_handshake_failures_total")? > failures, "no metric shows it");
    Ok(())
}

#[test]
fn r09_a_flood_of_silent_connections_leaves_room_for_others() -> anyhow::Result<()> {
    let wanted = Wanted { bare: &["x"], resources: A_TO_B, ..Wanted::default() };
    let cluster = Cluster::up("r09_a_flood_of_silent_connections", &wanted)?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "it does not work at all");
    let mut floods = Vec::new();
    for to in ["10.88.0.12:15443", "10.88.0.2:7443", "10.88.0.2:7480"] {
        let arguments = ["attack", "silent", "--to", to, "--connections", "2000", "--patience-ms", "6000"];
        floods.push(cluster.start(Who::Host("x"), &arguments)?);
    }
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(5) {
        ensure!(cluster.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "no new connections during the flood");
        cluster.operator.status()?;
    }
    for mut flood in floods {
        flood.event(PATIENCE)?;
    }
    for node in ["a", "b"] {
        ensure!(cluster.node(node)?.state == "active", "{node} lost its lease in the flood");
    }
    Ok(())
}

#[test]
fn r36_the_api_refuses_large_slow_and_unauthenticated_requests() -> anyhow::Result<()> {
    let cluster = Cluster::up("r36_the_api_refuses", &Wanted { nodes: &["a"], ..Wanted::default() })?;
    let socket = cluster.rig.state.api_socket().display().to_string();
    let token = std::fs::read_to_string(cluster.rig.state.admin_token())?;
    let bearer = format!("Authorization: Bearer {}", token.trim());
    // The server's name is a SPIFFE ID, which curl does not know: authenticity is not what is tested here.
    let curl = |arguments: &[&str], body: &[u8]| -> anyhow::Result<String> {
        let file = cluster.directory.join("body");
        std::fs::write(&file, body)?;
        let data = format!("@{}", file.display());
        let mut command = std::process::Command::new("curl");
        command.args(["-sk", "-m", "20", "--unix-socket", &socket, "-o", "/dev/null", "-w", "%{http_code}"]);
        command.args(arguments);
        if !body.is_empty() {
            command.args(["--data-binary", &data]);
        }
        let output = command.stdin(Stdio::null()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let with_token = |path: &str, body: &[u8]| curl(&["-H", &bearer, &format!("https://ctl{path}")], body);
    ensure!(with_token("/v1/status", b"")? == "200", "the control is refused");
    ensure!(curl(&["https://ctl/healthz"], b"")? == "200", "health is for everybody");
    for (what, status, allowed) in [
        ("no token", curl(&["https://ctl/v1/status"], b"")?, &["401"][..]),
        ("a wrong token", curl(&["-H", "Authorization: Bearer x", "https://ctl/v1/status"], b"")?, &["401"]),
        ("a large body", with_token("/v1/apply", &vec![b'#'; 32 << 20])?, &["413"]),
        ("binary", with_token("/v1/apply", &[0xff; 4096])?, &["400", "415", "422"]),
        ("a path upwards", with_token("/v1/../../etc/passwd", b"")?, &["404"]),
        ("no such thing", with_token("/v1/nodes/nobody", b"")?, &["404"]),
        ("a long path", with_token(&format!("/v1/nodes/{}", "x".repeat(60_000)), b"")?, &["404", "414", "431", "000"]),
    ] {
        ensure!(allowed.contains(&status.as_str()), "{what}: HTTP status {status}");
    }
    ensure!(with_token("/v1/status", b"")? == "200", "service does not go on");
    Ok(())
}
