//! Frames: a type byte, a 24-bit length, a payload. Everything is big-endian.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes in front of every payload.
pub const HEADER: usize = 4;

/// The longest payload of one DATA frame. Data is passed on as it arrives, so this bounds no memory; it only keeps a
/// broken length from being taken seriously.
pub const MAX_DATA: usize = 256 * 1024;

/// The longest text of a REFUSE frame, in bytes.
pub const MAX_REFUSAL_TEXT: usize = 256;

/// The longest payload of a frame that is kept until it is complete.
const MAX_CONTROL: usize = 2 + MAX_REFUSAL_TEXT;

/// The version in OPEN.
const VERSION: u8 = 1;
const OPEN_FIXED: usize = 1 + 1 + 1 + 2 + 8 + 16;

/// The types of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Starts a flow.
    Open = 1,
    /// The flow may pass and its destination is connected.
    Accept = 2,
    /// The flow may not pass, or its destination could not be reached.
    Refuse = 3,
    /// Bytes of the application.
    Data = 4,
    /// The sender's direction ended as the application ended it.
    Fin = 5,
    /// The sender's direction was cut; it will also throw away what it still receives.
    Reset = 6,
}

impl Kind {
    fn parse(byte: u8) -> Result<Self, FrameError> {
        Ok(match byte {
            1 => Self::Open,
            2 => Self::Accept,
            3 => Self::Refuse,
            4 => Self::Data,
            5 => Self::Fin,
            6 => Self::Reset,
            other => return Err(FrameError::UnknownKind(other)),
        })
    }

    fn check_length(self, length: usize) -> Result<(), FrameError> {
        let fits = match self {
            Self::Open => length == OPEN_FIXED + 4 || length == OPEN_FIXED + 16,
            Self::Accept | Self::Fin | Self::Reset => length == 0,
            Self::Refuse => (2..=MAX_CONTROL).contains(&length),
            Self::Data => (1..=MAX_DATA).contains(&length),
        };
        if fits { Ok(()) } else { Err(FrameError::BadLength { kind: self, length }) }
    }
}

/// Why bytes are not frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A type that this version does not know.
    #[error("unknown frame type {0}: is the peer of another version?")]
    UnknownKind(u8),
    /// A length that this type cannot have.
    #[error("a {kind:?} frame cannot be {length} bytes long")]
    BadLength {
        /// The type.
        kind: Kind,
        /// What was announced.
        length: usize,
    },
    /// OPEN of another version.
    #[error("OPEN has version {0}, this proxy speaks version {VERSION}")]
    Version(u8),
    /// A reserved field is used.
    #[error("OPEN has reserved flags {0:#04x} set")]
    ReservedFlags(u8),
    /// The address family and the length disagree, or the family is unknown.
    #[error("OPEN has address family {0}, which is unknown or does not fit its length")]
    Family(u8),
    /// Port 0, or an address that no connection can go to.
    #[error("OPEN has a target that cannot be connected to")]
    Target,
    /// REFUSE with a code or text that is not allowed.
    #[error("REFUSE has an unknown code or a text that is not printable UTF-8")]
    Refusal,
}

/// The header of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Where the client wanted to go.
    pub target: SocketAddr,
    /// Chosen by the source's proxy; appears in both proxies' logs.
    pub flow: u64,
    /// For following a request through several hops.
    pub trace: u128,
}

