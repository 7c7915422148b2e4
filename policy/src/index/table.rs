//! The rules as hash maps: what a decision looks up.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Decision, FastMap, NONE, RuleId};
use crate::resource::Effect;

/// The first rule of each effect that matched; `NONE` where none did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    deny: u32,
    allow: u32,
}

impl Verdict {
    pub(super) const NONE: Self = Self { deny: NONE, allow: NONE };

    fn of(rule: u32, effect: Effect) -> Self {
        match effect {
            Effect::Allow => Self { allow: rule, ..Self::NONE },
            Effect::Deny => Self { deny: rule, ..Self::NONE },
        }
    }

    /// What two sets of rules say together.
    pub(super) fn and(self, other: Self) -> Self {
        Self { deny: self.deny.min(other.deny), allow: self.allow.min(other.allow) }
    }

    /// A deny beats every allow.
    pub(super) fn decision(self) -> Decision {
        match self {
            Self { deny: NONE, allow: NONE } => Decision::DefaultDeny,
            Self { deny: NONE, allow } => Decision::Allow(RuleId(allow)),
            Self { deny, .. } => Decision::Deny(RuleId(deny)),
        }
    }
}

/// What rules can match a source by. `NONE`: not by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// Its number, if the configuration names it.
    pub(super) identity: u32,
    /// The workloads of its namespace that back the same services.
    pub(super) group: u32,
    pub(super) namespace: u32,
    /// Whether it is a workload of our own trust domain: only those are matched by their address alone.
    pub(super) member: bool,
}

/// Whom a rule is about, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Who {
    Anyone,
    Identity(u32),
    Group(u32),
    Namespace(u32),
}

impl Who {
    /// Different for each. (A number has 30 bits: what it stands for takes up more than 4 bytes of memory, of which there
    /// would have to be 4 GiB.)
    fn code(self) -> u32 {
        match self {
            Self::Anyone => 0,
            Self::Identity(number) => number << 2 | 1,
            Self::Group(number) => number << 2 | 2,
            Self::Namespace(number) => number << 2 | 3,
        }
    }
}

/// Rules by scope and source.
///
/// Each scope has a small hash table of its own, a part of `slots`: what one decision looks up is close together, and the
/// memory that most decisions touch stays small.
#[derive(Debug, Default)]
pub(super) struct Table {
    scopes: Vec<Scope>,
    slots: Vec<Slot>,
    /// By [`Cell::ranges`].
    ranges: Vec<Lengths>,
    v4: FastMap<V4Range, Verdict>,
    v6: FastMap<V6Range, Verdict>,
}

/// Where a scope's part of the slots is: 2^`bits` from `start`, open addressing, at most three quarters full.
#[derive(Clone, Copy, Debug)]
struct Scope {
    anyone: Cell,
    start: u32,
    bits: u8,
    identities: bool,
    groups: bool,
    namespaces: bool,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// `VACANT`, or [`Who::code`].
    code: u32,
    cell: Cell,
}

/// No code: that of anyone, who is not in a slot.
const VACANT: u32 = 0;

/// The rules of one scope for one kind of source.
#[derive(Clone, Copy, Debug)]
struct Cell {
    /// Whatever the address.
    anywhere: Verdict,
    /// Those that ask for addresses: an index of [`Table::ranges`].
    ranges: u32,
}

impl Cell {
    const EMPTY: Self = Self { anywhere: Verdict::NONE, ranges: NONE };
}

/// The prefix lengths that occur among the ranges of one cell, one bit each.
#[derive(Clone, Copy, Debug, Default)]
struct Lengths {
    v4: u64,
    v6: u128,
    /// Length 128, for which `v6` has no bit.
    v6_hosts: bool,
}

/// A range of IPv4 addresses in one cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct V4Range {
    cell_and_network: u64,
    length: u8,
}

impl V4Range {
    fn new(cell: u32, address: u32, length: u8) -> Self {
        // A shift by all 32 bits is no shift, so length 0 is told apart.
        let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
        Self { cell_and_network: u64::from(cell) << 32 | u64::from(address & mask), length }
    }
}

