//! What a node's shards hold, as the control port tells it: for `torusadm status`, `why` and `volume promote`.

use super::{length, parse};
use torus_schema::control_capnp::{held_slices, held_volume, shard_instances};
use torus_schema::ids::{Epoch, RingGeneration, ShardIndex, SliceId, Version, VolumeId};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardInstances {
    pub index: ShardIndex,
    /// Its disk failed: what it holds is not known now.
    pub failed: Option<String>,
    pub volumes: Vec<HeldVolume>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldVolume {
    pub volume: VolumeId,
    /// Of the last writer that opened it here.
    pub epoch: Epoch,
    /// F as the shard knows it.
    pub flush_point: Version,
    /// With data, whatever became of the slices.
    pub blocks: u64,
    /// Changes of the volume's status that the shard heard of.
    pub status_changes: u64,
    pub slices: Vec<HeldSlices>,
}

/// Slices that are alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldSlices {
    /// The ring generation in which this replica was given them.
    pub generation: RingGeneration,
    /// Nothing of them was lost since they were created.
    pub valid: bool,
    pub slices: Vec<SliceId>,
}

impl HeldVolume {
    /// Of the slice's instance: the generation, and whether it is whole.
    pub fn slice(&self, slice: SliceId) -> Option<(RingGeneration, bool)> {
        let held = self.slices.iter().find(|held| held.slices.contains(&slice))?;
        Some((held.generation, held.valid))
    }
}

pub fn set_instances(mut to: shard_instances::Builder<'_>, shard: &ShardInstances) {
    to.set_index(shard.index.0);
    to.set_failed(shard.failed.as_deref().unwrap_or_default());
    let mut volumes = to.init_volumes(length(shard.volumes.len()));
    for (position, held) in (0u32..).zip(&shard.volumes) {
        let mut to = volumes.reborrow().get(position);
        to.set_volume(held.volume.to_string());
        to.set_epoch(held.epoch.0);
        to.set_flush_epoch(held.flush_point.epoch.0);
        to.set_flush_sequence(held.flush_point.sequence);
        to.set_blocks(held.blocks);
        to.set_status_changes(held.status_changes);
        let mut groups = to.init_slices(length(held.slices.len()));
        for (position, group) in (0u32..).zip(&held.slices) {
            let mut to = groups.reborrow().get(position);
            to.set_generation(group.generation.0);
            to.set_valid(group.valid);
            let mut slices = to.init_slices(length(group.slices.len()));
            for (position, slice) in (0u32..).zip(&group.slices) {
                slices.set(position, slice.0);
            }
        }
    }
}

pub(super) fn get_instances(from: shard_instances::Reader<'_>) -> Result<ShardInstances, capnp::Error> {
    let failed = from.get_failed()?.to_string()?;
    Ok(ShardInstances {
        index: ShardIndex(from.get_index()),
        failed: (!failed.is_empty()).then_some(failed),
        volumes: from.get_volumes()?.iter().map(get_volume).collect::<Result<_, _>>()?,
    })
}

fn get_volume(from: held_volume::Reader<'_>) -> Result<HeldVolume, capnp::Error> {
    Ok(HeldVolume {
        volume: parse(from.get_volume()?.to_str()?, "volume")?,
        epoch: Epoch(from.get_epoch()),
        flush_point: Version::new(Epoch(from.get_flush_epoch()), from.get_flush_sequence()),
        blocks: from.get_blocks(),
        status_changes: from.get_status_changes(),
        slices: from.get_slices()?.iter().map(get_slices).collect::<Result<_, _>>()?,
    })
}

fn get_slices(from: held_slices::Reader<'_>) -> Result<HeldSlices, capnp::Error> {
    Ok(HeldSlices {
        generation: RingGeneration(from.get_generation()),
        valid: from.get_valid(),
        slices: from.get_slices()?.iter().map(SliceId).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use capnp::message::Builder;

    #[test]
    fn what_is_held_arrives_as_it_was_sent() {
        let group = |generation, valid, slices: [u32; 2]| HeldSlices {
            generation: RingGeneration(generation),
            valid,
            slices: slices.map(SliceId).to_vec(),
        };
        let held = HeldVolume {
            volume: VolumeId::from_bytes([3; 16]),
            epoch: Epoch(4),
            flush_point: Version::new(Epoch(3), 99),
            blocks: u64::MAX,
            status_changes: 12,
            slices: vec![group(2, true, [1, 4095]), group(1, false, [7, 8])],
        };
        assert_eq!(held.slice(SliceId(8)), Some((RingGeneration(1), false)));
        let shard = ShardInstances { index: ShardIndex(1), failed: Some("gone".into()), volumes: vec![held] };
        let mut message = Builder::new_default();
        set_instances(message.init_root(), &shard);
        assert_eq!(get_instances(message.get_root_as_reader().unwrap()).unwrap(), shard);
    }
}
