//! R04: the end of this node's life. Its proxy drains first; then the node severs itself, unless the controller, which keeps
//! the same time, has retired it before.

use std::time::Duration;

use opencluster_api::local::{self, to_proxy};
use opencluster_policy::lease::Reason;
use opencluster_policy::lifetime::{Age, Lifetime, Phase};
use tokio::time::Instant;

use super::core::Core;
use crate::clock;

/// What was agreed at the enrolment, and how far it has come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Life {
    /// CLOCK_BOOTTIME.
    enrolled: u64,
    max_age: Option<Age>,
    drain: Duration,
    /// The proxy drains, and is not started again.
    pub(super) cordoned: bool,
}

impl Life {
    /// Begins now.
    pub(super) fn begin(max_age: Option<Age>, drain: Duration) -> Self {
        Self { enrolled: clock::boottime(), max_age, drain, cordoned: false }
    }

    fn lifetime(self, own: Option<Age>) -> Option<Lifetime> {
        own.or(self.max_age).map(|age| Lifetime::new(age, self.drain))
    }

    fn lived(self) -> Duration {
        Duration::from_nanos(clock::boottime().saturating_sub(self.enrolled))
    }
}

impl Core {
    /// When [`Core::live`] has something to do.
    pub(super) fn life_due(&self) -> Option<Instant> {
        let lifetime = self.life.lifetime(self.resources.max_age())?;
        let lived = self.life.lived();
        let wait = match lifetime.phase(lived) {
            Phase::Serving { until_cordoned } if !self.life.cordoned => until_cordoned,
            Phase::Cordoned if !self.life.cordoned => Duration::ZERO,
            Phase::Serving { .. } | Phase::Cordoned => lifetime.left(lived),
            Phase::Over => Duration::ZERO,
        };
        Some(Instant::now() + wait)
    }

    /// Drains or ends when it is time.
    pub(super) async fn live(&mut self) {
        let Some(lifetime) = self.life.lifetime(self.resources.max_age()) else { return };
        let lived = self.life.lived();
        match lifetime.phase(lived) {
            Phase::Serving { .. } => {}
            Phase::Cordoned if self.life.cordoned => {}
            Phase::Cordoned => self.cordon(lifetime.left(lived)),
            Phase::Over => self.sever(Reason::Revoked("its life is over".to_owned())).await,
        }
    }

    fn cordon(&mut self, left: Duration) {
        tracing::warn!(?left, "this node's life is nearly over: it takes no new flows");
        self.life.cordoned = true;
        self.report("node.cordoned", &format!("{} ms are left", left.as_millis()));
        let deadline_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
        self.tell_proxy(to_proxy::Message::Drain(local::Drain { deadline_ms }), vec![]);
        if !self.supervisor.is_running() {
            self.supervisor.retire();
        }
    }

    /// The proxy has nothing left to carry.
    pub(super) fn drained(&mut self) {
        tracing::info!("drained: nothing is carried any more");
        self.supervisor.retire();
        self.proxy = None;
        self.requests.forget_proxy();
        self.report("node.drained", "its proxy has ended");
        self.acknowledge();
    }
}
