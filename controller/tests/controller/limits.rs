//! Garbage, slow and oversized peers on both ports; everybody else is served meanwhile.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use opencluster_identity::tls::{self, ExpectedPeer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{Cluster, connect};

/// Longer than the controller's patience with heads and handshakes.
const CUT_OFF: Duration = Duration::from_secs(25);

async fn closed_within(stream: &mut (impl tokio::io::AsyncRead + Unpin), limit: Duration) -> Duration {
    let start = Instant::now();
    let mut sink = vec![0; 4096];
    loop {
        match tokio::time::timeout(limit, stream.read(&mut sink)).await.expect("the controller ends it") {
            Ok(0) | Err(_) => return start.elapsed(),
            Ok(_) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn r36_slow_heads_and_silent_handshakes_are_cut_off_while_others_are_served() {
    let cluster = Cluster::start().await;
    let config =
        tls::anonymous_client_config(&cluster.trust(), ExpectedPeer::AnyController, &[b"http/1.1"]).expect("tls");

    let mut slow = connect(cluster.api(), config.clone()).await.expect("TLS");
    let trickle = tokio::spawn(async move {
        for byte in b"GET /v1/whoami HTTP/1.1\r\nx-slow: ".iter().chain(std::iter::repeat_n(&b'x', 1000)) {
            if slow.write_all(&[*byte]).await.is_err() || slow.flush().await.is_err() {
                break;
            }
            let mut sink = [0; 256];
            let read = tokio::time::timeout(Duration::from_millis(100), slow.read(&mut sink)).await;
            if let Ok(Ok(0) | Err(_)) = read {
                break;
            }
        }
    });
    let mut silent_api = TcpStream::connect(cluster.api()).await.expect("TCP");
    let mut silent_nodes = TcpStream::connect(cluster.nodes()).await.expect("TCP");
    let mut idle = connect(cluster.api(), config).await.expect("TLS");

    let (one, two, three) = tokio::join!(
        closed_within(&mut silent_api, CUT_OFF),
        closed_within(&mut silent_nodes, CUT_OFF),
        closed_within(&mut idle, CUT_OFF),
    );
    assert!(one > Duration::from_secs(3) && two > Duration::from_secs(3), "not at once: {one:?} {two:?} {three:?}");
    tokio::time::timeout(CUT_OFF, trickle).await.expect("cut off in the middle of its head").expect("no panic");
    assert_eq!(cluster.get("/v1/whoami").await.0, 200);
}

#[tokio::test]
async fn r36_a_slow_body_does_not_hold_others_and_is_cut_off() {
    let cluster = Cluster::start().await;
    let config =
        tls::anonymous_client_config(&cluster.trust(), ExpectedPeer::AnyController, &[b"http/1.1"]).expect("tls");
    let mut slow = connect(cluster.api(), config).await.expect("TLS");
    let head = format!(
        "POST /v1/apply HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: 1000\r\n\r\nkind",
        cluster.admin
    );
    slow.write_all(head.as_bytes()).await.expect("write");
    slow.flush().await.expect("flush");
    assert_eq!(cluster.get("/v1/whoami").await.0, 200, "others are served");
    let mut answer = vec![0; 4096];
    let read =
        tokio::time::timeout(Duration::from_secs(45), slow.read(&mut answer)).await.expect("cut off").expect("read");
    assert!(String::from_utf8_lossy(&answer[..read]).starts_with("HTTP/1.1 408"), "{:?}", &answer[..read]);
}

#[tokio::test]
async fn r36_oversized_bodies_and_heads_are_refused() {
    let cluster = Cluster::start().await;
    let large = "#".repeat(4 * 1024 * 1024 + 1);
    assert_eq!(cluster.post("/v1/apply", &large).await.0, 413);
    let fits = "#".repeat(1024 * 1024);
    assert_ne!(cluster.post("/v1/apply", &fits).await.0, 413, "positive control");
    assert_eq!(cluster.post("/v1/operators", &format!("{{}}{}", " ".repeat(70_000))).await.0, 413);

    let config =
        tls::anonymous_client_config(&cluster.trust(), ExpectedPeer::AnyController, &[b"http/1.1"]).expect("tls");
    let mut stream = connect(cluster.api(), config).await.expect("TLS");
    let head = format!("GET /healthz HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n", "x".repeat(100_000));
    // The controller may close before all of it is written.
    drop(stream.write_all(head.as_bytes()).await);
    let mut answer = Vec::new();
    drop(tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await.expect("closed"));
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "{:?}", String::from_utf8_lossy(&answer));
    assert_eq!(cluster.get("/v1/whoami").await.0, 200);
}

#[tokio::test]
async fn r36_garbage_on_both_ports_does_no_harm() {
    async fn garbage(address: SocketAddr, bytes: &[u8]) {
        let mut stream = TcpStream::connect(address).await.expect("TCP");
        drop(stream.write_all(bytes).await);
        closed_within(&mut stream, Duration::from_secs(20)).await;
    }
    let cluster = Cluster::start().await;
    for address in [cluster.api(), cluster.nodes()] {
        garbage(address, b"GET / HTTP/1.1\r\n\r\n").await;
        garbage(address, &vec![0xff; 20_000]).await;
        garbage(address, &[0x16, 0x03, 0x01, 0xff, 0xff, 0x01]).await;
    }
    let config = tls::anonymous_client_config(&cluster.trust(), ExpectedPeer::AnyController, &[b"h2"]).expect("tls");
    let mut stream = connect(cluster.nodes(), config).await.expect("TLS");
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff").await.expect("write");
    closed_within(&mut stream, Duration::from_secs(20)).await;
    assert_eq!(cluster.get("/v1/whoami").await.0, 200);
}

#[tokio::test]
async fn r36_whoever_shows_no_certificate_does_not_stay_at_the_nodes_port() {
    let cluster = Cluster::start().await;
    let config = tls::anonymous_client_config(&cluster.trust(), ExpectedPeer::AnyController, &[b"h2"]).expect("tls");
    let mut stream = connect(cluster.nodes(), config).await.expect("TLS");
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("write");
    closed_within(&mut stream, Duration::from_secs(45)).await;
}

#[tokio::test]
async fn r36_one_address_does_not_take_the_places_of_all_others() {
    let cluster = Cluster::with("api_socket: api.sock\n").await;
    let mut held = Vec::new();
    let mut refused = 0;
    for _ in 0..150 {
        let mut stream = TcpStream::connect(cluster.api()).await.expect("TCP");
        let mut byte = [0];
        match tokio::time::timeout(Duration::from_millis(20), stream.read(&mut byte)).await {
            Ok(_) => refused += 1,
            Err(_) => held.push(stream),
        }
    }
    assert_eq!((held.len(), refused), (128, 22), "the rest is closed at once");
    let socket = tokio::net::UnixStream::connect(cluster.directory.path().join("api.sock")).await.expect("connect");
    let config =
        tls::anonymous_client_config(&cluster.trust(), ExpectedPeer::AnyController, &[b"http/1.1"]).expect("tls");
    let name = rustls::pki_types::ServerName::try_from("controller").expect("name");
    tokio_rustls::TlsConnector::from(config).connect(name, socket).await.expect("the socket is not concerned");
    drop(held);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(cluster.get("/v1/whoami").await.0, 200, "places are given back");
}
