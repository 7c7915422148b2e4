//! Many idle connections, to weigh what each of them costs.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::{Outcome, Payload, connect};
use crate::error::BenchError;
use crate::histogram::Latencies;

/// Opens `count` connections one after another, each with one round trip. At each of `marks`, and when all are open, calls
/// `ready` with the outcome so far, which returns when they were held long enough; at last every one must still echo.
///
/// The time that `ready` takes is no part of the outcome's.
pub fn hold(
    to: SocketAddr,
    count: usize,
    size: usize,
    marks: &[usize],
    mut ready: impl FnMut(&Outcome) -> Result<(), BenchError>,
) -> Result<Outcome, BenchError> {
    let mut held = Vec::with_capacity(count);
    let mut latencies = Latencies::new()?;
    let mut opening = Duration::ZERO;
    let mut start = Instant::now();
    let mut outcome = Outcome::default();
    for index in 0..count {
        let began = Instant::now();
        let mut payload = Payload::new(index, size);
        let stream = connect::blocking(to)?;
        echo(&stream, &mut payload, index)?;
        latencies.record(began.elapsed());
        held.push((stream, payload));
        let open = held.len();
        if open == count || marks.contains(&open) {
            opening += start.elapsed();
            outcome = Outcome {
                operations: open as u64,
                operations_total: open as u64,
                bytes: (open * size) as u64,
                seconds: opening.as_secs_f64(),
                buckets: latencies.buckets(),
                ..Outcome::default()
            };
            ready(&outcome)?;
            start = Instant::now();
        }
    }
    for (index, (stream, payload)) in held.iter_mut().enumerate() {
        echo(stream, payload, index)?;
    }
    Ok(outcome)
}

fn echo(mut stream: &TcpStream, payload: &mut Payload, index: usize) -> Result<(), BenchError> {
    let what = |step: &str| format!("connection {index}: {step}");
    stream.write_all(payload.next()).map_err(BenchError::socket(what("sending")))?;
    let mut answer = vec![0; payload.bytes.len()];
    stream.read_exact(&mut answer).map_err(BenchError::socket(what("waiting for its echo")))?;
    if payload.echoes(0, &answer) { Ok(()) } else { Err(BenchError::Peer(what("the answer differs from the request"))) }
}