/// A range of IPv6 addresses in one cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct V6Range {
    network: u128,
    cell: u32,
    length: u8,
}

impl V6Range {
    fn new(cell: u32, address: u128, length: u8) -> Self {
        let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
        Self { network: address & mask, cell, length }
    }
}

impl Table {
    /// What the rules of a scope say about a source at an address.
    pub(super) fn verdict(&self, scope: u32, source: Source, address: IpAddr) -> Verdict {
        let Some(rules) = self.scopes.get(scope as usize) else { return Verdict::NONE };
        let mut verdict = Verdict::NONE;
        if source.member {
            verdict = self.cell(&rules.anyone, address);
        }
        for (has_rules, number, who) in [
            (rules.identities, source.identity, Who::Identity(source.identity)),
            (rules.groups, source.group, Who::Group(source.group)),
            (rules.namespaces, source.namespace, Who::Namespace(source.namespace)),
        ] {
            if has_rules
                && number != NONE
                && let Some(cell) = self.find(rules, who.code())
            {
                verdict = verdict.and(self.cell(cell, address));
            }
        }
        verdict
    }

    /// The cell with this code in a scope.
    fn find(&self, rules: &Scope, code: u32) -> Option<&Cell> {
        let slots = self.slots.get(rules.start as usize..)?.get(..1 << rules.bits)?;
        // Each table has a vacant slot, where the search ends at the latest.
        probe(code, rules.bits)
            .map_while(|at| slots.get(at))
            .take_while(|slot| slot.code != VACANT)
            .find(|slot| slot.code == code)
            .map(|slot| &slot.cell)
    }

    fn cell(&self, cell: &Cell, address: IpAddr) -> Verdict {
        match self.ranges.get(cell.ranges as usize) {
            // Most rules ask for no address.
            None => cell.anywhere,
            Some(lengths) => cell.anywhere.and(self.longest_match(cell.ranges, lengths, address)),
        }
    }

    /// What the longest range that holds the address says; it includes what those around it say.
    fn longest_match(&self, cell: u32, lengths: &Lengths, address: IpAddr) -> Verdict {
        match address.to_canonical() {
            IpAddr::V4(v4) => descending(u128::from(lengths.v4))
                .find_map(|length| self.v4.get(&V4Range::new(cell, v4.to_bits(), length)))
                .copied(),
            IpAddr::V6(v6) => lengths
                .v6_hosts
                .then(|| self.v6.get(&V6Range::new(cell, v6.to_bits(), 128)))
                .flatten()
                .or_else(|| {
                    descending(lengths.v6).find_map(|length| self.v6.get(&V6Range::new(cell, v6.to_bits(), length)))
                })
                .copied(),
        }
        .unwrap_or(Verdict::NONE)
    }
}

/// The numbers of the bits that are set, highest first.
fn descending(mut bits: u128) -> impl Iterator<Item = u8> {
    std::iter::from_fn(move || {
        let highest = bits.checked_ilog2()?;
        bits &= !(1 << highest);
        u8::try_from(highest).ok()
    })
}

/// Collects rules and lays them out as a [`Table`].
#[derive(Debug, Default)]
pub(super) struct TableBuilder {
    cells: FastMap<(u32, Who), CellBuilder>,
}

#[derive(Debug, Default)]
struct CellBuilder {
    anywhere: Option<Verdict>,
    ranges: FastMap<IpNet, Verdict>,
}

impl TableBuilder {
    /// Adds a rule that asks for no address (`None`) or for any one of some ranges.
    pub(super) fn add(&mut self, scope: u32, who: Who, ranges: Option<&[IpNet]>, rule: u32, effect: Effect) {
        let verdict = Verdict::of(rule, effect);
        match ranges {
            None => {
                let cell = self.cells.entry((scope, who)).or_default();
                cell.anywhere = Some(cell.anywhere.map_or(verdict, |before| before.and(verdict)));
            }
            // Addresses that nobody can have: the rule matches nothing.
            Some([]) => {}
            Some(ranges) => {
                let cell = self.cells.entry((scope, who)).or_default();
                for range in ranges {
                    cell.ranges.entry(*range).and_modify(|before| *before = before.and(verdict)).or_insert(verdict);
                }
            }
        }
    }

