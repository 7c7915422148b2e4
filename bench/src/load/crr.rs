//! Connect, one round trip, close: what a client without a connection pool does.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use super::poll::{EventFlags, Poll};
use super::{ANSWER_TIMEOUT, Outcome, Payload, Plan, Window, connect};
use crate::error::BenchError;

/// So many failures one after another end the run.
const HOPELESS: u64 = 100;

enum State {
    Connecting,
    Waiting,
}

struct Client {
    stream: TcpStream,
    state: State,
    began: Instant,
    received: usize,
}

/// `plan.connections` clients, each starting its next transaction when the last is done.
pub(super) fn run(plan: &Plan) -> Result<Outcome, BenchError> {
    let mut poll = Poll::new(256)?;
    let mut window = Window::start(plan)?;
    let mut payloads: Vec<Payload> = (0..plan.connections).map(|i| Payload::new(i, plan.size)).collect();
    let mut buffer = vec![0; 16 << 10];
    let mut clients = Vec::with_capacity(plan.connections);
    for index in 0..plan.connections {
        clients.push(start(plan, &poll, index)?);
    }
    let mut failures_in_a_row = 0;
    let mut last_success = Instant::now();
    loop {
        let now = Instant::now();
        if now >= window.closes {
            return Ok(window.finish());
        }
        poll.wait(Some(window.closes - now))?;
        for event in 0..poll.len() {
            let (token, flags) = poll.event(event);
            let index = token as usize;
            match step(&mut clients[index], &mut payloads[index], flags, &mut buffer) {
                Ok(false) => continue,
                Ok(true) => {
                    last_success = Instant::now();
                    failures_in_a_row = 0;
                    window.completed(clients[index].began, last_success, plan.size);
                }
                Err(error) => {
                    failures_in_a_row += 1;
                    window.outcome.failed(|| error.to_string());
                    if failures_in_a_row >= HOPELESS {
                        return Err(error);
                    }
                }
            }
            // The old stream closes here, which also takes it out of the epoll set.
            clients[index] = start(plan, &poll, index)?;
        }
        if last_success.elapsed() > ANSWER_TIMEOUT {
            return Err(BenchError::Peer(format!("no transaction done for {} s", ANSWER_TIMEOUT.as_secs())));
        }
    }
}

fn start(plan: &Plan, poll: &Poll, index: usize) -> Result<Client, BenchError> {
    let began = Instant::now();
    let stream = connect::begun(plan.to).map_err(BenchError::socket(format!("connecting to {}", plan.to)))?;
    // Edge-triggered for both directions: one registration serves the whole life of the connection.
    poll.add(&stream, index as u64, EventFlags::IN | EventFlags::OUT | EventFlags::ET)?;
    Ok(Client { stream, state: State::Connecting, began, received: 0 })
}

/// Advances a client; true when its transaction is complete.
fn step(client: &mut Client, payload: &mut Payload, flags: EventFlags, buffer: &mut [u8]) -> Result<bool, BenchError> {
    if let State::Connecting = client.state {
        if flags.contains(EventFlags::ERR) {
            let error = client.stream.take_error().map_err(BenchError::socket("reading a socket's error"))?;
            return Err(BenchError::socket("connecting")(error.unwrap_or_else(|| ErrorKind::Other.into())));
        }
        if !flags.contains(EventFlags::OUT) {
            return Ok(false);
        }
        let request = payload.next();
        let sent = client.stream.write(request).map_err(BenchError::socket("sending a request"))?;
        if sent != request.len() {
            return Err(BenchError::Peer(format!("only {sent} of {} bytes fitted a new socket", request.len())));
        }
        client.state = State::Waiting;
        return Ok(false);
    }
    match client.stream.read(buffer) {
        Ok(0) => Err(BenchError::Peer("the connection was closed before its answer".into())),
        Ok(n) if payload.echoes(client.received, &buffer[..n]) => {
            client.received += n;
            Ok(client.received == payload.bytes.len())
        }
        Ok(_) => Err(BenchError::Peer("an answer differs from its request".into())),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
        Err(e) => Err(BenchError::socket("waiting for an answer")(e)),
    }
}
