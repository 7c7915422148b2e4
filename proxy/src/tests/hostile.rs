//! Peers that do not behave. Each time the others are served as if nothing had happened.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use opencluster_identity::authority::Root;
use opencluster_identity::bundle::TrustBundle;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::revocation::RevocationSet;
use opencluster_identity::svid::{Svid, SvidStore};
use opencluster_identity::tls::{ExpectedPeer, client_config, server_name};
use opencluster_identity::trust::Trust;
use rustls::{ClientConnection, StreamOwned};

use super::{HOUR, PATIENCE, World, echo, eventually};
use crate::limits::Limits;
use crate::tunnel::info::wall_clock;
use crate::tunnel::oct::frame::{Decoder, Event, HEADER, Kind, Open, RefusalCode, data_header, encode_empty};

pub(super) type Tls = StreamOwned<ClientConnection, TcpStream>;

/// rustls itself as the peer: what the record layer of this crate makes must be TLS for others too.
pub(super) fn rustls_peer(world: &World, svid: Option<Svid>, bundle: TrustBundle, alpn: &[&[u8]]) -> Tls {
    let svids = SvidStore::new();
    let id = svid.as_ref().map_or_else(|| world.a.workload.clone(), |svid| svid.id().clone());
    if let Some(svid) = svid {
        svids.install(svid);
    }
    let trust = Trust::with_bundle(bundle);
    trust.replace_revocations(RevocationSet::new(1));
    let config = client_config(&svids, &id, &trust, ExpectedPeer::ServerName, alpn).expect("configuration");
    let name = server_name(&world.b.workload).expect("name");
    let stream = TcpStream::connect(world.b.tunnel).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    StreamOwned::new(ClientConnection::new(config, name).expect("connection"), stream)
}

fn good_peer(world: &World) -> Tls {
    rustls_peer(world, Some(world.svid(&world.a.workload, HOUR)), world.root.bundle().expect("bundle"), &[b"oct/1"])
}

pub(super) fn next_event(peer: &mut Tls, decoder: &mut Decoder, pending: &mut Vec<u8>) -> (Event, Vec<u8>) {
    loop {
        let (used, event) = decoder.next(pending).expect("a frame");
        let used: Vec<u8> = pending.drain(..used).collect();
        if let Some(event) = event {
            let data = if let Event::Data(length) = event { used[used.len() - length..].to_vec() } else { Vec::new() };
            return (event, data);
        }
        let mut buffer = [0; 4096];
        let read = peer.read(&mut buffer).expect("more");
        assert!(read > 0, "the tunnel ended");
        pending.extend_from_slice(&buffer[..read]);
    }
}

fn open(world: &World) -> Vec<u8> {
    let mut frame = Vec::new();
    Open { target: world.target, flow: 1, trace: 2 }.encode(None, &mut frame);
    frame
}

#[test]
fn a_stock_rustls_peer_understands_our_records_and_key_updates() {
    let world = World::new(echo);
    let mut peer = good_peer(&world);
    let (mut decoder, mut pending) = (Decoder::default(), Vec::new());
    for round in 0..3 {
        let mut bytes = open(&world);
        bytes.extend_from_slice(&data_header(5));
        bytes.extend_from_slice(b"marco");
        // One byte at a time, to be unkind.
        for byte in bytes {
            peer.write_all(&[byte]).expect("write");
        }
        assert_eq!(next_event(&mut peer, &mut decoder, &mut pending).0, Event::Accept(None), "round {round}");
        let (event, data) = next_event(&mut peer, &mut decoder, &mut pending);
        assert_eq!((event, data.as_slice()), (Event::Data(5), &b"marco"[..]));
        // New keys in our direction; rustls asks for an update of the other one, too.
        peer.conn.refresh_traffic_keys().expect("key update");
        let mut end = Vec::new();
        encode_empty(Kind::Fin, None, &mut end);
        peer.write_all(&end).expect("write");
        assert_eq!(next_event(&mut peer, &mut decoder, &mut pending).0, Event::Fin);
    }
}

#[test]
fn r31_peers_without_a_good_certificate_are_refused() {
    let world = World::new(echo);
    let own = || world.root.bundle().expect("bundle");
    let refused = |what: &str, mut peer: Tls| {
        // The refusal may show at the write or at the read.
        let answered = peer.write_all(&open(&world)).is_ok() && matches!(peer.read(&mut [0; 64]), Ok(read) if read > 0);
        assert!(!answered, "{what} was let in");
    };
    // The positive control.
    let mut good = good_peer(&world);
    good.write_all(&open(&world)).expect("write");
    assert!(good.read(&mut [0; 64]).expect("read") > 0);

    refused("a peer without a certificate", rustls_peer(&world, None, own(), &[b"oct/1"]));
    let foreign = Root::create(&world.domain, HOUR, wall_clock()).expect("root");
    let issuer = foreign.create_issuer(HOUR, wall_clock()).expect("issuer");
    let key = PrivateKey::generate().expect("key");
    let csr = key.csr_der(&world.a.workload).expect("CSR");
    let issued = issuer.issue(&csr, &world.a.workload, HOUR, wall_clock()).expect("issued");
    let svid = Svid::new(&world.a.workload, issued.chain, key).expect("SVID");
    refused("a peer of another authority", rustls_peer(&world, Some(svid), own(), &[b"oct/1"]));
    let good_svid = world.svid(&world.a.workload, HOUR);
    refused("a peer of another protocol", rustls_peer(&world, Some(good_svid), own(), &[b"h2"]));
    eventually("they are counted", || World::metrics(&world.b).contains("tls_handshake_failures_total 3"));
    World::echo(&mut world.connect());
}

