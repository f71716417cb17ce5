//! Blocks of one volume that are superseded and yet kept (rule 14), for two reasons: as long as the version that
//! superseded them is above min(F, H) it may be taken back, here by a crash or by a resync, or a snapshot may be taken
//! between the two; and what is the newest at or below a pin is what that snapshot reads.

use crate::index::Entry;
use crate::log::Position;
use std::collections::{BTreeMap, BTreeSet};
use torus_rpc::message::Few;
use torus_schema::ids::{BlockIndex, Version};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Kept {
    pub block: BlockIndex,
    pub version: Version,
}

/// What need not be kept of a volume.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// min(F, H), as records in the log say them. Zero frees nothing.
    pub limit: Version,
    /// Ascending.
    pub pins: Vec<Version>,
}

impl Bounds {
    /// A record of `version` that `by` superseded is garbage.
    pub fn frees(&self, version: Version, by: Version) -> bool {
        by <= self.limit && !self.pinned(version, by)
    }

    /// There is a pin that reads what is older than `by` and not older than `version`.
    pub fn pinned(&self, version: Version, by: Version) -> bool {
        self.lowest_pin_from(version).is_some_and(|pin| pin < by)
    }

    /// At or above `version`.
    pub fn lowest_pin_from(&self, version: Version) -> Option<Version> {
        self.pins.get(self.pins.partition_point(|pin| *pin < version)).copied()
    }
}

#[derive(Clone, Copy, Debug)]
struct Held {
    /// What superseded it: the next version of the block, or a later one where records came out of order, which keeps
    /// it longer than need be.
    by: Version,
    position: Position,
    checksum: u32,
}

#[derive(Default, Debug)]
pub struct Pins {
    kept: BTreeMap<Kept, Held>,
    /// Those whose successor is above the limit, by the successor: a higher limit releases the lowest.
    waiting: BTreeSet<(Version, Kept)>,
    /// The others: only a pin holds them.
    pinned: BTreeSet<Kept>,
}

impl Pins {
    /// Keeps what lies at the entry's position. A second copy of the same takes the place of the first if `replace`;
    /// the position of the one that is not kept comes back.
    pub fn keep(
        &mut self,
        block: BlockIndex,
        entry: Entry,
        by: Version,
        replace: bool,
        bounds: &Bounds,
    ) -> Option<Position> {
        let kept = Kept { block, version: entry.version };
        match self.kept.get_mut(&kept) {
            None if bounds.frees(entry.version, by) => Some(entry.position),
            None => {
                let held = Held { by, position: entry.position, checksum: entry.checksum };
                self.kept.insert(kept, held);
                self.list(kept, by, bounds);
                None
            }
            Some(held) if replace => {
                held.checksum = entry.checksum;
                Some(std::mem::replace(&mut held.position, entry.position))
            }
            Some(_) => Some(entry.position),
        }
    }

    fn list(&mut self, kept: Kept, by: Version, bounds: &Bounds) {
        if by > bounds.limit {
            self.waiting.insert((by, kept));
        } else {
            self.pinned.insert(kept);
        }
    }

    /// Forgets what was superseded at or below the limit, except what is pinned.
    pub fn release(&mut self, bounds: &Bounds) -> Few<Position> {
        let mut freed = Few::new();
        while let Some((by, kept)) = self.waiting.first().copied().filter(|(by, _)| *by <= bounds.limit) {
            self.waiting.remove(&(by, kept));
            if bounds.pinned(kept.version, by) {
                self.pinned.insert(kept);
            } else {
                freed.extend(self.kept.remove(&kept).map(|held| held.position));
            }
        }
        freed
    }

    /// The pins are others.
    pub fn repin(&mut self, bounds: &Bounds) -> Vec<Position> {
        let unpinned = |kept: &&Kept| !bounds.pinned(kept.version, self.kept[kept].by);
        let unpinned: Vec<Kept> = self.pinned.iter().filter(unpinned).copied().collect();
        unpinned.into_iter().filter_map(|kept| self.take(kept)).map(|entry| entry.position).collect()
    }

