//! Shared tunnels: many small flows over one tunnel ("mice share").
//!
//! What is gained is system calls and packets: everything that a worker's flows have to say in one turn leaves in one
//! write, and what arrives in one read is written to each application from where it lies. Each stream has a window of its
//! own, so that one slow reader stalls nobody. A stream that carries bulk moves to a leased tunnel ("elephants lease"),
//! where TCP's own flow control does everything.
//!
//! [`hub`] is one shared tunnel, driven by one task; [`stream`] is what it keeps for each flow; [`outbox`] packs frames
//! into records. The flow's own task is in `relay/shared.rs`.

pub mod hub;
pub mod outbox;
pub mod stream;

/// Bytes that a stream's receiver takes beyond what the application has read. Enough for 1 Gbit/s over 1 ms; what wants
/// more is bulk, and moves to a tunnel of its own.
pub const WINDOW: u32 = 128 * 1024;

/// Flows on one tunnel at most: a lost packet delays all of them, and what is saved by sharing is saved by then.
pub const STREAMS: usize = 256;
