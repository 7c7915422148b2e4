//! What is measured: the names of the contract, and any other number in their places.

use std::fmt;
use std::str::FromStr;

/// The scenarios of the report, in its order.
pub const CONTRACT: [&str; 9] =
    ["rr-1", "rr-16", "rr-64", "fixed-4k", "crr-8", "stream-1", "stream-4", "stream-16", "idle-10k"];

/// Connections of the fixed-rate scenario.
pub const FIXED_CONNECTIONS: usize = 16;

/// One scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scenario {
    /// `rr-N`: closed-loop round trips over N connections.
    RoundTrip(usize),
    /// `fixed-R`: R requests a second over 16 connections.
    Fixed(u32),
    /// `crr-N`: connect, round trip, close, by N clients.
    Crr(usize),
    /// `stream-N`: bulk from client to server over N flows.
    Stream(usize),
    /// `stream-N-down`: bulk from server to client.
    StreamDown(usize),
    /// `idle-N`: memory for each of N idle flows.
    Idle(usize),
}

impl Scenario {
    /// The scenarios that are run when none are named.
    pub fn contract() -> Vec<Self> {
        CONTRACT.iter().filter_map(|name| name.parse().ok()).collect()
    }

    /// What it is, for people.
    pub fn describe(self) -> String {
        match self {
            Self::RoundTrip(n) => format!("64-byte round trips, {n} connection(s), closed loop"),
            Self::Fixed(rate) => format!("64-byte round trips at {rate}/s over {FIXED_CONNECTIONS} connections"),
            Self::Crr(n) => format!("connect, one round trip, close, {n} clients"),
            Self::Stream(n) => format!("bulk from client to server, {n} flow(s)"),
            Self::StreamDown(n) => format!("bulk from server to client, {n} flow(s)"),
            Self::Idle(n) => format!("{n} idle flows opened one after another and held"),
        }
    }

    /// The figure that a reader looks at first.
    pub fn headline(self) -> &'static str {
        match self {
            Self::RoundTrip(_) | Self::Crr(_) => "rate",
            Self::Fixed(_) => "p99_us",
            Self::Stream(_) | Self::StreamDown(_) => "gbit_s",
            Self::Idle(_) => "bytes_per_flow",
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RoundTrip(n) => write!(f, "rr-{n}"),
            Self::Fixed(n) => write!(f, "fixed-{}", short(*n as usize)),
            Self::Crr(n) => write!(f, "crr-{n}"),
            Self::Stream(n) => write!(f, "stream-{n}"),
            Self::StreamDown(n) => write!(f, "stream-{n}-down"),
            Self::Idle(n) => write!(f, "idle-{}", short(*n)),
        }
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let unknown = || {
            format!(
                "unknown scenario {name:?}; there are {} (and the same with other numbers, and stream-N-down)",
                CONTRACT.join(", ")
            )
        };
        let (kind, rest) = name.split_once('-').ok_or_else(unknown)?;
        let (number, down) = match rest.strip_suffix("-down") {
            Some(number) if kind == "stream" => (number, true),
            Some(_) => return Err(unknown()),
            None => (rest, false),
        };
        let number = parse_number(number).ok_or_else(unknown)?;
        let limited = |limit: usize| {
            if (1..=limit).contains(&number) {
                Ok(number)
            } else {
                Err(format!("{name}: the number must be between 1 and {limit}"))
            }
        };
        match kind {
            "rr" => Ok(Self::RoundTrip(limited(4096)?)),
            "fixed" => Ok(Self::Fixed(limited(1_000_000)? as u32)),
            "crr" => Ok(Self::Crr(limited(4096)?)),
            "stream" if down => Ok(Self::StreamDown(limited(4096)?)),
            "stream" => Ok(Self::Stream(limited(4096)?)),
            // Below the number of ephemeral ports of the namespaces.
            "idle" => Ok(Self::Idle(limited(40_000)?)),
            _ => Err(unknown()),
        }
    }
}

/// `4k` is 4000.
fn parse_number(text: &str) -> Option<usize> {
    if !text.bytes().next()?.is_ascii_digit() {
        return None;
    }
    match text.strip_suffix('k') {
        Some(thousands) => thousands.parse::<usize>().ok()?.checked_mul(1000),
        None => text.parse().ok(),
    }
}

fn short(n: usize) -> String {
    if n >= 1000 && n.is_multiple_of(1000) { format!("{}k", n / 1000) } else { n.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r37_every_name_of_the_contract_is_a_scenario_and_keeps_its_name() {
        let all = Scenario::contract();
        assert_eq!(all.iter().map(ToString::to_string).collect::<Vec<_>>(), CONTRACT);
        assert_eq!("stream-4-down".parse(), Ok(Scenario::StreamDown(4)));
        assert_eq!("fixed-500".parse(), Ok(Scenario::Fixed(500)));
    }

    #[test]
    fn a_wrong_name_says_what_there_is() {
        for name in
            ["", "rr", "rr-", "rr-x", "rr-+1", "rr-0", "ping-1", "rr-1-down", "idle-99k", "rr-99999999999999999999k"]
        {
            let error = name.parse::<Scenario>().unwrap_err();
            assert!(error.contains("fixed-4k") || error.contains("between"), "{name}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(name in "\\PC{0,24}") {
            if let Ok(scenario) = name.parse::<Scenario>() {
                proptest::prop_assert_eq!(scenario.to_string().parse::<Scenario>(), Ok(scenario));
            }
        }
    }
}
