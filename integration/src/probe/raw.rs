//! Ways to get a marker out of a host: honest ones, and those around every hook that might catch the honest ones.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket};
use opencluster_integration::report::Event;
use socket2::{Domain, Protocol, Socket, Type};

/// See [`send`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// How
    #[arg(value_enum)]
    method: Method,
    /// Where to
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// What to get there
    #[arg(long, value_name = "TEXT")]
    marker: String,
    /// Set this SO_MARK first
    #[arg(long, value_name = "N", value_parser = clap_mark)]
    mark: Option<u32>,
    /// Bind to this address first, own or foreign
    #[arg(long, value_name = "ADDRESS:PORT")]
    bind: Option<SocketAddr>,
    /// As often as this
    #[arg(long, value_name = "N", default_value_t = 3)]
    times: usize,
    /// How long an answer may take
    #[arg(long, value_name = "MS", default_value_t = 1500)]
    patience_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    /// A TCP connection, the marker as its first bytes
    Tcp,
    /// UDP
    Udp,
    /// An echo request
    Icmp,
    /// A raw IP socket, protocol 253
    RawIp,
    /// A raw IP socket, protocol 132 (SCTP)
    Sctp,
    /// A raw IP socket, own header, a TCP segment from the proxy's tunnel port
    RawTcp,
    /// A raw IP socket, own header, a loose source route through the destination
    SourceRoute,
    /// A packet socket, Ethernet and all, IPv4
    Packet4,
    /// A packet socket, Ethernet and all, IPv6
    Packet6,
    /// A packet socket, an unknown Ethernet type
    PacketOther,
    /// A packet socket, a VLAN tag around an IPv4 packet
    PacketVlan,
    /// A packet socket that passes the queueing discipline by
    PacketBypass,
    /// An AF_XDP socket in copy mode
    Xdp,
}

fn clap_mark(text: &str) -> Result<u32, std::num::ParseIntError> {
    text.strip_prefix("0x").map_or_else(|| text.parse(), |digits| u32::from_str_radix(digits, 16))
}

/// Tries, and tells how far it got.
pub(crate) fn send(options: &Options) -> anyhow::Result<()> {
    let (mut sent, mut connected, mut answer, mut error) = (0, false, String::new(), None);
    for _ in 0..options.times {
        match attempt(options) {
            Ok(back) => {
                sent += 1;
                if let Some(back) = back {
                    connected = true;
                    answer = back;
                }
            }
            Err(failure) => error = Some(format!("{failure:#}")),
        }
    }
    crate::tell(&Event::Attempted { sent, connected, answer, error })
}

/// What came back over a connection; `None` where there is none.
fn attempt(options: &Options) -> anyhow::Result<Option<String>> {
    let marker = options.marker.as_bytes();
    match options.method {
        Method::Tcp => connect(options).map(Some),
        Method::Udp => datagram(options, Type::DGRAM, Protocol::UDP, marker),
        Method::Icmp => {
            let (kind, protocol) = match options.to {
                SocketAddr::V4(_) => (8, Protocol::ICMPV4),
                SocketAddr::V6(_) => (128, Protocol::ICMPV6),
            };
            let mut message = vec![kind, 0, 0, 0, 0, 1, 0, 1];
            message.extend_from_slice(marker);
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            datagram(options, Type::RAW, protocol, &message)
        }
        Method::RawIp => datagram(options, Type::RAW, Protocol::from(253), marker),
        Method::Sctp => datagram(options, Type::RAW, Protocol::from(132), marker),
        Method::RawTcp => own_header(options, &tcp_segment(options.to.port(), marker), 6, &[]),
        Method::SourceRoute => {
            let IpAddr::V4(via) = options.to.ip() else { bail!("source routes are tried over IPv4") };
            let [a, b, c, d] = via.octets();
            // Option 131, 7 bytes, pointer to the first address; padded to words.
            own_header(options, &udp(options.to.port(), marker), 17, &[131, 7, 4, a, b, c, d, 0])
        }
        Method::Packet4
        | Method::Packet6
        | Method::PacketOther
        | Method::PacketVlan
        | Method::PacketBypass
        | Method::Xdp => frame(options, marker),
    }
}

fn prepared(options: &Options, kind: Type, protocol: Protocol) -> anyhow::Result<Socket> {
    let socket = Socket::new(Domain::for_address(options.to), kind, Some(protocol)).context("socket")?;
    if let Some(mark) = options.mark {
        socket.set_mark(mark).context("SO_MARK")?;
    }
    if let Some(address) = options.bind {
        match address {
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(true).context("IP_TRANSPARENT")?,
            SocketAddr::V6(_) => socket.set_ip_transparent_v6(true).context("IPV6_TRANSPARENT")?,
        }
        socket.set_reuse_address(true).context("SO_REUSEADDR")?;
        socket.bind(&address.into()).with_context(|| format!("bind to {address}"))?;
    }
    Ok(socket)
}

