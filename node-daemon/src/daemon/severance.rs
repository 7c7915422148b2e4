//! Severance: what a node lets go of, and in which order. Terminal until it is wiped and enrolled again.

use std::net::SocketAddr;
use std::time::Duration;

use opencluster_api::control;
use opencluster_api::local::to_proxy;
use opencluster_policy::lease::Reason;
use tokio::time::Instant;

use super::core::{Core, RETRY};
use crate::firewall::policy::Posture;
use crate::flows;
use crate::heartbeat::finding::Untold;

/// What a severed proxy gets to reset its flows and forget its keys before it is killed.
const LAST_WORDS: Duration = Duration::from_millis(300);

impl Core {
    /// In order of what matters most: the kernel, the proxy, everybody's flows, our keys, the session. If the controller must
    /// hear why, then the node's own key and the way to the controllers are kept until it has, but no longer than a lease;
    /// everything else goes at once.
    pub(super) async fn sever(&mut self, reason: Reason) {
        if self.severed.is_some() {
            return;
        }
        tracing::error!(?reason, "SEVERED: everything is dropped until this node is wiped and enrolled again");
        self.severed = Some(reason.clone());
        if let Some(found) = self.finding.take() {
            match self.firewall.renew(0).await {
                // Nothing is carried from here on. The report goes its way while the rest is let go of.
                Ok(()) => self.report_finding(&found),
                // What is carried must end, if nobody hears why.
                Err(error) => {
                    tracing::error!(%error, "the lease could not be ended in the kernel: everything is closed");
                }
            }
        }
        if self.reporting.is_some() {
            self.close_but_for_controllers().await;
        } else {
            self.close().await;
        }
        let verdict = control::Sever { reason: reason.to_string() };
        self.tell_proxy(to_proxy::Message::Sever(verdict), vec![]);
        self.kill_proxy_at = Some(Instant::now() + LAST_WORDS);
        self.requests.clear();
        self.outstanding = None;
        if self.reporting.is_some() {
            reset_flows(&self.base.controllers.iter().copied().collect::<Vec<_>>());
        } else {
            self.let_go();
        }
    }

    fn report_finding(&mut self, found: &Reason) {
        let Some(session) = self.session.take() else { return };
        let finding = control::Finding { code: found.code().to_owned(), detail: found.to_string() };
        self.reporting = Some(session.report(self.controller.take(), finding, self.lease_span));
    }

    /// What became of the report.
    pub(super) async fn told(&mut self, told: Result<String, Untold>) {
        if self.reporting.take().is_none() {
            return;
        }
        match told {
            Ok(reason) => tracing::info!(reason, "the controller knows why this node severed itself"),
            Err(untold) => tracing::error!(%untold, "the controller was not told why this node severed itself"),
        }
        self.close().await;
        self.let_go();
    }

    /// Nothing is carried any more, and nobody is served; what is left is what an enrolled node may do before its first lease.
    async fn close_but_for_controllers(&mut self) {
        match self.firewall.apply(Posture::Serving(self.base.clone())).await {
            Ok(()) => (self.firewall_applied, self.firewall_retry) = (true, None),
            Err(error) => {
                tracing::error!(%error, "the packet filter could not be closed but for the controllers: it is closed to them, too");
                self.close().await;
            }
        }
    }

    /// Closes the packet filter for good. What cannot be closed now is tried again until it is: meanwhile nobody renews the lease.
    pub(super) async fn close(&mut self) {
        let closed = self.firewall.apply(Posture::Closed).await;
        if let Err(error) = &closed {
            tracing::error!(%error, "the packet filter could not be closed at once; trying again");
        }
        self.firewall_applied = closed.is_ok();
        self.firewall_retry = closed.is_err().then(|| Instant::now() + RETRY);
    }

    /// The rest: what the way to the controllers needs.
    fn let_go(&mut self) {
        self.session = None;
        reset_flows(&[]);
        if let Err(error) = flows::forget_tracked() {
            // They lead nowhere: the rules that would ask for them are gone.
            tracing::warn!(%error, "tracked connections could not be forgotten");
        }
        self.svids.clear();
        self.controller = None;
    }
}

/// All but those with these.
fn reset_flows(spared: &[SocketAddr]) {
    match flows::reset_all(spared) {
        Ok(count) => tracing::info!(count, "connections were reset"),
        Err(error) => tracing::error!(%error, "not every connection could be reset: those see nothing but silence"),
    }
}
