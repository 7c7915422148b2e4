//! The packet filter of a node that is severed.

use tokio::time::Instant;

use super::core::{Core, RETRY};
use crate::firewall::policy::Posture;

impl Core {
    /// Closes it for good. What cannot be closed now is tried again until it is: meanwhile nobody renews the lease.
    pub(super) async fn close(&mut self) {
        let closed = self.firewall.apply(Posture::Closed).await;
        if let Err(error) = &closed {
            tracing::error!(%error, "the packet filter could not be closed at once; trying again");
        }
        self.firewall_applied = closed.is_ok();
        self.firewall_retry = closed.is_err().then(|| Instant::now() + RETRY);
    }
}
