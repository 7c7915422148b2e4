//! R06: what a controller does whose store does not take the end of a node.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use opencluster_api::control::controller_message::Message as Down;
use opencluster_api::control::node_message::Message as Up;
use opencluster_api::control::{Acknowledgement, NodeEvent};
use opencluster_controller::lease::clocks;
use opencluster_controller::store::{Batch, EmbeddedStore, Entry, Store, StoreError, Table};
use opencluster_policy::lease::{self, NodeState};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;

use crate::harness::{Cluster, PATIENCE, Session, TestNode};

/// For what a busy machine adds. Without a bound it would be for ever.
const SLACK: Duration = Duration::from_millis(1500);

/// The real store, whose commits fail or hang when a test says so. (A disk that hangs cannot be had without the kernel's
/// help; one that fails is tested for real below.)
#[derive(Debug)]
struct Faulty {
    store: EmbeddedStore,
    mode: Mutex<Mode>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Works,
    Fails,
    Hangs,
}

impl Faulty {
    fn new(store: EmbeddedStore) -> Arc<Self> {
        Arc::new(Self { store, mode: Mutex::new(Mode::Works), changed: Condvar::new() })
    }

    fn set(&self, mode: Mode) {
        *self.mode.lock().expect("no panic") = mode;
        self.changed.notify_all();
    }
}

impl Store for Faulty {
    fn get(&self, table: Table, key: &str) -> Result<Option<Entry>, StoreError> {
        self.store.get(table, key)
    }

    fn scan(&self, table: Table, prefix: &str, from: &str, limit: usize) -> Result<Vec<(String, Entry)>, StoreError> {
        self.store.scan(table, prefix, from, limit)
    }

    fn commit(&self, batch: Batch) -> Result<u64, StoreError> {
        let mode = self.mode.lock().expect("no panic");
        let mode = *self.changed.wait_while(mode, |mode| *mode == Mode::Hangs).expect("no panic");
        match mode {
            Mode::Fails => Err(StoreError::Io { path: "store".into(), detail: "a fault of the test".into() }),
            Mode::Works | Mode::Hangs => self.store.commit(batch),
        }
    }

    fn revision(&self) -> u64 {
        self.store.revision()
    }
}

/// A test that fails does not leave a commit hanging, for which its end would wait.
struct Fault(Arc<Faulty>);

impl Fault {
    fn set(&self, mode: Mode) {
        self.0.set(mode);
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        self.set(Mode::Works);
    }
}

async fn faulty(lines: &str) -> (Cluster, Fault) {
    let mut cluster = Cluster::with_resources(lines).await;
    cluster.stop().await;
    let mut store = None;
    cluster.serve_through(|real| Arc::clone(store.insert(Faulty::new(real)))).await;
    (cluster, Fault(store.expect("made")))
}

/// A node that sends heartbeats as it should, and acknowledges what it gets.
struct Living {
    node: TestNode,
    session: Session,
    last_grant: Instant,
    /// The newest revocations: which keys.
    revoked: Vec<Vec<u8>>,
}

impl Living {
    async fn start(cluster: &Cluster, name: &str) -> Self {
        let mut node = cluster.enrol(name).await;
        let mut session = cluster.session(&node).await.expect("session");
        node.beat(&mut session).await;
        Self { node, session, last_grant: Instant::now(), revoked: Vec::new() }
    }

    /// Lives until this is so.
    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "{what}");
            self.session.send(Up::Heartbeat(self.node.heartbeat())).await;
            let pause = tokio::time::sleep(Duration::from_millis(50));
            tokio::pin!(pause);
            loop {
                let message = tokio::select! {
                    () = &mut pause => break,
                    message = self.session.next() => message,
                };
                let message = match message {
                    Ok(message) => message,
                    // The controller counts a node as lost soon after the node's own lease has ended, which may be between
                    // two looks at it.
                    Err(status) => {
                        self.node.lease.step(lease::NodeEvent::Tick(clocks()));
                        assert!(done(self), "{what}: before that, the session ended: {status:?}");
                        return;
                    }
                };
                match message {
                    Down::Grant(grant) => {
                        self.node.granted(&grant);
                        self.last_grant = Instant::now();
                    }
                    Down::Revocations(set) => {
                        self.revoked = set.entries.into_iter().map(|entry| entry.spki_sha256).collect();
                        let applied = Acknowledgement { config_version: 0, revocation_version: set.version };
                        self.session.send(Up::Acknowledgement(applied)).await;
                    }
                    _ => {}
                }
            }
            self.node.lease.step(lease::NodeEvent::Tick(clocks()));
        }
    }

    async fn is_held_up(&mut self) {
        self.until("grants go on", |living| living.last_grant.elapsed() > Duration::from_millis(400)).await;
    }

    async fn is_granted_again(&mut self) {
        let held_up = self.last_grant;
        self.until("no grants any more", |living| living.last_grant > held_up).await;
        assert!(matches!(self.node.lease.state(), NodeState::Active { .. }), "{:?}", self.node.lease.state());
    }
}

