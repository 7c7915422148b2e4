//! Frames: a type byte, a 24-bit length, on shared tunnels a 32-bit stream number, a payload. Everything is big-endian.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes in front of every payload on a leased tunnel.
pub const HEADER: usize = 4;

/// Bytes in front of every payload on a shared tunnel: the same, and the stream's number.
pub const SHARED_HEADER: usize = HEADER + 4;

/// How the frames of a tunnel are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// One flow at a time: frames need not say which.
    #[default]
    Leased,
    /// Many flows at once: each frame names its stream.
    Shared,
}

impl Framing {
    fn header(self) -> usize {
        match self {
            Self::Leased => HEADER,
            Self::Shared => SHARED_HEADER,
        }
    }
}

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
const CONTINUE: usize = 8 + 2;

/// The most credit that one frame may give: larger windows are not of this protocol.
pub const MAX_CREDIT: u32 = 16 * 1024 * 1024;

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
    /// Shared tunnels: so many more bytes of data may be sent on this stream.
    Credit = 7,
    /// Shared tunnels: the sender's direction goes on over the leased tunnel that was agreed.
    Move = 8,
    /// Leased tunnels: takes over a flow of a shared tunnel.
    Continue = 9,
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
            7 => Self::Credit,
            8 => Self::Move,
            9 => Self::Continue,
            other => return Err(FrameError::UnknownKind(other)),
        })
    }

    fn check(self, framing: Framing, length: usize) -> Result<(), FrameError> {
        let allowed = match self {
            Self::Credit | Self::Move => framing == Framing::Shared,
            Self::Continue => framing == Framing::Leased,
            _ => true,
        };
        if !allowed {
            return Err(FrameError::Misplaced(self));
        }
        let fits = match self {
            Self::Open => length == OPEN_FIXED + 4 || length == OPEN_FIXED + 16,
            Self::Accept if framing == Framing::Shared => length == 2,
            Self::Accept | Self::Fin | Self::Reset | Self::Move => length == 0,
            Self::Credit => length == 4,
            Self::Continue => length == CONTINUE,
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
    /// A type that does not belong on this kind of tunnel.
    #[error("a {0:?} frame does not belong on this kind of tunnel")]
    Misplaced(Kind),
    /// CREDIT for nothing, or for more than any window holds.
    #[error("CREDIT of {0} bytes")]
    Credit(u32),
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
    /// Appends the frame, for a stream of a shared tunnel or for a leased one.
    pub fn encode(&self, stream: Option<u32>, out: &mut Vec<u8>) {
        let length = OPEN_FIXED + if self.target.is_ipv4() { 4 } else { 16 };
        put_header(out, stream, Kind::Open, length);
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

    /// Appends the frame, for a stream of a shared tunnel or for a leased one.
    pub fn encode(&self, stream: Option<u32>, out: &mut Vec<u8>) {
        put_header(out, stream, Kind::Refuse, 2 + self.text.len());
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

/// What CONTINUE names: a flow of a shared tunnel, and where the acceptor keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Continue {
    /// The flow's ID, as OPEN gave it.
    pub flow: u64,
    /// The acceptor's worker, as ACCEPT gave it.
    pub worker: u16,
}

impl Continue {
    /// Appends the frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_header(out, None, Kind::Continue, CONTINUE);
        out.extend_from_slice(&self.flow.to_be_bytes());
        out.extend_from_slice(&self.worker.to_be_bytes());
    }

    fn parse(payload: &[u8]) -> Result<Self, FrameError> {
        let bad_length = FrameError::BadLength { kind: Kind::Continue, length: payload.len() };
        let Some((flow, rest)) = payload.split_first_chunk::<8>() else { return Err(bad_length) };
        let Ok(worker) = <[u8; 2]>::try_from(rest) else { return Err(bad_length) };
        Ok(Self { flow: u64::from_be_bytes(*flow), worker: u16::from_be_bytes(worker) })
    }
}

/// Appends a frame without payload: ACCEPT on a leased tunnel, FIN, RESET or MOVE.
pub fn encode_empty(kind: Kind, stream: Option<u32>, out: &mut Vec<u8>) {
    put_header(out, stream, kind, 0);
}

/// Appends ACCEPT for a stream of a shared tunnel: which worker keeps the flow.
pub fn encode_accept(stream: u32, worker: u16, out: &mut Vec<u8>) {
    put_header(out, Some(stream), Kind::Accept, 2);
    out.extend_from_slice(&worker.to_be_bytes());
}

/// Appends CREDIT for a stream.
pub fn encode_credit(stream: u32, bytes: u32, out: &mut Vec<u8>) {
    put_header(out, Some(stream), Kind::Credit, 4);
    out.extend_from_slice(&bytes.to_be_bytes());
}

/// The header of a DATA frame on a leased tunnel.
pub fn data_header(length: usize) -> [u8; HEADER] {
    header(Kind::Data, length)
}

/// The header of a DATA frame on a shared tunnel.
pub fn shared_data_header(stream: u32, length: usize) -> [u8; SHARED_HEADER] {
    let mut bytes = [0; SHARED_HEADER];
    bytes[..HEADER].copy_from_slice(&header(Kind::Data, length));
    bytes[HEADER..].copy_from_slice(&stream.to_be_bytes());
    bytes
}

fn put_header(out: &mut Vec<u8>, stream: Option<u32>, kind: Kind, length: usize) {
    out.extend_from_slice(&header(kind, length));
    if let Some(stream) = stream {
        out.extend_from_slice(&stream.to_be_bytes());
    }
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
    /// It was accepted; on a shared tunnel, by this worker.
    Accept(Option<u16>),
    /// It was refused.
    Refuse(Refusal),
    /// The last so many bytes that were consumed are the application's (a frame may come in several pieces).
    Data(usize),
    /// The peer's direction ended.
    Fin,
    /// The peer's direction was cut.
    Reset,
    /// So many more bytes may be sent.
    Credit(u32),
    /// The peer's direction goes on elsewhere.
    Move,
    /// This tunnel takes over a flow.
    Continue(Continue),
}

impl Event {
    /// The type of the frame.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Open(_) => Kind::Open,
            Self::Accept(_) => Kind::Accept,
            Self::Refuse(_) => Kind::Refuse,
            Self::Data(_) => Kind::Data,
            Self::Fin => Kind::Fin,
            Self::Reset => Kind::Reset,
            Self::Credit(_) => Kind::Credit,
            Self::Move => Kind::Move,
            Self::Continue(_) => Kind::Continue,
        }
    }
}

