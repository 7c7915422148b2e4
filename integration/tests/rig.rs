//! The rig itself: faithful to what runs in it, invisible to the machine, gone when it is gone.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::ensure;
use nix::sys::signal::Signal;
use opencluster_integration::binaries::Binaries;
use opencluster_integration::cgroup::Cgroups;
use opencluster_integration::harness::{A_TO_B, Cluster, Wanted, Who, rig_name};
use opencluster_integration::layout::ALL_RIGS;
use opencluster_integration::poll;
use opencluster_integration::process::ProcessId;
use opencluster_integration::state::StateDir;

/// Everything of the machine that a rig could leave something in, as far as it belongs to the rig of that name or to
/// nobody.
#[derive(Debug, PartialEq, Eq)]
struct Machine {
    links: String,
    addresses: String,
    rules: String,
    firewall: String,
    namespaces: BTreeSet<String>,
    mounts: BTreeSet<String>,
    cgroups: Vec<String>,
    processes: Vec<i32>,
}

impl Machine {
    fn look(rig: &str) -> anyhow::Result<Self> {
        let ours = format!("{rig}-");
        let only_ours = |text: &str| text.lines().filter(|line| line.contains(&ours)).map(str::to_owned).collect();
        let cgroups = Cgroups::find()?;
        let of_rig: Vec<String> = cgroups.children(ALL_RIGS)?.into_iter().filter(|name| name == rig).collect();
        Ok(Self {
            links: say("ip", &["-o", "link"])?,
            addresses: without_lifetimes(&say("ip", &["-o", "addr"])?),
            rules: say("ip", &["rule"])?,
            firewall: say("nft", &["list", "ruleset"])?,
            namespaces: only_ours(&say("ip", &["netns", "list"])?),
            mounts: only_ours(&fs::read_to_string("/proc/self/mounts")?),
            processes: cgroups.processes(&format!("{ALL_RIGS}/{rig}"))?,
            cgroups: of_rig,
        })
    }
}

