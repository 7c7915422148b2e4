//! Keeps one posture in force in the kernel.

use std::collections::BTreeSet;
use std::io;

use super::FirewallError;
use super::express::Express;
use super::interfaces;
use super::netlink::{Batch, Netlink, OWNED_AND_PERSISTENT};
use super::policy::Posture;
use super::rules::{Marks, Ruleset};
use crate::clock;

/// The kernel counts timeouts in ticks of at most 10 ms, and a timeout of zero ticks would mean 'for ever': a remaining
/// lease shorter than this counts as ended.
const SHORTEST_LEASE_MS: u64 = 20;

/// The kernel counts a lease from when it gets it. If that was so long after the clock was read, the lease is shortened.
const PROMPT_NS: u64 = 20_000_000;

/// One owner of the tables.
#[derive(Debug)]
pub(crate) struct Enforcer {
    netlink: Netlink,
    table_flags: u32,
    only_interfaces: Option<Vec<String>>,
    marks: Marks,
    lease_deadline: Option<u64>,
    express: Express,
    applied: Option<Applied>,
}

#[derive(Debug)]
struct Applied {
    posture: Posture,
    interfaces: BTreeSet<String>,
    ruleset: Ruleset,
    /// What the kernel said right after.
    description: Vec<Vec<u8>>,
}

impl Enforcer {
    /// Takes part in the network namespace of the calling thread. `only_interfaces`: all but loopback if `None`.
    pub(crate) fn new(only_interfaces: Option<Vec<String>>) -> Result<Self, FirewallError> {
        Ok(Self {
            netlink: Netlink::open()?,
            table_flags: OWNED_AND_PERSISTENT,
            only_interfaces,
            marks: random_marks()?,
            lease_deadline: None,
            express: Express::default(),
            applied: None,
        })
    }

    /// Tables with other flags than ours: that others may change, for example, to test what happens then.
    #[cfg(test)]
    pub(crate) fn with_table_flags(
        table_flags: u32,
        only_interfaces: Option<Vec<String>>,
    ) -> Result<Self, FirewallError> {
        Ok(Self { table_flags, ..Self::new(only_interfaces)? })
    }

    /// The netlink port of our changes.
    pub(crate) fn port(&self) -> u32 {
        self.netlink.port()
    }

    /// Puts `posture` in force in one batch; the lease goes on. If the kernel refuses, what was in force before still is; but
    /// what was to be closed is tried again by each verification.
    pub(crate) fn apply(&mut self, posture: Posture) -> Result<(), FirewallError> {
        if posture == Posture::Closed {
            return self.close();
        }
        let interfaces = self.interfaces()?;
        self.express.occupy(&interfaces).map_err(FirewallError::Express)?;
        let ruleset = Ruleset::new(&posture, self.marks, &interfaces);
        if self.has_the_chains_of(&ruleset)? {
            self.netlink.commit(&Batch::exchange_rules(&ruleset))?;
            self.remember(posture, interfaces, ruleset)
        } else {
            self.replace(posture, interfaces, ruleset)
        }
    }

    /// For good, and without waiting for anything: whatever else is to be held (queues, new interfaces) is left to the
    /// verifications, which report when it cannot be.
    fn close(&mut self) -> Result<(), FirewallError> {
        self.lease_deadline = None;
        let interfaces = match (self.interfaces(), &self.applied) {
            (Ok(present), _) => present,
            (Err(error), Some(applied)) => {
                tracing::error!(%error, "packet filter: closing the interfaces that were there before");
                applied.interfaces.clone()
            }
            (Err(error), None) => return Err(error),
        };
        let ruleset = Ruleset::new(&Posture::Closed, self.marks, &interfaces);
        if let Err(error) = self.netlink.commit(&Batch::replace(&ruleset, self.table_flags, None)) {
            // At least what is there may close: the lease's end is a smaller change.
            if let Err(error) = self.netlink.commit(&Batch::lease(&ruleset, None)) {
                tracing::error!(%error, "packet filter: the lease could not be ended either");
            }
            // Nothing is known of what is there: the next verification finds it to be wrong.
            self.applied = Some(Applied { posture: Posture::Closed, interfaces, ruleset, description: Vec::new() });
            return Err(error.into());
        }
        self.remember(Posture::Closed, interfaces, ruleset)
    }

    /// Whether what is in force is what was applied, and has these chains.
    fn has_the_chains_of(&mut self, ruleset: &Ruleset) -> Result<bool, FirewallError> {
        let found = self.netlink.dump()?;
        let same = |applied: &Applied| applied.description == found && applied.ruleset.has_the_chains_of(ruleset);
        Ok(self.applied.as_ref().is_some_and(same))
    }