impl Open {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let length = OPEN_FIXED + if self.target.is_ipv4() { 4 } else { 16 };
        put_header(out, Kind::Open, length);
        out.extend_from_slice(&[VERSION, 0, if self.target.is_ipv4() { 4 } else { 6 }]);
        out.extend_from_slice(&self.target.port().to_be_bytes());
        match self.target.ip() {
            IpAddr::V4(ip) => out.extend_from_slice(&ip.octets()),
            IpAddr::V6(ip) => out.extend_from_slice(&ip.octets()),
        }
        out.extend_from_slice(&self.flow.to_be_bytes());
        out.extend_from_slice(&self.trace.to_be_bytes());
    }

    /// Parses the payload of an OPEN frame. Strict: every byte is accounted for.
    pub fn parse(payload: &[u8]) -> Result<Self, FrameError> {
        let bad_length = || FrameError::BadLength { kind: Kind::Open, length: payload.len() };
        let (&[version, flags, family, port_high, port_low], rest) =
            payload.split_first_chunk::<5>().ok_or_else(bad_length)?;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if flags != 0 {
            return Err(FrameError::ReservedFlags(flags));
        }
        let (ip, rest) = match family {
            4 => rest.split_first_chunk::<4>().map(|(ip, rest)| (IpAddr::V4(Ipv4Addr::from(*ip)), rest)),
            6 => rest.split_first_chunk::<16>().map(|(ip, rest)| (IpAddr::V6(Ipv6Addr::from(*ip)), rest)),
            other => return Err(FrameError::Family(other)),
        }
        .ok_or_else(bad_length)?;
        let (flow, rest) = rest.split_first_chunk::<8>().ok_or_else(bad_length)?;
        let Ok(trace) = <[u8; 16]>::try_from(rest) else { return Err(FrameError::Family(family)) };
        let port = u16::from_be_bytes([port_high, port_low]);
        if port == 0 || ip.is_unspecified() || ip.is_multicast() {
            return Err(FrameError::Target);
        }
        Ok(Self {
            target: SocketAddr::new(ip, port),
            flow: u64::from_be_bytes(*flow),
            trace: u128::from_be_bytes(trace),
        })
    }
}

/// Why a flow was refused, as it travels to the other proxy, its log and its metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RefusalCode {
    /// The destination's policy denies it.
    Denied = 1,
    /// The target is not an address and port of the workload that the tunnel is for.
    WrongDestination = 2,
    /// The destination has no policy, revocation set or lease: it carries nothing.
    NotReady = 3,
    /// The destination application refused the connection.
    ConnectRefused = 4,
    /// The destination application could not be reached.
    Unreachable = 5,
    /// The destination application did not answer in time.
    ConnectTimeout = 6,
    /// A limit of the destination is reached.
    Overloaded = 7,
    /// The destination is shutting down.
    Draining = 8,
    /// The source ended the flow before it was answered.
    Cancelled = 9,
    /// The source's or destination's identity was revoked.
    Revoked = 10,
}

impl RefusalCode {
    const ALL: [Self; 10] = [
        Self::Denied,
        Self::WrongDestination,
        Self::NotReady,
        Self::ConnectRefused,
        Self::Unreachable,
        Self::ConnectTimeout,
        Self::Overloaded,
        Self::Draining,
        Self::Cancelled,
        Self::Revoked,
    ];

    fn parse(code: u16) -> Result<Self, FrameError> {
        Self::ALL.into_iter().find(|known| *known as u16 == code).ok_or(FrameError::Refusal)
    }

    /// For metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::WrongDestination => "wrong_destination",
            Self::NotReady => "not_ready",
            Self::ConnectRefused => "connect_refused",
            Self::Unreachable => "unreachable",
            Self::ConnectTimeout => "connect_timeout",
            Self::Overloaded => "overloaded",
            Self::Draining => "draining",
            Self::Cancelled => "cancelled",
            Self::Revoked => "revoked",
        }
    }
}

/// A typed refusal with a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people: printable, at most [`MAX_REFUSAL_TEXT`] bytes.
    pub text: String,
}

impl Refusal {
    /// A refusal; the text is cut to what the frame can carry.
    pub fn new(code: RefusalCode, text: impl Into<String>) -> Self {
        let mut text: String = text.into();
        text.retain(|c| !c.is_control());
        while text.len() > MAX_REFUSAL_TEXT {
            text.pop();
        }
        Self { code, text }
    }

    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_header(out, Kind::Refuse, 2 + self.text.len());
        out.extend_from_slice(&(self.code as u16).to_be_bytes());
        out.extend_from_slice(self.text.as_bytes());
    }

    fn parse(payload: &[u8]) -> Result<Self, FrameError> {
        let (code, text) = payload.split_first_chunk::<2>().ok_or(FrameError::Refusal)?;
        let text = std::str::from_utf8(text).map_err(|_| FrameError::Refusal)?;
        if text.chars().any(char::is_control) {
            return Err(FrameError::Refusal);
        }
        Ok(Self { code: RefusalCode::parse(u16::from_be_bytes(*code))?, text: text.to_owned() })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.text)
    }
}

/// Appends a frame without payload: ACCEPT, FIN or RESET.
pub fn encode_empty(kind: Kind, out: &mut Vec<u8>) {
    put_header(out, kind, 0);
}

/// The header of a DATA frame.
pub fn data_header(length: usize) -> [u8; HEADER] {
    header(Kind::Data, length)
}

