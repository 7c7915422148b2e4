//! Many small hash tables in one piece of memory.
//!
//! A scope has a handful of rules, and a decision asks about several of them: what is looked up together lies together, in one
//! line of the cache, where tables of the whole index would cost a wait for memory each. Keys lie apart from values: most
//! of what is asked for is not there, and that is found out without reading a value. Open addressing, at most three quarters
//! full, made once and then only read.

use super::NONE;

/// A key, and how it is spread over a table. Keys come from the operators' configuration, and tables hold nothing else: who
/// merely asks can make no table slow.
pub(super) trait ArenaKey: Copy + Eq {
    /// A key that no entry has.
    const VACANT: Self;

    /// Its bits, mixed so that the upper ones depend on all.
    fn mix(self) -> u64;
}

/// An odd number without structure: multiplying by it carries every bit upward (Fibonacci hashing).
pub(super) const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

#[derive(Debug)]
pub(super) struct Arena<K, V> {
    keys: Vec<Line<K>>,
    values: Vec<V>,
}

/// So many keys of 4 bytes are a line of the cache: a table of a dozen rules is one.
const LINE: usize = 16;

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line<K>([K; LINE]);

/// A table whose keys lie with whoever asks it, if they are no more than a line: they are read at the same time as what else is
/// kept there, and not after it.
#[derive(Clone, Copy, Debug)]
pub(super) struct NearTable<K> {
    keys: [K; LINE],
    region: Region,
}

/// Where one table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    start: u32,
    bits: u8,
}

impl Region {
    pub(super) const EMPTY: Self = Self { start: NONE, bits: 0 };

    fn is_line(self) -> bool {
        self.bits <= LINE.ilog2() as u8
    }

    /// The places of a key, in the order in which they are tried.
    fn probe<K: ArenaKey>(self, key: K) -> impl Iterator<Item = usize> {
        let mask = (1_usize << self.bits) - 1;
        // Where there is no table there are no bits, and nothing is at its start.
        let first = key.mix().checked_shr(64 - u32::from(self.bits)).unwrap_or(0) as usize;
        (0..=mask).map(move |step| self.start as usize + ((first + step) & mask))
    }
}

impl<K, V> Default for Arena<K, V> {
    fn default() -> Self {
        Self { keys: Vec::new(), values: Vec::new() }
    }
}

impl<K: ArenaKey, V: Copy> Arena<K, V> {
    /// Adds a table of these entries, no two with the same key.
    pub(super) fn add(&mut self, entries: &[(K, V)]) -> Region {
        let Some(&(_, any)) = entries.first() else { return Region::EMPTY };
        // A third more: never full, and never fewer than two slots.
        let slots = (entries.len() * 4).div_ceil(3).next_power_of_two();
        // No table of up to a line is split between two.
        let start = self.values.len().next_multiple_of(slots.min(LINE));
        let region = Region { start: start as u32, bits: slots.trailing_zeros() as u8 };
        self.values.resize(start + slots, any);
        self.keys.resize(self.values.len().div_ceil(LINE), Line([K::VACANT; LINE]));
        for &(key, value) in entries {
            if let Some(at) = region.probe(key).find(|at| self.key(*at) == Some(K::VACANT)) {
                self.keys[at / LINE].0[at % LINE] = key;
                self.values[at] = value;
            }
        }
        region
    }

    /// The same, with the keys of a small table in what is returned.
    pub(super) fn add_near(&mut self, entries: &[(K, V)]) -> NearTable<K> {
        let region = self.add(entries);
        let line = self.keys.get(region.start as usize / LINE).filter(|_| region.is_line());
        NearTable { keys: line.map_or([K::VACANT; LINE], |line| line.0), region }
    }

    /// The value of a key in one table.
    pub(super) fn get(&self, region: Region, key: K) -> Option<&V> {
        self.find(region, key, |at| self.key(at))
    }

    /// The same of a table whose keys are near.
    pub(super) fn get_near(&self, table: &NearTable<K>, key: K) -> Option<&V> {
        if table.region.is_line() {
            // The region's whole line was copied, so that its places in it are the same.
            self.find(table.region, key, |at| Some(table.keys[at % LINE]))
        } else {
            self.get(table.region, key)
        }
    }

    fn find(&self, region: Region, key: K, key_at: impl Fn(usize) -> Option<K>) -> Option<&V> {
        for at in region.probe(key) {
            match key_at(at) {
                Some(found) if found == key => return self.values.get(at),
                Some(found) if found != K::VACANT => {}
                _ => return None,
            }
        }
        None
    }

    fn key(&self, at: usize) -> Option<K> {
        self.keys.get(at / LINE).map(|line| line.0[at % LINE])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl ArenaKey for u64 {
        const VACANT: Self = 0;

        /// As bad as can be within a table: everything collides.
        fn mix(self) -> u64 {
            self << 60
        }
    }

    #[test]
    fn every_table_answers_for_itself() {
        let mut arena = Arena::default();
        let tables: Vec<(u64, NearTable<u64>)> = (0..40)
            .map(|size| (size, arena.add_near(&(1..=size).map(|key| (key, (size, key))).collect::<Vec<_>>())))
            .collect();
        for (size, table) in tables {
            for key in 1..=50 {
                let value = (key <= size).then_some((size, key));
                assert_eq!(arena.get(table.region, key), value.as_ref());
                assert_eq!(arena.get_near(&table, key), value.as_ref());
            }
        }
    }
}
