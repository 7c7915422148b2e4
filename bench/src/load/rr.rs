//! Round trips: closed loop, and at a fixed rate.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::poll::{EventFlags, Poll, Ticker};
use super::{ANSWER_TIMEOUT, Outcome, Payload, Plan, Window, connect};
use crate::error::BenchError;
use crate::histogram::{Latencies, Schedule};

/// A client connection with at most one request under way.
struct Connection {
    stream: TcpStream,
    payload: Payload,
    received: usize,
    /// When the request under way was sent, or should have been.
    began: Option<Instant>,
}

impl Connection {
    fn open(plan: &Plan, index: usize) -> Result<Self, BenchError> {
        let stream = connect::established(plan.to)?;
        Ok(Self { stream, payload: Payload::new(index, plan.size), received: 0, began: None })
    }

    fn send(&mut self, began: Instant) -> Result<(), BenchError> {
        let request = self.payload.next();
        match self.stream.write(request) {
            Ok(n) if n == request.len() => {}
            Ok(n) => return Err(BenchError::Peer(format!("only {n} of {} bytes fitted the socket", request.len()))),
            Err(e) => return Err(BenchError::socket("sending a request")(e)),
        }
        self.received = 0;
        self.began = Some(began);
        Ok(())
    }

    /// Reads what there is; returns the begin of the request when its answer is complete.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<Instant>, BenchError> {
        let answer = match self.stream.read(buffer) {
            Ok(0) => return Err(BenchError::Peer("the server closed a connection in the middle of the run".into())),
            Ok(n) => &buffer[..n],
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(None),
            Err(e) => return Err(BenchError::socket("waiting for an answer")(e)),
        };
        if self.began.is_none() || !self.payload.echoes(self.received, answer) {
            return Err(BenchError::Peer(
                "an answer differs from its request: bytes were lost, doubled or mixed".into(),
            ));
        }
        self.received += answer.len();
        Ok(if self.received == self.payload.bytes.len() { self.began.take() } else { None })
    }
}

/// Each connection sends its next request when it has the answer to the last.
pub(super) fn closed(plan: &Plan) -> Result<Outcome, BenchError> {
    let (mut poll, mut connections) = connections(plan)?;
    let mut buffer = vec![0; 16 << 10];
    let mut window = Window::start(plan)?;
    for connection in &mut connections {
        connection.send(Instant::now())?;
    }
    let mut last_answer = Instant::now();
    loop {
        let now = Instant::now();
        if now >= window.closes {
            return Ok(window.finish());
        }
        poll.wait(Some(window.closes - now))?;
        for index in 0..poll.len() {
            let (token, _) = poll.event(index);
            let connection = &mut connections[token as usize];
            if let Some(began) = connection.receive(&mut buffer)? {
                let now = Instant::now();
                last_answer = now;
                window.completed(began, now, plan.size);
                connection.send(now)?;
            }
        }
        if last_answer.elapsed() > ANSWER_TIMEOUT {
            return Err(BenchError::Peer(format!("no answer at all for {} s", ANSWER_TIMEOUT.as_secs())));
        }
    }
}

/// Requests leave at fixed times, taking turns over the connections; latency counts from the intended time.
pub(super) fn fixed(plan: &Plan, rate: u32) -> Result<Outcome, BenchError> {
    let (mut poll, mut connections) = connections(plan)?;
    let timer_token = connections.len() as u64;
    let timer = Ticker::start(Duration::from_secs(1) / rate.max(1))?;
    poll.add(&timer, timer_token, EventFlags::IN)?;
    let mut waiting: Vec<VecDeque<Instant>> = vec![VecDeque::new(); connections.len()];
    let mut lag = Latencies::new()?;
    let mut buffer = vec![0; 16 << 10];

    let mut window = Window::start(plan)?;
    let schedule = Schedule::new(Instant::now(), rate, plan.warmup + plan.length);
    let give_up = window.closes + Duration::from_secs(2);
    let mut next = 0;
    let mut open = 0_u64;
    while next < schedule.total() || open > 0 {
        let now = Instant::now();
        if now >= give_up {
            break;
        }
        while next < schedule.total() && schedule.intended(next) <= now {
            let slot = (next % connections.len() as u64) as usize;
            waiting[slot].push_back(schedule.intended(next));
            open += 1;
            next += 1;
            send_waiting(&mut connections[slot], &mut waiting[slot], &mut lag)?;
        }
        poll.wait(Some(give_up - now))?;
        for index in 0..poll.len() {
            let (token, _) = poll.event(index);
            if token == timer_token {
                timer.acknowledge()?;
                continue;
            }
            let slot = token as usize;
            if let Some(intended) = connections[slot].receive(&mut buffer)? {
                open -= 1;
                completed_when_intended(&mut window, intended, Instant::now(), plan.size);
                send_waiting(&mut connections[slot], &mut waiting[slot], &mut lag)?;
            }
        }
    }
    // What was never answered has waited at least until now; to leave it out would be the omission again.
    let now = Instant::now();
    for intended in connections.iter().filter_map(|c| c.began).chain(waiting.into_iter().flatten()) {
        window.latencies.record(now - intended);
        window.outcome.failed(|| "unanswered 2 s after the end: the rate is more than the path carries".into());
    }
    let mut outcome = window.finish();
    outcome.send_lag_p99_us = Some(lag.quantile_us(0.99));
    Ok(outcome)
}

