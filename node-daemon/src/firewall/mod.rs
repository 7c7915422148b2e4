//! The packet filter: a plain description of what may pass ([`policy`]), the rules that follow from it ([`rules`]), and
//! the kernel behind one seam ([`netlink`]).
//!
//! All changes are made by one thread of its own, so that nothing that happens in the runtime can hold up a renewal, and
//! so that the socket that owns the tables lives as long as the daemon does.

mod enforcer;
mod express;
mod expression;
mod interfaces;
pub(crate) mod netlink;
pub(crate) mod policy;
mod rules;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use tokio::sync::{mpsc, oneshot};

use enforcer::Enforcer;
use netlink::Monitor;
pub(crate) use netlink::NetlinkError;
use policy::Posture;

/// How often the tables are compared with what they should be, notification or not.
const VERIFY_EVERY: Duration = Duration::from_secs(1);

/// How many orders may wait for the thread: more than ever do.
const QUEUE: usize = 64;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FirewallError {
    #[error("packet filter: {0}")]
    Netlink(#[from] NetlinkError),
    #[error("packet filter: cannot list network interfaces: {0}")]
    Interfaces(io::Error),
    #[error("packet filter: {0}. Which process has an AF_XDP socket: ss --xdp -p")]
    Express(io::Error),
    #[error("packet filter: no random mark: {0}")]
    Random(io::Error),
    #[error("packet filter: cannot start its thread: {0}")]
    Thread(io::Error),
    #[error("packet filter: its thread has ended")]
    Ended,
    #[error("packet filter: its thread does not keep up")]
    Busy,
}

/// What the daemon has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Somebody else changed rules in this network namespace (ours or others).
    Changed { by: String },
    /// Our tables were not what they should be, and have been put back.
    Repaired { what: String },
    /// They could not be put back: nothing may be carried any more.
    Failed { why: String },
}

enum Order {
    Apply(Posture, oneshot::Sender<Result<(), FirewallError>>),
    Renew(u64, oneshot::Sender<Result<(), FirewallError>>),
}

/// The handle. Dropping it ends the thread and leaves the tables, which close when the lease ends.
#[derive(Debug)]
pub(crate) struct Firewall {
    orders: SyncSender<Order>,
    wake: Arc<OwnedFd>,
}

impl Firewall {
    /// Applies `posture`, and from then on keeps it in force.
    pub(crate) fn start(
        posture: Posture,
        only_interfaces: Option<Vec<String>>,
        events: mpsc::Sender<Event>,
    ) -> Result<Self, FirewallError> {
        // Subscribed before the first change, so that none is missed.
        let monitor = Monitor::open()?;
        let mut enforcer = Enforcer::new(only_interfaces)?;
        enforcer.apply(posture)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(|error| FirewallError::Thread(error.into()))?);
        let (orders, queue) = sync_channel(QUEUE);
        let guard = Guard { enforcer, monitor, queue, wake: Arc::clone(&wake), events };
        thread::Builder::new().name("firewall".to_owned()).spawn(move || guard.run()).map_err(FirewallError::Thread)?;
        Ok(Self { orders, wake })
    }

    /// Replaces what is in force. The lease keeps its remaining time; established connections go on.
    pub(crate) async fn apply(&self, posture: Posture) -> Result<(), FirewallError> {
        let (answer, answered) = oneshot::channel();
        self.order(Order::Apply(posture, answer))?;
        answered.await.map_err(|_| FirewallError::Ended)?
    }

    /// Lets traffic pass until `deadline` (CLOCK_BOOTTIME) and not longer.
    pub(crate) async fn renew(&self, deadline: u64) -> Result<(), FirewallError> {
        let (answer, answered) = oneshot::channel();
        self.order(Order::Renew(deadline, answer))?;
        answered.await.map_err(|_| FirewallError::Ended)?
    }

    fn order(&self, order: Order) -> Result<(), FirewallError> {
        self.orders.try_send(order).map_err(|error| match error {
            TrySendError::Full(_) => FirewallError::Busy,
            TrySendError::Disconnected(_) => FirewallError::Ended,
        })?;
        match rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) {
            // A full counter wakes as well.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(FirewallError::Thread(error.into())),
        }
    }
}

/// The thread: obeys orders, watches for changes that are not its own, and verifies all the time.
struct Guard {
    enforcer: Enforcer,
    monitor: Monitor,
    queue: Receiver<Order>,
    wake: Arc<OwnedFd>,
    events: mpsc::Sender<Event>,
}

impl Guard {
    fn run(mut self) {
        let mut verified = Instant::now();
        loop {
            self.wait(VERIFY_EVERY.saturating_sub(verified.elapsed()));
            loop {
                match self.queue.try_recv() {
                    Ok(order) => self.obey(order),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            if self.foreign_changes() || verified.elapsed() >= VERIFY_EVERY {
                self.verify();
                verified = Instant::now();
            }
        }
    }

    /// Until there is something to do, at most for `limit`.
    fn wait(&self, limit: Duration) {
        let limit = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: i64::from(limit.subsec_nanos()) };
        let mut sources = [PollFd::new(&self.wake, PollFlags::IN), PollFd::new(&self.monitor, PollFlags::IN)];
        match poll(&mut sources, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "packet filter: cannot wait"),
        }
        match rustix::io::read(&self.wake, &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "packet filter: cannot wait for orders"),
        }
    }

    fn obey(&mut self, order: Order) {
        // Who asked may have gone away in the meantime; what was asked is done all the same.
        match order {
            Order::Apply(posture, answer) => drop(answer.send(self.enforcer.apply(posture))),
            Order::Renew(deadline, answer) => drop(answer.send(self.enforcer.renew(deadline))),
        }
    }

    /// Whether somebody else changed something, or may have.
    fn foreign_changes(&self) -> bool {
        match self.monitor.changes() {
            Ok(changes) => {
                let ours = self.enforcer.port();
                let mut foreign = false;
                for change in changes.into_iter().filter(|change| change.port != ours) {
                    self.report(Event::Changed { by: change.process });
                    foreign = true;
                }
                foreign
            }
            Err(error) => {
                tracing::warn!(%error, "packet filter: notifications were lost; verifying");
                true
            }
        }
    }

    fn verify(&mut self) {
        match self.enforcer.verify() {
            Ok(None) => {}
            Ok(Some(what)) => self.report(Event::Repaired { what }),
            Err(error) => self.report(Event::Failed { why: error.to_string() }),
        }
    }

    fn report(&self, event: Event) {
        tracing::warn!(?event, "packet filter");
        // A full queue means that hundreds of reports wait already: the verification does not wait for them.
        if let Err(error) = self.events.try_send(event) {
            tracing::error!(%error, "packet filter: an event was lost");
        }
    }
}