/// Reads frames from a stream of bytes that arrives in pieces of any size. Keeps at most one incomplete control frame
/// (262 bytes); data is never kept.
#[derive(Debug, Default)]
pub struct Decoder {
    framing: Framing,
    /// The stream of the latest frame (shared tunnels).
    stream: u32,
    /// Header and payload of a control frame, or the header of a data frame, as far as it has arrived. Without
    /// allocation as long as frames arrive whole.
    partial: Vec<u8>,
    /// Bytes of the current DATA frame that are still to come.
    data: u32,
}

impl Decoder {
    /// At the start of a tunnel's stream of frames.
    pub fn new(framing: Framing) -> Self {
        Self { framing, ..Self::default() }
    }

    /// The stream that the latest event is of, on a shared tunnel.
    pub fn stream(&self) -> u32 {
        self.stream
    }

    /// Consumes the next event from the front of `input`: how many bytes were used, and what they meant (`None`: more is
    /// needed, everything was used).
    pub fn next(&mut self, input: &[u8]) -> Result<(usize, Option<Event>), FrameError> {
        if self.data > 0 {
            return Ok(self.data(0, input));
        }
        if self.partial.is_empty() {
            // The usual case: the frame lies in one piece.
            let Some((kind, length, stream)) = parse_header(self.framing, input)? else { return Ok(self.keep(input)) };
            let header = self.framing.header();
            self.stream = stream;
            if kind == Kind::Data {
                self.data = length as u32;
                return Ok(self.data(header, &input[header..]));
            }
            let total = header + length;
            if input.len() < total {
                return Ok(self.keep(input));
            }
            return Ok((total, Some(parse_control(kind, &input[header..total])?)));
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
        let header = self.framing.header();
        let mut used = input.len().min(header.saturating_sub(self.partial.len()));
        self.partial.extend_from_slice(&input[..used]);
        let Some((kind, length, stream)) = parse_header(self.framing, &self.partial)? else { return Ok((used, None)) };
        self.stream = stream;
        if kind == Kind::Data {
            self.partial = Vec::new();
            self.data = length as u32;
            return Ok(self.data(used, &input[used..]));
        }
        let missing = (header + length).saturating_sub(self.partial.len());
        let more = missing.min(input.len() - used);
        self.partial.extend_from_slice(&input[used..used + more]);
        used += more;
        if more < missing {
            return Ok((used, None));
        }
        let frame = std::mem::take(&mut self.partial);
        Ok((used, Some(parse_control(kind, &frame[header..])?)))
    }
}

fn parse_header(framing: Framing, input: &[u8]) -> Result<Option<(Kind, usize, u32)>, FrameError> {
    // The type is judged as soon as it is there: garbage is refused at its first byte.
    let Some(&kind) = input.first() else { return Ok(None) };
    let kind = Kind::parse(kind)?;
    let Some(&[_, a, b, c]) = input.first_chunk::<HEADER>() else { return Ok(None) };
    let length = u32::from_be_bytes([0, a, b, c]) as usize;
    kind.check(framing, length)?;
    let stream = match framing {
        Framing::Leased => 0,
        Framing::Shared => match input[HEADER..].first_chunk::<4>() {
            Some(stream) => u32::from_be_bytes(*stream),
            None => return Ok(None),
        },
    };
    Ok(Some((kind, length, stream)))
}

fn parse_control(kind: Kind, payload: &[u8]) -> Result<Event, FrameError> {
    Ok(match kind {
        Kind::Open => Event::Open(Open::parse(payload)?),
        Kind::Accept => Event::Accept(payload.first_chunk::<2>().map(|worker| u16::from_be_bytes(*worker))),
        Kind::Refuse => Event::Refuse(Refusal::parse(payload)?),
        Kind::Fin => Event::Fin,
        Kind::Reset => Event::Reset,
        Kind::Move => Event::Move,
        Kind::Continue => Event::Continue(Continue::parse(payload)?),
        Kind::Credit => {
            let bytes = payload.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes));
            if bytes == 0 || bytes > MAX_CREDIT {
                return Err(FrameError::Credit(bytes));
            }
            Event::Credit(bytes)
        }
        Kind::Data => return Err(FrameError::BadLength { kind, length: payload.len() }),
    })
}

#[cfg(test)]
mod tests;
