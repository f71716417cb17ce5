//! What the shard knows of each volume: which slices it holds, who has it open, how far it is flushed.
//! All of it is merged from records in any order: epoch and F by maximum, slices by union.

use super::pins::{Bounds, Pins};
use crate::index::Entry;
use crate::log::record::{Instances, Open, Retain};
use crate::log::{BatchNumber, Position};
use std::collections::{BTreeMap, BTreeSet};
use torus_rpc::message::{Envelope, Few, Refusal, Retention, Token};
use torus_schema::ids::{BlockIndex, Epoch, RingGeneration, SliceId, Version, VolumeId};
use torus_schema::ring::placement::Placement;

/// The shard is a replica of one slice of one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance {
    pub generation: RingGeneration,
    pub created: BatchNumber,
}

/// A writer that opened the volume in this incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    pub epoch: Epoch,
    pub generation: RingGeneration,
    pub open_in_previous_epoch: bool,
    /// Within its epoch: this incarnation need not have everything that the writer was answered.
    pub restarted: bool,
}

#[derive(Default)]
pub struct Volume {
    /// Known once an instance was created.
    pub layout: Option<Layout>,
    pub slices: BTreeMap<SliceId, Instance>,
    pub epoch: Epoch,
    pub token: Option<Token>,
    /// F as its writer last told.
    pub flush_point: Version,
    /// F as a record says that stands in the log. Only this frees anything: the next start knows no more than this, and
    /// would find in use again what was freed by more.
    pub settled: Version,
    /// F of a record that is on its way for no other purpose.
    pub settling: Version,
    pub session: Option<Session>,
    /// What its writer last said has to be kept. `None`: no writer ever did, and nothing is freed.
    pub retained: Option<Retained>,
    /// The highest order of a retain of the present epoch that was drawn.
    pub order_drawn: u64,
    /// How often the volume's status has changed, as writers said: the highest counts, whatever retain said it.
    pub status_changes: u64,
    /// What follows from `settled` and `retained`.
    bounds: Bounds,
    pub pins: Pins,
    /// Records that never were, wherever they stand.
    pub revoked: BTreeSet<(BlockIndex, Version)>,
    /// Appends of data that are not applied yet.
    pub in_flight: usize,
}

pub struct Retained {
    /// Of two the higher counts.
    pub epoch: Epoch,
    pub order: u64,
    pub retention: Retention,
}

pub struct Layout {
    pub id: VolumeId,
    pub width: u32,
    pub ring_slices: u32,
    pub placement: Placement,
}

impl Volume {
    pub fn merge_instances(&mut self, record: &Instances) {
        self.layout.get_or_insert_with(|| Layout {
            id: record.placement,
            width: record.width,
            ring_slices: record.ring_slices,
            placement: Placement::new(record.placement, record.width, record.ring_slices),
        });
        for slice in &record.slices {
            let new = Instance { generation: record.generation, created: record.created };
            let held = self.slices.entry(*slice).or_insert(new);
            if (new.generation, new.created) > (held.generation, held.created) {
                *held = new;
            }
        }
    }

    /// Without its F; see `settle`.
    pub fn merge_open(&mut self, record: &Open) {
        if record.epoch >= self.epoch {
            self.epoch = record.epoch;
            self.token = Some(record.token);
        }
    }

    /// Those of the record's instances that are what the shard is now: what the cleaner carries forward.
    pub fn still_of(&self, record: &Instances) -> Option<Instances> {
        let said = Instance { generation: record.generation, created: record.created };
        let slices: Vec<SliceId> =
            record.slices.iter().copied().filter(|slice| self.slices.get(slice) == Some(&said)).collect();
        (!slices.is_empty()).then(|| Instances { slices, ..record.clone() })
    }

    pub fn open(&self, volume: VolumeId) -> Option<Open> {
        let (flush_point, epoch) = (self.flush_point, self.epoch);
        self.token.map(|token| Open { volume, flush_point, epoch, token })
    }

    /// A slice the shard may answer for: created in that generation, and after whatever was lost.
    pub fn holds(&self, slice: SliceId, generation: RingGeneration, lost_below: BatchNumber) -> bool {
        self.slices
            .get(&slice)
            .is_some_and(|instance| instance.generation == generation && instance.created >= lost_below)
    }

    /// Rule 5, without the incarnation. `slice`: the one the request is about, if it is about one.
    pub fn check(&self, envelope: &Envelope, slice: Option<SliceId>, lost_below: BatchNumber) -> Result<(), Refusal> {
        if envelope.epoch < self.epoch {
            return Err(Refusal::StaleEpoch { replica: self.epoch });
        }
        let session = self.session.filter(|session| session.epoch == envelope.epoch).ok_or(Refusal::NotOpen)?;
        match slice {
            Some(slice) if session.generation != envelope.generation => Err(Refusal::NotOwner { slice }),
            Some(slice) if !self.holds(slice, envelope.generation, lost_below) => Err(Refusal::NotOwner { slice }),
            None if session.generation != envelope.generation => Err(Refusal::NotOpen),
            _ => Ok(()),
        }
    }

    /// The retain that says again what is known: what the cleaner carries forward.
    pub fn retain(&self, volume: VolumeId) -> Option<Retain> {
        let flush_point = self.flush_point;
        let Retained { epoch, order, retention } = self.retained.as_ref()?;
        let retention = Retention { status_changes: self.status_changes, ..retention.clone() };
        Some(Retain { volume, flush_point, epoch: *epoch, order: *order, retention })
    }

    pub fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// See `Pins::keep`.
    pub fn keep(&mut self, block: BlockIndex, entry: Entry, by: Version, replace: bool) -> Option<Position> {
        self.pins.keep(block, entry, by, replace, &self.bounds)
    }

