//! R35, R09: how things end: in order where there is time for it, and otherwise with a reset, never with what looks like the
//! end of the data.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use opencluster_integration::harness::{A_TO_B, Cluster, PATIENCE, Wanted, Who};
use opencluster_integration::poll;
use opencluster_integration::process::ProcessId;

const ECHO: &str = "10.88.0.12:9000";

fn signal_proxy(cluster: &Cluster, node: &str, signal: Signal) -> anyhow::Result<Vec<ProcessId>> {
    let processes: Vec<_> = cluster.proxy(node)?.into_iter().map(ProcessId::of).collect::<Result<_, _>>()?;
    ensure!(!processes.is_empty(), "no proxy on {node}");
    for process in &processes {
        process.signal(signal)?;
    }
    Ok(processes)
}

#[test]
fn r35_a_proxy_that_is_asked_to_end_lets_flows_finish() -> anyhow::Result<()> {
    let cluster = Cluster::up("r35_a_proxy_that_is_asked_to_end", &Wanted { resources: A_TO_B, ..Wanted::default() })?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    for node in ["a", "b"] {
        ensure!(cluster.comes_to_reach(Who::Workload("a"), ECHO)?, "it does not work");
        let mut pulse = cluster.start(Who::Workload("a"), &["pulse", "--to", ECHO])?;
        pulse.expect_up()?;
        let old = signal_proxy(&cluster, node, Signal::SIGTERM)?;
        // What is under way goes on; what is new is refused.
        ensure!(pulse.is_quiet_for(Duration::from_secs(1))?, "{node}: the flow was cut at once: {:?}", pulse.told()?);
        ensure!(!cluster.reaches(Who::Workload("a"), ECHO)?, "{node}: a proxy that drains took a new flow");
        ensure!(old.iter().all(|process| process.is_alive()), "{node}: it ended with a flow under way");
        // When the last flow has ended, so does the proxy, and the next one takes over.
        let asked = Instant::now();
        pulse.stop()?;
        let ended = poll::until_true(PATIENCE, || !old.iter().any(|process| process.is_alive()));
        ensure!(ended && asked.elapsed() < Duration::from_secs(15), "{node}: it waits for nothing");
        ensure!(cluster.comes_to_reach(Who::Workload("a"), ECHO)?, "{node}: the next proxy does not work");
    }
    Ok(())
}

#[test]
fn r35_a_daemon_that_is_asked_to_end_drains_and_then_closes() -> anyhow::Result<()> {
    let cluster = Cluster::up("r35_a_daemon_that_is_asked_to_end", &Wanted { resources: A_TO_B, ..Wanted::default() })?;
    let _echo = cluster.serve(Who::Workload("b"), &["echo", "--listen", "[::]:9000"])?;
    ensure!(cluster.comes_to_reach(Who::Workload("a"), ECHO)?, "it does not work");
    let mut pulse = cluster.start(Who::Workload("a"), &["pulse", "--patience-ms", "15000", "--to", ECHO])?;
    pulse.expect_up()?;
    let daemon = cluster.rig.daemon("b")?;
    let asked = Instant::now();
    daemon.signal(Signal::SIGTERM)?;
    ensure!(pulse.is_quiet_for(Duration::from_secs(1))?, "the flow was cut at once: {:?}", pulse.told()?);
    ensure!(!cluster.reaches(Who::Workload("a"), ECHO)?, "a node that drains took a new flow");
    let (_, how) = pulse.expect_down(PATIENCE)?;
    ensure!(how == "reset", "the flow that outlasted the draining ended in {how}");
    ensure!(poll::until_true(PATIENCE, || !daemon.is_alive()), "the daemon does not end");
    ensure!(asked.elapsed() < Duration::from_secs(10), "it took {:?}", asked.elapsed());
    ensure!(cluster.proxy("b")?.is_empty(), "its proxy outlived it");
    let rules = cluster.run(Who::Host("b"), &["nft", "list", "ruleset"])?;
    let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
    ensure!(rules.contains("table inet opencluster"), "the packet filter is gone: {rules}");
    ensure!(!cluster.reaches(Who::Workload("a"), ECHO)?, "it carries traffic without a daemon");
    Ok(())
}

