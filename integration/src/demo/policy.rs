//! Policies: nothing without one, and what they say counts for live traffic.

use std::io::Read;
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
    let download = ["curl", "-sS", "-o", "/dev/null", "--limit-rate", "2M", "http://10.88.0.12:8080/large"];
    let mut download = stage.workload("a", "till", &download)?;
    let mut download = download.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    ensure!(pulse.is_quiet_for(Duration::from_millis(1500))?, "the pulse died by itself");
    ensure!(download.try_wait()?.is_none(), "the download ended by itself");

    story.check("policy-cuts", "Policies deleted: live connections die", || {
        let begun = Instant::now();
        for policy in ["shop/till-to-meter", "shop/till-to-web"] {
            stage.operator.delete("policy", policy)?;
        }
        let (last_echo, how) = pulse.expect_down(PATIENCE)?;
        let cut = last_echo.saturating_duration_since(begun);
        ensure!(cut < Duration::from_secs(1), "the last echo came {} ms later", cut.as_millis());
        let ended = poll::until(PATIENCE, || download.try_wait().transpose());
        ensure!(matches!(ended, Some(Ok(status)) if !status.success()), "curl goes on loading: {ended:?}");
        let mut said = String::new();
        if let Some(mut stderr) = download.stderr.take() {
            stderr.read_to_string(&mut said)?;
        }
        let after = begun.elapsed().as_millis();
        Ok(format!("last echo {} ms after the command, then {how}; after {after} ms {}", cut.as_millis(), said.trim()))
    })?;
    if download.try_wait()?.is_none() {
        download.kill()?;
        download.wait()?;
    }
    story.check("policy-returns", "Policies applied again: traffic is back", || {
        let begun = Instant::now();
        stage.operator.apply(POLICIES)?;
        let back = pulse.expect_up()?.duration_since(begun);
        ensure!(back < Duration::from_secs(1), "it took {} ms", back.as_millis());
        let page = || said(&mut stage.workload("a", "till", &["curl", "-sf", "-m", "2", "http://10.88.0.12:8080/"])?);
        ensure!(poll::until_true(PATIENCE, || page().is_ok()), "nginx stays away");
        Ok(format!("first echo {} ms after the command; nginx answers", back.as_millis()))
    })
}
