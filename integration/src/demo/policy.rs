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
    let query = ["psql", "-h", "10.88.0.12", "-U", "shop", "-c", "select pg_sleep(60)", "postgres"];
    let mut query = stage.workload("a", "till", &query)?;
    let mut query = query.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    ensure!(pulse.is_quiet_for(Duration::from_millis(1500))?, "the pulse died by itself");
    ensure!(query.try_wait()?.is_none(), "the query ended by itself");

    story.check("policy-cuts", "Policies deleted: live connections die", || {
        let begun = Instant::now();
        for policy in ["shop/till-to-meter", "shop/till-to-database"] {
            stage.operator.delete("policy", policy)?;
        }
        let (last_echo, how) = pulse.expect_down(PATIENCE)?;
        let cut = last_echo.saturating_duration_since(begun);
        ensure!(cut < Duration::from_secs(1), "the last echo came {} ms later", cut.as_millis());
        let ended = poll::until(PATIENCE, || query.try_wait().transpose());
        ensure!(matches!(ended, Some(Ok(status)) if !status.success()), "psql goes on waiting: {ended:?}");
        let mut said = String::new();
        if let Some(mut stderr) = query.stderr.take() {
            stderr.read_to_string(&mut said)?;
        }
        let after = begun.elapsed().as_millis();
        let said = said.lines().next().unwrap_or_default().to_owned();
        Ok(format!("last echo {} ms after the command, then {how}; after {after} ms psql: {said}", cut.as_millis()))
    })?;
    if query.try_wait()?.is_none() {
        query.kill()?;
        query.wait()?;
    }
    story.check("policy-returns", "Policies applied again: traffic is back", || {
        let begun = Instant::now();
        stage.operator.apply(POLICIES)?;
        let back = pulse.expect_up()?.duration_since(begun);
        ensure!(back < Duration::from_secs(1), "it took {} ms", back.as_millis());
        let answer = || {
            let query = ["psql", "-h", "10.88.0.12", "-U", "shop", "-At", "-c", "select 6 * 7", "postgres"];
            said(&mut stage.workload("a", "till", &query)?)
        };
        ensure!(poll::until_true(PATIENCE, || answer().is_ok_and(|answer| answer == "42\n")), "PostgreSQL stays away");
        Ok(format!("first echo {} ms after the command; PostgreSQL answers", back.as_millis()))
    })
}