pub(crate) async fn audited(cluster: &Cluster, action: &str, subject: &str) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let audit = cluster.audit().await;
        if let Some(event) = audit.iter().find(|event| event["action"] == action && event["subject"] == subject) {
            return event.clone();
        }
        assert!(Instant::now() < deadline, "no {action} of {subject}: {audit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r06_a_store_that_hangs_ends_every_lease_within_the_bound() {
    let (cluster, store) = faulty("lease_ms: 2000\nheartbeat_ms: 200\n").await;
    let mut b = Living::start(&cluster, "b").await;
    let a = cluster.enrol("a").await;
    let (mut a, silent_since) = (
        Living {
            session: cluster.session(&a).await.expect("session"),
            node: a,
            last_grant: Instant::now(),
            revoked: Vec::new(),
        },
        Instant::now(),
    );
    a.node.beat(&mut a.session).await;
    store.set(Mode::Hangs);
    // What waits for the store in the same session does not hold up heartbeats.
    let report = NodeEvent { kind: "firewall.changed".into(), detail: String::new(), realtime_ns: 1 };
    b.session.send(Up::Event(report)).await;

    b.until("b goes on after the end of a", |b| matches!(b.node.lease.state(), NodeState::Severed(_))).await;
    let granted_for = b.last_grant.duration_since(silent_since);
    let lost = Duration::from_secs(2);
    assert!(granted_for > lost, "positive control: a was not lost yet, but b got no grant after {granted_for:?}");
    let bound = lost + Duration::from_millis(24 + 20 + 1000);
    assert!(granted_for < bound + SLACK, "b was granted leases for {granted_for:?}, the bound is {bound:?}");
    let status = cluster.until_state("b", "lost").await;
    assert!(status["reason"].as_str().expect("text").contains("could not store"), "{status}");

    // It is not forgotten: what was decided is stored when that is possible.
    store.set(Mode::Works);
    audited(&cluster, "node.lost", "Node a").await;
    audited(&cluster, "node.lost", "Node b").await;
    let (_, list) = cluster.get("/v1/revocations").await;
    assert_eq!(list["revocations"].as_array().expect("a list").len(), 2, "{list}");
}

#[tokio::test(flavor = "multi_thread")]
async fn r06_a_store_that_comes_back_in_time_costs_no_healthy_node() {
    let (cluster, store) = faulty("lease_ms: 4000\nheartbeat_ms: 500\n").await;
    let mut b = Living::start(&cluster, "b").await;
    let mut a = Living::start(&cluster, "a").await;
    store.set(Mode::Fails);
    let reason = tokio::select! {
        reason = a.session.end() => reason.expect("told why"),
        () = b.until("a is told that it is lost", |_| false) => unreachable!("it never is"),
    };
    assert!(reason.contains("lease ran out"), "a is out although that could not be stored: {reason}");
    b.is_held_up().await;
    assert!(b.revoked.is_empty(), "nothing was announced that is not stored");
    store.set(Mode::Works);
    b.is_granted_again().await;
    assert!(b.revoked.iter().any(|key| key == a.node.spki.as_bytes()), "a's key is refused everywhere");
    assert_eq!(cluster.node_status("b").await["state"], "active");
}

/// Every write of the controller's to a file fails, as on a full disk; the kernel sees to that.
fn writes_fail(controller: u32, fail: bool) {
    let pid = Pid::from_raw(i32::try_from(controller).expect("a process ID"));
    let limit = Rlimit { current: fail.then_some(0), maximum: None };
    prlimit(pid, Resource::Fsize, limit).expect("the limit of our own child");
}

#[tokio::test(flavor = "multi_thread")]
async fn r06_a_controller_that_cannot_write_grants_nothing_after_a_verdict_and_recovers() {
    let mut cluster = Cluster::with_resources("lease_ms: 4000\nheartbeat_ms: 500\n").await;
    cluster.stop().await;
    let controller = cluster.serve_as_program();
    let mut b = Living::start(&cluster, "b").await;
    let mut a = Living::start(&cluster, "a").await;
    writes_fail(controller, true);
    let spare = r#"{"apiVersion": "opencluster/v1", "kind": "Node", "metadata": {"name": "spare"}, "spec": {"addresses": ["10.88.0.99"]}}"#;
    assert_eq!(cluster.post("/v1/apply", spare).await.0, 500, "positive control: nothing is written");

    let verdict = Instant::now();
    let (status, answer) = tokio::select! {
        answer = cluster.post("/v1/nodes/a/revoke", r#"{"reason": "stolen"}"#) => answer,
        () = b.until("the revocation is answered", |_| false) => unreachable!("it never is"),
    };
    assert_eq!((status, &answer["code"]), (503, &"not-stored".into()), "{answer}");
    assert_eq!(a.session.end().await.expect("told"), "stolen", "a is out at once");
    cluster.session(&a.node).await.expect_err("and stays so");
    b.is_held_up().await;
    let granted_for = b.last_grant.saturating_duration_since(verdict);
    assert!(granted_for < Duration::from_secs(2) + SLACK, "b was granted leases for {granted_for:?} after the verdict");

    writes_fail(controller, false);
    b.is_granted_again().await;
    assert!(b.revoked.iter().any(|key| key == a.node.spki.as_bytes()), "a's key is refused everywhere");
    let event = audited(&cluster, "node.revoke", "Node a").await;
    assert_eq!(event["actor"], "admin", "whose verdict it was is kept");
    assert_eq!(cluster.post("/v1/apply", spare).await.0, 200, "everything is written again");
    // And what it left is a sound store.
    cluster.stop().await;
    cluster.serve().await;
    assert_eq!(cluster.get("/v1/nodes/spare").await.0, 200);
}
