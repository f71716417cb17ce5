//! What the shard holds of each volume, for the control port.

use super::Shard;
use std::collections::BTreeMap;
use torus_rpc::control::{HeldSlices, HeldVolume};
use torus_rpc::runtime::Runtime;
use torus_schema::ids::{RingGeneration, SliceId, VolumeId};

impl<R: Runtime> Shard<R> {
    /// Of `only`, or of all volumes that were not deleted, in the order of their ids.
    pub fn held(&self, only: Option<VolumeId>) -> Vec<HeldVolume> {
        let state = self.state.borrow();
        let wanted = state.contents.volumes.iter().filter(|(id, _)| only.is_none_or(|only| only == **id));
        let held = wanted.map(|(id, volume)| {
            let mut groups: BTreeMap<(RingGeneration, bool), Vec<SliceId>> = BTreeMap::new();
            for (slice, instance) in &volume.slices {
                let valid = instance.created >= state.lost_below;
                groups.entry((instance.generation, valid)).or_default().push(*slice);
            }
            let group = |((generation, valid), slices)| HeldSlices { generation, valid, slices };
            HeldVolume {
                volume: *id,
                epoch: volume.epoch,
                flush_point: volume.flush_point,
                blocks: state.contents.index.blocks_of(*id),
                status_changes: volume.status_changes,
                slices: groups.into_iter().map(group).collect(),
            }
        });
        let mut held: Vec<HeldVolume> = held.collect();
        held.sort_by_key(|held| held.volume);
        held
    }
}