    /// Replaces tables, chains, set and rules, whatever is there.
    fn replace(
        &mut self,
        posture: Posture,
        interfaces: BTreeSet<String>,
        ruleset: Ruleset,
    ) -> Result<(), FirewallError> {
        let read_at = clock::boottime();
        self.netlink.commit(&Batch::replace(&ruleset, self.table_flags, self.lease_milliseconds(read_at)))?;
        self.shorten(&ruleset, read_at)?;
        self.remember(posture, interfaces, ruleset)
    }

    fn remember(
        &mut self,
        posture: Posture,
        interfaces: BTreeSet<String>,
        ruleset: Ruleset,
    ) -> Result<(), FirewallError> {
        let described = self.netlink.dump();
        // What cannot be described is as good as unknown, but it is what is wanted: a verification may put it back, never
        // what was there before.
        let description = described.as_ref().cloned().unwrap_or_default();
        self.applied = Some(Applied { posture, interfaces, ruleset, description });
        Ok(described.map(drop)?)
    }

    /// Lets traffic pass until `deadline` (CLOCK_BOOTTIME); a deadline in the past ends the lease. Does nothing when
    /// closed.
    pub(crate) fn renew(&mut self, deadline: u64) -> Result<(), FirewallError> {
        self.renew_as_of(clock::boottime(), deadline)
    }

    /// What is left until `deadline` is counted from `read_at`, when the clock was read.
    pub(super) fn renew_as_of(&mut self, read_at: u64, deadline: u64) -> Result<(), FirewallError> {
        let Some(applied) = self.applied.as_ref().filter(|applied| applied.posture != Posture::Closed) else {
            return Ok(());
        };
        let ruleset = applied.ruleset.clone();
        self.lease_deadline = Some(deadline);
        self.netlink.commit(&Batch::lease(&ruleset, self.lease_milliseconds(read_at)))?;
        self.shorten(&ruleset, read_at)
    }

    /// This process may have been held up, stopped even, between the reading of the clock and the commit: then the kernel has
    /// got a lease that ends too late, or one that is over already. It gets what is left now instead, until it gets it in time.
    fn shorten(&mut self, ruleset: &Ruleset, mut read_at: u64) -> Result<(), FirewallError> {
        while self.lease_milliseconds(read_at).is_some() && clock::boottime().saturating_sub(read_at) > PROMPT_NS {
            read_at = clock::boottime();
            self.netlink.commit(&Batch::lease(ruleset, self.lease_milliseconds(read_at)))?;
        }
        Ok(())
    }

    /// Compares what is in force with what was applied, and puts it back if it is not that. Returns what was wrong.
    pub(crate) fn verify(&mut self) -> Result<Option<String>, FirewallError> {
        let Some(applied) = &self.applied else { return Ok(None) };
        let expected = applied.description.clone();
        let interfaces = applied.interfaces.clone();
        let posture = applied.posture.clone();
        let found = self.netlink.dump()?;
        let present = self.interfaces()?;
        let fault = if found.is_empty() {
            Some("our tables were gone".to_owned())
        } else if present != interfaces {
            Some(format!("the network interfaces changed from {interfaces:?} to {present:?}"))
        } else if found != expected {
            let missing = expected.iter().filter(|part| !found.contains(part)).count();
            let foreign = found.iter().filter(|part| !expected.contains(part)).count();
            Some(format!("of our tables' parts {missing} were missing or changed, {foreign} were not ours"))
        } else {
            None
        };
        // The tables first: to take a queue may have to wait, and may fail.
        if fault.is_some() {
            let ruleset = Ruleset::new(&posture, self.marks, &present);
            self.replace(posture, present.clone(), ruleset)?;
        }
        self.express.occupy(&present).map_err(FirewallError::Express)?;
        Ok(fault)
    }

    /// What was left of the lease then, rounded down.
    fn lease_milliseconds(&self, read_at: u64) -> Option<u64> {
        let remaining = self.lease_deadline?.saturating_sub(read_at) / 1_000_000;
        (remaining >= SHORTEST_LEASE_MS).then_some(remaining)
    }

    fn interfaces(&self) -> Result<BTreeSet<String>, FirewallError> {
        let present = interfaces::all_but_loopback().map_err(FirewallError::Interfaces)?;
        Ok(match &self.only_interfaces {
            // A named interface that is not there (yet) has nothing to leave through.
            Some(only) => present.into_iter().filter(|name| only.contains(name)).collect(),
            None => present,
        })
    }
}

fn random_marks() -> Result<Marks, FirewallError> {
    let carried = random_mark()?;
    loop {
        let control = random_mark()?;
        if control != carried {
            return Ok(Marks { carried, control });
        }
    }
}

fn random_mark() -> Result<u32, FirewallError> {
    let mut bytes = [0; 4];
    loop {
        let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| FirewallError::Random(io::Error::from(error)))?;
        let mark = u32::from_ne_bytes(bytes);
        // 0 is the mark of every ordinary packet.
        if filled == bytes.len() && mark != 0 {
            return Ok(mark);
        }
    }
}
