//! The rules as hash maps: what a decision looks up.

use std::cmp::Reverse;
use std::net::IpAddr;

use ipnet::IpNet;

use super::arena::{Arena, ArenaKey, NearTable, Region, SPREAD};
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

/// [`Who`] in one number. (Those in it have 30 bits: each stands for something that takes up more than 4 bytes of memory, of
/// which there would have to be 4 GiB.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WhoCode(u32);

impl From<Who> for WhoCode {
    fn from(who: Who) -> Self {
        Self(match who {
            Who::Anyone => 0,
            Who::Identity(number) => number << 2 | 1,
            Who::Group(number) => number << 2 | 2,
            Who::Namespace(number) => number << 2 | 3,
        })
    }
}

impl ArenaKey for WhoCode {
    /// Anyone's, who has a place of its own.
    const VACANT: Self = Self(0);

    fn mix(self) -> u64 {
        u64::from(self.0).wrapping_mul(SPREAD)
    }
}

/// Rules by scope and source.
#[derive(Debug, Default)]
pub(super) struct Table {
    scopes: Vec<Scope>,
    cells: Arena<WhoCode, Cell>,
    /// By [`Cell::ranges`].
    ranges: Vec<Ranges>,
    /// By [`Ranges::v6`].
    v6_ranges: Vec<V6Ranges>,
    v4: Arena<V4Range, Verdict>,
    v6: Arena<V6Range, Verdict>,
}

/// The rules of one scope: two lines of the cache that lie side by side. What it has none of is not looked up.
#[derive(Clone, Copy, Debug)]
#[repr(align(128))]
struct Scope {
    /// The rules about anyone, whatever the address, and those that ask for one.
    anyone: Verdict,
    anyone_at: Ranges,
    named: NearTable<WhoCode>,
    identities: bool,
    groups: bool,
    namespaces: bool,
}

/// The rules of one scope for one source.
#[derive(Clone, Copy, Debug)]
struct Cell {
    /// Whatever the address.
    anywhere: Verdict,
    /// Those that ask for addresses: an index of [`Table::ranges`], or `NONE`.
    ranges: u32,
}

/// The ranges of addresses of one cell.
#[derive(Clone, Copy, Debug)]
struct Ranges {
    v4: V4Ranges,
    /// An index of [`Table::v6_ranges`], or `NONE`.
    v6: u32,
}

impl Ranges {
    const NONE: Self = Self { v4: V4Ranges::Few([V4Ranges::NO_RANGE; FEW]), v6: NONE };
}

/// So many ranges lie where the scope does, and take no wait for memory of their own.
const FEW: usize = 2;

#[derive(Clone, Copy, Debug)]
enum V4Ranges {
    /// The longest first; the rest of the places are [`V4Ranges::NO_RANGE`].
    Few([(V4Range, Verdict); FEW]),
    Many {
        /// Which prefix lengths occur, one bit each, but for 32.
        lengths: u32,
        /// Length 32.
        hosts: bool,
        region: Region,
    },
}

impl V4Ranges {
    const NO_RANGE: (V4Range, Verdict) = (V4Range::VACANT, Verdict::NONE);
}

#[derive(Clone, Copy, Debug)]
struct V6Ranges {
    lengths: u128,
    /// Length 128, for which `lengths` has no bit.
    hosts: bool,
    region: Region,
}

/// A range of IPv4 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct V4Range {
    network: u32,
    length: u8,
}

impl V4Range {
    fn new(address: u32, length: u8) -> Self {
        // A shift by all 32 bits is no shift, so length 0 is told apart.
        let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
        Self { network: address & mask, length }
    }
}

impl ArenaKey for V4Range {
    const VACANT: Self = Self { network: 0, length: u8::MAX };

    fn mix(self) -> u64 {
        (u64::from(self.network) << 8 | u64::from(self.length)).wrapping_mul(SPREAD)
    }
}

/// A range of IPv6 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct V6Range {
    network: u128,
    length: u8,
}

impl V6Range {
    fn new(address: u128, length: u8) -> Self {
        let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
        Self { network: address & mask, length }
    }
}

impl ArenaKey for V6Range {
    const VACANT: Self = Self { network: 0, length: u8::MAX };

    fn mix(self) -> u64 {
        let upper = ((self.network >> 64) as u64).wrapping_mul(SPREAD);
        let lower = (self.network as u64) ^ u64::from(self.length);
        (upper.rotate_left(32) ^ lower).wrapping_mul(SPREAD)
    }
}

impl Table {
    /// What the rules of a scope say about a source at an address.
    pub(super) fn verdict(&self, scope: u32, source: Source, address: IpAddr) -> Verdict {
        let Some(rules) = self.scopes.get(scope as usize) else { return Verdict::NONE };
        let mut verdict = Verdict::NONE;
        if source.member {
            verdict = rules.anyone.and(self.longest_match(&rules.anyone_at, address));
        }
        for (has_rules, number, who) in [
            (rules.identities, source.identity, Who::Identity(source.identity)),
            (rules.groups, source.group, Who::Group(source.group)),
            (rules.namespaces, source.namespace, Who::Namespace(source.namespace)),
        ] {
            if has_rules
                && number != NONE
                && let Some(cell) = self.cells.get_near(&rules.named, who.into())
            {
                verdict = verdict.and(self.cell(cell, address));
            }
        }
        verdict
    }

