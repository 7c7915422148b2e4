//! `opencluster-rig demo`: unmodified applications on two hosts, talking through Opencluster, and everything that is claimed
//! about it, observed.

mod applications;
mod intruder;
mod loss;
mod policy;
mod stage;
mod story;
mod wire;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use opencluster_integration::binaries::Binaries;
use opencluster_integration::layout::DEFAULT_RIG;
use opencluster_integration::up::Options;

use stage::Stage;
use story::Story;

/// Tells the whole story. True only if everything that it claims was observed.
pub(crate) fn run(rig: &str, keep: bool, interrupted: &Arc<AtomicBool>) -> anyhow::Result<bool> {
    let directory = if rig == DEFAULT_RIG { "demo".to_owned() } else { format!("demo-{rig}") };
    let mut story = Story::begin(&Binaries::locate()?.target().join(directory), Arc::clone(interrupted))?;
    // Dropped, also after a failure, the stage takes the rig down.
    let outcome = tell(&mut story, rig);
    if let Err(error) = &outcome {
        story.fail("story", &format!("{error:#}"));
    }
    let ok = story.end()?;
    if ok && keep {
        story.note("");
        Stage::up(&mut story, rig, true)?.keep(&mut story)?;
    }
    Ok(ok)
}

fn tell(story: &mut Story, rig: &str) -> anyhow::Result<()> {
    story.chapter("A cluster: one controller, two nodes, and two hosts that know nothing of Opencluster");
    let mut stage = Stage::up(story, rig, false)?;
    stage.describe(story);

    story.chapter("No policy yet, so nothing may connect to anything");
    applications::start(story, &mut stage)?;
    policy::default_deny(story, &stage)?;

    story.chapter("Policies for four applications from Debian, unmodified, from host a to host b");
    applications::allow(story, &stage)?;
    applications::http(story, &stage)?;
    applications::postgres(story, &stage)?;
    applications::redis(story, &stage)?;
    applications::iperf(story, &stage)?;

    story.chapter("What the wire shows of it");
    wire::no_plaintext(story, &stage)?;

    story.chapter("A policy is taken away and given back, under live traffic");
    policy::live(story, &stage)?;

    story.chapter("An intruder on the same switch, and root on node a");
    intruder::try_everything(story, &stage)?;

    story.chapter("The controller is killed");
    loss::controller(story, &mut stage).context("the last chapter")
}

/// The rig that the demo is played on.
fn options(rig: &str) -> Options {
    Options { name: rig.to_owned(), bare: vec!["x".to_owned(), "y".to_owned()], ..Options::default() }
}
