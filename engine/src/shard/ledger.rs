//! Where each note that is still needed stands: records without payload say something until something else says it, or
//! until nothing is left that it was said about. What the ledger has in a segment is what the segment's cleaning has to
//! carry elsewhere; nothing else in it is needed.
//!
//! | note      | is garbage when                                                                                     |
//! |-----------|-----------------------------------------------------------------------------------------------------|
//! | instances, open, retain | a later one says the same or more, or the volume was dropped                          |
//! | clear     | it is at most min(F, H) and no replica may be stale below it, and: each of its blocks has a newer   |
//! |           | record at most min(F, H, the next pin); or nothing older is kept of its blocks, and every segment   |
//! |           | that may hold an older record of them was used anew since                                           |
//! | drop      | every segment that may hold a record of the volume was used anew                                    |
//! | revoke    | as a drop, and no replica may be stale below it, and no clear of that version is needed: a clear is |
//! |           | carried whole, and without the revocation a start would let it hide what was taken back             |
//!
//! Which segments may hold a record that nobody will append any more? What was handed in before that was known may yet
//! be on its way, so an *era* of the queue passes first; all segments opened by then may, those opened later cannot.
//! That a record older than a flushed clear comes later still is prevented where writes come in (`requests`).
//!
//! A free segment still holds what stood in it: only its next opening, when that is durable, makes it unreadable.

use super::queue::Eras;
use super::state::Contents;
use super::volumes::Volume;
use crate::index::ClearRange;
use crate::log::record::{Clear, Record};
use crate::log::{BatchNumber, SegmentIndex};
use ahash::AHashSet;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use torus_rpc::message::Revoked;
use torus_schema::ids::{BlockIndex, RingGeneration, SliceId, Version, VolumeId};

/// Notes looked at in one go: some milliseconds at most.
const REVIEW_MAX: usize = 4096;

/// What a note is about: of two with one key the later counts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Key {
    Drop,
    Open,
    Retain,
    /// By generation, creation and first slice.
    Instances(RingGeneration, BatchNumber, SliceId),
    /// By slice, range and version.
    Clear(SliceId, BlockIndex, u64, Version),
    Revoke(Vec<Revoked>),
}

impl Key {
    /// `None`: it is not a note.
    fn of(record: &Record) -> Option<Self> {
        Some(match record {
            Record::Data(_) => return None,
            Record::Drop(_) => Key::Drop,
            Record::Open(_) => Key::Open,
            Record::Retain(_) => Key::Retain,
            Record::Instances(instances) => {
                Key::Instances(instances.generation, instances.created, *instances.slices.first()?)
            }
            Record::Clear(clear) => Key::Clear(clear.slice, clear.first, clear.count, clear.version),
            Record::Revoke(revoke) => Key::Revoke(revoke.revoked.clone()),
        })
    }
}

/// How near a note is to being garbage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Needed,
    /// Nothing it is about will be handed in any more; what was, in that era or before, may be on its way.
    Passing(u64),
    /// Segments opened up to this one may hold what it is about.
    Bounded(u64),
}

struct Noted {
    segment: SegmentIndex,
    bytes: usize,
    stage: Stage,
}

#[derive(Default)]
pub struct Ledger {
    notes: BTreeMap<(VolumeId, Key), Noted>,
    /// The next review begins behind it.
    reviewed: Option<(VolumeId, Key)>,
    /// Another review may find garbage.
    pub is_due: bool,
}

/// How many are needed.
#[cfg(test)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Lengths {
    pub clears: usize,
    pub revokes: usize,
    pub drops: usize,
}

#[cfg(test)]
impl Ledger {
    pub fn lengths(&self) -> Lengths {
        let mut lengths = Lengths::default();
        for (_, key) in self.notes.keys() {
            match key {
                Key::Clear(..) => lengths.clears += 1,
                Key::Revoke(_) => lengths.revokes += 1,
                Key::Drop => lengths.drops += 1,
                Key::Open | Key::Retain | Key::Instances(..) => {}
            }
        }
        lengths
    }
}

/// What a review has to know of the log.
pub struct Openings<'a> {
    pub eras: &'a Eras,
    /// Sequence of the last segment opened.
    pub last: u64,
}

