//! Bulk: bytes one way, as fast as the path carries them.
//!
//! Up (client to sink) ends with the sink's own count of what arrived. So the figure is goodput, what still sat in
//! buffers when the sender stopped is waited for, and a byte lost or doubled on the way fails the run.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::poll::{EventFlags, Poll};
use super::{ANSWER_TIMEOUT, Outcome, Plan, connect};
use crate::error::BenchError;

/// Bytes of one write or read.
pub(super) const CHUNK: usize = 256 << 10;

struct Flow {
    stream: TcpStream,
    bytes: u64,
    trailer: Vec<u8>,
    state: State,
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum State {
    Moving,
    /// Up only: all is sent, the sink's count is awaited.
    Closing,
    Done,
}

/// `plan.connections` flows from here to a sink.
pub(super) fn up(plan: &Plan) -> Result<Outcome, BenchError> {
    let (mut poll, mut flows) = flows(plan, EventFlags::OUT)?;
    let chunk = vec![0x5a; CHUNK];
    let start = Instant::now();
    let end = start + plan.warmup + plan.length;
    let mut open = flows.len();
    while open > 0 {
        let now = Instant::now();
        if now >= end {
            close_moving(&poll, &mut flows)?;
        }
        if now >= end + ANSWER_TIMEOUT {
            return Err(BenchError::Peer(format!("{open} flows were not drained {ANSWER_TIMEOUT:?} after the end")));
        }
        poll.wait(Some(if now < end { end - now } else { end + ANSWER_TIMEOUT - now }))?;
        for event in 0..poll.len() {
            let (token, _) = poll.event(event);
            let flow = &mut flows[token as usize];
            match flow.state {
                State::Moving => flow.bytes += transferred(flow.stream.write(&chunk), "sending")?.unwrap_or(0) as u64,
                State::Closing => open -= usize::from(counted(flow)?),
                State::Done => {}
            }
        }
    }
    Ok(outcome(&flows, start.elapsed()))
}

/// `plan.connections` flows from a source to here; each is asked for as many milliseconds as the run is long.
pub(super) fn down(plan: &Plan) -> Result<Outcome, BenchError> {
    let (mut poll, mut flows) = flows(plan, EventFlags::IN)?;
    let length = plan.warmup + plan.length;
    let request = (length.as_millis() as u64).to_be_bytes();
    let mut buffer = vec![0; CHUNK];
    let start = Instant::now();
    for flow in &mut flows {
        flow.stream.write_all(&request).map_err(BenchError::socket("asking the source"))?;
    }
    let give_up = start + length + ANSWER_TIMEOUT;
    let mut open = flows.len();
    while open > 0 {
        let now = Instant::now();
        if now >= give_up {
            return Err(BenchError::Peer(format!("{open} flows had no end {ANSWER_TIMEOUT:?} after their time")));
        }
        poll.wait(Some(give_up - now))?;
        for event in 0..poll.len() {
            let (token, _) = poll.event(event);
            let flow = &mut flows[token as usize];
            if flow.state == State::Done {
                continue;
            }
            match transferred(flow.stream.read(&mut buffer), "receiving")? {
                Some(0) => {
                    flow.state = State::Done;
                    open -= 1;
                }
                Some(n) => flow.bytes += n as u64,
                None => {}
            }
        }
    }
    Ok(outcome(&flows, start.elapsed()))
}

fn flows(plan: &Plan, interest: EventFlags) -> Result<(Poll, Vec<Flow>), BenchError> {
    let poll = Poll::new(64)?;
    let mut flows = Vec::with_capacity(plan.connections);
    for index in 0..plan.connections {
        let stream = connect::established(plan.to)?;
        poll.add(&stream, index as u64, interest)?;
        flows.push(Flow { stream, bytes: 0, trailer: Vec::new(), state: State::Moving });
    }
    Ok((poll, flows))
}

fn close_moving(poll: &Poll, flows: &mut [Flow]) -> Result<(), BenchError> {
    for (index, flow) in flows.iter_mut().enumerate().filter(|(_, f)| f.state == State::Moving) {
        flow.stream.shutdown(Shutdown::Write).map_err(BenchError::socket("closing the sending side"))?;
        poll.modify(&flow.stream, index as u64, EventFlags::IN)?;
        flow.state = State::Closing;
    }
    Ok(())
}

/// Reads the sink's count; true when it is there and right.
fn counted(flow: &mut Flow) -> Result<bool, BenchError> {
    let mut buffer = [0; 16];
    match transferred(flow.stream.read(&mut buffer), "reading the sink's count")? {
        None => return Ok(false),
        Some(0) => return Err(BenchError::Peer("a flow was closed without the sink's count".into())),
        Some(n) => flow.trailer.extend_from_slice(&buffer[..n]),
    }
    let Ok(count) = <[u8; 8]>::try_from(flow.trailer.as_slice()) else { return Ok(false) };
    let count = u64::from_be_bytes(count);
    if count != flow.bytes {
        return Err(BenchError::Peer(format!("{} bytes were sent but {count} arrived", flow.bytes)));
    }
    flow.state = State::Done;
    Ok(true)
}

fn transferred(result: std::io::Result<usize>, what: &str) -> Result<Option<usize>, BenchError> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(BenchError::socket(what)(e)),
    }
}

fn outcome(flows: &[Flow], elapsed: Duration) -> Outcome {
    Outcome {
        operations: flows.len() as u64,
        operations_total: flows.len() as u64,
        bytes: flows.iter().map(|f| f.bytes).sum(),
        seconds: elapsed.as_secs_f64(),
        ..Outcome::default()
    }
}
