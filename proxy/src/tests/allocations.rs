//! Carrying bytes allocates nothing: not for a message, not for bulk, not in the workers' regular look around. What does
//! allocate is the beginning and the end of flows and tunnels, changes of configuration, and data that an application
//! leaves unread on a shared tunnel.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::counting::{allocations, exempt};
use super::pool::counter;
use super::{PATIENCE, World, echo};
use crate::limits::Limits;

/// Several of the workers' ticks, of all kinds.
const LONG_ENOUGH: Duration = Duration::from_millis(2500);

/// Flows that speak at the same time.
const FLOWS: usize = 8;

/// The allocator counts for the whole process: each test runs alone in one of its own.
pub(super) fn alone(test: &str) {
    // One of them at a time: some measure what their threads use, or how long they are kept waiting.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["--ignored", "--exact", &format!("tests::{test}")])
        .output()
        .expect("the test program");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn r37_messages_allocate_nothing_on_shared_tunnels() {
    alone("allocations::messages_shared");
}

#[test]
fn r37_messages_allocate_nothing_on_leased_tunnels() {
    alone("allocations::messages_leased");
}

#[test]
fn r37_bulk_allocates_nothing_after_its_move_to_a_tunnel_of_its_own() {
    alone("allocations::bulk_moved");
}

#[test]
fn r37_bulk_allocates_nothing_on_leased_tunnels() {
    alone("allocations::bulk_leased");
}

#[test]
fn r37_the_beginning_of_a_flow_is_seen_to_allocate() {
    alone("allocations::control");
}

#[test]
#[ignore = "run by r37_messages_allocate_nothing_on_shared_tunnels in a process of its own"]
fn messages_shared() {
    messages(true);
}

#[test]
#[ignore = "run by r37_messages_allocate_nothing_on_leased_tunnels in a process of its own"]
fn messages_leased() {
    messages(false);
}

fn world(sharing: bool) -> World {
    exempt();
    let application = |stream| {
        exempt();
        echo(stream);
    };
    World::with(application, &Limits { sharing, ..Limits::default() }, 1)
}

fn messages(sharing: bool) {
    let world = world(sharing);
    let mut flows: Vec<_> = (0..FLOWS).map(|_| world.connect()).collect();
    // Idle tunnels, so that there is something to look around for.
    drop(world.connect());
    say(&mut flows, LONG_ENOUGH);
    let mut rounds = 0;
    let (count, places) = allocations(|| rounds = say(&mut flows, LONG_ENOUGH));
    println!("{count} allocations in {rounds} round trips of {FLOWS} flows");
    assert!(rounds > 100, "too little happened: {rounds} round trips");
    assert_eq!(count, 0, "in {rounds} round trips of {FLOWS} flows; the first:\n{places:#?}");
}

/// A message on each, then the answers, over and over; how often.
fn say(flows: &mut [TcpStream], duration: Duration) -> usize {
    let end = Instant::now() + duration;
    let mut rounds = 0;
    while Instant::now() < end {
        // Of all sizes that stay small, one flow at a time and all at once.
        let message = &[7; 4096][..=rounds * 61 % 4096];
        let mut answer = [0; 4096];
        for flow in flows.iter_mut() {
            flow.write_all(message).expect("write");
            if rounds % 2 == 0 {
                flow.read_exact(&mut answer[..message.len()]).expect("read");
            }
        }
        if rounds % 2 == 1 {
            for flow in flows.iter_mut() {
                flow.read_exact(&mut answer[..message.len()]).expect("read");
            }
        }
        rounds += 1;
    }
    rounds
}

#[test]
#[ignore = "run by r37_bulk_allocates_nothing_after_its_move_to_a_tunnel_of_its_own in a process of its own"]
fn bulk_moved() {
    bulk(true);
}

#[test]
#[ignore = "run by r37_bulk_allocates_nothing_on_leased_tunnels in a process of its own"]
fn bulk_leased() {
    bulk(false);
}

fn bulk(sharing: bool) {
    let world = world(sharing);
    let stream = world.connect();
    carry(&stream, LONG_ENOUGH);
    assert_eq!(counter(&world.a, "opencluster_proxy_promotions_total"), u64::from(sharing));
    let mut carried = 0;
    let (count, places) = allocations(|| carried = carry(&stream, LONG_ENOUGH));
    println!("{count} allocations in {carried} bytes");
    assert!(carried > 10_000_000, "too little happened: {carried} bytes");
    assert_eq!(count, 0, "in {carried} bytes of bulk; the first:\n{places:#?}");
}

/// As much as goes through in both directions at once; how much.
fn carry(stream: &TcpStream, duration: Duration) -> u64 {
    let mut reader = stream.try_clone().expect("clone");
    reader.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let end = Instant::now() + duration;
    let mut writer = stream.try_clone().expect("clone");
    let writing = thread::spawn(move || {
        exempt();
        let bytes = vec![7; 256 * 1024];
        let mut sent = 0;
        while Instant::now() < end {
            writer.write_all(&bytes).expect("write");
            sent += bytes.len() as u64;
        }
        sent
    });
    let mut buffer = vec![0; 256 * 1024];
    let mut received = 0;
    while !writing.is_finished() {
        received += reader.read(&mut buffer).expect("read") as u64;
    }
    let sent = writing.join().expect("writer");
    while received < sent {
        received += reader.read(&mut buffer).expect("read") as u64;
    }
    sent
}

/// The count counts.
#[test]
#[ignore = "run by r37_the_beginning_of_a_flow_is_seen_to_allocate in a process of its own"]
fn control() {
    let world = world(true);
    World::echo(&mut world.connect());
    let (count, places) = allocations(|| World::echo(&mut world.connect()));
    assert!(count > 0, "a flow begins without any memory?");
    assert!(!places.is_empty());
}
