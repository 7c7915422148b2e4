//! Packs frames of many streams into records, in the place that they are sealed and sent from.

use std::io::{self, IoSlice, IoSliceMut};
use std::task::{Context, Poll, ready};

use crate::relay::buffer::{self, Buffer, LARGE_RECORDS, Size};
use crate::relay::socket::Socket;
use crate::tunnel::link::LinkError;
use crate::tunnel::oct::frame::{SHARED_HEADER, shared_data_header};
use crate::tunnel::tls::record::{KEY_UPDATE_RECORD, MAX_CONTENT, MAX_OWN_RECORD, RECORD_HEADER, Session};

/// Data begins a new record if less than this is left in the last one.
const LEAST: usize = 512;

/// Control frames that may wait while the peer does not read. Each answers something that it sent, so this is what a peer
/// that sends without ever reading can make us hold.
const MAX_OVERFLOW: usize = 256 * 1024;

/// What the application's socket gave.
#[derive(Debug)]
pub enum Put {
    /// So many bytes are packed.
    Data(usize),
    /// There is no room now: [`Outbox::poll_send`] first.
    Full,
    /// The application ended its direction.
    End,
    /// The application's connection broke.
    Broken(io::Error),
}

/// Sealed records, and one that is still open at the end.
#[derive(Debug, Default)]
pub struct Outbox {
    buffer: Option<Buffer>,
    sent: usize,
    sealed: usize,
    /// Content of the open record.
    open: usize,
    size: Size,
    /// Control frames that found no room: they go before any further data.
    overflow: Vec<u8>,
}

