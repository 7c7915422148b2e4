//! Policies: nothing without one, and what they say counts for live traffic.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use opencluster_integration::poll;

use super::stage::{POLICIES, Stage, said};
use super::story::Story;

const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn default_deny(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    story.check("default-deny", "Without a policy the till gets nothing", || {
        for port in ["8080", "5432", "6379", "5201"] {
            let url = format!("telnet://10.88.0.12:{port}");
            let mut curl = stage.workload("a", "till", &["curl", "-sS", "-m", "3", &url])?;
            if let Ok(answer) = said(&mut curl) {
                bail!("port {port} answered {answer:?}");
            }
        }
        let why = stage.operator.run(&["explain", "flow", "--from", "shop/till", "--to", "shop/web:8080"], "");
        // Exit code 1 says that the flow would be denied; the story is on standard output or in the error.
        let why = why.unwrap_or_else(|error| error.to_string());
        ensure!(why.to_lowercase().contains("den"), "explain says {why:?}");
        Ok("nginx, PostgreSQL, Redis and iperf3 are out of reach".to_owned())
    })
}

pub(crate) fn live(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    let mut pulse = stage.probe("a", "till", &["pulse", "--again", "--to", "10.88.0.12:9000"])?;
    pulse.expect_up()?;
    let endless = ["redis-benchmark", "-h", "10.88.0.12", "-t", "set", "-l", "-q", "-c", "4"];
    let mut benchmark = stage.workload("a", "till", &endless)?;
    let mut benchmark = benchmark.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    ensure!(pulse.is_quiet_for(Duration::from_millis(1500))?, "the pulse died by itself");
    ensure!(benchmark.try_wait()?.is_none(), "redis-benchmark ended by itself");

    story.check("policy-cuts", "Policies deleted: live connections die", || {
        let begun = Instant::now();
        for policy in ["shop/till-to-meter", "shop/till-to-cache"] {
            stage.operator.delete("policy", policy)?;
        }
        let (last_echo, how) = pulse.expect_down(PATIENCE)?;
        let cut = last_echo.saturating_duration_since(begun);
        ensure!(cut < Duration::from_secs(1), "the last echo came {} ms later", cut.as_millis());
        let ended = poll::until(PATIENCE, || benchmark.try_wait().transpose());
        ensure!(matches!(ended, Some(Ok(status)) if !status.success()), "redis-benchmark goes on: {ended:?}");
        Ok(format!("last echo {} ms after the command, then {how}; redis-benchmark gave up", cut.as_millis()))
    })?;
    if benchmark.try_wait()?.is_none() {
        benchmark.kill()?;
        benchmark.wait()?;
    }
    story.check("policy-returns", "Policies applied again: traffic is back", || {
        let begun = Instant::now();
        stage.operator.apply(POLICIES)?;
        let back = pulse.expect_up()?.duration_since(begun);
        ensure!(back < Duration::from_secs(1), "it took {} ms", back.as_millis());
        let pong = || said(&mut stage.workload("a", "till", &["redis-cli", "-h", "10.88.0.12", "PING"])?);
        ensure!(poll::until_true(PATIENCE, || pong().is_ok_and(|pong| pong.contains("PONG"))), "Redis stays away");
        Ok(format!("first echo {} ms after the command; Redis answers PONG", back.as_millis()))
    })
}