    /// The table for scopes 0 to `scopes` - 1.
    pub(super) fn build(self, scopes: usize) -> Table {
        let mut by_scope: Vec<Vec<(Who, CellBuilder)>> = Vec::new();
        by_scope.resize_with(scopes, Vec::new);
        for ((scope, who), cell) in self.cells {
            by_scope[scope as usize].push((who, cell));
        }
        let mut table = Table::default();
        for cells in by_scope {
            table.add_scope(&cells);
        }
        table
    }
}

/// Where to look for a code in 2^`bits` slots, in order (Fibonacci hashing; the numbers are ours, nobody can choose them).
fn probe(code: u32, bits: u8) -> impl Iterator<Item = usize> {
    let mask = (1_usize << bits) - 1;
    let first = (u64::from(code).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - u32::from(bits))) as usize;
    (0..=mask).map(move |step| (first + step) & mask)
}

impl Table {
    fn add_scope(&mut self, cells: &[(Who, CellBuilder)]) {
        let named = cells.iter().filter(|(who, _)| *who != Who::Anyone).count();
        // At least two slots, so that the shift in `probe` is less than 64, and never full.
        let bits = (named + named / 3 + 2).next_power_of_two().trailing_zeros() as u8;
        let start = self.slots.len();
        self.slots.resize(start + (1 << bits), Slot { code: VACANT, cell: Cell::EMPTY });
        let mut scope = Scope {
            anyone: Cell::EMPTY,
            start: start as u32,
            bits,
            identities: false,
            groups: false,
            namespaces: false,
        };
        for (who, cell) in cells {
            let cell = self.lay_out(cell);
            match who {
                Who::Anyone => {
                    scope.anyone = cell;
                    continue;
                }
                Who::Identity(_) => scope.identities = true,
                Who::Group(_) => scope.groups = true,
                Who::Namespace(_) => scope.namespaces = true,
            }
            let slots = &mut self.slots[start..];
            let vacant = probe(who.code(), bits).find(|at| slots[*at].code == VACANT);
            if let Some(at) = vacant {
                slots[at] = Slot { code: who.code(), cell };
            }
        }
        self.scopes.push(scope);
    }

    fn lay_out(&mut self, cell: &CellBuilder) -> Cell {
        let anywhere = cell.anywhere.unwrap_or(Verdict::NONE);
        if cell.ranges.is_empty() {
            return Cell { anywhere, ranges: NONE };
        }
        let number = self.ranges.len() as u32;
        let mut lengths = Lengths::default();
        for range in cell.ranges.keys() {
            match range {
                IpNet::V4(v4) => lengths.v4 |= 1 << v4.prefix_len(),
                IpNet::V6(v6) if v6.prefix_len() == 128 => lengths.v6_hosts = true,
                IpNet::V6(v6) => lengths.v6 |= 1 << v6.prefix_len(),
            }
        }
        self.ranges.push(lengths);
        for range in cell.ranges.keys() {
            match range {
                IpNet::V4(v4) => {
                    let key = V4Range::new(number, v4.network().to_bits(), v4.prefix_len());
                    self.v4.insert(key, around(*range, u128::from(lengths.v4), &cell.ranges));
                }
                IpNet::V6(v6) => {
                    let key = V6Range::new(number, v6.network().to_bits(), v6.prefix_len());
                    self.v6.insert(key, around(*range, lengths.v6, &cell.ranges));
                }
            }
        }
        Cell { anywhere, ranges: number }
    }
}

/// What a range's rules and those of all ranges around it (with the prefix lengths that occur) say together.
fn around(range: IpNet, lengths: u128, ranges: &FastMap<IpNet, Verdict>) -> Verdict {
    let own = ranges.get(&range).copied().unwrap_or(Verdict::NONE);
    descending(lengths)
        .filter(|length| *length < range.prefix_len())
        .filter_map(|length| IpNet::new(range.addr(), length).ok())
        .filter_map(|wider| ranges.get(&wider.trunc()))
        .fold(own, |verdict, wider| verdict.and(*wider))
}