impl Contents {
    /// The note stands in `segment` now, and needs to stand nowhere else.
    pub fn enter(&mut self, segment: SegmentIndex, note: &Record) {
        let (volume, Some(key)) = (note.volume(), Key::of(note)) else { return };
        if key == Key::Drop {
            self.strike_volume(volume);
        } else if !self.still_says(note) {
            return;
        }
        let bytes = note.bytes();
        self.space.add_note(segment, bytes);
        match self.ledger.notes.get_mut(&(volume, key.clone())) {
            Some(noted) => {
                let (before, bytes_before) = (noted.segment, noted.bytes);
                (noted.segment, noted.bytes) = (segment, bytes);
                self.space.remove_note(before, bytes_before);
            }
            None => {
                let noted = Noted { segment, bytes, stage: Stage::Needed };
                self.ledger.notes.insert((volume, key), noted);
            }
        }
    }

    /// It is not outdated already: batches complete out of order.
    fn still_says(&self, note: &Record) -> bool {
        let Some(volume) = self.volumes.get(&note.volume()) else { return false };
        match note {
            Record::Open(open) => open.epoch >= volume.epoch,
            Record::Retain(retain) => {
                let newest = volume.retained.as_ref().map(|retained| (retained.epoch, retained.order));
                newest.is_none_or(|newest| (retain.epoch, retain.order) >= newest)
            }
            _ => !self.dropped.contains(&note.volume()),
        }
    }

    fn strike_volume(&mut self, volume: VolumeId) {
        let all = self.ledger.notes.range((volume, Key::Drop)..).take_while(|((of, _), _)| *of == volume);
        let all: Vec<_> = all.map(|(key, _)| key.clone()).filter(|(_, key)| *key != Key::Drop).collect();
        all.iter().for_each(|key| self.strike(key));
    }

    fn strike(&mut self, key: &(VolumeId, Key)) {
        if let Some(noted) = self.ledger.notes.remove(key) {
            self.space.remove_note(noted.segment, noted.bytes);
        }
    }

    /// It has to be carried elsewhere when its segment is cleaned.
    pub fn is_entered(&self, segment: SegmentIndex, note: &Record) -> bool {
        let key = Key::of(note).map(|key| (note.volume(), key));
        key.and_then(|key| self.ledger.notes.get(&key)).is_some_and(|noted| noted.segment == segment)
    }

    /// What of it was needed was carried elsewhere.
    pub fn strike_in(&mut self, segment: SegmentIndex, note: &Record) {
        if self.is_entered(segment, note)
            && let Some(key) = Key::of(note)
        {
            self.strike(&(note.volume(), key));
        }
    }

    /// Moves some of the notes towards their end, round and round.
    pub fn review(&mut self, openings: &Openings) {
        let start = self.ledger.reviewed.take().map_or(Bound::Unbounded, Bound::Excluded);
        let some: Vec<_> = self.ledger.notes.range((start, Bound::Unbounded)).take(REVIEW_MAX).collect();
        let reviewed = some.last().filter(|_| some.len() == REVIEW_MAX).map(|(key, _)| (*key).clone());
        let era = openings.eras.begin();
        let cleared = self.cleared_of_revoked(&some);
        let stage = |key: &(VolumeId, Key), noted: &Noted| self.stage(key, noted.stage, &cleared, (era, openings));
        let stages: Vec<_> = some.into_iter().map(|(key, noted)| (key.clone(), stage(key, noted))).collect();
        self.ledger.is_due = reviewed.is_some();
        for (key, stage) in stages {
            self.ledger.is_due |= self.ledger.notes.get(&key).map(|noted| noted.stage) != stage;
            match (stage, self.ledger.notes.get_mut(&key)) {
                (Some(stage), Some(noted)) => noted.stage = stage,
                _ => self.strike(&key),
            }
        }
        self.ledger.reviewed = reviewed;
    }

    /// Versions of the clears that are needed, of each volume of which a revocation is among `some`.
    fn cleared_of_revoked(&self, some: &[(&(VolumeId, Key), &Noted)]) -> AHashSet<(VolumeId, Version)> {
        let revoked = some.iter().filter(|((_, key), _)| matches!(key, Key::Revoke(_)));
        let volumes: BTreeSet<VolumeId> = revoked.map(|((volume, _), _)| *volume).collect();
        let clears = volumes.into_iter().flat_map(|volume| self.clears_of(volume).map(move |clear| (volume, clear.3)));
        clears.collect()
    }