/// The kernel closes what a killed process had open. An application that took that for the end of the data would take half
/// an answer for a whole one.
#[test]
fn r35_a_killed_proxy_does_not_look_like_the_end_of_the_data() -> anyhow::Result<()> {
    let cluster = Cluster::up("r35_a_killed_proxy_does_not_look", &Wanted { resources: A_TO_B, ..Wanted::default() })?;
    // Says what it was told when its peer was gone.
    let server = "use IO::Socket::INET; $| = 1;
        my $listener = IO::Socket::INET->new(LocalPort => 9001, Listen => 9, ReuseAddr => 1) or die; print qq(listening\\n);
        while (my $peer = $listener->accept) { my $sum = 0;
            while (1) { my $got = sysread($peer, my $bytes, 65536);
                if (!defined $got) { print qq(reset after $sum\\n); last }
                if (!$got) { print qq(end after $sum\\n); last }
                $sum += $got; syswrite($peer, $bytes); } }";
    let mut server = Lines::start(cluster.command(Who::Workload("b"))?, &["perl", "-e", server])?;
    server.expect("listening")?;
    let client = "use IO::Socket::INET; $| = 1; use Time::HiRes qw(sleep);
        my $peer;
        for (1 .. 500) {
            $peer = IO::Socket::INET->new(PeerAddr => q(10.88.0.12:9001));
            last if $peer && syswrite($peer, q(hello)) && sysread($peer, my $answer, 9);
            undef $peer; sleep 0.05;
        }
        $peer or die; print qq(idle\\n);
        my $got = sysread($peer, my $bytes, 9);
        print defined $got ? ($got ? qq(data\\n) : qq(end\\n)) : qq(reset\\n);";
    for killed in ["a", "b"] {
        let mut client = Lines::start(cluster.command(Who::Workload("a"))?, &["perl", "-e", client])?;
        client.expect("idle")?;
        // Nothing is under way and nothing unread: the kernel's own choice would be a clean end.
        signal_proxy(&cluster, killed, Signal::SIGKILL)?;
        client.expect("reset").with_context(|| format!("the client, when the proxy of {killed} is killed"))?;
        // Attempts that were refused while the mesh was not ready do not come this far.
        server.expect("reset after 5").with_context(|| format!("the server, when the proxy of {killed} is killed"))?;
    }
    // The positive control: an application that ends in order is seen to end in order, with all its data.
    ensure!(cluster.comes_to_reach(Who::Workload("a"), "10.88.0.12:9001")?, "it does not come back");
    server.expect("end after 13")
}

/// Half-closed is not dead: the other direction goes on, until its reader dies.
#[test]
fn r09_a_half_closed_application_that_dies_is_noticed_by_the_other() -> anyhow::Result<()> {
    let cluster = Cluster::up("r09_a_half_closed_application", &Wanted { resources: A_TO_B, ..Wanted::default() })?;
    // Waits for the end of what it is told, then talks for as long as anybody listens.
    let server = "use IO::Socket::INET; use Time::HiRes qw(sleep); $| = 1; $SIG{PIPE} = 'IGNORE';
        my $listener = IO::Socket::INET->new(LocalPort => 9001, Listen => 9, ReuseAddr => 1) or die; print qq(listening\\n);
        while (my $peer = $listener->accept) {
            my $told = join '', <$peer>; next if $told ne q(question); print qq(question\\n);
            while (syswrite($peer, q(word))) { sleep 0.01 } print qq(gone\\n); }";
    let mut server = Lines::start(cluster.command(Who::Workload("b"))?, &["perl", "-e", server])?;
    server.expect("listening")?;
    let client = "use IO::Socket::INET; use Time::HiRes qw(sleep); $| = 1;
        for (1 .. 500) {
            my $peer = IO::Socket::INET->new(PeerAddr => q(10.88.0.12:9001)) or next;
            print $peer q(question); $peer->flush; shutdown($peer, 1);
            my $heard = 0; while ($heard < 400) { my $got = sysread($peer, my $bytes, 99); last if !$got; $heard += $got }
            if ($heard >= 400) { print qq(heard\\n); sleep 600 } sleep 0.05;
        }";
    let mut client = Lines::start(cluster.command(Who::Workload("a"))?, &["perl", "-e", client])?;
    server.expect("question")?;
    client.expect("heard")?;
    let flows = || cluster.metric("a", "opencluster_proxy_open_flows");
    ensure!(flows()? >= 1.0, "the flow is not counted");
    drop(client);
    server.expect("gone")?;
    let forgotten = poll::until_true(PATIENCE, || flows().is_ok_and(|open| open == 0.0));
    ensure!(forgotten, "the flow of an application that died is still held");
    Ok(())
}

/// An application of one of the hosts, and the lines that it prints. Dropped, it is killed.
struct Lines {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Lines {
    fn start(mut command: Command, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut child = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("no stdout")?;
        let (sender, lines) = std::sync::mpsc::sync_channel(64);
        std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Ok(Self { child, lines })
    }

    fn expect(&mut self, wanted: &str) -> anyhow::Result<()> {
        let line = self.lines.recv_timeout(PATIENCE).with_context(|| format!("nothing instead of {wanted:?}"))?;
        ensure!(line == wanted, "{line:?} instead of {wanted:?}");
        Ok(())
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        // A child of ours that has not been waited for can always be killed.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
