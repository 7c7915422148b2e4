//! Packets that do not come from ordinary sockets.

#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socket};

use socket2::{Domain, Protocol, Socket, Type};

use super::host::{B, Hosts, PATIENCE, TUNNEL, address, output, shell};

/// A packet socket (CAP_NET_RAW) bound to eth0.
fn packet_socket() -> OwnedFd {
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).expect("packet socket");
    let index = nix::net::if_::if_nametoindex("eth0").expect("eth0");
    // SAFETY: sockaddr_ll is plain integers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = index.cast_signed();
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the pointer is to a sockaddr_ll of this length, which outlives the call.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
    socket
}

/// Frames of a local experiment's EtherType to everybody.
fn send_frames(count: usize) {
    let socket = packet_socket();
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    frame.resize(64, 0x5a);
    for _ in 0..count {
        // The packet filter's drop shows as an error here: what counts is what B sees.
        match send(socket.as_raw_fd(), &frame, MsgFlags::empty()) {
            Ok(_) | Err(nix::errno::Errno::ENOBUFS | nix::errno::Errno::EPERM) => {}
            Err(error) => panic!("send: {error}"),
        }
    }
}

fn received_by_b(hosts: &Hosts) -> u64 {
    hosts.b.run(|| {
        output("ip -s -o link show eth0 | sed 's/.*RX:[^\\\\]*\\\\ *//' | awk '{print $2}'")
            .trim()
            .parse()
            .expect("number")
    })
}

#[test]
fn r30_packet_sockets_do_not_get_around_the_filter() {
    const FRAMES: u64 = 1000;
    let hosts = Hosts::new();
    let before = received_by_b(&hosts);
    send_frames(FRAMES as usize);
    let unfiltered = received_by_b(&hosts) - before;
    assert!(unfiltered >= FRAMES, "the positive control: only {unfiltered} frames arrived");

    let _filter = hosts.guarded();
    let before = received_by_b(&hosts);
    send_frames(FRAMES as usize);
    let filtered = received_by_b(&hosts) - before;
    assert!(filtered < FRAMES / 10, "{filtered} of {FRAMES} frames got out");
}

#[test]
fn r30_the_secret_mark_stays_on_this_host() {
    let hosts = Hosts::new();
    let _filter = hosts.guarded();
    // Behind our egress chain, where a tap would be.
    assert!(shell(
        "nft 'add table netdev tap; \
         add chain netdev tap tap { type filter hook egress device \"eth0\" priority 100; }; \
         add rule netdev tap tap meta mark != 0 counter comment \"marked\"; \
         add rule netdev tap tap counter comment \"all\"'"
    ));
    assert!(hosts.connect(Some("proxy"), B[0], TUNNEL).expect("connects").echoes());
    let listing = output("nft list table netdev tap");
    let marked = listing.lines().find(|line| line.contains("\"marked\"")).expect("rule");
    let all = listing.lines().find(|line| line.contains("\"all\"")).expect("rule");
    assert!(marked.contains("counter packets 0 "), "{marked}");
    assert!(!all.contains("counter packets 0 "), "the positive control: {all}");
}

/// By a process with every capability, but outside of every workload.
fn connects_with_mark(ip: &str) -> bool {
    let address = address(ip, 80);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("socket");
    socket.set_mark(0x0c5e_0001).expect("SO_MARK");
    socket.connect_timeout(&address.into(), PATIENCE).is_ok()
}

#[test]
fn r30_a_mark_of_ones_own_does_not_open_the_filter() {
    let hosts = Hosts::new();
    for ip in B {
        assert!(connects_with_mark(ip), "the positive control");
    }
    let _filter = hosts.guarded();
    for ip in B {
        assert!(!connects_with_mark(ip));
    }
}

/// A raw socket's packet has a socket, but not one of the proxy's.
#[test]
fn r30_raw_sockets_do_not_get_around_the_filter() {
    const PACKETS: u64 = 1000;
    let hosts = Hosts::new();
    let send = || {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(253))).expect("raw socket");
        for _ in 0..PACKETS {
            match socket.send_to(&[0x5a; 64], &address(B[0], 0).into()) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => panic!("send: {error}"),
            }
        }
    };
    let before = received_by_b(&hosts);
    send();
    let unfiltered = received_by_b(&hosts) - before;
    assert!(unfiltered >= PACKETS, "the positive control: only {unfiltered} packets arrived");
    let _filter = hosts.guarded();
    let before = received_by_b(&hosts);
    send();
    let filtered = received_by_b(&hosts) - before;
    assert!(filtered < PACKETS / 10, "{filtered} of {PACKETS} packets got out");
}
