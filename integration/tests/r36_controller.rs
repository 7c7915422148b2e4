//! R36: enrolment, the store and the policy API of the controller, as a cluster uses them.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::ensure;
use opencluster_integration::harness::{A_TO_B, Cluster, PATIENCE, Wanted, Who};
use opencluster_integration::layout::CONTROLLER;
use opencluster_integration::poll;
use opencluster_integration::report::Event;
use opencluster_integration::state::StateDir;

#[test]
fn r36_a_token_is_used_once_even_under_a_race() -> anyhow::Result<()> {
    const SPARE: &str = "
apiVersion: opencluster/v1
kind: Node
metadata: {name: spare}
spec: {addresses: [10.88.0.200]}
";
    let wanted = Wanted { nodes: &["a"], bare: &["x"], resources: SPARE, ..Wanted::default() };
    let cluster = Cluster::up("r36_a_token_is_used_once", &wanted)?;
    let file = cluster.directory.join("token");
    let name = file.display().to_string();
    let enrol = |arguments: &[&str]| {
        cluster.probe(Who::Host("x"), &[&["enrol", "--token-file", &name][..], arguments].concat())
    };
    for attempts in [2, 2, 2, 16] {
        fs::write(&file, cluster.operator.token("spare")?.token)?;
        let event = enrol(&["--attempts", &attempts.to_string()])?;
        let Event::Enrolled { granted: 1, refused, .. } = event else { anyhow::bail!("{attempts} at once: {event:?}") };
        ensure!(refused == attempts - 1, "{refused} of {attempts} were refused");
        // And never again.
        let event = enrol(&["--attempts", "1"])?;
        ensure!(matches!(event, Event::Enrolled { granted: 0, .. }), "used again: {event:?}");
    }
    // It is for one node, and it ends.
    fs::write(&file, cluster.operator.token("spare")?.token)?;
    let event = enrol(&["--attempts", "1", "--node", "a"])?;
    ensure!(matches!(event, Event::Enrolled { granted: 0, .. }), "used for another node: {event:?}");
    let short = cluster.operator.run(&["node", "token", "spare", "--ttl", "1s", "-o", "json"], "")?;
    let short: serde_json::Value = serde_json::from_str(&short)?;
    fs::write(&file, short["token"].as_str().unwrap_or_default())?;
    poll::holds_for(Duration::from_millis(2100), || true);
    let event = enrol(&["--attempts", "1"])?;
    ensure!(matches!(event, Event::Enrolled { granted: 0, .. }), "used after its end: {event:?}");
    let text = fs::read_to_string(&file)?;
    let wrong = text.trim().char_indices().map(|(at, c)| if at == 20 { if c == 'A' { 'B' } else { 'A' } } else { c });
    fs::write(&file, wrong.collect::<String>())?;
    let event = enrol(&["--attempts", "1"])?;
    ensure!(matches!(event, Event::Enrolled { granted: 0, .. }), "a wrong secret: {event:?}");
    Ok(())
}

#[test]
fn r36_a_store_under_the_wrong_key_is_refused_and_not_touched() -> anyhow::Result<()> {
    let cluster = Cluster::up("r36_store_wrong_key", &Wanted { nodes: &["a"], ..Wanted::default() })?;
    // A copy of the store, as a thief or a restored backup would have it.
    cluster.rig.daemon(CONTROLLER)?.signal(nix::sys::signal::Signal::SIGTERM)?;
    let daemon = cluster.rig.daemon(CONTROLLER)?;
    ensure!(poll::until_true(PATIENCE, || !daemon.is_alive()), "the controller does not end");
    let home = cluster.rig.state.host(CONTROLLER)?;
    let store = cluster.directory.join("store.redb");
    fs::copy(home.join("store.redb"), &store)?;
    let key = cluster.directory.join("store.key");
    let socket = cluster.directory.join("api.sock");
    let config = cluster.directory.join("controller.yaml");
    let mut settings: serde_json::Value = serde_json::from_str(&fs::read_to_string(cluster.rig.config(CONTROLLER)?)?)?;
    settings["state"] = store.display().to_string().into();
    settings["store_key"]["file"] = key.display().to_string().into();
    settings["api_socket"] = socket.display().to_string().into();
    StateDir::write(&config, &settings.to_string())?;
    let program = cluster.rig.binaries.path("opencluster-controller")?;
    let serve = || -> anyhow::Result<Command> {
        let mut command = cluster.command(Who::Host(CONTROLLER))?;
        command.arg(&program).args(["serve", "--config"]).arg(&config).stdin(Stdio::null());
        Ok(command)
    };

    let good = fs::read(&store)?;
    let mut damaged = good.clone();
    for at in (damaged.len() / 3..damaged.len()).step_by(997) {
        damaged[at] ^= 0x55;
    }
    let right = fs::read_to_string(home.join("store.key"))?;
    for (what, content, key_text, word) in [
        ("a wrong key", &good, "ab".repeat(32), "key"),
        ("a damaged store", &damaged, right.clone(), "damage"),
        ("an empty store", &Vec::new(), right.clone(), "store"),
    ] {
        fs::write(&store, content)?;
        StateDir::write(&key, &key_text)?;
        let output = serve()?.output()?;
        let said = String::from_utf8_lossy(&output.stderr).to_lowercase() + &String::from_utf8_lossy(&output.stdout);
        ensure!(!output.status.success(), "{what}: it serves");
        ensure!(said.contains(word) && !said.contains("panicked"), "{what}: {said}");
        ensure!(fs::read(&store)? == *content, "{what}: the store was written to");
        let mut init = Command::new(&program);
        let output = init.args(["init", "--config"]).arg(&config).stdin(Stdio::null()).output()?;
        ensure!(!output.status.success(), "{what}: init went over a store that is there");
        ensure!(fs::read(&store)? == *content, "{what}: init wrote to the store");
    }
    // Values are sealed: what is in the store cannot be read in it.
    ensure!(!good.windows(9).any(|window| window == b"addresses"), "a resource is in plaintext in the store");

    // The positive control: with the right key the copy serves.
    fs::write(&store, &good)?;
    StateDir::write(&key, &right)?;
    let mut child = serve()?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let serves = poll::until_true(PATIENCE, || socket.exists());
    child.kill()?;
    child.wait()?;
    ensure!(serves, "with the right key it does not serve either");
    Ok(())
}

