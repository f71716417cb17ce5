//! Whole extents of one slice that read as zeros, as ranges: clearing a volume costs one entry a slice, whatever its
//! size, and no page. A range names extents of other slices too; who asks knows the slice.

use std::collections::BTreeMap;
use torus_schema::ids::{ExtentIndex, Version};

/// Ranges apart from each other: first extent → (extent behind the last, version).
#[derive(Default)]
pub struct ClearedExtents {
    ranges: BTreeMap<u64, (u64, Version)>,
}

impl ClearedExtents {
    /// Zero where the extent was never cleared as a whole.
    pub fn version(&self, extent: ExtentIndex) -> Version {
        match self.ranges.range(..=extent.0).next_back() {
            Some((_, (end, version))) if extent.0 < *end => *version,
            _ => Version::ZERO,
        }
    }

    /// first..end are cleared at `version`, except where they are at a higher one.
    pub fn insert(&mut self, first: ExtentIndex, end: ExtentIndex, version: Version) {
        self.split(first.0);
        self.split(end.0);
        let inside: Vec<(u64, u64, Version)> =
            self.ranges.range(first.0..end.0).map(|(first, (end, version))| (*first, *end, *version)).collect();
        let mut at = first.0;
        for (inside_first, inside_end, inside_version) in inside {
            self.put(at, inside_first, version);
            if version >= inside_version {
                self.ranges.remove(&inside_first);
            }
            self.put(inside_first, inside_end, version.max(inside_version));
            at = inside_end;
        }
        self.put(at, end.0, version);
        self.join(first.0, end.0);
    }

    /// The extent was not cleared as a whole after all.
    pub fn remove(&mut self, extent: ExtentIndex) {
        self.split(extent.0);
        self.split(extent.0 + 1);
        self.ranges.remove(&extent.0);
    }

    /// Ranges that reach past `from`, in order: first, end, version.
    pub fn ranges_from(&self, from: ExtentIndex) -> impl Iterator<Item = (ExtentIndex, ExtentIndex, Version)> + '_ {
        let start = self.ranges.range(..=from.0).next_back().map_or(from.0, |(first, _)| *first);
        self.ranges
            .range(start..)
            .filter(move |(_, (end, _))| *end > from.0)
            .map(move |(first, (end, version))| (ExtentIndex((*first).max(from.0)), ExtentIndex(*end), *version))
    }

    /// Every extent of first..end is cleared at a version above `version` and at most `limit`.
    pub fn covers_above(&self, first: ExtentIndex, end: ExtentIndex, version: Version, limit: Version) -> bool {
        let mut at = first.0;
        for (range_first, range_end, range_version) in self.ranges_from(first) {
            if at >= end.0 || range_first.0 > at {
                break;
            }
            if range_version <= version || range_version > limit {
                return false;
            }
            at = range_end.0;
        }
        at >= end.0
    }

    /// An estimate: nodes of the tree are usually two thirds full.
    pub fn heap_bytes(&self) -> usize {
        self.ranges.len() * size_of::<(u64, (u64, Version))>() * 3 / 2
    }

    fn put(&mut self, first: u64, end: u64, version: Version) {
        if first < end {
            self.ranges.insert(first, (end, version));
        }
    }

    /// No range lies across `at` afterwards.
    fn split(&mut self, at: u64) {
        if let Some((_, (end, version))) = self.ranges.range_mut(..at).next_back()
            && *end > at
        {
            let right = (*end, *version);
            *end = at;
            self.ranges.insert(at, right);
        }
    }

    /// Neighbours at one version become one, from the one before `first` to the one behind `end`.
    fn join(&mut self, first: u64, end: u64) {
        let start = self.ranges.range(..first).next_back().map_or(first, |(first, _)| *first);
        let near: Vec<u64> = self.ranges.range(start..=end).map(|(first, _)| *first).collect();
        let mut last: Option<u64> = None;
        for at in near {
            let (right_end, version) = self.ranges[&at];
            if let Some(left) = last
                && self.ranges[&left] == (at, version)
            {
                self.ranges.remove(&at);
                self.ranges.insert(left, (right_end, version));
            } else {
                last = Some(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::ids::Epoch;

    #[test]
    fn clearing_everything_again_and_again_keeps_one_range() {
        let mut cleared = ClearedExtents::default();
        for sequence in 1..100 {
            cleared.insert(ExtentIndex(sequence % 7), ExtentIndex(7 + sequence), Version::new(Epoch(1), sequence));
            cleared.insert(ExtentIndex(0), ExtentIndex(1 << 30), Version::new(Epoch(1), sequence));
        }
        assert_eq!(cleared.ranges.len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn the_highest_version_over_each_extent_is_found(steps in proptest::collection::vec((0u64..40, 1u64..20, 1u64..30), 1..40)) {
            let (mut cleared, mut model) = (ClearedExtents::default(), vec![0u64; 64]);
            for (first, count, sequence) in steps {
                cleared.insert(ExtentIndex(first), ExtentIndex(first + count), Version::new(Epoch(0), sequence));
                (first..first + count).for_each(|at| model[at as usize] = model[at as usize].max(sequence));
                for (at, sequence) in model.iter().enumerate() {
                    assert_eq!(cleared.version(ExtentIndex(at as u64)).sequence, *sequence);
                }
                for from in 0..64 {
                    let mut listed = vec![0; 64];
                    for (first, end, version) in cleared.ranges_from(ExtentIndex(from)) {
                        (first.0..end.0).for_each(|at| listed[at as usize] = version.sequence);
                    }
                    assert_eq!(listed[from as usize..], model[from as usize..]);
                }
                let covered = model[10..20].iter().all(|found| *found > 5 && *found <= 25);
                let (above, limit) = (Version::new(Epoch(0), 5), Version::new(Epoch(0), 25));
                assert_eq!(cleared.covers_above(ExtentIndex(10), ExtentIndex(20), above, limit), covered);
            }
        }
    }
}
