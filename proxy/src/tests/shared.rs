//! Shared tunnels: many small flows on one, a tunnel of its own for bulk, and nobody who suffers for another.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, LazyLock, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use super::hostile::{Tls, next_event, rustls_peer};
use super::pool::counter;
use super::{HOUR, Site, World, echo, eventually, live_flows};
use crate::limits::Limits;
use crate::tunnel::oct;
use crate::tunnel::oct::frame::{
    Decoder, Event, Framing, Kind, MAX_CREDIT, Open, encode_credit, encode_empty, shared_data_header,
};
use crate::tunnel::shared::{STREAMS, WINDOW};

fn handshakes(site: &Site) -> u64 {
    counter(site, "opencluster_proxy_tls_handshakes_total")
}

fn promotions(site: &Site) -> u64 {
    counter(site, "opencluster_proxy_promotions_total")
}

/// Sends and receives so many bytes at once.
fn bulk(stream: &TcpStream, length: usize) {
    let bytes: Vec<u8> = (0..length).map(|at| (at / 7 % 251) as u8).collect();
    let (mut writer, mut reader) = (stream.try_clone().expect("clone"), stream.try_clone().expect("clone"));
    let sent = bytes.clone();
    let writing = thread::spawn(move || writer.write_all(&sent).expect("write"));
    let mut back = vec![0; length];
    reader.read_exact(&mut back).expect("read");
    writing.join().expect("writer");
    assert!(back == bytes, "what came back is not what was sent");
}

#[test]
fn r34_small_flows_share_one_tunnel() {
    let world = World::new(echo);
    let mut flows: Vec<_> = (0..100).map(|_| world.connect()).collect();
    for _ in 0..3 {
        for flow in &mut flows {
            World::echo(flow);
        }
    }
    assert_eq!(handshakes(&world.a), 1);
    assert_eq!(promotions(&world.a), 0);
    // Beyond what one tunnel takes, there is a second.
    flows.extend((0..STREAMS).map(|_| world.connect()));
    for flow in &mut flows {
        World::echo(flow);
    }
    assert_eq!(handshakes(&world.a), 2);
}

/// All of them find that there is no tunnel yet, and wait for the same one.
#[test]
fn r34_a_crowd_that_comes_at_once_is_spread_over_tunnels() {
    let world = World::new(echo);
    let mut flows: Vec<_> = (0..600).map(|_| world.connect()).collect();
    for flow in &mut flows {
        flow.write_all(b"marco").expect("write");
    }
    for flow in &mut flows {
        let mut answer = [0; 5];
        flow.read_exact(&mut answer).expect("read");
        assert_eq!(&answer, b"marco");
    }
    assert_eq!(handshakes(&world.a), 600_u64.div_ceil(STREAMS as u64));
}

#[test]
fn r37_a_bulk_flow_gets_a_tunnel_of_its_own() {
    let world = World::with(echo, &Limits { warm_tunnels: 0, ..Limits::default() }, 1);
    let (mut small, large) = (world.connect(), world.connect());
    World::echo(&mut small);
    bulk(&large, 8 * 1024 * 1024);
    assert_eq!((promotions(&world.a), handshakes(&world.a)), (1, 2));
    // It goes on there, in both directions and to its end.
    bulk(&large, 100);
    large.shutdown(std::net::Shutdown::Write).expect("half-close");
    assert_eq!((&large).read(&mut [0; 8]).expect("the end"), 0);
    World::echo(&mut small);
    drop(large);
    eventually("its tunnel is idle", || counter(&world.a, "opencluster_proxy_idle_tunnels") == 1);
    // The next one takes the same.
    bulk(&world.connect(), 8 * 1024 * 1024);
    assert_eq!((promotions(&world.a), handshakes(&world.a)), (2, 2));
}

#[test]
fn a_download_makes_a_flow_bulk_too() {
    let world = World::new(|mut stream| {
        stream.read_exact(&mut [0; 2]).expect("request");
        stream.write_all(&vec![7; 20_000_000]).expect("answer");
    });
    let mut stream = world.connect();
    stream.write_all(b"go").expect("write");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("read");
    assert_eq!(answer.len(), 20_000_000);
    assert_eq!(promotions(&world.a), 1);
}

/// The kernel spreads tunnels over the destination's workers: most arrive at another one than that of their flow.
#[test]
fn a_tunnel_finds_the_worker_that_has_its_flow() {
    let world = World::with(echo, &Limits::default(), 4);
    let flows: Vec<_> = (0..24).map(|_| world.connect()).collect();
    for flow in &flows {
        bulk(flow, 1_000_000);
    }
    assert_eq!(promotions(&world.a), 24, "all of them have moved");
    for flow in &flows {
        bulk(flow, 1000);
    }
}

