//! What flows cost: the size of what is kept for each, and what happens when descriptors run out.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::pool::counter;
use super::{PATIENCE, World, echo, eventually};
use crate::capture::{self, Destination};
use crate::limits::Limits;
use crate::tunnel::inbound;
use crate::tunnel::shared::hub::Hub;
use crate::tunnel::shared::stream::Stream;
use crate::worker::Worker;
use crate::worker::registry::{Flow, Held};

/// An idle flow is a task on each side, its records in the registry, a tunnel on each side, and no buffer. Measured sizes
/// plus a little: whoever makes a hot future grow shall notice.
#[test]
fn hot_futures_and_records_stay_small() {
    let world = World::new(echo);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let worker = Rc::new(Worker::new(Arc::clone(&world.a.shared), 0));
        let stream = || async { tokio::net::TcpStream::connect(world.b.tunnel).await.expect("connect") };
        let workload = worker.intern(&world.a.workload);
        let outbound =
            capture::serve(Rc::clone(&worker), stream().await, world.target, workload, Destination::Redirected);
        assert_size("outbound flow", std::mem::size_of_val(&outbound), 1024);
        let config = opencluster_identity::tls::server_config(
            opencluster_identity::tls::ServerIdentity::ByServerName(world.b.shared.svids.clone()),
            &world.b.shared.trust,
            opencluster_identity::tls::ClientAuth::Required,
            &[b"oct/1"],
        )
        .expect("configuration");
        let inbound = inbound::serve(Rc::clone(&worker), stream().await, world.target, config);
        assert_size("inbound tunnel", std::mem::size_of_val(&inbound), 1024);
    });
    assert_size("inbound flow of a shared tunnel", size_of_future(inbound::serve_stream), 1024);
    assert_size("shared tunnel", size_of::<Hub>(), 1280);
    assert_size("flow's place on a shared tunnel", size_of::<Stream>(), 512);
    assert_size("flow record", size_of::<Flow>(), 320);
    assert_size("inbound tunnel record", size_of::<Held>(), 256);
    assert_size("tunnel", size_of::<crate::tunnel::link::Tunnel>(), 1024);
}

/// Of an async function, without calling it.
fn size_of_future<A, B, C, D, E, F: Future>(_: impl FnOnce(A, B, C, D, E) -> F) -> usize {
    size_of::<F>()
}

fn assert_size(what: &str, size: usize, limit: usize) {
    println!("{what}: {size} bytes");
    assert!(size <= limit, "{what}: {size} bytes, at most {limit} wanted");
}

#[test]
fn idle_flows_hold_no_buffers() {
    let world = World::new(echo);
    let mut flows: Vec<_> = (0..50).map(|_| world.connect()).collect();
    for flow in &mut flows {
        World::echo(flow);
    }
    eventually("they are accounted for", || {
        World::metrics(&world.a).contains("opencluster_proxy_open_flows{worker=\"0\"} 50")
    });
    eventually("every buffer is back", || [&world.a, &world.b].into_iter().all(|site| lent(site) == 0));
    for flow in &mut flows {
        World::echo(flow);
    }
}

fn lent(site: &super::Site) -> i64 {
    let name = "opencluster_proxy_buffer_bytes";
    World::metrics(site)
        .lines()
        .filter(|line| line.starts_with(name))
        .map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<i64>().ok()).expect("a number"))
        .sum()
}

#[test]
fn descriptors_that_run_out_slow_accepting_down_and_stop_nothing() {
    // The limit is the process's: this test runs alone in a process of its own.
    let output = std::process::Command::new(std::env::current_exe().expect("this test"))
        .args(["--ignored", "--exact", "tests::resources::in_a_process_with_few_descriptors"])
        .output()
        .expect("the test program");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
#[ignore = "run by descriptors_that_run_out_slow_accepting_down_and_stop_nothing in a process of its own"]
fn in_a_process_with_few_descriptors() {
    let world = World::with(echo, &Limits::default(), 1);
    let mut live = world.connect();
    World::echo(&mut live);
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(200), ..before }).expect("setrlimit");
    // Connections that take what is left; the kernel completes them even if the proxy cannot accept.
    let mut hogs = Vec::new();
    let mut failures = || {
        // Again and again: flows that are refused for want of a descriptor give some back.
        while let Ok(stream) = TcpStream::connect(world.a.capture) {
            hogs.push(stream);
        }
        World::metrics(&world.a)
            .lines()
            .filter(|line| line.starts_with("opencluster_proxy_accept_failures_total"))
            .any(|line| !line.ends_with(" 0"))
    };
    eventually("it is counted", &mut failures);
    assert!(!hogs.is_empty());
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    thread::park_timeout(Duration::from_millis(500));
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let spent = (spent.tv_sec - cpu.tv_sec) * 1_000_000_000 + spent.tv_nsec - cpu.tv_nsec;
    assert!(spent < 200_000_000, "spinning: {spent} ns of CPU in half a second");
    // The flow that was there goes on, and with descriptors new ones come.
    World::echo(&mut live);
    drop(hogs);
    eventually("new flows pass again", || {
        TcpStream::connect(world.a.capture).is_ok_and(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(2))).is_ok()
                && stream.write_all(b"x").is_ok()
                && stream.read_exact(&mut [0]).is_ok()
        })
    });
}

