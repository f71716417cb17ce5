//! Blocks of one volume that are superseded and yet kept (rule 14): as long as the version that superseded them is above
//! F, it may be taken back, here by a crash or by a resync, and then they are what is current.

use crate::log::Position;
use ahash::AHashMap;
use std::collections::BTreeSet;
use torus_schema::ids::{BlockIndex, Version};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Kept {
    pub block: BlockIndex,
    pub version: Version,
}

#[derive(Default)]
pub struct Pins {
    kept: AHashMap<Kept, (Version, Position)>,
    /// The same by what superseded them: F releases the lowest.
    by: BTreeSet<(Version, Kept)>,
}

impl Pins {
    /// Keeps what lies at `position`. A second copy of the same takes the place of the first if `replace`; the position
    /// of the one that is not kept comes back.
    pub fn keep(&mut self, kept: Kept, by: Version, position: Position, replace: bool) -> Option<Position> {
        match self.kept.get_mut(&kept) {
            None => {
                self.kept.insert(kept, (by, position));
                self.by.insert((by, kept));
                None
            }
            Some((_, standing)) if replace => Some(std::mem::replace(standing, position)),
            Some(_) => Some(position),
        }
    }

    /// Forgets what was superseded at or below `flush_point`.
    pub fn release(&mut self, flush_point: Version) -> Vec<Position> {
        let mut freed = Vec::new();
        while let Some((by, kept)) = self.by.first().copied().filter(|(by, _)| *by <= flush_point) {
            self.by.remove(&(by, kept));
            freed.extend(self.kept.remove(&kept).map(|(_, position)| position));
        }
        freed
    }

    /// The lowest version that superseded anything kept.
    pub fn oldest(&self) -> Option<Version> {
        self.by.first().map(|(by, _)| *by)
    }

    /// It was copied; false if it is not kept, or lies elsewhere.
    pub fn relocate(&mut self, kept: Kept, from: Position, to: Position) -> bool {
        let found = self.kept.get_mut(&kept).filter(|(_, position)| *position == from);
        found.map(|(_, position)| *position = to).is_some()
    }

    pub fn position(&self, kept: Kept) -> Option<Position> {
        self.kept.get(&kept).map(|(_, position)| *position)
    }

    pub fn positions(&self) -> impl Iterator<Item = Position> + '_ {
        self.kept.values().map(|(_, position)| *position)
    }
}

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

    #[test]
    fn what_was_superseded_is_released_when_its_successor_is_flushed_and_not_before() {
        let mut pins = Pins::default();
        assert_eq!(pins.keep(kept(1, 3), version(5), Position(50), true), None);
        assert_eq!(pins.keep(kept(2, 3), version(7), Position(70), true), None);
        assert_eq!(pins.oldest(), Some(version(5)));
        assert_eq!(pins.release(version(4)), vec![]);
        assert_eq!(pins.release(version(5)), vec![Position(50)]);
        assert_eq!(pins.release(Version::new(Epoch(2), 0)), vec![Position(70)]);
    }

    #[test]
    fn of_two_copies_of_what_is_kept_one_is_enough() {
        let mut pins = Pins::default();
        pins.keep(kept(1, 3), version(5), Position(50), true);
        assert_eq!(pins.keep(kept(1, 3), version(6), Position(60), true), Some(Position(50)));
        assert_eq!(pins.keep(kept(1, 3), version(6), Position(70), false), Some(Position(70)));
        assert!(!pins.relocate(kept(1, 3), Position(50), Position(80)));
        assert!(pins.relocate(kept(1, 3), Position(60), Position(80)));
        assert_eq!(pins.release(version(5)), vec![Position(80)]);
    }
}
