//! What the shard knows of each volume: which slices it holds, who has it open, how far it is flushed.
//! All of it is merged from records in any order: epoch and F by maximum, slices by union.

use super::pins::Pins;
use crate::log::record::{Instances, Open};
use crate::log::{BatchNumber, Position};
use std::collections::BTreeMap;
use torus_rpc::message::{Envelope, Refusal, Token};
use torus_schema::ids::{Epoch, RingGeneration, SliceId, Version, VolumeId};
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
    pub pins: Pins,
    /// Appends of data that are not applied yet.
    pub in_flight: usize,
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

    /// Records that say the same again: what the cleaner carries forward.
    pub fn instances(&self, volume: VolumeId) -> Vec<Instances> {
        let Some(layout) = &self.layout else { return Vec::new() };
        let mut groups: BTreeMap<(RingGeneration, BatchNumber), Vec<SliceId>> = BTreeMap::new();
        for (slice, instance) in &self.slices {
            groups.entry((instance.generation, instance.created)).or_default().push(*slice);
        }
        let record = |((generation, created), slices)| Instances {
            volume,
            placement: layout.id,
            generation,
            created,
            width: layout.width,
            ring_slices: layout.ring_slices,
            slices,
        };
        groups.into_iter().map(record).collect()
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

    /// A record in the log says F: what it covers needs to be kept no longer.
    pub fn settle(&mut self, flush_point: Version) -> Vec<Position> {
        self.flush_point = self.flush_point.max(flush_point);
        if flush_point <= self.settled {
            return Vec::new();
        }
        self.settled = flush_point;
        self.pins.release(flush_point)
    }

    /// A record that says F would free something, and none is on its way.
    pub fn is_worth_settling(&self) -> bool {
        let freed = |by: Version| by <= self.flush_point && by > self.settling;
        self.flush_point > self.settling && self.pins.oldest().is_some_and(freed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::pins::Kept;
    use super::*;
    use torus_schema::ids::BlockIndex;

    #[test]
    fn a_flush_point_is_worth_a_record_of_its_own_only_if_that_frees_something() {
        let version = |sequence| Version::new(Epoch(1), sequence);
        let mut volume = Volume { flush_point: version(5), ..Volume::default() };
        assert!(!volume.is_worth_settling());
        let kept = Kept { block: BlockIndex(1), version: version(2) };
        volume.pins.keep(kept, version(4), Position(40), true);
        assert!(volume.is_worth_settling());
        volume.settling = version(5);
        assert!(!volume.is_worth_settling(), "one is on its way");
        assert_eq!(volume.settle(version(5)), vec![Position(40)]);
    }

    #[test]
    fn records_carried_forward_say_the_same() {
        let mut volume = Volume::default();
        let id = VolumeId::from_bytes([1; 16]);
        let (generation, created) = (RingGeneration(3), BatchNumber(4));
        let slices = vec![SliceId(1), SliceId(2)];
        let record = Instances { volume: id, placement: id, generation, created, width: 2, ring_slices: 4, slices };
        volume.merge_instances(&record);
        assert_eq!(volume.instances(id), vec![record]);
        assert!(volume.holds(SliceId(1), generation, BatchNumber(4)));
        assert!(!volume.holds(SliceId(1), generation, BatchNumber(5)), "created before something was lost");
        assert!(!volume.holds(SliceId(1), RingGeneration(2), BatchNumber(0)));
    }
}
