//! R04: no enrolment lasts for ever. Before its end a node is cordoned and drains; then it is retired: its keys are revoked
//! and it is told to sever.
//!
//! Ages count on CLOCK_BOOTTIME, which nobody sets. They live in memory, with the leases: a restart of the controller ends
//! every enrolment anyway (see [`crate::lease`]).

use std::sync::Arc;
use std::time::Duration;

use opencluster_policy::lifetime::{Age, Lifetime, Phase};
use opencluster_policy::resource::Resource;
use serde_json::json;
use tokio::sync::watch;

use crate::lease::clocks;
use crate::lease::registry::{Life, Registry};
use crate::listen::shutting_down;
use crate::state::{State, StateError, node_key};

/// How often lives are looked at.
const PERIOD: Duration = Duration::from_millis(250);

/// After a failure to write down that a node was cordoned.
const RETRY: Duration = Duration::from_secs(1);

/// What the cluster's configuration says about the age of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LifetimePolicy {
    /// For nodes whose resource says nothing.
    pub max_age: Age,
    /// How long before its end a node is cordoned.
    pub drain: Duration,
}

/// How much of its life a node has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// So much.
    pub time: Duration,
    /// It takes nothing new.
    pub cordoned: bool,
}

impl LifetimePolicy {
    /// What an enrolment has left, of which the node's resource says this.
    pub fn left(&self, life: &Life, max_age: Option<Age>, boottime: u64) -> Left {
        let whole = self.life(max_age);
        let lived = lived(life, boottime);
        let serving = matches!(whole.phase(lived), Phase::Serving { .. });
        // What was cordoned stays so, also when its age is changed: its proxy has begun to drain.
        Left { time: whole.left(lived), cordoned: life.cordoned || !serving }
    }

    fn life(&self, max_age: Option<Age>) -> Lifetime {
        Lifetime::new(max_age.unwrap_or(self.max_age), self.drain)
    }
}

fn lived(life: &Life, boottime: u64) -> Duration {
    Duration::from_nanos(boottime.saturating_sub(life.began))
}

/// What a node's resource says of its age.
pub fn max_age_of(state: &State, node: &str) -> Option<Age> {
    match state.configuration().snapshot.resources.get(&node_key(node)).map(AsRef::as_ref) {
        Some(Resource::Node(node)) => node.spec.max_age,
        _ => None,
    }
}

/// Cordons and retires nodes when their time comes, until the controller ends. It does not wait for the store.
pub async fn watch_lifetimes(
    state: Arc<State>,
    registry: Arc<Registry>,
    policy: LifetimePolicy,
    mut shutdown: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            () = shutting_down(&mut shutdown) => return,
        }
        let now = clocks();
        for life in registry.lives() {
            match policy.life(max_age_of(&state, &life.node)).phase(lived(&life, now.boottime)) {
                Phase::Over => retire(&registry, &life, "its life is over"),
                // Its proxy has ended: it takes nothing, and carries nothing any more.
                _ if life.cordoned && life.drained => {
                    retire(&registry, &life, "its life is nearly over, and it has drained");
                }
                Phase::Cordoned if registry.cordon(&life) => {
                    tracing::warn!(
                        event = "node.cordoned",
                        node = life.node,
                        "a node's life is nearly over: it drains"
                    );
                    tokio::spawn(audit_cordon(Arc::clone(&state), life.node, shutdown.clone()));
                }
                Phase::Cordoned | Phase::Serving { .. } => {}
            }
        }
    }
}

async fn audit_cordon(state: Arc<State>, node: String, mut shutdown: watch::Receiver<bool>) {
    loop {
        let name = node.clone();
        let audited = state.run(move |state| {
            let mut writer = state.write()?;
            let after = Some(json!({"reason": "its life is nearly over"}));
            writer.audit("controller", "node.cordon", format!("Node {name}"), None, after);
            writer.commit()
        });
        match audited.await {
            Ok(_) | Err(StateError::ShuttingDown | StateError::Poisoned) => return,
            Err(error) => {
                tracing::error!(event = "node.cordon-not-audited", node, %error, "that a node was cordoned could not be written down: tried again");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            () = shutting_down(&mut shutdown) => return,
        }
    }
}

fn retire(registry: &Registry, life: &Life, reason: &str) {
    // It is stored and announced by whoever does so for all ends.
    if registry.retire_life(life, reason, clocks()).is_some() {
        tracing::warn!(
            event = "node.retired",
            node = life.node,
            reason,
            "a node is retired: its identities will be revoked"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn r04_the_nodes_own_age_beats_the_clusters() {
        let max_age = Age::from_seconds(100).expect("age");
        let policy = LifetimePolicy { max_age, drain: Duration::from_secs(30) };
        let life = Life { node: "a".into(), enrolment: "1".into(), began: 7 * SECOND, cordoned: false, drained: false };
        let left = |age, now| policy.left(&life, age, now * SECOND);
        assert_eq!(left(None, 17), Left { time: Duration::from_secs(90), cordoned: false });
        assert_eq!(left(None, 77), Left { time: Duration::from_secs(30), cordoned: true });
        let longer = Age::from_seconds(200).ok();
        assert_eq!(left(longer, 77), Left { time: Duration::from_secs(130), cordoned: false });
        assert_eq!(left(None, 500).time, Duration::ZERO);
        let cordoned = Life { cordoned: true, ..life.clone() };
        assert!(policy.left(&cordoned, longer, 77 * SECOND).cordoned, "it has begun to drain");
    }
}