/// What the workers of this test's process have used of processors.
fn workers_cpu() -> Duration {
    let is_worker =
        |task: &Path| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("worker-"));
    let nanoseconds: u64 = std::fs::read_dir("/proc/self/task")
        .expect("threads")
        .filter_map(|task| Some(task.ok()?.path()))
        .filter(|task| is_worker(task))
        .filter_map(|task| std::fs::read_to_string(task.join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    Duration::from_nanos(nanoseconds)
}

#[test]
#[ignore = "run by r37_workers_poll_behind_messages_and_sleep_without_traffic in a process of its own"]
fn polling() {
    let world = World::new(echo);
    let mut flow = world.connect();
    let mut message = [7; 64];
    let deadline = Instant::now() + PATIENCE;
    let name = "opencluster_proxy_busy_poll_hits_total";
    let hits = || counter(&world.a, name) + counter(&world.b, name);
    // Positive control: they do poll, and find what they wait for.
    while hits() == 0 {
        assert!(Instant::now() < deadline, "no worker has found anything by polling");
        for _ in 0..100 {
            flow.write_all(&message).expect("write");
            flow.read_exact(&mut message).expect("read");
        }
    }
    thread::park_timeout(Duration::from_millis(100));
    let before = workers_cpu();
    assert!(before > Duration::ZERO, "the workers are not found");
    thread::park_timeout(Duration::from_secs(2));
    let used = workers_cpu().saturating_sub(before);
    assert!(used < Duration::from_millis(100), "{used:?} of processors in two silent seconds");
}

#[test]
fn r37_workers_poll_behind_messages_and_sleep_without_traffic() {
    super::allocations::alone("resources::polling");
}

/// Leaves this process one processor, for all that it has to do. (The tests beside it have the others.)
fn leave_one_processor() {
    let mut one = rustix::thread::CpuSet::new();
    let all = rustix::thread::sched_getaffinity(None).expect("affinity");
    let last = (0..rustix::thread::CpuSet::MAX_CPU).rev().find(|cpu| all.is_set(*cpu)).expect("a processor");
    one.set(last);
    rustix::thread::sched_setaffinity(None, &one).expect("affinity");
}

/// A bulk flow to an application that only reads; what it has sent so far.
fn bulk(world: &World) -> Arc<AtomicU64> {
    let sent = Arc::new(AtomicU64::new(0));
    let (mut stream, count) = (world.connect(), Arc::clone(&sent));
    stream.write_all(b"b").expect("write");
    thread::spawn(move || {
        let bytes = vec![7; 256 * 1024];
        while stream.write_all(&bytes).is_ok() {
            count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
    });
    sent
}

/// Echoes, or, if the first byte says so, only reads.
fn echo_or_sink(mut stream: TcpStream) {
    let mut first = [0];
    if stream.peek(&mut first).is_ok_and(|read| read == 1) && first == *b"b" {
        let mut buffer = vec![0; 256 * 1024];
        while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}
    } else {
        echo(stream);
    }
}

#[test]
fn r37_bulk_rests_for_small_flows_on_a_full_machine() {
    super::allocations::alone("resources::bulk_rests");
}

#[test]
#[ignore = "run by r37_bulk_rests_for_small_flows_on_a_full_machine in a process of its own"]
fn bulk_rests() {
    leave_one_processor();
    let world = World::new(echo_or_sink);
    let name = "opencluster_proxy_bulk_rests_total";
    let rests = || counter(&world.a, name) + counter(&world.b, name);
    let sent = bulk(&world);
    let more = |what: &str| {
        let before = sent.load(Ordering::Relaxed);
        eventually(what, || sent.load(Ordering::Relaxed) > before + 32 * 1024 * 1024);
    };
    eventually("bulk has a tunnel of its own", || counter(&world.a, "opencluster_proxy_promotions_total") == 1);
    // Its first byte was a small message, and the workers tell what they have counted at their ticks.
    let a_moment = || thread::park_timeout(Duration::from_millis(600));
    a_moment();
    let alone = rests();
    more("bulk alone goes on");
    a_moment();
    assert_eq!(rests(), alone, "there is nobody to rest for");

    let mut small = world.connect();
    let deadline = Instant::now() + PATIENCE;
    while rests() < alone + 3 {
        assert!(Instant::now() < deadline, "bulk never rests");
        World::echo(&mut small);
    }
    let end = Instant::now() + Duration::from_secs(1);
    let before = sent.load(Ordering::Relaxed);
    while Instant::now() < end {
        World::echo(&mut small);
    }
    assert!(sent.load(Ordering::Relaxed) > before, "bulk rests for good");
    more("and afterwards it goes on");
}
