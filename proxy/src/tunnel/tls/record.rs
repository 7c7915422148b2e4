//! The record layer of an established TLS 1.3 session (RFC 8446, section 5), sealing and opening in place.
//!
//! rustls does the handshake and the key schedule, and hands over traffic keys through its kernel interface, which
//! exists for this. What is left is one AEAD call for each record, counting, and key updates.

use std::fmt;
use std::ops::Range;

use rustls::ConnectionTrafficSecrets;
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;

use super::aead::{Algorithm, Key, Library, NONCE, TAG};

/// Type, version and length in front of every record.
pub const RECORD_HEADER: usize = 5;
/// The content type at the end of the plaintext, and the authentication tag.
pub const RECORD_TRAILER: usize = 1 + TAG;
/// The most content that one record carries.
pub const MAX_CONTENT: usize = 16 * 1024;
/// The longest record that we write.
pub const MAX_OWN_RECORD: usize = RECORD_HEADER + MAX_CONTENT + RECORD_TRAILER;
/// The longest record that a peer may send (the RFC allows 256 bytes of expansion).
pub const MAX_RECORD: usize = RECORD_HEADER + MAX_CONTENT + 256;
/// A key update as a record.
pub const KEY_UPDATE_RECORD: usize = RECORD_HEADER + 5 + RECORD_TRAILER;

const APPLICATION_DATA: u8 = 23;
const HANDSHAKE: u8 = 22;
const ALERT: u8 = 21;
const CHANGE_CIPHER_SPEC: u8 = 20;

/// AES-GCM keys are good for 2^24.5 full records (RFC 8446, section 5.5): ours are replaced well before.
const REKEY_AFTER: u64 = 1 << 23;

/// A peer may not make us derive keys without sending data in between more often than this.
const MAX_UPDATES_IN_A_ROW: u8 = 16;

/// What can go wrong with records. All of these end the session.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RecordError {
    /// The record does not authenticate: it was changed on the way, or the peer lost count.
    #[error("a TLS record did not authenticate")]
    BadRecord,
    /// Not a TLS 1.3 record header.
    #[error("not a TLS 1.3 record (type {content_type}, length {length})")]
    BadHeader {
        /// The type byte.
        content_type: u8,
        /// The announced length.
        length: usize,
    },
    /// The peer ended the session with an alert other than close_notify.
    #[error("the peer ended the TLS session with alert {0} ({alert})", alert = alert_name(*.0))]
    Alert(u8),
    /// A handshake message that cannot follow a handshake.
    #[error("unexpected TLS handshake message of type {0} after the handshake")]
    UnexpectedHandshake(u8),
    /// The peer asks for new keys over and over.
    #[error("the peer sends key updates without data between them")]
    TooManyUpdates,
    /// The suite is none of ours.
    #[error("the TLS session uses a suite that this proxy does not carry data with")]
    Suite,
    /// The key schedule failed.
    #[error("TLS key update: {0}")]
    KeySchedule(#[from] rustls::Error),
    /// The provider refused to seal (it does not for lengths that we make).
    #[error("a TLS record could not be sealed")]
    Seal,
}

/// The names of the alerts that tell a person something.
fn alert_name(alert: u8) -> &'static str {
    match alert {
        10 => "unexpected_message",
        20 => "bad_record_mac",
        40 => "handshake_failure",
        42 => "bad_certificate",
        43 => "unsupported_certificate",
        44 => "certificate_revoked",
        45 => "certificate_expired",
        46 => "certificate_unknown",
        48 => "unknown_ca",
        49 => "access_denied",
        50 => "decode_error",
        51 => "decrypt_error",
        80 => "internal_error",
        90 => "user_canceled",
        112 => "unrecognized_name",
        116 => "certificate_required",
        120 => "no_application_protocol",
        _ => "see RFC 8446, section 6",
    }
}

/// One direction's key, IV and counter.
struct Keys {
    key: Key,
    iv: [u8; NONCE],
    sequence: u64,
}