/// More than all socket buffers on the way hold: each proxy's receive buffer grows to `tcp_rmem`'s maximum, 32 MiB on
/// many hosts, of which bytes fill half.
const MUCH: usize = 64_000_000;

/// What a slow flow carries: a byte out of place shows.
fn pattern() -> &'static [u8] {
    static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| (0..MUCH).map(|at| (at / 7 % 251) as u8).collect());
    &PATTERN
}

/// Applications at both ends that do not read, until the gate opens.
fn slow_application(mut stream: TcpStream, gate: &RwLock<()>) {
    let mut first = [0];
    if stream.read_exact(&mut first).is_err() {
        return;
    }
    match first[0] {
        b'u' => {
            drop(gate.read());
            let mut received = Vec::new();
            stream.read_to_end(&mut received).expect("read");
            stream.write_all(&[u8::from(received == pattern())]).expect("answer");
        }
        b'd' => stream.write_all(pattern()).expect("write"),
        _ => {
            stream.write_all(&first).expect("write");
            echo(stream);
        }
    }
}

/// The middle of so many round trips.
fn usual_round_trip(stream: &mut TcpStream) -> Duration {
    let mut times: Vec<_> = (0..200)
        .map(|_| {
            let start = Instant::now();
            World::echo(stream);
            start.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

#[test]
fn r34_slow_readers_stall_nobody_are_held_up_themselves_and_lose_nothing() {
    assert_eq!(pattern().len(), MUCH);
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write().expect("gate");
    let for_applications = Arc::clone(&gate);
    let world = World::new(move |stream| slow_application(stream, &for_applications));
    let mut quick = world.connect();
    World::echo(&mut quick);
    let alone = usual_round_trip(&mut quick);

    let slow: Vec<_> = [b'u', b'u', b'd', b'd']
        .map(|kind| {
            let mut stream = world.connect();
            stream.set_read_timeout(None).expect("timeout");
            let gate = Arc::clone(&gate);
            thread::spawn(move || {
                stream.write_all(&[kind]).expect("write");
                if kind == b'u' {
                    stream.write_all(pattern()).expect("write");
                    stream.shutdown(std::net::Shutdown::Write).expect("half-close");
                    let mut answer = [0];
                    stream.read_exact(&mut answer).expect("answer");
                    answer == [1]
                } else {
                    drop(gate.read());
                    let mut received = Vec::new();
                    stream.read_to_end(&mut received).expect("read");
                    received == pattern()
                }
            })
        })
        .into();
    // They stand still: nothing moves on either node, and nobody has finished.
    let moved = || [live_flows(&world.a), live_flows(&world.b)].concat();
    let mut before = moved();
    eventually("the slow ones are held up", || {
        thread::park_timeout(Duration::from_millis(300));
        let now = moved();
        let begun = now.iter().filter(|(received, sent)| received.max(sent) > &100_000).count();
        let still = begun == 2 * slow.len() && now == before;
        before = now;
        still
    });
    assert!(slow.iter().all(|flow| !flow.is_finished()), "nothing holds them up");
    let most = before.iter().map(|(received, sent)| *received.max(sent)).max().unwrap_or(0);
    assert!(most < MUCH as u64, "{most} bytes were taken in for nobody");

    // The others go on as if they were alone, those that come now too.
    let beside = usual_round_trip(&mut quick);
    assert!(beside < alone * 5 + Duration::from_millis(5), "{beside:?} beside them, {alone:?} alone");
    World::echo(&mut world.connect());

    // As soon as the slow ones read, they get everything.
    drop(closed);
    for flow in slow {
        assert!(flow.join().expect("slow flow"), "something is missing or out of place");
    }
    World::echo(&mut quick);
}

/// Longer than the kernel waits for a tunnel's peer that takes nothing, in tests.
const BREAK: Duration = Duration::from_secs(5);

#[test]
fn r37_a_download_survives_a_reader_who_takes_a_break() {
    for sharing in [true, false] {
        let world = World::with(
            |mut stream| {
                stream.read_exact(&mut [0]).expect("request");
                for _ in 0..2 {
                    stream.write_all(pattern()).expect("write");
                }
            },
            &Limits { sharing, ..Limits::default() },
            1,
        );
        let mut stream = world.connect();
        stream.write_all(b"d").expect("write");
        let mut piece = vec![0; MUCH / 4];
        stream.read_exact(&mut piece).expect("read");
        assert!(piece == pattern()[..MUCH / 4]);
        assert_eq!(promotions(&world.a), u64::from(sharing), "it is on a tunnel of its own");
        thread::park_timeout(BREAK);
        let sent = live_flows(&world.b).iter().map(|(_, sent)| *sent).max().unwrap_or(0);
        assert!((1..2 * MUCH as u64).contains(&sent), "nothing waited for the reader: {sent} bytes sent");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("the rest");
        assert!(rest == [&pattern()[MUCH / 4..], pattern()].concat(), "{} bytes came", rest.len());
    }
}

#[test]
fn a_reset_in_the_middle_of_a_move_ends_both_sides() {
    let world = World::new(echo);
    let mut other = world.connect();
    World::echo(&mut other);
    for round in 0..40_u64 {
        let stream = world.connect();
        let mut writer = stream.try_clone().expect("clone");
        let writing = thread::spawn(move || {
            // Ends with the reset.
            while writer.write_all(&[1; 16 * 1024]).is_ok() {}
        });
        thread::park_timeout(Duration::from_micros(100 * round));
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
        stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
        drop(stream);
        writing.join().expect("writer");
    }
    World::echo(&mut other);
    eventually("only one flow is left", || live_flows(&world.a).len() == 1 && live_flows(&world.b).len() == 1);
}

#[test]
fn r09_a_flow_that_is_cut_leaves_the_tunnel_to_the_others() {
    let world = World::new(echo);
    let mut flow = world.connect();
    World::echo(&mut flow);
    world.apply(super::NO_POLICY);
    eventually("it is cut", || super::is_cut(&mut flow));
    world.apply(super::ALLOW);
    World::echo(&mut world.connect());
    assert_eq!(handshakes(&world.a), 1, "the tunnel was good for another flow");
}

// --- peers that do not behave ---------------------------------------------------------------------------------------

fn shared_peer(world: &World) -> Tls {
    let svid = world.svid(&world.a.workload, HOUR);
    rustls_peer(world, Some(svid), world.root.bundle().expect("bundle"), &[oct::SHARED_ALPN])
}

fn open(world: &World, stream: u32) -> Vec<u8> {
    let mut frame = Vec::new();
    Open { target: world.target, flow: u64::from(stream), trace: 2 }.encode(Some(stream), &mut frame);
    frame
}

/// Whether the tunnel is closed within patience.
fn closes(peer: &mut Tls) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match peer.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

#[test]
fn peers_that_break_the_rules_of_shared_tunnels_lose_the_tunnel() {
    let world = World::new(echo);
    let data = |stream: u32, length: usize| {
        let mut frame = shared_data_header(stream, length).to_vec();
        frame.resize(frame.len() + length, 0);
        frame
    };
    let frame = |kind: Kind, stream: u32| {
        let mut frame = Vec::new();
        encode_empty(kind, Some(stream), &mut frame);
        frame
    };
    let credit = |bytes: u32| {
        let mut frame = Vec::new();
        encode_credit(1, bytes, &mut frame);
        frame
    };
    let opened = open(&world, 1);
    let crowd: Vec<u8> = (1..=2 * STREAMS as u32 + 1).flat_map(|stream| open(&world, stream)).collect();
    let bad: [(&str, Vec<u8>); 9] = [
        ("data for a stream that is not open", data(7, 5)),
        ("a number that was used before", [opened.clone(), opened.clone()].concat()),
        ("a lower number", [open(&world, 5), open(&world, 4)].concat()),
        ("the end of a stream that is not open", frame(Kind::Fin, 3)),
        ("a move of a stream that is not open", frame(Kind::Move, 3)),
        ("data after the end", [opened.clone(), frame(Kind::Fin, 1), data(1, 5)].concat()),
        ("data after the move", [opened.clone(), frame(Kind::Move, 1), data(1, 5)].concat()),
        ("more credit than a window", [opened.clone(), credit(MAX_CREDIT)].concat()),
        ("more streams than a tunnel takes", crowd),
    ];
    for (what, bytes) in bad {
        let mut peer = shared_peer(&world);
        peer.write_all(&bytes).expect("write");
        assert!(closes(&mut peer), "{what}: the tunnel stays");
        World::echo(&mut world.connect());
    }
}

#[test]
fn a_peer_that_ignores_the_window_loses_the_tunnel() {
    // Its application does not read.
    let world = World::new(|_stream| thread::park());
    let mut peer = shared_peer(&world);
    peer.write_all(&open(&world, 1)).expect("write");
    let (mut decoder, mut pending) = (Decoder::new(Framing::Shared), Vec::new());
    assert!(matches!(next_event(&mut peer, &mut decoder, &mut pending).0, Event::Accept(Some(_))));
    let mut frame = shared_data_header(1, 16_000).to_vec();
    frame.resize(frame.len() + 16_000, 0);
    // The kernel's buffers take some megabytes, for which credit comes; it is not waited for.
    let closed = (0..4096).any(|_| peer.write_all(&frame).is_err());
    assert!(closed, "{WINDOW} bytes are all that may be under way");
}
