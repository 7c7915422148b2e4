//! Buffers, pooled for each worker thread. A flow holds one only while it has bytes in it.

use std::cell::RefCell;
use std::io::IoSlice;
use std::ops::{Deref, DerefMut};

use crate::tunnel::link::MAX_PIECES;
use crate::tunnel::tls::record::{KEY_UPDATE_RECORD, MAX_OWN_RECORD, MAX_RECORD};

/// Records in a large buffer: about 256 KiB. (Measured: 64 → 256 KiB raised bulk throughput by 40 %.)
pub const LARGE_RECORDS: usize = 16;

const SMALL: usize = MAX_RECORD + KEY_UPDATE_RECORD;
const LARGE: usize = LARGE_RECORDS * MAX_OWN_RECORD + KEY_UPDATE_RECORD;

/// What a worker keeps for reuse; beyond that, memory goes back to the allocator.
const KEEP_SMALL: usize = 256;
const KEEP_LARGE: usize = 32;

/// What a worker has from the beginning, so that a rare moment in which more flows than ever have bytes at the same time
/// finds a buffer and not the allocator. (Memory that is not written to is not taken from the machine.)
const READY_SMALL: usize = 16;

/// Once this much is in use by a worker's flows, large buffers are not handed out: stuck flows make do with small ones.
const PRESSURE: usize = 128 * 1024 * 1024;

/// How much to ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Size {
    /// One record.
    #[default]
    Small,
    /// [`LARGE_RECORDS`] records.
    Large,
}

/// What a buffer holds besides bytes.
#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    ranges: Vec<(u32, u32)>,
}

/// A buffer on loan; dropping it gives it back.
#[derive(Debug)]
pub struct Buffer {
    // `None` only while being dropped.
    block: Option<Box<Block>>,
}

#[derive(Debug, Default)]
struct Pool {
    // Boxed on purpose: a flow's task holds a pointer, not the headers.
    #[allow(clippy::vec_box)]
    small: Vec<Box<Block>>,
    #[allow(clippy::vec_box)]
    large: Vec<Box<Block>>,
    lent: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

impl Block {
    fn of(length: usize) -> Self {
        Self { bytes: vec![0; length], ranges: Vec::with_capacity(MAX_PIECES) }
    }
}

/// Makes this thread's first buffers, and the shelves that later ones are kept on.
pub fn prepare() {
    POOL.with_borrow_mut(|pool| {
        pool.small.reserve(KEEP_SMALL);
        pool.large.reserve(KEEP_LARGE);
        pool.small.resize_with(READY_SMALL, || Box::new(Block::of(SMALL)));
    });
}

/// Takes a buffer. Its contents are left over from earlier use.
pub fn take(size: Size) -> Buffer {
    POOL.with_borrow_mut(|pool| {
        let size = if pool.lent > PRESSURE { Size::Small } else { size };
        let (shelf, length) = match size {
            Size::Small => (&mut pool.small, SMALL),
            Size::Large => (&mut pool.large, LARGE),
        };
        // With room for all that is ever noted in it: carrying bulk allocates nothing.
        let block = shelf.pop().unwrap_or_else(|| Box::new(Block::of(length)));
        pool.lent += length;
        Buffer { block: Some(block) }
    })
}

/// Bytes of one flow that its application does not take yet, in plaintext. Counted like buffers; gives its memory back
/// when it is empty.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: std::collections::VecDeque<u8>,
}

/// A worker's flows hold as much as they may: who does not read has to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the applications of this node leave too much unread")]
pub struct Overfull;

impl Backlog {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Adds to the end.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Overfull> {
        POOL.with_borrow_mut(|pool| {
            if pool.lent + bytes.len() > PRESSURE * 2 {
                return Err(Overfull);
            }
            pool.lent += bytes.len();
            Ok(())
        })?;
        self.bytes.extend(bytes);
        Ok(())
    }

    /// What waits, in order.
    pub fn pieces(&self) -> [IoSlice<'_>; 2] {
        let (first, second) = self.bytes.as_slices();
        [IoSlice::new(first), IoSlice::new(second)]
    }

    /// Drops so many from the front.
    pub fn consume(&mut self, bytes: usize) {
        self.bytes.drain(..bytes);
        Self::forget(bytes);
        if self.bytes.is_empty() {
            self.bytes = std::collections::VecDeque::new();
        }
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.consume(self.bytes.len());
    }

    fn forget(bytes: usize) {
        let forgotten = POOL.try_with(|pool| {
            let pool = &mut *pool.borrow_mut();
            pool.lent = pool.lent.saturating_sub(bytes);
        });
        if forgotten.is_err() {
            tracing::trace!("a backlog outlived its worker's pool");
        }
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        Self::forget(self.bytes.len());
    }
}

/// Bytes that this thread's flows hold at the moment.
pub fn lent() -> usize {
    POOL.with_borrow(|pool| pool.lent)
}

impl Buffer {
    /// The pieces of plaintext that wait to be delivered (start, end).
    pub fn ranges(&self) -> &[(u32, u32)] {
        self.block.as_deref().map_or(&[], |block| &block.ranges)
    }

    /// The same, to change.
    pub fn ranges_mut(&mut self) -> Option<&mut Vec<(u32, u32)>> {
        self.block.as_deref_mut().map(|block| &mut block.ranges)
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.block.as_deref().map_or(&[], |block| &block.bytes)
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.block.as_deref_mut().map_or(&mut [], |block| &mut block.bytes)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(mut block) = self.block.take() else { return };
        block.ranges.clear();
        // When the thread ends, its pool may be gone before its last flow: then the memory is simply freed.
        let returned = POOL.try_with(|pool| {
            let pool = &mut *pool.borrow_mut();
            pool.lent = pool.lent.saturating_sub(block.bytes.len());
            let (shelf, keep) =
                if block.bytes.len() == SMALL { (&mut pool.small, KEEP_SMALL) } else { (&mut pool.large, KEEP_LARGE) };
            if shelf.len() < keep {
                shelf.push(block);
            }
        });
        if returned.is_err() {
            tracing::trace!("a buffer outlived its worker's pool");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_pressure_makes_them_small() {
        let first = take(Size::Large);
        assert_eq!(first.len(), LARGE);
        assert_eq!(lent(), LARGE);
        drop(first);
        assert_eq!(lent(), 0);

        let many: Vec<_> = (0..=PRESSURE / LARGE).map(|_| take(Size::Large)).collect();
        assert_eq!(take(Size::Large).len(), SMALL, "under pressure");
        drop(many);
        assert_eq!(lent(), 0);
        assert_eq!(take(Size::Large).len(), LARGE, "and relieved of it");
    }
}