impl Keys {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Algorithm::Aes128Gcm, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Algorithm::Aes256Gcm, key, iv),
            _ => return Err(RecordError::Suite),
        };
        let key = Key::new(Library::fastest(), algorithm, key.as_ref()).map_err(|_| RecordError::Suite)?;
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::Suite)?;
        Ok(Self { key, iv, sequence })
    }

    /// The nonce of the next record. Each is used once: the counter cannot wrap before a key update.
    fn nonce(&mut self) -> [u8; NONCE] {
        let mut nonce = self.iv;
        for (byte, count) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= count;
        }
        self.sequence += 1;
        nonce
    }
}

/// The key schedule of either side.
pub(crate) enum Schedule {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Schedule {
    fn next_transmit(&mut self) -> Result<Keys, RecordError> {
        Keys::new(match self {
            Self::Client(kernel) => kernel.update_tx_secret()?,
            Self::Server(kernel) => kernel.update_tx_secret()?,
        })
    }

    fn next_receive(&mut self) -> Result<Keys, RecordError> {
        Keys::new(match self {
            Self::Client(kernel) => kernel.update_rx_secret()?,
            Self::Server(kernel) => kernel.update_rx_secret()?,
        })
    }
}

/// What a received record was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// Application data: this part of the record. Never empty.
    Data(Range<usize>),
    /// The peer will send nothing more.
    CloseNotify,
    /// The peer changed its keys, and asks us to change ours if `reply`.
    KeyUpdate {
        /// Whether we must send a key update before the next data.
        reply: bool,
    },
    /// Nothing for anybody (a session ticket, padding).
    Nothing,
}