#[test]
fn r36_malformed_documents_are_refused_whole_and_say_where() -> anyhow::Result<()> {
    let cluster = Cluster::up("r36_malformed_documents", &Wanted { nodes: &["a", "b"], ..Wanted::default() })?;
    let apply = |text: &str| cluster.operator.apply(text).map_err(|error| error.to_string());
    let before = cluster.operator.status()?.store_version;
    let unknown_field = A_TO_B.replace("workloads: [b]", "workload: [b]");
    let bad_port = A_TO_B.replace("port: 9001", "port: 90010");
    let dangling = A_TO_B.replace("from: [{workload: a}]", "from: [{workload: nobody}]");
    let bomb = format!("{}[]{}", "[".repeat(5000), "]".repeat(5000));
    for (text, words) in [
        (unknown_field.as_str(), &["`workloads`", ":5:59"][..]),
        (&bad_port, &["port"]),
        (&dangling, &["nobody"]),
        ("kind: [", &[]),
        ("apiVersion: opencluster/v2\nkind: Service\n", &["apiVersion"]),
        (&bomb, &[]),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", &[]),
        ("\u{0}\u{1}\u{2}", &[]),
        ("", &[]),
    ] {
        let Err(said) = apply(text) else { anyhow::bail!("accepted: {}", &text[..text.len().min(200)]) };
        for word in words {
            ensure!(said.contains(word), "{word:?} is not in: {said}");
        }
        ensure!(!said.contains("panicked"), "{said}");
    }
    // The good first document of a bad file was not taken.
    ensure!(cluster.operator.status()?.store_version == before, "something was changed");
    apply(A_TO_B).map_err(anyhow::Error::msg)?;
    ensure!(cluster.operator.status()?.store_version > before, "a good file changed nothing");
    Ok(())
}

#[test]
fn r36_the_command_line_checks_and_explains_a_cluster() -> anyhow::Result<()> {
    let cluster = Cluster::up("r36_the_command_line", &Wanted { resources: A_TO_B, ..Wanted::default() })?;
    cluster.operator.run(&["check"], "")?;
    let explained = cluster.operator.run(&["explain", "flow", "--from", "a", "--to", "echo:9000", "-o", "json"], "")?;
    let explained: serde_json::Value = serde_json::from_str(&explained)?;
    ensure!(explained["allowed"] == true, "{explained}");
    let explained = cluster.operator.run(&["explain", "flow", "--from", "b", "--to", "echo:9000", "-o", "json"], "")?;
    let explained: serde_json::Value = serde_json::from_str(&explained)?;
    ensure!(explained["allowed"] == false, "{explained}");
    let usage = cluster.operator.command()?.arg("nonsense").output()?;
    ensure!(usage.status.code() == Some(2), "usage has exit code {:?}", usage.status.code());

    // The file that the rig offers to shells does what it says.
    let script = ". \"$0\" && opencluster status -o json";
    let mut shell = Command::new("sh");
    let output =
        shell.args(["-c", script]).arg(cluster.rig.state.env()).env_clear().env("PATH", "/usr/bin:/bin").output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    cluster.rig.daemon("b")?.signal(nix::sys::signal::Signal::SIGKILL)?;
    let noticed = poll::until_true(PATIENCE, || cluster.operator.run(&["check"], "").is_err());
    ensure!(noticed, "check finds nothing wrong with a dead node");
    Ok(())
}