fn connect(options: &Options) -> anyhow::Result<String> {
    let patience = Duration::from_millis(options.patience_ms);
    let mut socket = prepared(options, Type::STREAM, Protocol::TCP)?;
    socket.connect_timeout(&options.to.into(), patience).context("connect")?;
    socket.set_read_timeout(Some(patience))?;
    socket.write_all(options.marker.as_bytes()).context("write")?;
    let mut answer = vec![0; 4096];
    let count = socket.read(&mut answer).context("read")?;
    if count == 0 {
        bail!("closed without an answer");
    }
    answer.truncate(count);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn datagram(options: &Options, kind: Type, protocol: Protocol, message: &[u8]) -> anyhow::Result<Option<String>> {
    let socket = prepared(options, kind, protocol)?;
    let mut to = options.to;
    if kind == Type::RAW {
        // The kernel takes the port of a raw socket's address for a protocol.
        to.set_port(0);
    }
    socket.send_to(message, &to.into()).context("send")?;
    Ok(None)
}

fn own_header(options: &Options, payload: &[u8], protocol: u8, ip_options: &[u8]) -> anyhow::Result<Option<String>> {
    let (IpAddr::V4(to), SocketAddr::V4(_)) = (options.to.ip(), options.to) else {
        bail!("own headers are tried over IPv4");
    };
    let socket = prepared(options, Type::RAW, Protocol::from(255))?;
    socket.set_header_included_v4(true).context("IP_HDRINCL")?;
    let mut to_address = options.to;
    to_address.set_port(0);
    // The kernel fills in the source, the length and the checksum.
    let packet = ipv4(Ipv4Addr::UNSPECIFIED, to, protocol, ip_options, payload);
    socket.send_to(&packet, &to_address.into()).context("send")?;
    Ok(None)
}

/// An Ethernet frame to everybody on the link, through the interface that has a link address.
fn frame(options: &Options, marker: &[u8]) -> anyhow::Result<Option<String>> {
    let (link, mac) = link()?;
    let (kind, content) = match options.method {
        Method::Packet6 => (0x86dd, ipv6(&udp(options.to.port(), marker), options.to.ip())?),
        Method::PacketOther => (0x88b5, marker.to_vec()),
        Method::PacketVlan => {
            let mut tagged = vec![0, 7, 0x08, 0x00];
            tagged.extend(ipv4_datagram(options, marker)?);
            (0x8100_u16, tagged)
        }
        _ => (0x0800, ipv4_datagram(options, marker)?),
    };
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend(kind.to_be_bytes());
    frame.extend(content);
    if options.method == Method::Xdp {
        return crate::bypass::send_by_xdp(link.ifindex() as u32, &frame).map(|()| None);
    }
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).context("packet socket")?;
    if options.method == Method::PacketBypass {
        crate::bypass::bypass_queues(&socket)?;
    }
    sendto(socket.as_raw_fd(), &frame, &link, MsgFlags::empty()).context("send")?;
    Ok(None)
}

fn ipv4_datagram(options: &Options, marker: &[u8]) -> anyhow::Result<Vec<u8>> {
    let IpAddr::V4(to) = options.to.ip() else { bail!("an IPv4 frame needs an IPv4 destination") };
    Ok(ipv4(Ipv4Addr::new(10, 88, 0, 77), to, 17, &[], &udp(options.to.port(), marker)))
}

fn link() -> anyhow::Result<(LinkAddr, [u8; 6])> {
    for interface in getifaddrs()? {
        let address = interface.address.as_ref().and_then(|address| address.as_link_addr().copied());
        if interface.interface_name != "lo"
            && let Some(address) = address
            && let Some(mac) = address.addr()
        {
            return Ok((address, mac));
        }
    }
    bail!("no interface with a link address")
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header = 20 + options.len();
    let length = (header + payload.len()) as u16;
    let mut packet = vec![0x40 | (header / 4) as u8, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(options);
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

fn ipv6(payload: &[u8], to: IpAddr) -> anyhow::Result<Vec<u8>> {
    let IpAddr::V6(to) = to else { bail!("an IPv6 frame needs an IPv6 destination") };
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([17, 64]);
    packet.extend(Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, 0x77).octets());
    packet.extend(to.octets());
    packet.extend(payload);
    Ok(packet)
}

fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(40_000_u16.to_be_bytes());
    datagram.extend(port.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    datagram
}

/// A segment that claims to belong to a tunnel.
fn tcp_segment(port: u16, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(opencluster_integration::layout::TUNNEL_PORT.to_be_bytes());
    segment.extend(port.to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    segment
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