#[test]
fn garbage_on_the_tunnel_port_is_refused_at_once() {
    let world = World::new(echo);
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 100], &[22, 3, 1, 255, 255], &[22, 3, 1, 0, 4, 9, 0, 0, 0]] {
        let mut stream = TcpStream::connect(world.b.tunnel).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream.write_all(garbage).expect("write");
        let start = Instant::now();
        let mut answer = Vec::new();
        if stream.read_to_end(&mut answer).is_ok() {
            // At most an alert.
            assert!(answer.len() < 64, "{answer:?}");
        }
        assert!(start.elapsed() < Duration::from_secs(1), "{garbage:?} was listened to for {:?}", start.elapsed());
    }
    World::echo(&mut world.connect());
}

#[test]
fn silent_and_slow_peers_are_cut_in_time_and_do_not_hold_others_up() {
    let limits = Limits {
        handshake_timeout: Duration::from_millis(300),
        open_timeout: Duration::from_millis(300),
        inbound_handshakes: 4,
        ..Limits::default()
    };
    let world = World::with(echo, &limits, 1);
    let mut first = world.connect();
    World::echo(&mut first);
    let silent: Vec<_> = (0..4).map(|_| TcpStream::connect(world.b.tunnel).expect("connect")).collect();
    let mut slow = good_peer(&world);
    // The fifth handshake is one too many, as long as the four wait.
    World::echo(&mut first);
    for mut stream in silent {
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        assert!(matches!(stream.read(&mut [0; 8]), Ok(0) | Err(_)));
    }
    assert!(slow.write_all(b"x").is_err() || slow.read(&mut [0; 8]).is_err(), "refused: too many handshakes");

    // An OPEN that never ends.
    let mut slow = good_peer(&world);
    slow.write_all(&open(&world)[..7]).expect("write");
    let start = Instant::now();
    assert!(matches!(slow.read(&mut [0; 8]), Ok(0) | Err(_)));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    World::echo(&mut first);
}

#[test]
fn frames_out_of_turn_end_the_tunnel() {
    let world = World::new(echo);
    let fin = {
        let mut frame = Vec::new();
        encode_empty(Kind::Fin, None, &mut frame);
        frame
    };
    let twice = [open(&world), open(&world)].concat();
    for bytes in [fin, twice, b"\x09\0\0\0".to_vec(), vec![4, 0, 0, 0]] {
        let mut peer = good_peer(&world);
        peer.write_all(&bytes).expect("write");
        let mut rest = Vec::new();
        let ended = peer.read_to_end(&mut rest);
        // ACCEPT of the first OPEN may come before the end.
        assert!(rest.len() <= HEADER, "{bytes:?}: {ended:?}, {rest:?}");
    }
    World::echo(&mut world.connect());
}

#[test]
fn a_target_that_is_not_the_workloads_is_refused_with_the_reason() {
    let world = World::new(echo);
    let mut peer = good_peer(&world);
    let (mut decoder, mut pending) = (Decoder::default(), Vec::new());
    for target in ["127.0.0.1:22".parse().expect("address"), std::net::SocketAddr::new(world.b.address, 1)] {
        let mut frame = Vec::new();
        Open { target, flow: 1, trace: 2 }.encode(None, &mut frame);
        frame.extend_from_slice(&data_header(3));
        frame.extend_from_slice(b"abc");
        peer.write_all(&frame).expect("write");
        let (event, _) = next_event(&mut peer, &mut decoder, &mut pending);
        let Event::Refuse(refusal) = event else { panic!("{event:?}") };
        assert_eq!(refusal.code, RefusalCode::WrongDestination, "{refusal}");
        // The refused flow ends with RESET, and the tunnel goes on.
        let mut reset = Vec::new();
        encode_empty(Kind::Reset, None, &mut reset);
        peer.write_all(&reset).expect("write");
    }
}

#[test]
fn one_identity_cannot_take_all_tunnels() {
    let world = World::with(echo, &Limits { tunnels_per_peer: 2, ..Limits::default() }, 1);
    let mut held: Vec<_> = (0..2).map(|_| good_peer(&world)).collect();
    for peer in &mut held {
        peer.write_all(&open(&world)).expect("write");
        assert!(peer.read(&mut [0; 64]).expect("read") > 0);
    }
    let mut third = good_peer(&world);
    let refused = third.write_all(&open(&world)).is_err() || !matches!(third.read(&mut [0; 64]), Ok(read) if read > 0);
    assert!(refused);
    drop(held);
    eventually("the places are free again", || {
        let mut peer = good_peer(&world);
        peer.write_all(&open(&world)).is_ok() && matches!(peer.read(&mut [0; 64]), Ok(read) if read > 0)
    });
}

#[test]
fn a_peer_that_does_not_end_a_refused_flow_loses_its_tunnel() {
    let world = World::with(echo, &Limits { open_timeout: Duration::from_millis(300), ..Limits::default() }, 1);
    let mut peer = good_peer(&world);
    let mut frame = Vec::new();
    Open { target: "127.0.0.1:22".parse().expect("address"), flow: 1, trace: 2 }.encode(None, &mut frame);
    peer.write_all(&frame).expect("write");
    let start = Instant::now();
    let mut answer = Vec::new();
    let end = peer.read_to_end(&mut answer);
    assert_eq!(answer.first(), Some(&(Kind::Refuse as u8)), "{end:?}");
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(super::live_flows(&world.b).is_empty());
}