    /// Clears and revocations above it are needed by a replica that is stale, or may become so before its writer can
    /// say it.
    pub fn note_limit(&self) -> Version {
        let stale_since = self.retained.as_ref().and_then(|retained| retained.retention.stale_since);
        stale_since.map_or(self.bounds.limit, |since| since.min(self.bounds.limit))
    }

    fn horizon(&self) -> Version {
        self.retained.as_ref().map_or(Version::ZERO, |retained| retained.retention.horizon)
    }

    /// A record in the log says F: what it covers needs to be kept no longer.
    pub fn settle(&mut self, flush_point: Version) -> Few<Position> {
        self.flush_point = self.flush_point.max(flush_point);
        if flush_point <= self.settled {
            return Few::new();
        }
        self.settled = flush_point;
        self.bounds.limit = self.settled.min(self.horizon());
        self.pins.release(&self.bounds)
    }

    /// A record in the log says what its writer needs kept. Without its F; see `settle`.
    pub fn merge_retain(&mut self, record: &Retain) -> Vec<Position> {
        let Retain { epoch, order, ref retention, .. } = *record;
        self.status_changes = self.status_changes.max(retention.status_changes);
        let is_newer = |known: &Retained| (epoch, order) > (known.epoch, known.order);
        if !self.retained.as_ref().is_none_or(is_newer) {
            return Vec::new();
        }
        self.retained = Some(Retained { epoch, order, retention: retention.clone() });
        self.order_drawn = self.order_drawn.max(order);
        self.bounds = Bounds { limit: self.settled.min(self.horizon()), pins: retention.pins.clone() };
        let mut freed = self.pins.repin(&self.bounds);
        freed.extend(self.pins.release(&self.bounds));
        freed
    }

    /// A record that says F would free something, and none is on its way.
    pub fn is_worth_settling(&self) -> bool {
        let limit = self.flush_point.min(self.horizon());
        let freed = |by: Version| by <= limit && by > self.settling;
        self.flush_point > self.settling && self.pins.oldest().is_some_and(freed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(sequence: u64) -> Version {
        Version::new(Epoch(1), sequence)
    }

    fn retain(epoch: u32, order: u64, retention: Retention) -> Retain {
        let (volume, flush_point) = (VolumeId::from_bytes([1; 16]), Version::ZERO);
        Retain { volume, flush_point, epoch: Epoch(epoch), order, retention }
    }

    /// Holds version 2 of a block, superseded by 4, at position 40.
    fn overwritten() -> Volume {
        let mut volume = Volume { flush_point: version(5), ..Volume::default() };
        let entry = Entry { position: Position(40), checksum: 0, version: version(2) };
        volume.pins.keep(BlockIndex(1), entry, version(4), true, &Bounds::default());
        volume
    }

    #[test]
    fn a_flush_point_is_worth_a_record_of_its_own_only_if_that_frees_something() {
        let mut volume = overwritten();
        assert!(!volume.is_worth_settling(), "nobody said what has to be kept");
        let all_below = Retention { horizon: version(9), ..Retention::default() };
        assert_eq!(volume.merge_retain(&retain(1, 1, all_below)), vec![]);
        assert!(volume.is_worth_settling());
        volume.settling = version(5);
        assert!(!volume.is_worth_settling(), "one is on its way");
        assert_eq!(volume.settle(version(5)).to_vec(), vec![Position(40)]);
    }

    #[test]
    fn what_a_writer_needs_kept_is_what_the_latest_of_the_latest_epoch_says() {
        let mut volume = overwritten();
        assert_eq!(volume.settle(version(5)).to_vec(), vec![], "unknown frees nothing");
        let pinned =
            Retention { horizon: version(9), pins: vec![version(3)], stale_since: Some(version(1)), status_changes: 7 };
        assert_eq!(volume.merge_retain(&retain(2, 2, pinned)), vec![]);
        assert_eq!((volume.bounds().limit, volume.note_limit()), (version(5), version(1)));
        let unpinned = Retention { horizon: version(9), ..Retention::default() };
        assert_eq!(volume.merge_retain(&retain(2, 1, unpinned.clone())), vec![], "an older one");
        assert_eq!(volume.merge_retain(&retain(1, 9, unpinned.clone())), vec![], "an older epoch's");
        assert_eq!(volume.merge_retain(&retain(2, 3, unpinned)), vec![Position(40)]);
        assert_eq!(volume.status_changes, 7, "what was heard once is not forgotten");
        assert_eq!(volume.note_limit(), version(5));
    }

    #[test]
    fn records_carried_forward_say_the_same() {
        let mut volume = Volume::default();
        let id = VolumeId::from_bytes([1; 16]);
        let (generation, created) = (RingGeneration(3), BatchNumber(4));
        let slices = vec![SliceId(1), SliceId(2)];
        let record = Instances { volume: id, placement: id, generation, created, width: 2, ring_slices: 4, slices };
        volume.merge_instances(&record);
        assert_eq!(volume.still_of(&record), Some(record.clone()));
        let later = Instances { generation: RingGeneration(4), slices: vec![SliceId(1)], ..record.clone() };
        let mut moved = Volume::default();
        [&record, &later].into_iter().for_each(|record| moved.merge_instances(record));
        assert_eq!(moved.still_of(&record), Some(Instances { slices: vec![SliceId(2)], ..record }));
        assert!(volume.holds(SliceId(1), generation, BatchNumber(4)));
        assert!(!volume.holds(SliceId(1), generation, BatchNumber(5)), "created before something was lost");
        assert!(!volume.holds(SliceId(1), RingGeneration(2), BatchNumber(0)));
    }
}