fn without_lifetimes(text: &str) -> String {
    text.lines().map(|line| line.split(" valid_lft").next().unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

fn say(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn rig(arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(Binaries::locate()?.path("opencluster-rig")?);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    Ok(command)
}

#[test]
fn rig_leaves_nothing_behind() -> anyhow::Result<()> {
    let name = rig_name("tleavings", &Binaries::locate()?);
    let name = name.as_str();
    let state = StateDir::of(Binaries::locate()?.target(), name);
    rig(&["down", "--name", name])?.status()?;
    let before = Machine::look(name)?;
    ensure!(before.namespaces.is_empty() && before.cgroups.is_empty(), "not clean to begin with: {before:?}");

    ensure!(rig(&["up", "--name", name, "--bare", "x"])?.status()?.success(), "it did not come up");
    let meanwhile = Machine::look(name)?;
    // The positive control: while it is up, all of it is seen by the same eyes ...
    ensure!(meanwhile.namespaces.len() == 5 && !meanwhile.mounts.is_empty(), "{meanwhile:?}");
    ensure!(!meanwhile.processes.is_empty() && meanwhile.cgroups == [name], "{meanwhile:?}");
    // ... and still the machine's own network is what it was.
    ensure!(
        (&meanwhile.links, &meanwhile.addresses, &meanwhile.rules, &meanwhile.firewall)
            == (&before.links, &before.addresses, &before.rules, &before.firewall),
        "the machine's own network changed: {before:?} {meanwhile:?}"
    );
    ensure!(rig(&["down", "--name", name])?.status()?.success(), "it did not go down");
    let after = Machine::look(name)?;
    ensure!(after == before, "left behind: {after:?}, before: {before:?}");
    ensure!(!state.path().exists(), "the state directory is still there");
    Ok(())
}

#[test]
fn rig_leaves_nothing_behind_after_a_crash() -> anyhow::Result<()> {
    let name = rig_name("tcrash", &Binaries::locate()?);
    let name = name.as_str();
    rig(&["down", "--name", name])?.status()?;
    let before = Machine::look(name)?;

    // Killed at every stage of coming up: `down` must cope with whatever half is there.
    for milliseconds in [10, 60, 150, 400, 800] {
        let mut up = rig(&["up", "--name", name])?.stderr(Stdio::null()).spawn()?;
        poll::until(Duration::from_millis(milliseconds), || up.try_wait().transpose());
        up.kill()?;
        up.wait()?;
        ensure!(rig(&["down", "--name", name])?.status()?.success(), "down after {milliseconds} ms");
        let after = Machine::look(name)?;
        ensure!(after == before, "left behind after {milliseconds} ms: {after:?}");
    }

    // Everything of it killed, and its record gone as well.
    ensure!(rig(&["up", "--name", name])?.status()?.success(), "it did not come up");
    for pid in Machine::look(name)?.processes {
        // Some end by themselves when others do.
        if let Ok(process) = ProcessId::of(pid)
            && process.is_alive()
        {
            process.signal(Signal::SIGKILL).or_else(|error| if process.is_alive() { Err(error) } else { Ok(()) })?;
        }
    }
    StateDir::of(Binaries::locate()?.target(), name).remove()?;
    ensure!(rig(&["down", "--name", name])?.status()?.success(), "down after everything was killed");
    let after = Machine::look(name)?;
    ensure!(after == before, "left behind: {after:?}");
    Ok(())
}

#[test]
fn rig_takes_itself_down_when_interrupted_or_unable() -> anyhow::Result<()> {
    let name = rig_name("tinterrupt", &Binaries::locate()?);
    let name = name.as_str();
    rig(&["down", "--name", name])?.status()?;
    let before = Machine::look(name)?;
    let mut up = rig(&["up", "--name", name])?.stderr(Stdio::null()).spawn()?;
    let there = poll::until_true(Duration::from_secs(10), || {
        Machine::look(name).is_ok_and(|machine| !machine.processes.is_empty())
    });
    ensure!(there, "nothing of it ever showed");
    ProcessId::of(up.id().cast_signed())?.signal(Signal::SIGINT)?;
    ensure!(!up.wait()?.success(), "it came up although it was interrupted");
    ensure!(Machine::look(name)? == before, "left behind after Ctrl-C");

    let file = std::env::temp_dir().join(format!("{name}.yaml"));
    fs::write(&file, "apiVersion: opencluster/v1\nkind: Service\nmetadata: {name: x}\nspec: {prots: []}\n")?;
    let mut command = rig(&["up", "--name", name, "--apply"])?;
    let output = command.arg(&file).stderr(Stdio::piped()).output()?;
    fs::remove_file(&file)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("prots"), "{said}");
    ensure!(Machine::look(name)? == before, "left behind after bad resources");
    ensure!(rig(&["down", "--name", name])?.status()?.success(), "down");

    let output = rig(&["up", "--name", name, "--controllers", "3"])?.stderr(Stdio::piped()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("shared store"), "{said}");
    Ok(())
}

#[test]
fn rig_exec_is_faithful() -> anyhow::Result<()> {
    let cluster = Cluster::up("rig_exec_is_faithful", &Wanted::default())?;
    let exec = |arguments: &[&str]| rig(&[&["exec", "--name", cluster.rig.name()], arguments].concat());

    ensure!(exec(&["a", "--", "sh", "-c", "exit 7"])?.status()?.code() == Some(7), "the exit code");
    ensure!(exec(&["a", "--", "sh", "-c", "kill -TERM $$"])?.status()?.signal() == Some(15), "death by a signal");
    // Rust programs ignore SIGPIPE, and what they start would, too: a pipeline's beginning has to die with its end.
    ensure!(exec(&["a", "--", "sh", "-c", "kill -PIPE $$"])?.status()?.signal() == Some(13), "SIGPIPE is ignored");
    ensure!(exec(&["a", "--", "/no/such/program"])?.stderr(Stdio::null()).status()?.code() == Some(127), "not found");

    let mut child = exec(&["a", "--", "cat"])?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().expect("piped").write_all(b"through and through")?;
    ensure!(child.wait_with_output()?.stdout == b"through and through", "standard streams");

    let mut sleeper = exec(&["a", "--", "sleep", "1000"])?.spawn()?;
    let process = ProcessId::of(sleeper.id().cast_signed())?;
    let comm = format!("/proc/{}/comm", process.pid);
    let sleeps = || fs::read_to_string(&comm).is_ok_and(|name| name == "sleep\n");
    ensure!(poll::until_true(Duration::from_secs(10), sleeps), "sleep never ran");
    process.signal(Signal::SIGTERM)?;
    ensure!(sleeper.wait()?.signal() == Some(15), "a signal to exec is a signal to the command");

    let mut bare = exec(&["a", "--", "sh", "-c", "echo $HOME; command -v ip; hostname >/dev/null && pwd"])?;
    let output = bare.env_clear().stdout(Stdio::piped()).current_dir("/usr").output()?;
    let text = String::from_utf8(output.stdout)?;
    let lines: Vec<_> = text.lines().collect();
    ensure!(
        matches!(lines[..], ["/root", "/sbin/ip" | "/usr/sbin/ip" | "/bin/ip" | "/usr/bin/ip", "/usr"]),
        "{lines:?}"
    );

    let refused = exec(&["a", "--as", "b", "--", "true"])?.stderr(Stdio::piped()).output()?;
    ensure!(!refused.status.success(), "workload b does not belong on node a");
    ensure!(!refused.stderr.is_empty(), "a refusal says why");
    Ok(())
}

#[test]
fn rig_is_up_within_five_seconds() -> anyhow::Result<()> {
    // The best of three: what is measured is the rig, not what else the machine is doing.
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let started = Instant::now();
        let cluster = Cluster::up("rig_is_up_within_five_seconds", &Wanted { alone: true, ..Wanted::default() })?;
        best = best.min(started.elapsed());
        drop(cluster);
        if best < Duration::from_secs(5) {
            return Ok(());
        }
    }
    anyhow::bail!("{best:?}");
}

#[test]
fn two_rigs_know_nothing_of_each_other() -> anyhow::Result<()> {
    let wanted = Wanted { resources: A_TO_B, ..Wanted::default() };
    let one = Cluster::up("two_rigs_one", &wanted)?;
    let other = Cluster::up("two_rigs_other", &wanted)?;
    let _echo = one.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    // The same address in both: only in one of them somebody answers.
    ensure!(one.comes_to_reach(Who::Workload("a"), "10.88.0.12:9000")?, "within its own rig");
    ensure!(!other.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "reached the other rig");
    drop(other);
    ensure!(one.reaches(Who::Workload("a"), "10.88.0.12:9000")?, "taking one down disturbed the other");
    Ok(())
}
