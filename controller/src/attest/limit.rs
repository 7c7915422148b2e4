//! A limit on failed attempts from one address, so that nobody can try tokens, or fill the log, for free.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many failures an address has at once.
const BURST: u32 = 10;

/// How long it takes to get one back.
const REFILL: Duration = Duration::from_secs(6);

/// How many addresses are remembered; the rest share one allowance.
const MAX_ADDRESSES: usize = 4096;

/// Counts failures by address: IPv4 addresses, IPv6 networks of 64 bits (one host has all of such a network).
#[derive(Debug, Default)]
pub struct FailureLimit(Mutex<HashMap<IpAddr, Allowance>>);

#[derive(Clone, Copy, Debug)]
struct Allowance {
    used: u32,
    since: Instant,
}

impl Allowance {
    fn refilled(self, now: Instant) -> Self {
        let back = now.saturating_duration_since(self.since).as_secs() / REFILL.as_secs();
        let back = u32::try_from(back).unwrap_or(u32::MAX).min(self.used);
        Self { used: self.used - back, since: self.since + REFILL * back }
    }
}

impl FailureLimit {
    /// Whether an attempt from this address is looked at.
    pub fn permits(&self, address: IpAddr, now: Instant) -> bool {
        let counts = self.counts();
        let count = counts
            .get(&source_group(address))
            .or_else(|| if counts.len() < MAX_ADDRESSES { None } else { counts.get(&OVERFLOW) });
        count.is_none_or(|count| count.refilled(now).used < BURST)
    }

    /// An attempt from this address failed.
    pub fn failed(&self, address: IpAddr, now: Instant) {
        let mut counts = self.counts();
        let mut group = source_group(address);
        if !counts.contains_key(&group) && counts.len() >= MAX_ADDRESSES {
            counts.retain(|_, count| count.refilled(now).used > 0);
            if counts.len() >= MAX_ADDRESSES {
                group = OVERFLOW;
            }
        }
        let count = counts.entry(group).or_insert(Allowance { used: 0, since: now });
        *count = if count.refilled(now).used == 0 { Allowance { used: 0, since: now } } else { count.refilled(now) };
        count.used = count.used.saturating_add(1).min(BURST);
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<IpAddr, Allowance>> {
        // Counts are whole at every moment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No host has this address.
const OVERFLOW: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// What is counted as one source: an IPv4 address, or an IPv6 network of 64 bits.
pub(crate) fn source_group(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from(network | 1))
        }
        IpAddr::V4(address) => IpAddr::V4(address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("address")
    }

    #[test]
    fn r36_failures_are_limited_by_address_and_forgiven_with_time() {
        let limit = FailureLimit::default();
        let start = Instant::now();
        for _ in 0..BURST {
            assert!(limit.permits(address("10.0.0.1"), start));
            limit.failed(address("10.0.0.1"), start);
        }
        assert!(!limit.permits(address("10.0.0.1"), start));
        assert!(!limit.permits(address("::ffff:10.0.0.1"), start), "the same host through a dual-stack socket");
        assert!(limit.permits(address("10.0.0.2"), start), "others are not concerned");
        assert!(limit.permits(address("10.0.0.1"), start + REFILL));
        limit.failed(address("10.0.0.1"), start + REFILL);
        assert!(!limit.permits(address("10.0.0.1"), start + REFILL));
    }

    #[test]
    fn r36_one_ipv6_network_is_one_source() {
        let limit = FailureLimit::default();
        let start = Instant::now();
        for host in 0..BURST {
            limit.failed(address(&format!("2001:db8::{host:x}")), start);
        }
        assert!(!limit.permits(address("2001:db8::ffff"), start));
        assert!(limit.permits(address("2001:db8:0:1::1"), start));
    }

    #[test]
    fn r36_the_memory_of_it_is_bounded_and_strangers_share_what_is_left() {
        let limit = FailureLimit::default();
        let start = Instant::now();
        for number in 0..MAX_ADDRESSES as u32 + BURST {
            limit.failed(IpAddr::from(number.to_be_bytes()), start);
        }
        assert!(limit.counts().len() <= MAX_ADDRESSES + 1);
        assert!(!limit.permits(address("192.0.2.1"), start), "the shared allowance is used up");
        assert!(limit.permits(address("192.0.2.1"), start + REFILL));
    }
}