impl Outbox {
    /// Whether nothing waits to be sent.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_none()
    }

    /// Bytes that wait to be sent.
    pub fn len(&self) -> usize {
        if self.buffer.is_some() { self.sealed - self.sent + self.open } else { 0 }
    }

    /// Packs an encoded control frame. `false` means that the peer makes us say more than it reads.
    pub fn control(&mut self, frame: &[u8], session: &mut Session) -> Result<bool, LinkError> {
        self.begin();
        if self.overflow.is_empty() {
            if self.fits(frame.len(), 1) {
                self.append(frame);
                return Ok(true);
            }
            self.seal(session)?;
            if self.fits(frame.len(), 1) || self.grow() {
                self.append(frame);
                return Ok(true);
            }
        }
        self.overflow.extend_from_slice(frame);
        Ok(self.overflow.len() <= MAX_OVERFLOW)
    }

    /// Packs data that was read before; how much of it found room.
    pub fn bytes(&mut self, stream: u32, bytes: &[u8], session: &mut Session) -> Result<usize, LinkError> {
        let room = self.data_room(session)?;
        let length = room.min(bytes.len());
        if length > 0 {
            let at = self.sealed + RECORD_HEADER + self.open;
            if let Some(buffer) = &mut self.buffer {
                buffer[at..at + SHARED_HEADER].copy_from_slice(&shared_data_header(stream, length));
                buffer[at + SHARED_HEADER..][..length].copy_from_slice(&bytes[..length]);
                self.open += SHARED_HEADER + length;
            }
        }
        Ok(length)
    }

    /// Packs what the application has sent, at most `limit` bytes and one frame, read into its place; `keep` gets a copy.
    pub fn read(
        &mut self,
        context: &mut Context<'_>,
        app: &mut Socket,
        stream: u32,
        limit: usize,
        keep: Option<&mut Vec<u8>>,
        session: &mut Session,
    ) -> Poll<Result<Put, LinkError>> {
        if let Err(error) = ready!(app.poll_readable(context)) {
            return Poll::Ready(Ok(Put::Broken(error)));
        }
        let room = self.data_room(session)?.min(limit);
        if room == 0 {
            return Poll::Ready(Ok(Put::Full));
        }
        let at = self.sealed + RECORD_HEADER + self.open;
        let Some(buffer) = &mut self.buffer else { return Poll::Ready(Ok(Put::Full)) };
        let place = &mut buffer[at + SHARED_HEADER..][..room];
        let read = app.poll_read_vectored(context, &mut [IoSliceMut::new(place)]);
        let put = match read {
            Poll::Ready(Ok(0)) => Put::End,
            Poll::Ready(Ok(read)) => {
                if let Some(keep) = keep {
                    keep.extend_from_slice(&place[..read]);
                }
                buffer[at..at + SHARED_HEADER].copy_from_slice(&shared_data_header(stream, read));
                self.open += SHARED_HEADER + read;
                return Poll::Ready(Ok(Put::Data(read)));
            }
            Poll::Ready(Err(error)) => Put::Broken(error),
            Poll::Pending => {
                self.give_back();
                return Poll::Pending;
            }
        };
        self.give_back();
        Poll::Ready(Ok(put))
    }

    /// Seals what is open and sends everything.
    pub fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        socket: &mut Socket,
        session: &mut Session,
    ) -> Poll<Result<(), LinkError>> {
        while self.buffer.is_some() {
            self.seal(session)?;
            self.size = if self.sealed > 2 * MAX_OWN_RECORD { Size::Large } else { Size::Small };
            while self.sent < self.sealed {
                let Some(buffer) = &self.buffer else { break };
                let rest = IoSlice::new(&buffer[self.sent..self.sealed]);
                self.sent += ready!(socket.poll_write_vectored(context, &[rest]))?;
            }
            self.buffer = None;
            if !self.overflow.is_empty() {
                self.begin();
                let length = self.overflow.len().min(MAX_CONTENT);
                let piece: Vec<u8> = self.overflow.drain(..length).collect();
                self.append(&piece);
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Seals a key update behind what is packed; `false`: no room yet.
    pub fn key_update(&mut self, session: &mut Session) -> Result<bool, LinkError> {
        self.begin();
        self.seal(session)?;
        let Some(buffer) = &mut self.buffer else { return Ok(false) };
        if buffer.len() - self.sealed < KEY_UPDATE_RECORD {
            return Ok(false);
        }
        self.sealed += session.seal_key_update(&mut buffer[self.sealed..])?;
        Ok(true)
    }

    fn begin(&mut self) {
        if self.buffer.is_none() {
            self.buffer = Some(buffer::take(self.size));
            (self.sent, self.sealed, self.open) = (0, 0, 0);
        }
    }

    fn append(&mut self, frame: &[u8]) {
        let at = self.sealed + RECORD_HEADER + self.open;
        if let Some(buffer) = &mut self.buffer {
            buffer[at..at + frame.len()].copy_from_slice(frame);
            self.open += frame.len();
        }
    }

    /// Whether `length` more bytes fit into the open record, with room for so many records (it and those behind it).
    fn fits(&self, length: usize, records: usize) -> bool {
        let space = self.buffer.as_ref().map_or(0, |buffer| buffer.len() - self.sealed);
        space >= records * MAX_OWN_RECORD && self.open + length <= MAX_CONTENT
    }

    /// Room for data behind a frame header, after sealing a record that is nearly full. In a large buffer the last record
    /// is kept free for control frames.
    fn data_room(&mut self, session: &mut Session) -> Result<usize, LinkError> {
        self.begin();
        if !self.overflow.is_empty() {
            return Ok(0);
        }
        if !self.has_data_room() {
            self.seal(session)?;
            if !self.has_data_room() && !self.grow() {
                return Ok(0);
            }
        }
        Ok(MAX_CONTENT - self.open - SHARED_HEADER)
    }

    fn has_data_room(&self) -> bool {
        let large = self.buffer.as_ref().is_some_and(|buffer| buffer.len() >= LARGE_RECORDS * MAX_OWN_RECORD);
        self.fits(SHARED_HEADER + LEAST, if large { 2 } else { 1 })
    }

    fn seal(&mut self, session: &mut Session) -> Result<(), LinkError> {
        if self.open > 0
            && let Some(buffer) = &mut self.buffer
        {
            self.sealed += session.seal_data(&mut buffer[self.sealed..], self.open)?;
            self.open = 0;
        }
        Ok(())
    }

    /// Moves to a large buffer; `false` if it is one already (or memory is short).
    fn grow(&mut self) -> bool {
        let Some(buffer) = &mut self.buffer else { return false };
        if buffer.len() >= LARGE_RECORDS * MAX_OWN_RECORD {
            return false;
        }
        let mut larger = buffer::take(Size::Large);
        if larger.len() <= buffer.len() {
            return false;
        }
        larger[..self.sealed - self.sent].copy_from_slice(&buffer[self.sent..self.sealed]);
        *buffer = larger;
        self.sealed -= self.sent;
        self.sent = 0;
        true
    }

    fn give_back(&mut self) {
        if self.sealed == 0 && self.open == 0 {
            self.buffer = None;
        }
    }
}