/// Whether an operation counts is decided by its intended time: a slow answer must not fall out of the window.
fn completed_when_intended(window: &mut Window, intended: Instant, now: Instant, size: usize) {
    window.outcome.operations_total += 1;
    window.outcome.bytes += size as u64;
    if intended >= window.opens {
        window.outcome.operations += u64::from(now <= window.closes);
        window.latencies.record(now.saturating_duration_since(intended));
    }
}

fn send_waiting(
    connection: &mut Connection,
    waiting: &mut VecDeque<Instant>,
    lag: &mut Latencies,
) -> Result<(), BenchError> {
    if connection.began.is_none()
        && let Some(intended) = waiting.pop_front()
    {
        lag.record(intended.elapsed());
        connection.send(intended)?;
    }
    Ok(())
}

fn connections(plan: &Plan) -> Result<(Poll, Vec<Connection>), BenchError> {
    let poll = Poll::new(256)?;
    let mut connections = Vec::with_capacity(plan.connections);
    for index in 0..plan.connections {
        let connection = Connection::open(plan, index)?;
        poll.add(&connection.stream, index as u64, EventFlags::IN)?;
        connections.push(connection);
    }
    Ok((poll, connections))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::load::Pattern;

    /// An echo that stalls once for `stall` after `after` answers.
    fn stalling_echo(after: usize, stall: Duration) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 64];
            for answered in 0.. {
                if stream.read_exact(&mut buffer).is_err() {
                    return;
                }
                if answered == after {
                    let (_keep, receiver) = std::sync::mpsc::sync_channel::<()>(0);
                    assert!(receiver.recv_timeout(stall).is_err(), "a pause");
                }
                if stream.write_all(&buffer).is_err() {
                    return;
                }
            }
        });
        address
    }

    fn plan(pattern: Pattern, to: std::net::SocketAddr) -> Plan {
        let length = Duration::from_millis(500);
        Plan { pattern, to, connections: 1, length, warmup: Duration::ZERO, size: 64 }
    }

    fn latencies(outcome: &Outcome) -> Latencies {
        let mut l = Latencies::new().unwrap();
        l.add_buckets(&outcome.buckets).unwrap();
        l
    }

    #[test]
    fn r37_a_stall_is_seen_by_every_request_that_should_have_left_during_it() {
        // 100 ms of 500 ms stalled, 1000/s: the 100 requests of that time waited 100, 99, 98 … ms.
        let outcome = run_fixed(Duration::from_millis(100));
        let l = latencies(&outcome);
        assert!(l.count() >= 490, "{}", l.count());
        assert!(l.quantile_us(0.90) > 30_000.0, "p90 {} µs: the stall was omitted", l.quantile_us(0.90));
        // The control: the closed loop sees the same stall as a single slow request of thousands.
        let to = stalling_echo(50, Duration::from_millis(100));
        let l = latencies(&closed(&plan(Pattern::RoundTrip, to)).unwrap());
        assert!(l.quantile_us(0.90) < 30_000.0, "p90 {} µs", l.quantile_us(0.90));
    }

    fn run_fixed(stall: Duration) -> Outcome {
        let to = stalling_echo(50, stall);
        fixed(&plan(Pattern::Fixed(1000), to), 1000).unwrap()
    }

    #[test]
    fn r37_requests_that_are_never_answered_count_as_slow_and_as_errors() {
        let outcome = run_fixed(Duration::from_secs(30));
        assert!(outcome.errors > 400, "{}", outcome.errors);
        assert!(latencies(&outcome).quantile_us(0.5) > 1_900_000.0);
    }

    #[test]
    fn a_wrong_answer_fails_the_run() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&[0; 64]).unwrap();
            // Held open until the client is gone.
            let mut sink = Vec::new();
            assert!(stream.read_to_end(&mut sink).is_ok() || sink.len() <= 64);
        });
        let error = closed(&plan(Pattern::RoundTrip, to)).unwrap_err();
        assert!(error.to_string().contains("differs"), "{error}");
    }
}
