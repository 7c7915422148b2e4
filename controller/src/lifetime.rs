//! R04: no enrolment lasts for ever. Before its end a node is cordoned and drains; then it is retired: its keys are revoked
//! and it is told to sever.
//!
//! Ages count on CLOCK_BOOTTIME, which nobody sets. They live in memory: a restart of the controller ends every enrolment
//! anyway (see [`crate::lease`]).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opencluster_policy::lease::PeerState;
use opencluster_policy::lifetime::{Age, Lifetime, Phase};
use opencluster_policy::resource::Resource;
use serde_json::json;
use tokio::sync::watch;

use crate::lease::clocks;
use crate::lease::registry::{PeerStatus, Registry};
use crate::listen::shutting_down;
use crate::state::record::Standing;
use crate::state::{State, StateError, node_key};

/// How often lives are looked at.
const PERIOD: Duration = Duration::from_millis(250);

/// What the cluster's configuration says about the age of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LifetimePolicy {
    /// For nodes whose resource says nothing.
    pub max_age: Age,
    /// How long before its end a node is cordoned.
    pub drain: Duration,
}

/// When each enrolment that is in force began.
#[derive(Debug)]
pub struct Lifetimes {
    policy: LifetimePolicy,
    began: Mutex<BTreeMap<String, Began>>,
}

#[derive(Clone, Copy, Debug)]
struct Began {
    boottime: u64,
    cordoned: bool,
}

/// How much of its life a node has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// So much.
    pub time: Duration,
    /// It takes nothing new.
    pub cordoned: bool,
}

impl Lifetimes {
    /// Nobody is enrolled.
    pub fn new(policy: LifetimePolicy) -> Self {
        Self { policy, began: Mutex::default() }
    }

    /// The policy of the cluster.
    pub fn policy(&self) -> LifetimePolicy {
        self.policy
    }

    /// A node enrolled, now.
    pub fn enrolled(&self, node: &str, boottime: u64) {
        self.began().insert(node.to_owned(), Began { boottime, cordoned: false });
    }

    /// What a node has left; `None`: no enrolment of it is known.
    pub fn left(&self, node: &str, max_age: Option<Age>, boottime: u64) -> Option<Left> {
        let began = *self.began().get(node)?;
        let lived = Duration::from_nanos(boottime.saturating_sub(began.boottime));
        let life = self.life(max_age);
        let serving = matches!(life.phase(lived), Phase::Serving { .. });
        // What was cordoned stays so, also when its age is changed: its proxy has begun to drain.
        Some(Left { time: life.left(lived), cordoned: began.cordoned || !serving })
    }

    fn life(&self, max_age: Option<Age>) -> Lifetime {
        Lifetime::new(max_age.unwrap_or(self.policy.max_age), self.policy.drain)
    }

    /// Each operation leaves it whole.
    fn began(&self) -> MutexGuard<'_, BTreeMap<String, Began>> {
        self.began.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a node's resource says of its age.
pub fn max_age_of(state: &State, node: &str) -> Option<Age> {
    match state.configuration().snapshot.resources.get(&node_key(node)).map(AsRef::as_ref) {
        Some(Resource::Node(node)) => node.spec.max_age,
        _ => None,
    }
}

/// Cordons and retires nodes when their time comes, until the controller ends.
pub async fn watch_lifetimes(
    state: Arc<State>,
    registry: Arc<Registry>,
    lifetimes: Arc<Lifetimes>,
    mut shutdown: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            () = shutting_down(&mut shutdown) => return,
        }
        let nodes: Vec<(String, Began)> =
            lifetimes.began().iter().map(|(node, began)| (node.clone(), *began)).collect();
        for (node, began) in nodes {
            let now = clocks();
            let peer = registry.status(&node, now);
            let Some(peer) = peer.filter(|peer| matches!(peer.state, PeerState::Enrolled | PeerState::Active { .. }))
            else {
                lifetimes.began().remove(&node);
                continue;
            };
            let lived = Duration::from_nanos(now.boottime.saturating_sub(began.boottime));
            let phase = lifetimes.life(max_age_of(&state, &node)).phase(lived);
            let done = match phase {
                Phase::Over => retire(&state, &registry, &node, "its life is over").await,
                _ if began.cordoned && drained(&peer) => {
                    retire(&state, &registry, &node, "its life is nearly over, and it has drained").await
                }
                Phase::Cordoned if !began.cordoned => cordon(&state, &lifetimes, &node).await,
                Phase::Cordoned | Phase::Serving { .. } => Ok(()),
            };
            if let Err(error) = done {
                tracing::error!(event = "node.not-retired", node, %error, "the end of a node's life could not be recorded: tried again");
            }
        }
    }
}

/// Its proxy has ended: it takes nothing, and carries nothing any more.
fn drained(peer: &PeerStatus) -> bool {
    !peer.health.proxy_ready && peer.health.flows == 0
}

async fn cordon(state: &Arc<State>, lifetimes: &Lifetimes, node: &str) -> Result<(), StateError> {
    tracing::warn!(event = "node.cordoned", node, "a node's life is nearly over: it drains");
    let name = node.to_owned();
    let audited = state.run(move |state| {
        let mut writer = state.write()?;
        let after = Some(json!({"reason": "its life is nearly over"}));
        writer.audit("controller", "node.cordon", format!("Node {name}"), None, after);
        writer.commit()
    });
    audited.await?;
    if let Some(began) = lifetimes.began().get_mut(node) {
        began.cordoned = true;
    }
    Ok(())
}

async fn retire(state: &Arc<State>, registry: &Arc<Registry>, node: &str, reason: &str) -> Result<(), StateError> {
    let (name, why, registry) = (node.to_owned(), reason.to_owned(), Arc::clone(registry));
    let retired = state
        .run(move |state| {
            let ended = state.end_enrolment("controller", &name, None, Standing::Retired, &why)?;
            registry.retire(&name, &why);
            Ok::<_, StateError>(ended)
        })
        .await?;
    if retired.is_some() {
        tracing::warn!(event = "node.retired", node, reason, "a node is retired: its identities are revoked");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn r04_the_nodes_own_age_beats_the_clusters() {
        let max_age = Age::from_seconds(100).expect("age");
        let lifetimes = Lifetimes::new(LifetimePolicy { max_age, drain: Duration::from_secs(30) });
        assert_eq!(lifetimes.left("a", None, 0), None);
        lifetimes.enrolled("a", 7 * SECOND);
        let left = |age, now| lifetimes.left("a", age, now * SECOND).expect("enrolled");
        assert_eq!(left(None, 17), Left { time: Duration::from_secs(90), cordoned: false });
        assert_eq!(left(None, 77), Left { time: Duration::from_secs(30), cordoned: true });
        let longer = Age::from_seconds(200).ok();
        assert_eq!(left(longer, 77), Left { time: Duration::from_secs(130), cordoned: false });
        assert_eq!(left(None, 500).time, Duration::ZERO);
        lifetimes.enrolled("a", 500 * SECOND);
        assert_eq!(left(None, 500).time, Duration::from_secs(100), "a new enrolment is a new life");
    }
}
