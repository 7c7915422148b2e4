//! What is measured: the names of the contract, and any other number in their places.

use std::fmt;
use std::str::FromStr;

/// The scenarios that every report has, in its order.
pub const CONTRACT: [&str; 9] =
    ["rr-1", "rr-16", "rr-64", "fixed-4k", "crr-8", "stream-1", "stream-4", "stream-16", "idle-10k"];

/// What the report has besides.
pub const BESIDES: [&str; 3] = ["first-1k", "open-8k", "fair-64"];

/// Requests a second of all small flows of the fairness scenario together: far below what any contender carries.
pub const FAIR_RATE: u32 = 2000;

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
    /// `first-R`: the time to the first answer on a new connection, R a second.
    First(u32),
    /// `open-N`: the time to open N flows one after another.
    Open(usize),
    /// `fair-N`: N small flows beside one bulk flow.
    Fair(usize),
    /// `stream-N`: bulk from client to server over N flows.
    Stream(usize),
    /// `stream-N-down`: bulk from server to client.
    StreamDown(usize),
    /// `idle-N`: memory for each of N idle flows.
    Idle(usize),
}

impl Scenario {
    /// The scenarios of a quick run.
    pub fn contract() -> Vec<Self> {
        CONTRACT.iter().filter_map(|name| name.parse().ok()).collect()
    }

    /// The scenarios that are run when none are named.
    pub fn report() -> Vec<Self> {
        CONTRACT.iter().chain(&BESIDES).filter_map(|name| name.parse().ok()).collect()
    }

    /// Whether it leaves thousands of flows behind or weighs what earlier scenarios leave: it then gets a contender of
    /// its own, and is run less often.
    pub fn is_heavy(self) -> bool {
        matches!(self, Self::Idle(_) | Self::Open(_))
    }

    /// How often a round measures it. The tail at a fixed rate is the noisiest figure of all: any thread of the kernel
    /// that holds a processor for a few milliseconds is in it.
    pub fn times_a_round(self) -> usize {
        if matches!(self, Self::Fixed(_)) { 2 } else { 1 }
    }

    /// What it is, for people.
    pub fn describe(self) -> String {
        match self {
            Self::RoundTrip(n) => format!("64-byte round trips, {n} connection(s), closed loop"),
            Self::Fixed(rate) => format!("64-byte round trips at {rate}/s over {FIXED_CONNECTIONS} connections"),
            Self::Crr(n) => format!("connect, one round trip, close, {n} clients"),
            Self::Stream(n) => format!("bulk from client to server, {n} flow(s)"),
            Self::StreamDown(n) => format!("bulk from server to client, {n} flow(s)"),
            Self::First(rate) => format!("first answer on a new connection, {rate}/s, one at a time"),
            Self::Open(n) => format!("{n} flows opened one after another"),
            Self::Fair(n) => format!("{n} small flows at {FAIR_RATE}/s beside one bulk flow"),
            Self::Idle(n) => format!("{n} idle flows opened one after another and held"),
        }
    }

    /// The figure that a reader looks at first.
    pub fn headline(self) -> &'static str {
        match self {
            Self::RoundTrip(_) | Self::Crr(_) => "rate",
            Self::Fixed(_) => "p99_us",
            Self::First(_) => "p50_us",
            Self::Open(_) => "seconds",
            Self::Fair(_) => "p99_growth",
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
            Self::First(n) => write!(f, "first-{}", short(*n as usize)),
            Self::Open(n) => write!(f, "open-{}", short(*n)),
            Self::Fair(n) => write!(f, "fair-{n}"),
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
                "unknown scenario {name:?}; there are {}, {} (and the same with other numbers, and stream-N-down)",
                CONTRACT.join(", "),
                BESIDES.join(", ")
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
            "first" => Ok(Self::First(limited(10_000)? as u32)),
            "open" => Ok(Self::Open(limited(40_000)?)),
            "fair" => Ok(Self::Fair(limited(2048)?)),
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
        let all = Scenario::report();
        let names = [&CONTRACT[..], &BESIDES].concat();
        assert_eq!(all.iter().map(ToString::to_string).collect::<Vec<_>>(), names);
        assert_eq!("stream-4-down".parse(), Ok(Scenario::StreamDown(4)));
        assert_eq!("fixed-500".parse(), Ok(Scenario::Fixed(500)));
    }

    #[test]
    fn a_wrong_name_says_what_there_is() {
        for name in [
            "",
            "rr",
            "rr-",
            "first-20k",
            "rr-x",
            "rr-+1",
            "rr-0",
            "ping-1",
            "rr-1-down",
            "idle-99k",
            "rr-99999999999999999999k",
        ] {
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
