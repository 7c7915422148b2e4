//! A thin epoll: the generator must cost far less than what it measures, so there is no runtime in between.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
pub(super) use rustix::event::epoll::EventFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::error::BenchError;

/// An epoll instance and the events of its last wait.
pub(super) struct Poll {
    fd: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Poll {
    /// A new instance that reports up to `batch` events at a time.
    pub(super) fn new(batch: usize) -> Result<Self, BenchError> {
        let fd = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| socket("creating an epoll instance", e))?;
        Ok(Self { fd, events: Vec::with_capacity(batch) })
    }

    /// Watches `source` for `interest` under the name `token`.
    pub(super) fn add(&self, source: impl AsFd, token: u64, interest: EventFlags) -> Result<(), BenchError> {
        epoll::add(&self.fd, source, epoll::EventData::new_u64(token), interest).map_err(|e| socket("epoll add", e))
    }

    /// Changes what a watched `source` is watched for.
    pub(super) fn modify(&self, source: impl AsFd, token: u64, interest: EventFlags) -> Result<(), BenchError> {
        epoll::modify(&self.fd, source, epoll::EventData::new_u64(token), interest)
            .map_err(|e| socket("epoll modify", e))
    }

    /// Waits for events for at most `timeout` (`None`: for ever); an interrupting signal counts as no event.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> Result<(), BenchError> {
        let timeout = timeout.map(timespec);
        self.events.clear();
        match epoll::wait(&self.fd, rustix::buffer::spare_capacity(&mut self.events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(socket("epoll wait", e)),
        }
    }

    /// The number of events of the last wait.
    pub(super) fn len(&self) -> usize {
        self.events.len()
    }

    /// Event `index` of the last wait: its token and what happened.
    pub(super) fn event(&self, index: usize) -> (u64, EventFlags) {
        let event = self.events[index];
        // The kernel's struct is packed: copy the fields out before they are used.
        let (data, flags) = (event.data, event.flags);
        (data.u64(), flags)
    }
}

/// A timer that fires at a fixed interval.
///
/// A timerfd rather than epoll's own timeout, because the latter has the 50 µs of timer slack of a normal thread.
pub(super) struct Ticker(OwnedFd);

impl Ticker {
    /// Starts it; the first expiry is one `interval` from now.
    pub(super) fn start(interval: Duration) -> Result<Self, BenchError> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|e| socket("creating a timer", e))?;
        let spec = Itimerspec { it_interval: timespec(interval), it_value: timespec(interval) };
        rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec)
            .map_err(|e| socket("starting a timer", e))?;
        Ok(Self(timer))
    }

    /// Takes note of an expiry. The kernel arms the next one only then.
    pub(super) fn acknowledge(&self) -> Result<(), BenchError> {
        match rustix::io::read(&self.0, &mut [0; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(socket("reading a timer", e)),
        }
    }
}

impl AsFd for Ticker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn timespec(d: Duration) -> Timespec {
    Timespec { tv_sec: d.as_secs().cast_signed(), tv_nsec: i64::from(d.subsec_nanos()) }
}

fn socket(what: &str, e: rustix::io::Errno) -> BenchError {
    BenchError::Socket { what: what.to_owned(), source: e.into() }
}
