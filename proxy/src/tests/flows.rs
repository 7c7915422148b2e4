//! What applications see of a flow.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

use super::{World, echo, eventually};
use crate::limits::Limits;

fn random_bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Writes everything, half-closes, and reads to the end at the same time.
fn exchange(stream: TcpStream, bytes: Vec<u8>) -> io::Result<Vec<u8>> {
    let mut reader = stream.try_clone()?;
    let writer = thread::spawn(move || {
        let mut stream = stream;
        stream.write_all(&bytes)?;
        stream.shutdown(Shutdown::Write)
    });
    let mut answer = Vec::new();
    reader.read_to_end(&mut answer)?;
    writer.join().expect("writer")?;
    Ok(answer)
}

#[test]
fn r31_a_round_trip_through_two_proxies() {
    let world = World::new(echo);
    let mut stream = world.connect();
    for _ in 0..100 {
        World::echo(&mut stream);
    }
}

#[test]
fn a_large_transfer_arrives_whole_and_its_half_close_is_carried() {
    let world = World::new(echo);
    let bytes = random_bytes(7, 96 * 1024 * 1024 + 12_345);
    let answer = exchange(world.connect(), bytes.clone()).expect("exchange");
    assert!(answer == bytes, "{} of {} bytes came back", answer.len(), bytes.len());
}

#[test]
fn half_close_lets_the_answer_come_after_the_end_of_the_question() {
    // Answers only once it has seen the end.
    let world = World::new(|mut stream| {
        let mut question = Vec::new();
        stream.read_to_end(&mut question).expect("question");
        stream.write_all(&question.len().to_be_bytes()).expect("answer");
    });
    let answer = exchange(world.connect(), vec![1; 300_000]).expect("exchange");
    assert_eq!(answer, 300_000_usize.to_be_bytes());
}

#[test]
fn an_application_that_speaks_first_is_heard() {
    let world = World::new(|mut stream| {
        stream.write_all(b"220 ready\r\n").expect("greeting");
        echo(stream);
    });
    let mut stream = world.connect();
    let mut greeting = [0; 11];
    stream.read_exact(&mut greeting).expect("greeting");
    assert_eq!(&greeting, b"220 ready\r\n");
    World::echo(&mut stream);
}

#[test]
fn data_before_a_close_is_never_lost() {
    // Writes and closes at once: the end must not overtake the data.
    let world = World::new(|mut stream| {
        let mut size = [0; 4];
        stream.read_exact(&mut size).expect("size");
        stream.write_all(&vec![7; u32::from_be_bytes(size) as usize]).expect("data");
    });
    for size in [1_u32, 1000, 16_384, 100_000, 3_000_000] {
        let mut stream = world.connect();
        stream.write_all(&size.to_be_bytes()).expect("write");
        stream.shutdown(Shutdown::Write).expect("shutdown");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("read");
        assert_eq!(answer.len(), size as usize);
    }
}

fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
    drop(stream);
}

#[test]
fn a_reset_by_the_server_reaches_the_client() {
    let world = World::new(|mut stream| {
        stream.read_exact(&mut [0; 4]).expect("read");
        reset(stream);
    });
    let mut stream = world.connect();
    stream.write_all(b"ping").expect("write");
    let error = stream.read(&mut [0; 4]).expect_err("reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // The tunnel survives the flow.
    let mut second = world.connect();
    second.write_all(b"ping").expect("write");
    second.read(&mut [0; 4]).expect_err("reset");
    assert!(World::metrics(&world.a).contains("tls_handshakes_total 1"), "{}", World::metrics(&world.a));
}

#[test]
fn a_reset_by_the_client_reaches_the_server() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let world = World::new(move |mut stream| {
        stream.read_exact(&mut [0; 4]).expect("read");
        stream.write_all(b"pong").expect("write");
        let end = stream.read(&mut [0; 4]).map_err(|error| error.kind());
        noted.lock().expect("lock").push(end);
    });
    let mut stream = world.connect();
    stream.write_all(b"ping").expect("write");
    stream.read_exact(&mut [0; 4]).expect("read");
    reset(stream);
    eventually("the server sees the reset", || !seen.lock().expect("lock").is_empty());
    assert_eq!(*seen.lock().expect("lock"), [Err(io::ErrorKind::ConnectionReset)]);
}

#[test]
fn a_closed_port_behind_the_proxy_is_a_reset_for_the_client() {
    let world = World::without_app(&Limits::default(), 1);
    let mut stream = world.connect();
    stream.read(&mut [0; 4]).expect_err("reset");
    eventually("it is counted", || World::metrics(&world.a).contains("reason=\"connect_refused\""));
}

#[test]
fn a_slow_reader_holds_the_sender_back_and_little_memory_is_used() {
    let world = World::new(|mut stream| {
        let block = vec![3; 1024 * 1024];
        // Stops when the reader has gone.
        while stream.write_all(&block).is_ok() {}
    });
    let mut stream = world.connect();
    stream.write_all(b"go").expect("write");
    let received = |site: &super::Site| {
        let text = World::metrics(site);
        // Live flows are accounted for when they end; here the kernel's buffers are what grows.
        text.len()
    };
    assert!(received(&world.a) > 0);
    // Read a little, then nothing for a while: whatever is in flight must stop growing.
    stream.read_exact(&mut vec![0; 100_000]).expect("read");
    thread::park_timeout(Duration::from_millis(500));
    let flows = super::live_flows(&world.a);
    let first = flows[0].0;
    thread::park_timeout(Duration::from_millis(500));
    let second = super::live_flows(&world.a)[0].0;
    assert_eq!(first, second, "the sender went on although nobody reads");
    assert!(first < 64 * 1024 * 1024, "{first} bytes were taken in for a reader that reads 100,000");
    // And it goes on when somebody reads again.
    stream.read_exact(&mut vec![0; 50_000_000]).expect("read on");
}

#[test]
fn many_flows_of_random_sizes_at_once_do_not_mix() {
    let world = Arc::new(World::with(echo, &Limits::default(), 2));
    let threads: Vec<_> = (0..24_u64)
        .map(|number| {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut random = StdRng::seed_from_u64(number);
                for round in 0..4 {
                    let size = random.random_range(1..2_000_000) >> random.random_range(0..12);
                    let mut stream = world.connect();
                    if random.random_ratio(1, 5) {
                        // Some stop in the middle.
                        stream.write_all(&random_bytes(number, size)).expect("write");
                        reset(stream);
                        continue;
                    }
                    let bytes = random_bytes(number << 8 | round, size);
                    let answer = exchange(stream, bytes.clone()).expect("exchange");
                    assert!(answer == bytes, "flow {number} round {round}: {} of {size}", answer.len());
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("flow");
    }
    eventually("all flows are gone", || {
        super::live_flows(&world.a).is_empty() && super::live_flows(&world.b).is_empty()
    });
}