    /// `None`: garbage. `cleared`: see `cleared_of_revoked`.
    fn stage(
        &self,
        (id, key): &(VolumeId, Key),
        stage: Stage,
        cleared: &AHashSet<(VolumeId, Version)>,
        (era, openings): (u64, &Openings),
    ) -> Option<Stage> {
        let volume = self.volumes.get(id);
        let ends = match (key, volume) {
            (Key::Drop, _) => true,
            (Key::Revoke(revoked), Some(volume)) => {
                let ends = |version| version <= volume.note_limit() && !cleared.contains(&(*id, version));
                revoked.iter().all(|revoked| ends(revoked.version))
            }
            (Key::Clear(slice, first, count, version), Some(volume)) => {
                let range = range_of(*id, *slice, *first, *count);
                if self.is_outdated(volume, range, *version) {
                    return None;
                }
                *version <= volume.note_limit() && !self.keeps_older(volume, range, *version)
            }
            _ => false,
        };
        match stage {
            _ if !ends => Some(Stage::Needed),
            Stage::Needed => Some(Stage::Passing(era)),
            Stage::Passing(era) if openings.eras.passed(era) => Some(Stage::Bounded(openings.last)),
            Stage::Bounded(last) if self.space.lowest_sequence().is_none_or(|lowest| lowest > last) => None,
            stage => Some(stage),
        }
    }

    /// Every block of the clear has a newer record that nothing will take back and no pin lies below.
    fn is_outdated(&self, volume: &Volume, range: ClearRange, version: Version) -> bool {
        let Some(layout) = &volume.layout else { return false };
        if version > volume.note_limit() {
            return false;
        }
        let bounds = volume.bounds();
        let limit = bounds.lowest_pin_from(version).map_or(bounds.limit, |pin| pin.min(bounds.limit));
        self.index.is_superseded(range, version, limit, &layout.placement)
    }

    fn keeps_older(&self, volume: &Volume, range: ClearRange, version: Version) -> bool {
        let inside = |block: BlockIndex| self.slice_of(range.volume, block.extent()) == range.slice;
        volume.pins.holds_older((range.first, range.end), version, inside)
    }

    /// At a start: it need not be counted where something else hides what it hides.
    pub fn is_superfluous(&self, clear: &Clear) -> bool {
        let Some(volume) = self.volumes.get(&clear.volume) else { return self.dropped.contains(&clear.volume) };
        self.is_outdated(volume, clear_range(clear), clear.version)
    }

    /// Versions of the clears that are needed and cover the block, in no order.
    pub fn clears_over(&self, id: VolumeId, slice: SliceId, block: BlockIndex) -> Vec<Version> {
        let revoked = self.volumes.get(&id).map(|volume| &volume.revoked);
        let covers = |(of, first, count, version): &(SliceId, BlockIndex, u64, Version)| {
            *of == slice
                && (first.0..first.0.saturating_add(*count)).contains(&block.0)
                && !revoked.is_some_and(|revoked| revoked.contains(&(block, *version)))
        };
        self.clears_of(id).filter(covers).map(|(_, _, _, version)| version).collect()
    }

    /// That are needed: slice, first block, count, version.
    fn clears_of(&self, id: VolumeId) -> impl Iterator<Item = (SliceId, BlockIndex, u64, Version)> + '_ {
        let first = (id, Key::Clear(SliceId(0), BlockIndex(0), 0, Version::ZERO));
        self.ledger.notes.range(first..).map_while(move |((of, key), _)| match key {
            Key::Clear(slice, first, count, version) if *of == id => Some((*slice, *first, *count, *version)),
            _ => None,
        })
    }
}

fn range_of(volume: VolumeId, slice: SliceId, first: BlockIndex, count: u64) -> ClearRange {
    ClearRange { volume, slice, first, end: BlockIndex(first.0.saturating_add(count)) }
}

pub fn clear_range(clear: &Clear) -> ClearRange {
    range_of(clear.volume, clear.slice, clear.first, clear.count)
}
