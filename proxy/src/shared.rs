//! What all workers look at: configuration, identities, trust, the lease. Read on every flow, written by the control
//! thread; nothing here is locked on the data path.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwapOption, Guard};
use opencluster_identity::svid::SvidStore;
use opencluster_identity::trust::Trust;
use opencluster_identity::{SpiffeId, TrustDomain};
use opencluster_policy::index::Index;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;

use crate::access_log::AccessLog;
use crate::admin::metrics::Metrics;
use crate::limits::Limits;
use crate::worker::doors::Door;

/// What is fixed for the life of the process.
#[derive(Clone, Debug)]
pub struct Node {
    /// The trust domain of every identity here.
    pub trust_domain: TrustDomain,
    /// The node's name.
    pub name: String,
    /// The node's addresses.
    pub addresses: Vec<IpAddr>,
}

impl Node {
    /// The node's address of the same family: where its own tunnels come from.
    pub fn address_towards(&self, peer: SocketAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|own| own.is_ipv4() == peer.is_ipv4())
    }
}

/// Why nothing is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// No policy.
    #[error("no configuration has arrived from the controller yet")]
    Configuration,
    /// No trust bundle.
    #[error("no trust bundle has arrived from the controller yet")]
    TrustBundle,
    /// No revocations.
    #[error("no revocation set has arrived from the controller yet")]
    Revocations,
    /// No lease.
    #[error("the controller has granted no lease yet")]
    NoLease,
    /// The lease ran out.
    #[error("the controller's lease has run out")]
    LeaseExpired,
    /// Terminal.
    #[error("this node is severed: it carries nothing until it has been enrolled again")]
    Severed,
    /// Shutting down.
    #[error("the proxy is shutting down")]
    Draining,
}

/// The shared state.
#[derive(Debug)]
pub struct Shared {
    /// Fixed facts.
    pub node: Node,
    /// Limits and timeouts.
    pub limits: Limits,
    /// Our identities.
    pub svids: SvidStore,
    /// Bundle and revocations.
    pub trust: Trust,
    /// Counters.
    pub metrics: Metrics,
    /// Where finished flows are reported.
    pub log: AccessLog,
    index: ArcSwapOption<Index>,
    /// CLOCK_BOOTTIME nanoseconds; 0: none yet.
    lease: AtomicU64,
    severed: AtomicBool,
    draining: AtomicBool,
    /// One for each worker: something changed that live flows must obey.
    changed: Vec<Notify>,
    /// For each worker: the revocation version that all it holds has been judged by, plus one; 0: none yet.
    enforced: Vec<AtomicU64>,
    /// The control thread reports changes of state.
    status: Notify,
    /// One for each worker.
    doors: OnceLock<Vec<Door>>,
}

impl Shared {
    /// Nothing arrived yet: nothing is carried.
    pub fn new(node: Node, limits: Limits, workers: usize, log: AccessLog) -> Self {
        Self {
            trust: Trust::new(node.trust_domain.clone()),
            node,
            limits,
            svids: SvidStore::new(),
            metrics: Metrics::default(),
            log,
            index: ArcSwapOption::empty(),
            lease: AtomicU64::new(0),
            severed: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            changed: (0..workers).map(|_| Notify::new()).collect(),
            enforced: (0..workers).map(|_| AtomicU64::new(0)).collect(),
            status: Notify::new(),
            doors: OnceLock::new(),
        }
    }

    /// Installs the workers' doors, once.
    pub fn install_doors(&self, doors: Vec<Door>) {
        self.doors.get_or_init(|| doors);
    }

    /// A worker's door.
    pub fn door(&self, worker: u16) -> Option<&Door> {
        self.doors.get()?.get(usize::from(worker))
    }

    /// How many workers.
    pub fn workers(&self) -> usize {
        self.changed.len()
    }

    /// Resolves when worker `number` must look at its flows again.
    pub async fn changed(&self, number: usize) {
        match self.changed.get(number) {
            Some(notify) => notify.notified().await,
            None => std::future::pending().await,
        }
    }

    /// Makes every worker look at its flows again, now.
    pub fn notify_workers(&self) {
        for notify in &self.changed {
            notify.notify_one();
        }
    }

    /// Worker `number` has judged every flow and tunnel that it holds by revocation set `version`.
    pub fn note_enforced(&self, number: usize, version: Option<u64>) {
        let Some(enforced) = self.enforced.get(number) else { return };
        let version = version.map_or(0, |version| version.saturating_add(1));
        if enforced.swap(version, Ordering::AcqRel) != version {
            self.status.notify_one();
        }
    }

