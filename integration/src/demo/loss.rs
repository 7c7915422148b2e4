//! The controller dies, and with it every flow.

use std::time::{Duration, Instant};

use anyhow::ensure;
use nix::sys::signal::Signal;
use opencluster_integration::layout::CONTROLLER;
use opencluster_integration::poll;
use opencluster_integration::report::Event;

use super::stage::{Stage, said};
use super::story::Story;

const LEASE: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn controller(story: &mut Story, stage: &mut Stage) -> anyhow::Result<()> {
    let mut pulses = Vec::new();
    for to in ["10.88.0.12:9000", "[fd88::12]:9000"] {
        let mut pulse = stage.probe("a", "till", &["pulse", "--again", "--to", to, "--patience-ms", "6000"])?;
        pulse.expect_up()?;
        pulses.push(pulse);
    }
    let longer = LEASE + Duration::from_millis(500);
    story.check("lease-control", "With the controller, flows outlive the lease", || {
        for pulse in &mut pulses {
            ensure!(pulse.is_quiet_for(longer / 2)?, "a flow died without a reason");
        }
        Ok(format!("both for {:.1} s", longer.as_secs_f64()))
    })?;

    let killed = Instant::now();
    stage.rig.daemon(CONTROLLER)?.signal(Signal::SIGKILL)?;
    story.check("controller-loss", "Without it, every flow is dead within the lease of 3 s", || {
        let mut lived = Vec::new();
        for pulse in &mut pulses {
            let (last_echo, _) = pulse.expect_down(PATIENCE)?;
            let span = last_echo.saturating_duration_since(killed);
            ensure!(span <= LEASE + Duration::from_millis(250), "a flow lived for {} ms", span.as_millis());
            lived.push(span.as_millis().to_string());
        }
        Ok(format!("last echoes {} ms after the kill", lived.join(" and ")))
    })?;
    story.check("severed", "Both nodes are severed", || {
        let status = |node: &str| {
            let program = stage.rig.binaries.path("opencluster-node")?.display().to_string();
            said(&mut stage.host(node, &[&program, "status"])?)
        };
        for node in ["a", "b"] {
            let severed = || status(node).is_ok_and(|status| status.contains("severed"));
            ensure!(poll::until_true(PATIENCE, severed), "{node}: {:?}", status(node));
        }
        Ok("they say so themselves".to_owned())
    })?;
    story.check("nothing-after", "Nothing goes through any more", || {
        for pulse in &mut pulses {
            let told = pulse.told()?;
            ensure!(!told.iter().any(|event| matches!(event, Event::Up { .. })), "a flow came back: {told:?}");
        }
        match said(&mut stage.workload("a", "till", &["curl", "-sS", "-m", "3", "http://10.88.0.12:8080/"])?) {
            Err(error) => Ok(format!("those who go on trying get nowhere, and who comes anew: {error}")),
            Ok(page) => Err(anyhow::anyhow!("curl got {page:?}")),
        }
    })
}
