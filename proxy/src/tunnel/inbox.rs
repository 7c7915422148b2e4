//! The receiving half of a tunnel, leased or shared: ciphertext as it arrives, records opened where they lie, frames.

use std::io::IoSliceMut;
use std::ops::Range;
use std::task::{Context, Poll, ready};

use super::link::LinkError;
use super::oct::frame::{Decoder, Event, Framing};
use super::tls::record::{MAX_CONTENT, MAX_OWN_RECORD, MAX_RECORD, Opened, Session, record_length};
use crate::relay::buffer::{self, Buffer, LARGE_RECORDS, Size};
use crate::relay::socket::Socket;

/// What has arrived: ciphertext, and the part of a record that is opened but not decoded.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) buffer: Option<Buffer>,
    /// The peer asked for new keys.
    pub(super) key_update_due: bool,
    decoder: Decoder,
    start: u32,
    end: u32,
    plain: (u32, u32),
    size: Size,
}

impl Inbox {
    /// Behind a handshake. `None`: the peer sent more than it may.
    pub(super) fn new(framing: Framing, leftover: &[u8]) -> Option<Self> {
        let mut inbox = Self {
            buffer: None,
            key_update_due: false,
            decoder: Decoder::new(framing),
            start: 0,
            end: 0,
            plain: (0, 0),
            size: Size::Small,
        };
        if !leftover.is_empty() {
            let mut buffer = buffer::take(if leftover.len() > MAX_RECORD { Size::Large } else { Size::Small });
            buffer.get_mut(..leftover.len())?.copy_from_slice(leftover);
            inbox.buffer = Some(buffer);
            inbox.end = leftover.len() as u32;
        }
        Some(inbox)
    }

    /// The next event from what has already arrived. The bytes of [`Event::Data`] are [`Inbox::piece`].
    pub(super) fn next(&mut self, session: &mut Session) -> Result<Option<Event>, LinkError> {
        loop {
            let Some(buffer) = &mut self.buffer else { return Ok(None) };
            let (start, end) = self.plain;
            if start < end {
                let (used, event) = self.decoder.next(&buffer[start as usize..end as usize])?;
                self.plain.0 += used as u32;
                match event {
                    None => continue,
                    some => return Ok(some),
                }
            }
            let arrived = &mut buffer[self.start as usize..self.end as usize];
            let Some(length) = record_length(arrived, false)? else {
                self.give_back();
                return Ok(None);
            };
            let opened = session.open(&mut arrived[..length])?;
            let record_start = self.start as usize;
            self.start += length as u32;
            match opened {
                Opened::Data(Range { start, end }) => {
                    self.plain = ((record_start + start) as u32, (record_start + end) as u32);
                }
                Opened::CloseNotify => return Err(LinkError::CloseNotify),
                Opened::KeyUpdate { reply } => self.key_update_due |= reply,
                Opened::Nothing => {}
            }
        }
    }

    /// The stream of the latest event, on a shared tunnel.
    pub(super) fn stream(&self) -> u32 {
        self.decoder.stream()
    }

    /// The last `length` bytes that were consumed.
    pub(super) fn piece(&self, length: usize) -> &[u8] {
        let end = self.plain.0 as usize;
        self.buffer.as_ref().map_or(&[], |buffer| &buffer[end - length..end])
    }

    /// Notes the last `length` bytes that were consumed among the buffer's ranges, which keeps them.
    pub(super) fn note(&mut self, length: usize) {
        let to = self.plain.0;
        if let Some(ranges) = self.buffer.as_mut().and_then(Buffer::ranges_mut) {
            ranges.push((to - length as u32, to));
        }
    }

    /// Reads more from the socket. Only when no range is noted and [`Inbox::next`] has found nothing.
    pub(super) fn poll_fill(&mut self, socket: &mut Socket, context: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        ready!(socket.poll_readable(context))?;
        self.make_room();
        let buffer = self.buffer.get_or_insert_with(|| buffer::take(self.size));
        let space = &mut buffer[self.end as usize..];
        let room = space.len();
        let read = match socket.poll_read_vectored(context, &mut [IoSliceMut::new(space)]) {
            Poll::Ready(Ok(read)) => read,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
            Poll::Pending => {
                self.give_back();
                return Poll::Pending;
            }
        };
        if read == 0 {
            return Poll::Ready(Err(LinkError::Truncated));
        }
        self.end += read as u32;
        self.size = if read == room {
            Size::Large
        } else if read < MAX_CONTENT {
            Size::Small
        } else {
            self.size
        };
        Poll::Ready(Ok(()))
    }

    /// Something of a frame or record has arrived, but not all.
    pub(super) fn is_mid_frame(&self) -> bool {
        self.buffer.is_some() || !self.decoder.is_between_frames()
    }

    /// Gives the buffer back as soon as nothing is in it.
    pub(super) fn give_back(&mut self) {
        let empty = self.start == self.end && self.plain.0 == self.plain.1;
        if empty && self.buffer.as_ref().is_some_and(|buffer| buffer.ranges().is_empty()) {
            self.buffer = None;
            (self.start, self.end, self.plain) = (0, 0, (0, 0));
        }
    }

    /// Moves an incomplete record to the front, and to a large buffer when the flow has become bulk.
    fn make_room(&mut self) {
        let Some(buffer) = &mut self.buffer else { return };
        let (start, end) = (self.start as usize, self.end as usize);
        if self.size == Size::Large && buffer.len() < LARGE_RECORDS * MAX_OWN_RECORD {
            let mut larger = buffer::take(Size::Large);
            larger[..end - start].copy_from_slice(&buffer[start..end]);
            *buffer = larger;
        } else {
            buffer.copy_within(start..end, 0);
        }
        self.start = 0;
        self.end = (end - start) as u32;
        self.plain = (0, 0);
    }
}