    /// Worker `number` has ended: whatever will be revoked, it holds nothing of it.
    pub fn note_ended(&self, number: usize) {
        if let Some(enforced) = self.enforced.get(number) {
            enforced.store(u64::MAX, Ordering::Release);
        }
    }

    /// The revocation version that every worker has enforced, on live flows too; 0: there is none.
    pub fn enforced_revocations(&self) -> u64 {
        let least = self.enforced.iter().map(|version| version.load(Ordering::Acquire)).min().unwrap_or(0);
        let current = self.trust.revocations().version().unwrap_or(0);
        least.saturating_sub(1).min(current)
    }

    /// Resolves when the state that is reported to the daemon may have changed.
    pub async fn status_changed(&self) {
        self.status.notified().await;
    }

    /// The policy in force, if everything is there that carrying traffic needs. Asked for every flow.
    pub fn carry(&self) -> Result<Guard<Option<Arc<Index>>>, NotReady> {
        self.alive()?;
        if self.draining.load(Ordering::Relaxed) {
            return Err(NotReady::Draining);
        }
        let index = self.index.load();
        if index.is_none() {
            return Err(NotReady::Configuration);
        }
        Ok(index)
    }

    /// Everything but draining: what live flows need.
    pub fn alive(&self) -> Result<(), NotReady> {
        if self.severed.load(Ordering::Acquire) {
            return Err(NotReady::Severed);
        }
        match self.lease.load(Ordering::Acquire) {
            0 => return Err(NotReady::NoLease),
            deadline if deadline <= boottime() => return Err(NotReady::LeaseExpired),
            _ => {}
        }
        if self.trust.revocations().version().is_none() {
            return Err(NotReady::Revocations);
        }
        if self.index.load().is_none() {
            return Err(NotReady::Configuration);
        }
        Ok(())
    }

    /// Whether it serves, for the daemon and for `/healthz`.
    pub fn readiness(&self) -> Result<(), NotReady> {
        if self.trust.bundle().is_none() {
            return Err(NotReady::TrustBundle);
        }
        self.carry().map(|_| ())
    }

    /// The policy in force.
    pub fn index(&self) -> Guard<Option<Arc<Index>>> {
        self.index.load()
    }

    /// Puts a policy in force, for live flows too.
    pub fn set_index(&self, index: Arc<Index>) {
        self.index.store(Some(index));
        self.notify_workers();
        self.status.notify_one();
    }

    /// Extends the lease. A deadline never moves back, and a severed proxy gets none.
    pub fn set_lease(&self, deadline: u64) {
        let before = self.lease.fetch_max(deadline, Ordering::AcqRel);
        if before == 0 {
            self.notify_workers();
            self.status.notify_one();
        }
    }

    /// Shortens the lease, which nothing but a test does.
    #[cfg(test)]
    pub(crate) fn expire_lease_at(&self, deadline: u64) {
        self.lease.store(deadline, Ordering::Release);
        self.notify_workers();
    }

    /// When the lease ends (CLOCK_BOOTTIME); `None`: there is none yet.
    pub fn lease(&self) -> Option<u64> {
        match self.lease.load(Ordering::Acquire) {
            0 => None,
            deadline => Some(deadline),
        }
    }

    /// Terminal: drops every key, cuts every flow, closes every listener.
    pub fn sever(&self) {
        self.severed.store(true, Ordering::Release);
        // The last owners of keys are handshakes that are under way: the workers end those next.
        self.svids.clear();
        self.notify_workers();
        self.status.notify_one();
    }

    /// Whether it was severed.
    pub fn is_severed(&self) -> bool {
        self.severed.load(Ordering::Acquire)
    }

    /// Takes no new flows.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.status.notify_one();
    }

    /// Whether it is shutting down.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Identities that are held, as text.
    pub fn identities(&self) -> Vec<String> {
        let mut identities: Vec<_> = self.svids.all().iter().map(|svid| svid.id().to_string()).collect();
        identities.sort();
        identities
    }

    /// Whether an identity is held here at the moment.
    pub fn holds(&self, id: &SpiffeId) -> bool {
        self.svids.get(id).is_some()
    }
}

/// CLOCK_BOOTTIME in nanoseconds: the clock of leases, which counts while the machine sleeps.
pub fn boottime() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
