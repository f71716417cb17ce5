//! What a block was: read at a pin, and back to when a version is taken back (rule 11).
//!
//! A revoked record never was. Of what is current, the block falls back to the newest kept version below, or to a clear
//! below, or was never written; of what is kept, what it had superseded now waits for its successor. It may have been
//! freed before, if the shard was told of an F above the revoked version (only a resync does that): then the writer of
//! the resync sends it again, under its old version, and a start before that finds it or nothing.

use super::pins::Kept;
use super::state::Contents;
use crate::index::{Found, Place};
use crate::log::record::{Clear, Revoke};
use torus_rpc::message::Revoked;
use torus_schema::ids::{BlockIndex, Epoch, Version, VolumeId};
use torus_schema::limits::SEQUENCE_MAX;

impl Contents {
    pub fn place_of(&self, volume: VolumeId, block: BlockIndex) -> Place {
        Place { volume, slice: self.slice_of(volume, block.extent()), block }
    }

    /// The block as it was at `pin`, which is one of the volume's pins: of another version some may be gone.
    /// Snapshots, which read so, are to come.
    #[cfg(test)]
    pub fn find_at(&self, place: Place, pin: Version) -> Found {
        let current = self.index.find(place);
        if current.version() <= pin { current } else { self.newest_below(place, next(pin)) }
    }

    /// The newest there is of the block below `version`, apart from what is current.
    fn newest_below(&self, place: Place, version: Version) -> Found {
        let clears = self.clears_over(place.volume, place.slice, place.block).into_iter();
        let clear = clears.filter(|clear| *clear < version).max();
        let volume = self.volumes.get(&place.volume);
        let kept = volume.and_then(|volume| volume.pins.newest(place.block, previous(version)));
        match (kept, clear) {
            (Some(entry), Some(clear)) if clear > entry.version => Found::Cleared(clear),
            (Some(entry), _) => Found::Data(entry),
            (None, Some(clear)) => Found::Cleared(clear),
            (None, None) => Found::Never,
        }
    }

    /// All versions there are of the block above `above`, up to `through`, current and kept.
    pub fn versions_of(&self, place: Place, above: Version, through: Version) -> Vec<Version> {
        let mut versions = self.clears_over(place.volume, place.slice, place.block);
        versions.push(self.index.find(place).version());
        if let Some(volume) = self.volumes.get(&place.volume) {
            versions.extend(volume.pins.versions(place.block));
        }
        versions.retain(|version| *version > above && *version <= through);
        versions.sort_unstable();
        versions.dedup();
        versions
    }

    pub fn is_revoked(&self, volume: VolumeId, block: BlockIndex, version: Version) -> bool {
        self.volumes.get(&volume).is_some_and(|volume| volume.revoked.contains(&(block, version)))
    }

    /// Of those blocks the first of which that version was revoked.
    pub fn first_revoked(
        &self,
        volume: VolumeId,
        blocks: std::ops::Range<u64>,
        version: Version,
    ) -> Option<BlockIndex> {
        let revoked = &self.volumes.get(&volume)?.revoked;
        let mut inside =
            revoked.range((BlockIndex(blocks.start), Version::ZERO)..(BlockIndex(blocks.end), Version::ZERO));
        inside.find(|(_, revoked)| *revoked == version).map(|(block, _)| *block)
    }

    /// Of one of those blocks some version was.
    pub fn has_revoked(&self, volume: VolumeId, blocks: std::ops::Range<u64>) -> bool {
        let Some(volume) = self.volumes.get(&volume).filter(|volume| !volume.revoked.is_empty()) else { return false };
        let range = (BlockIndex(blocks.start), Version::ZERO)..(BlockIndex(blocks.end), Version::ZERO);
        volume.revoked.range(range).next().is_some()
    }

    pub fn revoke(&mut self, record: &Revoke) {
        for Revoked { block, version } in record.revoked.iter().copied() {
            let volume = self.volumes.entry(record.volume).or_default();
            if volume.revoked.insert((block, version)) {
                self.take_back(self.place_of(record.volume, block), version);
            }
        }
    }

    fn take_back(&mut self, place: Place, version: Version) {
        let current = self.index.find(place);
        let kept = Kept { block: place.block, version };
        if current.version() == version {
            if let Found::Data(entry) = current {
                self.space.remove_live(entry.position);
            }
            let below = self.newest_below(place, version);
            self.index.take_back(place, version, below);
            if let (Found::Data(entry), Some(volume)) = (below, self.volumes.get_mut(&place.volume)) {
                volume.pins.take(Kept { block: place.block, version: entry.version });
            }
        } else if let Some(entry) = self.volumes.get_mut(&place.volume).and_then(|volume| volume.pins.take(kept)) {
            self.space.remove_live(entry.position);
        } else {
            // It may have been a clear of the whole extent, which the block is not part of any more.
            self.index.take_back(place, version, current);
        }
        self.rechain(place);
    }

    fn rechain(&mut self, place: Place) {
        let mut above = self.clears_over(place.volume, place.slice, place.block);
        above.push(self.index.find(place).version());
        let next_above = |version: Version| {
            let newer = above.iter().filter(|newer| **newer > version).min();
            // Kept is only what something stands above; if that was taken back the entry has become current.
            newer.copied().unwrap_or(Version { epoch: Epoch(u32::MAX), sequence: SEQUENCE_MAX })
        };
        if let Some(volume) = self.volumes.get_mut(&place.volume) {
            let bounds = volume.bounds().clone();
            volume.pins.rechain(place.block, next_above, &bounds);
        }
    }

    /// Blocks of the clear for which it was revoked, as they are now: applying it must leave them so.
    pub fn spared(&self, clear: &Clear) -> Vec<(Place, Found)> {
        let Some(volume) = self.volumes.get(&clear.volume).filter(|volume| !volume.revoked.is_empty()) else {
            return Vec::new();
        };
        let end = BlockIndex(clear.first.0.saturating_add(clear.count));
        let inside = volume.revoked.range((clear.first, Version::ZERO)..(end, Version::ZERO));
        let spared = inside.filter(|(_, version)| *version == clear.version);
        let places = spared.map(|(block, _)| self.place_of(clear.volume, *block));
        places.filter(|place| place.slice == clear.slice).map(|place| (place, self.index.find(place))).collect()
    }

    /// A write of that version would be garbage from the start.
    pub fn is_dead_on_arrival(&self, place: Place, version: Version) -> bool {
        let found = self.index.find(place).version();
        let volume = self.volumes.get(&place.volume);
        found > version && volume.is_some_and(|volume| volume.bounds().frees(version, found))
    }
}

fn previous(version: Version) -> Version {
    match version {
        Version { epoch, sequence: 0 } => Version { epoch: Epoch(epoch.0.saturating_sub(1)), sequence: SEQUENCE_MAX },
        Version { epoch, sequence } => Version { epoch, sequence: sequence - 1 },
    }
}

#[cfg(test)]
fn next(version: Version) -> Version {
    match version {
        Version { epoch, sequence: SEQUENCE_MAX } => Version { epoch: Epoch(epoch.0 + 1), sequence: 0 },
        Version { epoch, sequence } => Version { epoch, sequence: sequence + 1 },
    }
}
