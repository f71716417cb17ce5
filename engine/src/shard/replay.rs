//! Which of several copies counts, at a start.
//!
//! The cleaner copies, and lets the original's segment go when the copy is durable; so after a crash both may be there.
//! Of two copies the later one counts, as it did before, and what was let go stays free. Except: a segment that was
//! still open and holds nothing but copies is let go itself, and the originals count. It is what a cleaner leaves that
//! was cut short. If it counted, a shard that dies again and again while it cleans would eat the last free segments,
//! and with none left nothing could ever be cleaned.

use super::damage::{Damaged, FoundBy};
use super::state::Contents;
use super::volumes::Instance;
use crate::index::AtTie;
use crate::log::record::{Data, Record};
use crate::log::recovery::FoundSegment;
use crate::log::{Position, SegmentIndex};
use torus_rpc::message::Revoked;
use torus_rpc::runtime::Instant;
use torus_schema::hash::{Map, Set};
use torus_schema::ids::{BlockIndex, SliceId, Version, VolumeId};

/// Of a segment without a footer: blocks that were durable, are not as they were, and are still needed.
pub fn list_damage(found: &FoundSegment, contents: &mut Contents, now: Instant) {
    if found.damaged.is_empty() {
        return;
    }
    let damaged: Set<Position> = found.damaged.iter().copied().collect();
    let pinned = contents.pinned_in(found.identity.segment);
    for record in found.unsealed.iter().flatten() {
        let Record::Data(data) = record else { continue };
        for (number, checksum) in data.checksums.iter().enumerate() {
            let position = Position(data.position.0 + number as u32);
            if damaged.contains(&position) && contents.needs(data, number, &pinned) {
                let Data { volume, version, .. } = *data;
                let block = BlockIndex(data.first.0 + number as u64);
                tracing::warn!(%volume, %block, %version, "a block that was durable is damaged");
                let damaged = Damaged { volume, block, version, checksum: *checksum, position };
                contents.damage.found(damaged, FoundBy::Start, now);
            }
        }
    }
}

/// Applies what stands in segments without a footer, after all others. Those that turn out to hold nothing that is not
/// elsewhere are left without records, for good: that is what their footer will say.
pub fn replay_unsealed(segments: &mut [FoundSegment], notes: &Notes, contents: &mut Contents) {
    let mut said = Said::default();
    for found in segments.iter().filter(|found| found.unsealed.is_none()) {
        notes.new_in(found.identity.segment, &mut said, contents);
    }
    for found in segments {
        let Some(records) = &mut found.unsealed else { continue };
        let segment = found.identity.segment;
        records.iter().for_each(|record| contents.replay(record, AtTie::StandingWins));
        let pinned = contents.pinned_in(segment);
        let needed = |record: &Record| match record {
            Record::Data(data) => (0..data.checksums.len()).any(|number| contents.needs(data, number, &pinned)),
            _ => false,
        };
        let says_more = notes.new_in(segment, &mut said, contents) > 0;
        if says_more || records.iter().any(needed) {
            records.iter().for_each(|record| contents.replay(record, AtTie::NewcomerWins));
        } else {
            records.clear();
        }
    }
}

/// Records without payload, by the segment they stand in.
#[derive(Default)]
pub struct Notes {
    by_segment: Map<SegmentIndex, Vec<Record>>,
}

impl Notes {
    pub fn see(&mut self, segment: SegmentIndex, records: &[Record]) {
        let notes = records.iter().filter(|record| record.payload_blocks() == 0);
        self.by_segment.entry(segment).or_default().extend(notes.cloned());
    }

    /// Each thing that has to be remembered is counted where it is said last.
    pub fn count(&self, segments: &[FoundSegment], contents: &mut Contents) {
        let mut said = Said::default();
        let is_left = |found: &&FoundSegment| found.unsealed.as_ref().is_none_or(|records| !records.is_empty());
        for found in segments.iter().rev().filter(is_left) {
            let segment = found.identity.segment;
            for note in self.by_segment.get(&segment).into_iter().flatten() {
                if said.is_new(note, contents) {
                    contents.enter(segment, note);
                }
            }
        }
    }

    /// Bytes of those in the segment that say something new.
    fn new_in(&self, segment: SegmentIndex, said: &mut Said, contents: &Contents) -> usize {
        let notes = self.by_segment.get(&segment).into_iter().flatten();
        notes.filter(|note| said.is_new(note, contents)).map(Record::bytes).sum()
    }
}

/// What the notes looked at so far say.
#[derive(Default)]
struct Said {
    drops: Set<VolumeId>,
    opens: Set<VolumeId>,
    retains: Set<VolumeId>,
    revokes: Set<(VolumeId, Vec<Revoked>)>,
    instances: Set<(VolumeId, SliceId)>,
    clears: Set<(VolumeId, SliceId, BlockIndex, u64, Version)>,
}

impl Said {
    fn is_new(&mut self, note: &Record, contents: &Contents) -> bool {
        let volume = contents.volumes.get(&note.volume());
        match (note, volume) {
            (Record::Drop(id), _) => self.drops.insert(*id),
            (Record::Open(open), Some(volume)) => open.epoch == volume.epoch && self.opens.insert(open.volume),
            (Record::Instances(record), Some(volume)) => {
                let (generation, created) = (record.generation, record.created);
                let current = |slice: &&SliceId| volume.slices.get(slice) == Some(&Instance { generation, created });
                let new = |slice: &&SliceId| self.instances.insert((record.volume, **slice));
                // Counted, not `any`: all of them are said with it.
                record.slices.iter().filter(current).filter(new).count() > 0
            }
            (Record::Clear(clear), Some(_)) => {
                let key = (clear.volume, clear.slice, clear.first, clear.count, clear.version);
                !contents.is_superfluous(clear) && self.clears.insert(key)
            }
            (Record::Retain(retain), Some(volume)) => {
                let newest = volume.retained.as_ref().map(|retained| (retained.epoch, retained.order));
                newest == Some((retain.epoch, retain.order)) && self.retains.insert(retain.volume)
            }
            (Record::Revoke(revoke), Some(_)) => self.revokes.insert((revoke.volume, revoke.revoked.clone())),
            _ => false,
        }
    }
}