    /// It is kept no longer.
    pub fn take(&mut self, kept: Kept) -> Option<Entry> {
        let held = self.kept.remove(&kept)?;
        self.waiting.remove(&(held.by, kept));
        self.pinned.remove(&kept);
        Some(Entry { position: held.position, checksum: held.checksum, version: kept.version })
    }

    /// The newest kept version of the block at or below `limit`.
    pub fn newest(&self, block: BlockIndex, limit: Version) -> Option<Entry> {
        let range = Kept { block, version: Version::ZERO }..=Kept { block, version: limit };
        let (kept, held) = self.kept.range(range).next_back()?;
        Some(Entry { position: held.position, checksum: held.checksum, version: kept.version })
    }

    /// All that is kept of the block, ascending.
    pub fn versions(&self, block: BlockIndex) -> impl Iterator<Item = Version> + '_ {
        let range = Kept { block, version: Version::ZERO }..=Kept { block, version: HIGHEST };
        self.kept.range(range).map(|(kept, _)| kept.version)
    }

    /// Says of every kept version of the block anew what superseded it, because something was taken back.
    pub fn rechain(&mut self, block: BlockIndex, next_above: impl Fn(Version) -> Version, bounds: &Bounds) {
        let range = Kept { block, version: Version::ZERO }..=Kept { block, version: HIGHEST };
        let chain: Vec<Version> = self.kept.range(range).map(|(kept, _)| kept.version).collect();
        for (at, version) in chain.iter().enumerate() {
            let above = next_above(*version);
            let by = chain.get(at + 1).map_or(above, |next| above.min(*next));
            let kept = Kept { block, version: *version };
            let held = self.kept.get_mut(&kept).expect("just listed");
            let before = std::mem::replace(&mut held.by, by);
            self.waiting.remove(&(before, kept));
            self.pinned.remove(&kept);
            self.list(kept, by, bounds);
        }
    }

    /// Something older than `version` is kept of a block of first..end for which `counts` says yes.
    pub fn holds_older(
        &self,
        (first, end): (BlockIndex, BlockIndex),
        version: Version,
        counts: impl Fn(BlockIndex) -> bool,
    ) -> bool {
        let range = Kept { block: first, version: Version::ZERO }..Kept { block: end, version: Version::ZERO };
        self.kept.range(range).any(|(kept, _)| kept.version < version && counts(kept.block))
    }

    /// The lowest version that superseded anything kept, and that is above the limit.
    pub fn oldest(&self) -> Option<Version> {
        self.waiting.first().map(|(by, _)| *by)
    }

    /// It was copied; false if it is not kept, or lies elsewhere.
    pub fn relocate(&mut self, kept: Kept, from: Position, to: Position) -> bool {
        let found = self.kept.get_mut(&kept).filter(|held| held.position == from);
        found.map(|held| held.position = to).is_some()
    }

    pub fn position(&self, kept: Kept) -> Option<Position> {
        self.kept.get(&kept).map(|held| held.position)
    }

    pub fn positions(&self) -> impl Iterator<Item = Position> + '_ {
        self.kept.values().map(|held| held.position)
    }

    /// All that is kept.
    #[cfg(test)]
    pub fn all(&self) -> impl Iterator<Item = (BlockIndex, Entry)> + '_ {
        let entry = |kept: &Kept, held: &Held| Entry {
            position: held.position,
            checksum: held.checksum,
            version: kept.version,
        };
        self.kept.iter().map(move |(kept, held)| (kept.block, entry(kept, held)))
    }
}

