//! The expressions that our rules are made of: a small, typed part of nf_tables' instruction set.
//!
//! Each condition loads something into register 1 and compares it; evaluation of a rule stops at the first condition that
//! does not hold.

use std::net::IpAddr;

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expression {
    /// Loads what is known about the packet.
    Meta(Meta),
    /// Sets the packet's mark from the register.
    SetMark,
    /// Loads what connection tracking knows.
    Ct(Ct),
    /// Sets the connection's mark from the register.
    SetCtMark,
    /// Loads bytes of the packet.
    Payload { base: Base, offset: u32, length: u32 },
    /// Loads the ID of the ancestor, at this level, of the cgroup of the packet's socket. Breaks without a socket.
    SocketCgroup { level: u32 },
    /// register = register & mask
    Mask(Vec<u8>),
    /// Goes on only if this holds.
    Compare(Comparison, Vec<u8>),
    /// Loads a constant.
    Constant(Vec<u8>),
    /// Goes on only if the register's value is in this set.
    Lookup { set: &'static str },
    /// Redirects the connection to this machine, port in the register.
    Redirect,
    /// Ends the evaluation of the hook.
    Verdict(Verdict),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Meta {
    Protocol = 1,
    Mark = 3,
    InputInterface = 4,
    OutputInterface = 5,
    NetworkProtocol = 15,
    TransportProtocol = 16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Ct {
    State = 0,
    Status = 2,
    Mark = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Base {
    Network = 1,
    Transport = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Comparison {
    Equal = 0,
    NotEqual = 1,
    AtMost = 3,
    AtLeast = 5,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Verdict {
    Drop = 0,
    Accept = 1,
}

/// Conditions and actions in the words of the rules.
pub(crate) mod words {
    use super::{Base, Comparison, Ct, Expression, IpAddr, Meta, Verdict};
    use crate::cgroup::Cgroup;

    pub(crate) type Part = Vec<Expression>;

    /// The loopback device has this index in every network namespace.
    const LOOPBACK_INDEX: u32 = 1;
    const TCP: u8 = 6;
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;
    pub(crate) const IPV4: u8 = 2;
    pub(crate) const IPV6: u8 = 10;

    pub(crate) const INVALID: u32 = 1;
    pub(crate) const ESTABLISHED: u32 = 2;
    pub(crate) const RELATED: u32 = 4;
    const DESTINATION_TRANSLATED: u32 = 1 << 5;

    fn equals(load: Expression, value: &[u8]) -> Part {
        vec![load, Expression::Compare(Comparison::Equal, value.to_vec())]
    }

    pub(crate) fn from_loopback() -> Part {
        equals(Expression::Meta(Meta::InputInterface), &LOOPBACK_INDEX.to_ne_bytes())
    }

    pub(crate) fn to_loopback() -> Part {
        equals(Expression::Meta(Meta::OutputInterface), &LOOPBACK_INDEX.to_ne_bytes())
    }

    pub(crate) fn not_to_loopback() -> Part {
        let index = LOOPBACK_INDEX.to_ne_bytes().to_vec();
        vec![Expression::Meta(Meta::OutputInterface), Expression::Compare(Comparison::NotEqual, index)]
    }

    pub(crate) fn tcp() -> Part {
        equals(Expression::Meta(Meta::TransportProtocol), &[TCP])
    }

    pub(crate) fn tcp_to_port(port: u16) -> Part {
        let mut part = tcp();
        part.extend(equals(destination_port(), &port.to_be_bytes()));
        part
    }

    pub(crate) fn tcp_to_ports(first: u16, last: u16) -> Part {
        let mut part = tcp();
        part.push(destination_port());
        part.push(Expression::Compare(Comparison::AtLeast, first.to_be_bytes().to_vec()));
        part.push(Expression::Compare(Comparison::AtMost, last.to_be_bytes().to_vec()));
        part
    }

    fn destination_port() -> Expression {
        Expression::Payload { base: Base::Transport, offset: 2, length: 2 }
    }

    /// An ICMP (v4) message of this type.
    pub(crate) fn icmp(kind: u8) -> Part {
        let mut part = network_protocol(IPV4);
        part.extend(equals(Expression::Meta(Meta::TransportProtocol), &[ICMP]));
        part.extend(equals(Expression::Payload { base: Base::Transport, offset: 0, length: 1 }, &[kind]));
        part
    }

    /// An ICMPv6 message of this type.
    pub(crate) fn icmpv6(kind: u8) -> Part {
        let mut part = network_protocol(IPV6);
        part.extend(equals(Expression::Meta(Meta::TransportProtocol), &[ICMPV6]));
        part.extend(equals(Expression::Payload { base: Base::Transport, offset: 0, length: 1 }, &[kind]));
        part
    }

    /// A hop limit (v6) of 255: no router has seen the packet.
    pub(crate) fn from_this_link() -> Part {
        equals(Expression::Payload { base: Base::Network, offset: 7, length: 1 }, &[255])
    }

    fn network_protocol(protocol: u8) -> Part {
        equals(Expression::Meta(Meta::NetworkProtocol), &[protocol])
    }

    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Side {
        Source,
        Destination,
    }

    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Family {
        V4,
        V6,
    }

    impl Family {
        pub(crate) const BOTH: [Self; 2] = [Self::V4, Self::V6];
    }

    fn address_field(family: Family, side: Side, length: u32) -> Expression {
        let offset = match (family, side) {
            (Family::V4, Side::Source) => 12,
            (Family::V4, Side::Destination) => 16,
            (Family::V6, Side::Source) => 8,
            (Family::V6, Side::Destination) => 24,
        };
        Expression::Payload { base: Base::Network, offset, length }
    }

    fn loopback_address(family: Family, side: Side, comparison: Comparison) -> Part {
        // 127.0.0.0/8 is its first byte; IPv6 has the one address ::1.
        let (protocol, value) = match family {
            Family::V4 => (IPV4, vec![127]),
            Family::V6 => (IPV6, std::net::Ipv6Addr::LOCALHOST.octets().to_vec()),
        };
        let mut part = network_protocol(protocol);
        part.push(address_field(family, side, value.len() as u32));
        part.push(Expression::Compare(comparison, value));
        part
    }

    /// The address is 127.0.0.0/8 or ::1.
    pub(crate) fn loopback(family: Family, side: Side) -> Part {
        loopback_address(family, side, Comparison::Equal)
    }

    /// The address is of this family, but not a loopback address.
    pub(crate) fn not_loopback(family: Family, side: Side) -> Part {
        loopback_address(family, side, Comparison::NotEqual)
    }

    /// The packet goes to exactly this address.
    pub(crate) fn to_address(address: IpAddr) -> Part {
        let (family, protocol, value) = match address {
            IpAddr::V4(address) => (Family::V4, IPV4, address.octets().to_vec()),
            IpAddr::V6(address) => (Family::V6, IPV6, address.octets().to_vec()),
        };
        let mut part = network_protocol(protocol);
        part.extend(equals(address_field(family, Side::Destination, value.len() as u32), &value));
        part
    }

    /// The packet's socket was made in this cgroup or below it.
    pub(crate) fn socket_of(cgroup: Cgroup) -> Part {
        equals(Expression::SocketCgroup { level: cgroup.level }, &cgroup.id.to_ne_bytes())
    }

    /// Connection tracking's state is one of these bits.
    pub(crate) fn ct_state(bits: u32) -> Part {
        any_bit(Ct::State, bits)
    }

    /// The connection was redirected (by us: nobody else may write to our table, and nothing else leaves this machine).
    pub(crate) fn redirected() -> Part {
        any_bit(Ct::Status, DESTINATION_TRANSLATED)
    }

    pub(crate) fn not_redirected() -> Part {
        vec![
            Expression::Ct(Ct::Status),
            Expression::Mask(DESTINATION_TRANSLATED.to_ne_bytes().to_vec()),
            Expression::Compare(Comparison::Equal, 0_u32.to_ne_bytes().to_vec()),
        ]
    }

    fn any_bit(key: Ct, bits: u32) -> Part {
        vec![
            Expression::Ct(key),
            Expression::Mask(bits.to_ne_bytes().to_vec()),
            Expression::Compare(Comparison::NotEqual, 0_u32.to_ne_bytes().to_vec()),
        ]
    }

    pub(crate) fn ct_mark(mark: u32) -> Part {
        equals(Expression::Ct(Ct::Mark), &mark.to_ne_bytes())
    }

    pub(crate) fn set_ct_mark(mark: u32) -> Part {
        vec![Expression::Constant(mark.to_ne_bytes().to_vec()), Expression::SetCtMark]
    }

    pub(crate) fn mark(mark: u32) -> Part {
        equals(Expression::Meta(Meta::Mark), &mark.to_ne_bytes())
    }

    pub(crate) fn set_mark(mark: u32) -> Part {
        vec![Expression::Constant(mark.to_ne_bytes().to_vec()), Expression::SetMark]
    }

    /// The frame's EtherType.
    pub(crate) fn ether_type(kind: u16) -> Part {
        equals(Expression::Meta(Meta::Protocol), &kind.to_be_bytes())
    }

    /// The packet's protocol family is in the set (an element that has timed out is not).
    pub(crate) fn family_in_set(set: &'static str) -> Part {
        vec![Expression::Meta(Meta::NetworkProtocol), Expression::Lookup { set }]
    }

    /// The packet's mark is in the set.
    pub(crate) fn mark_in_set(set: &'static str) -> Part {
        vec![Expression::Meta(Meta::Mark), Expression::Lookup { set }]
    }

    pub(crate) fn redirect(port: u16) -> Part {
        vec![Expression::Constant(port.to_be_bytes().to_vec()), Expression::Redirect]
    }

    pub(crate) fn accept() -> Part {
        vec![Expression::Verdict(Verdict::Accept)]
    }

    pub(crate) fn drop() -> Part {
        vec![Expression::Verdict(Verdict::Drop)]
    }
}
