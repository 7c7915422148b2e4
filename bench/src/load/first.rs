//! The first byte on a new flow: how long an application waits that opens a connection for one question.
//!
//! One connection at a time, begun at fixed times far enough apart that none has to wait for the one before it on a path
//! that keeps up: unlike the closed loop of crr, this says what a connection costs on a machine that is not saturated.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use rustix::thread::{NanosleepRelativeResult, Timespec};

use super::{Outcome, Payload, Plan, Window, connect};
use crate::error::BenchError;
use crate::histogram::Schedule;

/// `rate` new connections a second, each with one round trip.
pub(super) fn run(plan: &Plan, rate: u32) -> Result<Outcome, BenchError> {
    let mut window = Window::start(plan)?;
    let schedule = Schedule::new(Instant::now(), rate, plan.warmup + plan.length);
    let mut payload = Payload::new(0, plan.size);
    let mut answer = vec![0; plan.size];
    for index in 0..schedule.total() {
        let intended = schedule.intended(index);
        let early = intended.saturating_duration_since(Instant::now());
        let began = if early.is_zero() {
            // The one before took longer than its share: this one has been waiting since its time came.
            intended
        } else {
            // What the sleep itself was late by is the generator's fault, and no connection's.
            pause(early);
            Instant::now()
        };
        let mut stream = connect::blocking(plan.to)?;
        stream.write_all(payload.next()).map_err(BenchError::socket("sending on a new connection"))?;
        stream.read_exact(&mut answer).map_err(BenchError::socket("waiting for the first answer"))?;
        if !payload.echoes(0, &answer) {
            return Err(BenchError::Peer("an answer differs from its request".into()));
        }
        window.completed(began, Instant::now(), plan.size);
    }
    Ok(window.finish())
}

/// Blocks this thread, which has nothing else to do.
fn pause(time: Duration) {
    let mut rest = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() };
    while let NanosleepRelativeResult::Interrupted(remaining) = rustix::thread::nanosleep(&rest) {
        rest = remaining;
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::histogram::Latencies;
    use crate::load::Pattern;

    /// An echo for one round trip a connection, which is slow to accept the one with number `slow`.
    fn echo(slow: usize, delay: Duration) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for (index, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                if index == slow {
                    pause(delay);
                }
                let mut buffer = [0; 64];
                stream.read_exact(&mut buffer).unwrap();
                stream.write_all(&buffer).unwrap();
            }
        });
        address
    }

    #[test]
    fn r37_a_slow_connection_also_costs_those_that_had_to_wait_for_it() {
        let (length, warmup) = (Duration::from_millis(400), Duration::ZERO);
        let to = echo(20, Duration::from_millis(100));
        let plan = Plan { pattern: Pattern::First(200), to, connections: 1, length, warmup, size: 64 };
        let outcome = run(&plan, 200).unwrap();
        let mut latencies = Latencies::new().unwrap();
        latencies.add_buckets(&outcome.buckets).unwrap();
        // 80 connections: one took 100 ms, and the 20 of that time waited 95, 90, 85 … ms for it.
        assert!(latencies.count() > 70, "{}", latencies.count());
        assert!(latencies.quantile_us(0.88) > 30_000.0, "p88 {} µs", latencies.quantile_us(0.88));
        assert!(latencies.quantile_us(0.5) < 30_000.0, "p50 {} µs", latencies.quantile_us(0.5));
    }
}