/// An established session: both directions' keys and the key schedule.
pub struct Session {
    transmit: Keys,
    receive: Keys,
    schedule: Schedule,
    updates_in_a_row: u8,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No keys here, ever.
        f.debug_struct("Session")
            .field("sent_records", &self.transmit.sequence)
            .field("received_records", &self.receive.sequence)
            .finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) fn new(secrets: rustls::ExtractedSecrets, schedule: Schedule) -> Result<Self, RecordError> {
        Ok(Self { transmit: Keys::new(secrets.tx)?, receive: Keys::new(secrets.rx)?, schedule, updates_in_a_row: 0 })
    }

    /// Seals `content` bytes of application data that lie in `slot` behind [`RECORD_HEADER`]; the slot must have room
    /// for [`RECORD_TRAILER`] behind them. Returns the record's length.
    pub fn seal_data(&mut self, slot: &mut [u8], content: usize) -> Result<usize, RecordError> {
        self.seal(slot, content, APPLICATION_DATA)
    }

    /// Seals a close_notify alert at the start of `slot`.
    pub fn seal_close_notify(&mut self, slot: &mut [u8]) -> Result<usize, RecordError> {
        slot.get_mut(RECORD_HEADER..RECORD_HEADER + 2).ok_or(RecordError::Seal)?.copy_from_slice(&[1, 0]);
        self.seal(slot, 2, ALERT)
    }

    /// Whether the keys that we send with should be replaced before more data.
    pub fn wants_key_update(&self) -> bool {
        self.transmit.sequence >= REKEY_AFTER
    }

    /// Seals a key update at the start of `slot` and changes the keys that we send with.
    pub fn seal_key_update(&mut self, slot: &mut [u8]) -> Result<usize, RecordError> {
        let message = slot.get_mut(RECORD_HEADER..RECORD_HEADER + 5).ok_or(RecordError::Seal)?;
        message.copy_from_slice(&[24, 0, 0, 1, 0]);
        let length = self.seal(slot, 5, HANDSHAKE)?;
        self.transmit = self.schedule.next_transmit()?;
        Ok(length)
    }

    fn seal(&mut self, slot: &mut [u8], content: usize, content_type: u8) -> Result<usize, RecordError> {
        let plaintext_end = RECORD_HEADER + content + 1;
        let record = slot.get_mut(..plaintext_end + TAG).ok_or(RecordError::Seal)?;
        let [a, b] = ((content + RECORD_TRAILER) as u16).to_be_bytes();
        let header = [APPLICATION_DATA, 3, 3, a, b];
        record[..RECORD_HEADER].copy_from_slice(&header);
        record[plaintext_end - 1] = content_type;
        let (plaintext, tag) = record[RECORD_HEADER..].split_at_mut(content + 1);
        let nonce = self.transmit.nonce();
        let sealed = self.transmit.key.seal(nonce, &header, plaintext).map_err(|_| RecordError::Seal)?;
        tag.copy_from_slice(&sealed);
        Ok(plaintext_end + TAG)
    }

    /// Opens one whole record in place (see [`record_length`]).
    pub fn open(&mut self, record: &mut [u8]) -> Result<Opened, RecordError> {
        let Some((header, body)) = record.split_first_chunk_mut::<RECORD_HEADER>() else {
            return Err(RecordError::BadRecord);
        };
        if header[0] != APPLICATION_DATA {
            return Err(RecordError::BadHeader { content_type: header[0], length: body.len() });
        }
        let nonce = self.receive.nonce();
        let plaintext = self.receive.key.open(nonce, header, body).map_err(|_| RecordError::BadRecord)?;
        // Zero padding may follow the content type.
        let Some(type_at) = plaintext.iter().rposition(|byte| *byte != 0) else { return Err(RecordError::BadRecord) };
        let (content, content_type) = (&plaintext[..type_at], plaintext[type_at]);
        match content_type {
            APPLICATION_DATA if content.is_empty() => Ok(Opened::Nothing),
            APPLICATION_DATA => {
                self.updates_in_a_row = 0;
                Ok(Opened::Data(RECORD_HEADER..RECORD_HEADER + type_at))
            }
            ALERT => match content {
                [_, 0] => Ok(Opened::CloseNotify),
                [_, alert] => Err(RecordError::Alert(*alert)),
                _ => Err(RecordError::BadRecord),
            },
            HANDSHAKE => match *content {
                // One whole KeyUpdate: the RFC forbids that it shares its record or spans several.
                [24, 0, 0, 1, request @ (0 | 1)] => self.receive_key_update(request == 1),
                // NewSessionTicket: we do not resume, so that revocation is always checked.
                [4, ..] => Ok(Opened::Nothing),
                [other, ..] => Err(RecordError::UnexpectedHandshake(other)),
                [] => Err(RecordError::BadRecord),
            },
            other => Err(RecordError::BadHeader { content_type: other, length: content.len() }),
        }
    }

    fn receive_key_update(&mut self, reply: bool) -> Result<Opened, RecordError> {
        self.updates_in_a_row += 1;
        if self.updates_in_a_row > MAX_UPDATES_IN_A_ROW {
            return Err(RecordError::TooManyUpdates);
        }
        self.receive = self.schedule.next_receive()?;
        Ok(Opened::KeyUpdate { reply })
    }
}

/// The length of the record at the front of `bytes`, once enough of it is there; `Err` as soon as it cannot be one.
/// For established sessions `handshaking` is false: only encrypted records may come.
pub fn record_length(bytes: &[u8], handshaking: bool) -> Result<Option<usize>, RecordError> {
    let Some(&[content_type, major, _minor, a, b]) = bytes.first_chunk::<RECORD_HEADER>() else {
        return match bytes.first() {
            // Garbage is refused at its first byte.
            Some(&first) if !acceptable(first, handshaking) => {
                Err(RecordError::BadHeader { content_type: first, length: 0 })
            }
            _ => Ok(None),
        };
    };
    let length = usize::from(u16::from_be_bytes([a, b]));
    let plausible = length > 0 && RECORD_HEADER + length <= MAX_RECORD && major == 3;
    // An encrypted record holds at least a content type and a tag.
    if !acceptable(content_type, handshaking) || !plausible || (!handshaking && length < RECORD_TRAILER) {
        return Err(RecordError::BadHeader { content_type, length });
    }
    Ok((bytes.len() >= RECORD_HEADER + length).then_some(RECORD_HEADER + length))
}

fn acceptable(content_type: u8, handshaking: bool) -> bool {
    content_type == APPLICATION_DATA || (handshaking && matches!(content_type, HANDSHAKE | ALERT | CHANGE_CIPHER_SPEC))
}