fn put_header(out: &mut Vec<u8>, kind: Kind, length: usize) {
    out.extend_from_slice(&header(kind, length));
}

fn header(kind: Kind, length: usize) -> [u8; HEADER] {
    let [_, a, b, c] = (length as u32).to_be_bytes();
    [kind as u8, a, b, c]
}

/// What the decoder found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A flow starts.
    Open(Open),
    /// It was accepted.
    Accept,
    /// It was refused.
    Refuse(Refusal),
    /// The last so many bytes that were consumed are the application's (a frame may come in several pieces).
    Data(usize),
    /// The peer's direction ended.
    Fin,
    /// The peer's direction was cut.
    Reset,
}

/// Reads frames from a stream of bytes that arrives in pieces of any size. Keeps at most one incomplete control frame
/// (262 bytes); data is never kept.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Header and payload of a control frame, or the header of a data frame, as far as it has arrived. Without
    /// allocation as long as frames arrive whole.
    partial: Vec<u8>,
    /// Bytes of the current DATA frame that are still to come.
    data: u32,
}

impl Decoder {
    /// Consumes the next event from the front of `input`: how many bytes were used, and what they meant (`None`: more is
    /// needed, everything was used).
    pub fn next(&mut self, input: &[u8]) -> Result<(usize, Option<Event>), FrameError> {
        if self.data > 0 {
            return Ok(self.data(0, input));
        }
        if self.partial.is_empty() {
            // The usual case: the frame lies in one piece.
            let Some((kind, length)) = parse_header(input)? else { return Ok(self.keep(input)) };
            if kind == Kind::Data {
                self.data = length as u32;
                return Ok(self.data(HEADER, &input[HEADER..]));
            }
            let total = HEADER + length;
            if input.len() < total {
                return Ok(self.keep(input));
            }
            return Ok((total, Some(parse_control(kind, &input[HEADER..total])?)));
        }
        self.resume(input)
    }

    /// Whether the stream is between two frames.
    pub fn is_between_frames(&self) -> bool {
        self.partial.is_empty() && self.data == 0
    }

    fn data(&mut self, skipped: usize, input: &[u8]) -> (usize, Option<Event>) {
        let length = input.len().min(self.data as usize);
        self.data -= length as u32;
        (skipped + length, (length > 0).then_some(Event::Data(length)))
    }

    fn keep(&mut self, input: &[u8]) -> (usize, Option<Event>) {
        self.partial.extend_from_slice(input);
        (input.len(), None)
    }

    fn resume(&mut self, input: &[u8]) -> Result<(usize, Option<Event>), FrameError> {
        let mut used = input.len().min(HEADER.saturating_sub(self.partial.len()));
        self.partial.extend_from_slice(&input[..used]);
        let Some((kind, length)) = parse_header(&self.partial)? else { return Ok((used, None)) };
        if kind == Kind::Data {
            self.partial = Vec::new();
            self.data = length as u32;
            return Ok(self.data(used, &input[used..]));
        }
        let missing = (HEADER + length).saturating_sub(self.partial.len());
        let more = missing.min(input.len() - used);
        self.partial.extend_from_slice(&input[used..used + more]);
        used += more;
        if more < missing {
            return Ok((used, None));
        }
        let frame = std::mem::take(&mut self.partial);
        Ok((used, Some(parse_control(kind, &frame[HEADER..])?)))
    }
}

fn parse_header(input: &[u8]) -> Result<Option<(Kind, usize)>, FrameError> {
    // The type is judged as soon as it is there: garbage is refused at its first byte.
    let Some(&kind) = input.first() else { return Ok(None) };
    let kind = Kind::parse(kind)?;
    let Some(&[_, a, b, c]) = input.first_chunk::<HEADER>() else { return Ok(None) };
    let length = u32::from_be_bytes([0, a, b, c]) as usize;
    kind.check_length(length)?;
    Ok(Some((kind, length)))
}

fn parse_control(kind: Kind, payload: &[u8]) -> Result<Event, FrameError> {
    Ok(match kind {
        Kind::Open => Event::Open(Open::parse(payload)?),
        Kind::Accept => Event::Accept,
        Kind::Refuse => Event::Refuse(Refusal::parse(payload)?),
        Kind::Fin => Event::Fin,
        Kind::Reset => Event::Reset,
        Kind::Data => return Err(FrameError::BadLength { kind, length: payload.len() }),
    })
}

#[cfg(test)]
mod tests;