    fn cell(&self, cell: &Cell, address: IpAddr) -> Verdict {
        match self.ranges.get(cell.ranges as usize) {
            // Most rules ask for no address.
            None => cell.anywhere,
            Some(ranges) => cell.anywhere.and(self.longest_match(ranges, address)),
        }
    }

    /// What the longest range that holds the address says; it includes what those around it say.
    fn longest_match(&self, ranges: &Ranges, address: IpAddr) -> Verdict {
        let found = match address.to_canonical() {
            IpAddr::V4(v4) => match &ranges.v4 {
                V4Ranges::Few(few) => few
                    .iter()
                    .take_while(|(range, _)| *range != V4Range::VACANT)
                    .find(|(range, _)| V4Range::new(v4.to_bits(), range.length) == *range)
                    .map(|(_, verdict)| verdict),
                V4Ranges::Many { lengths, hosts, region } => {
                    let find = |length| self.v4.get(*region, V4Range::new(v4.to_bits(), length));
                    let host = if *hosts { find(32) } else { None };
                    host.or_else(|| descending(u128::from(*lengths)).find_map(find))
                }
            },
            IpAddr::V6(v6) => self.v6_ranges.get(ranges.v6 as usize).and_then(|ranges| {
                let find = |length| self.v6.get(ranges.region, V6Range::new(v6.to_bits(), length));
                let host = if ranges.hosts { find(128) } else { None };
                host.or_else(|| descending(ranges.lengths).find_map(find))
            }),
        };
        found.copied().unwrap_or(Verdict::NONE)
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

impl Table {
    fn add_scope(&mut self, cells: &[(Who, CellBuilder)]) {
        let (mut anyone, mut anyone_at) = (Verdict::NONE, Ranges::NONE);
        let (mut identities, mut groups, mut namespaces) = (false, false, false);
        let mut named = Vec::with_capacity(cells.len());
        for (who, cell) in cells {
            let anywhere = cell.anywhere.unwrap_or(Verdict::NONE);
            match who {
                Who::Anyone => {
                    anyone = anywhere;
                    anyone_at = self.lay_out(&cell.ranges);
                    continue;
                }
                Who::Identity(_) => identities = true,
                Who::Group(_) => groups = true,
                Who::Namespace(_) => namespaces = true,
            }
            let mut ranges = NONE;
            if !cell.ranges.is_empty() {
                ranges = self.ranges.len() as u32;
                let laid_out = self.lay_out(&cell.ranges);
                self.ranges.push(laid_out);
            }
            named.push((WhoCode::from(*who), Cell { anywhere, ranges }));
        }
        let named = self.cells.add_near(&named);
        self.scopes.push(Scope { anyone, anyone_at, named, identities, groups, namespaces });
    }

    fn lay_out(&mut self, ranges: &FastMap<IpNet, Verdict>) -> Ranges {
        Ranges { v4: self.lay_out_v4(ranges), v6: self.lay_out_v6(ranges) }
    }

    fn lay_out_v4(&mut self, ranges: &FastMap<IpNet, Verdict>) -> V4Ranges {
        let of_family = || ranges.keys().filter_map(|range| if let IpNet::V4(v4) = range { Some(*v4) } else { None });
        let lengths = of_family().fold(0_u64, |lengths, v4| lengths | 1 << v4.prefix_len());
        let mut laid_out: Vec<(V4Range, Verdict)> = of_family()
            .map(|v4| {
                let verdict = around(v4.into(), u128::from(lengths), ranges);
                (V4Range::new(v4.network().to_bits(), v4.prefix_len()), verdict)
            })
            .collect();
        if laid_out.len() > FEW {
            let region = self.v4.add(&laid_out);
            return V4Ranges::Many { lengths: lengths as u32, hosts: lengths >> 32 == 1, region };
        }
        laid_out.sort_unstable_by_key(|(range, _)| Reverse(range.length));
        laid_out.resize(FEW, V4Ranges::NO_RANGE);
        V4Ranges::Few(std::array::from_fn(|place| laid_out[place]))
    }

    fn lay_out_v6(&mut self, ranges: &FastMap<IpNet, Verdict>) -> u32 {
        let of_family = || ranges.keys().filter_map(|range| if let IpNet::V6(v6) = range { Some(*v6) } else { None });
        let (mut lengths, mut hosts) = (0_u128, false);
        for v6 in of_family() {
            match v6.prefix_len() {
                128 => hosts = true,
                length => lengths |= 1 << length,
            }
        }
        let laid_out: Vec<(V6Range, Verdict)> = of_family()
            .map(|v6| {
                let verdict = around(v6.into(), lengths, ranges);
                (V6Range::new(v6.network().to_bits(), v6.prefix_len()), verdict)
            })
            .collect();
        if laid_out.is_empty() {
            return NONE;
        }
        let region = self.v6.add(&laid_out);
        self.v6_ranges.push(V6Ranges { lengths, hosts, region });
        self.v6_ranges.len() as u32 - 1
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_two_cache_lines() {
        assert_eq!(size_of::<Scope>(), 128);
    }
}