const HIGHEST: Version = Version { epoch: torus_schema::ids::Epoch(u32::MAX), sequence: u64::MAX };

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::ids::Epoch;

    fn version(sequence: u64) -> Version {
        Version::new(Epoch(1), sequence)
    }

    fn kept(block: u64, sequence: u64) -> Kept {
        Kept { block: BlockIndex(block), version: version(sequence) }
    }

    fn entry(sequence: u64, position: u32) -> Entry {
        Entry { position: Position(position), checksum: 7, version: version(sequence) }
    }

    fn bounds(limit: u64, pins: &[u64]) -> Bounds {
        Bounds { limit: version(limit), pins: pins.iter().map(|pin| version(*pin)).collect() }
    }

    #[test]
    fn what_was_superseded_is_released_when_its_successor_is_flushed_and_not_before() {
        let (mut pins, start) = (Pins::default(), bounds(1, &[]));
        assert_eq!(pins.keep(BlockIndex(1), entry(3, 50), version(5), true, &start), None);
        assert_eq!(pins.keep(BlockIndex(2), entry(3, 70), version(7), true, &start), None);
        assert_eq!(pins.keep(BlockIndex(3), entry(0, 90), version(1), true, &start), Some(Position(90)));
        assert_eq!(pins.oldest(), Some(version(5)));
        assert_eq!(pins.release(&bounds(4, &[])).to_vec(), vec![]);
        assert_eq!(pins.release(&bounds(5, &[])).to_vec(), vec![Position(50)]);
        assert_eq!(pins.release(&bounds(9, &[])).to_vec(), vec![Position(70)]);
    }

    #[test]
    fn the_newest_at_or_below_a_pin_is_kept_until_the_pin_goes() {
        let (mut pins, start) = (Pins::default(), bounds(0, &[]));
        for (sequence, by) in [(1, 3), (3, 6), (6, 9)] {
            pins.keep(BlockIndex(1), entry(sequence, 10 * sequence as u32), version(by), true, &start);
        }
        assert_eq!(pins.release(&bounds(9, &[5])).to_vec(), vec![Position(10), Position(60)]);
        assert_eq!(pins.newest(BlockIndex(1), version(5)), Some(entry(3, 30)));
        assert_eq!(pins.oldest(), None, "a flush point would not free it");
        assert_eq!(pins.keep(BlockIndex(1), entry(4, 40), version(9), true, &bounds(9, &[5])), None);
        assert_eq!(pins.repin(&bounds(9, &[4])), vec![]);
        assert_eq!(pins.repin(&bounds(9, &[])), vec![Position(30), Position(40)]);
    }

    #[test]
    fn of_two_copies_of_what_is_kept_one_is_enough() {
        let (mut pins, start) = (Pins::default(), bounds(0, &[]));
        pins.keep(BlockIndex(1), entry(3, 50), version(5), true, &start);
        assert_eq!(pins.keep(BlockIndex(1), entry(3, 60), version(6), true, &start), Some(Position(50)));
        assert_eq!(pins.keep(BlockIndex(1), entry(3, 70), version(6), false, &start), Some(Position(70)));
        assert!(!pins.relocate(kept(1, 3), Position(50), Position(80)));
        assert!(pins.relocate(kept(1, 3), Position(60), Position(80)));
        assert_eq!(pins.release(&bounds(5, &[])).to_vec(), vec![Position(80)]);
    }

    #[test]
    fn when_a_version_is_taken_back_what_it_superseded_waits_for_the_next() {
        let (mut pins, start) = (Pins::default(), bounds(0, &[]));
        pins.keep(BlockIndex(1), entry(1, 10), version(2), true, &start);
        pins.keep(BlockIndex(1), entry(2, 20), version(5), true, &start);
        assert_eq!(pins.take(kept(1, 2)), Some(entry(2, 20)));
        pins.rechain(BlockIndex(1), |_| version(5), &start);
        assert_eq!(pins.release(&bounds(4, &[])).to_vec(), vec![]);
        assert!(pins.holds_older((BlockIndex(0), BlockIndex(2)), version(2), |_| true));
        assert!(!pins.holds_older((BlockIndex(0), BlockIndex(2)), version(1), |_| true));
        assert_eq!(pins.release(&bounds(5, &[])).to_vec(), vec![Position(10)]);
    }
}
