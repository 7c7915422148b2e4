//! Many small hash tables in one piece of memory.
//!
//! A scope has a handful of rules, and a decision asks about several of them: what is looked up together lies together, in one
//! or two lines of the cache, where tables of the whole index would cost a wait for memory each. Open addressing, at most three
//! quarters full, made once and then only read.

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
    slots: Vec<(K, V)>,
}

/// Where one table is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    start: u32,
    bits: u8,
}

impl Region {
    pub(super) const EMPTY: Self = Self { start: NONE, bits: 0 };

    /// The places of a key, in the order in which they are tried.
    fn probe<K: ArenaKey>(self, key: K) -> impl Iterator<Item = usize> {
        let mask = (1_usize << self.bits) - 1;
        let first = (key.mix() >> (64 - u32::from(self.bits))) as usize;
        (0..=mask).map(move |step| (first + step) & mask)
    }
}

impl<K, V> Default for Arena<K, V> {
    fn default() -> Self {
        Self { slots: Vec::new() }
    }
}

impl<K: ArenaKey, V: Copy> Arena<K, V> {
    /// Adds a table of these entries, no two with the same key.
    pub(super) fn add(&mut self, entries: &[(K, V)]) -> Region {
        let Some(&(_, any)) = entries.first() else { return Region::EMPTY };
        // One more than a third more: never full, and never fewer than two slots.
        let slots = (entries.len() + entries.len() / 3 + 1).next_power_of_two();
        let start = self.slots.len();
        let region = Region { start: start as u32, bits: slots.trailing_zeros() as u8 };
        self.slots.resize(start + slots, (K::VACANT, any));
        let table = &mut self.slots[start..];
        for &(key, value) in entries {
            if let Some(at) = region.probe(key).find(|at| table[*at].0 == K::VACANT) {
                table[at] = (key, value);
            }
        }
        region
    }

    /// The value of a key in one table.
    pub(super) fn get(&self, region: Region, key: K) -> Option<&V> {
        let table = self.slots.get(region.start as usize..)?.get(..1 << region.bits)?;
        for at in region.probe(key) {
            match table.get(at) {
                Some((found, value)) if *found == key => return Some(value),
                Some((found, _)) if *found != K::VACANT => {}
                _ => return None,
            }
        }
        None
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
        let regions: Vec<(u64, Region)> = (0..40)
            .map(|size| (size, arena.add(&(1..=size).map(|key| (key, (size, key))).collect::<Vec<_>>())))
            .collect();
        for (size, region) in regions {
            for key in 1..=50 {
                assert_eq!(arena.get(region, key), (key <= size).then_some(&(size, key)));
            }
        }
    }
}
