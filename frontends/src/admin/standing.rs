//! How the replicas of each slice of a volume stand, by the metadata store: what several commands decide by.

use super::snapshot::{Cluster, Nodes};
use std::collections::BTreeMap;
use torus_schema::ids::{NodeId, NodeNumber, RingGeneration, ShardId, SliceId};
use torus_schema::records::{StaleReplica, StatusRecord, VolumeRecord};
use torus_schema::ring::placement::Placement;

pub struct SliceStanding<'a> {
    pub slice: SliceId,
    /// In the order of the ring; `None`: in sync.
    pub replicas: Vec<(ShardId, Option<&'a StaleReplica>)>,
}

impl SliceStanding<'_> {
    pub fn in_sync(&self) -> impl Iterator<Item = ShardId> + '_ {
        self.replicas.iter().filter(|(_, stale)| stale.is_none()).map(|(shard, _)| *shard)
    }

    pub fn is_in_sync_on(&self, node: NodeNumber) -> bool {
        self.in_sync().any(|shard| shard.node == node)
    }
}

/// Nothing for a volume that the ring cannot place.
pub fn slices_of<'a>(cluster: &Cluster, volume: &VolumeRecord, status: &'a StatusRecord) -> Vec<SliceStanding<'a>> {
    let ring = &cluster.ring;
    if usize::from(volume.replicas) > ring.replicas_max() || volume.width > ring.slices() {
        return Vec::new();
    }
    let placement = Placement::new(volume.placement, volume.width, ring.slices());
    let standing = |&slice: &SliceId| SliceStanding {
        slice,
        replicas: ring
            .replicas(slice, volume.replicas)
            .iter()
            .map(|shard| (*shard, stale_in(status, shard.node, slice)))
            .collect(),
    };
    placement.slices().iter().map(standing).collect()
}

pub fn stale_in(status: &StatusRecord, node: NodeNumber, slice: SliceId) -> Option<&StaleReplica> {
    status.stale.iter().find(|stale| stale.node == node && stale.slices.contains(&slice))
}

/// Who has a number, and the generation of its instances of a volume.
pub fn holder(cluster: &Cluster, number: NodeNumber, volume: &VolumeRecord) -> Option<(NodeId, RingGeneration)> {
    let node = cluster.ring.node(number)?;
    Some((node.id, cluster.ring.instance_generation(number, volume.generation)))
}

/// The address of a node by its number in the ring, for people.
pub fn name_of(cluster: &Cluster, nodes: &Nodes, number: NodeNumber) -> String {
    cluster.ring.node(number).map_or_else(|| format!("node {number}"), |node| nodes.name(node.id))
}

/// The status with these slices of one node stale since `since`, whatever they were before; `now_s` is for the node
/// that was not stale at all.
pub fn with_stale(
    status: &StatusRecord,
    node: NodeNumber,
    slices: &[SliceId],
    since: torus_schema::records::VersionRecord,
    now_s: u64,
) -> StatusRecord {
    let known_s = status.stale.iter().find(|stale| stale.node == node).map(|stale| stale.stale_s);
    let mut by_mark: BTreeMap<_, Vec<SliceId>> = BTreeMap::new();
    for stale in status.stale.iter().filter(|stale| stale.node == node) {
        let kept = stale.slices.iter().copied().filter(|slice| !slices.contains(slice));
        by_mark.entry(stale.since).or_default().extend(kept);
    }
    by_mark.entry(since).or_default().extend(slices);
    let mut stale: Vec<StaleReplica> = status.stale.iter().filter(|stale| stale.node != node).cloned().collect();
    for (since, mut slices) in by_mark {
        slices.sort_unstable();
        if !slices.is_empty() {
            stale.push(StaleReplica { node, since, stale_s: known_s.unwrap_or(now_s), slices });
        }
    }
    stale.sort_by_key(|stale| (stale.node, stale.since));
    StatusRecord { changes: status.changes + 1, stale }
}

/// The status with these slices of one node in sync.
pub fn without_stale(status: &StatusRecord, node: NodeNumber, slices: &[SliceId]) -> StatusRecord {
    let mut stale = status.stale.clone();
    for listed in stale.iter_mut().filter(|listed| listed.node == node) {
        listed.slices.retain(|slice| !slices.contains(slice));
    }
    stale.retain(|listed| !listed.slices.is_empty());
    StatusRecord { changes: status.changes + 1, stale }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::ids::Epoch;
    use torus_schema::records::VersionRecord;

    fn at(sequence: u64) -> VersionRecord {
        VersionRecord { epoch: Epoch(2), sequence }
    }

    #[test]
    fn marks_of_a_node_are_moved_and_lifted_slice_by_slice() {
        let (one, two) = (NodeNumber(1), NodeNumber(2));
        let status = with_stale(&StatusRecord::default(), one, &[SliceId(1), SliceId(2)], at(9), 100);
        let status = with_stale(&status, two, &[SliceId(2)], at(5), 200);
        let moved = with_stale(&status, one, &[SliceId(2), SliceId(3)], at(5), 300);
        let marks = |slice| stale_in(&moved, one, SliceId(slice)).map(|stale| (stale.since.sequence, stale.stale_s));
        assert_eq!([1, 2, 3, 4].map(marks), [Some((9, 100)), Some((5, 100)), Some((5, 100)), None]);
        let lifted = without_stale(&moved, one, &[SliceId(2), SliceId(3)]);
        assert_eq!(stale_in(&lifted, one, SliceId(1)).map(|stale| stale.since), Some(at(9)));
        assert_eq!((stale_in(&lifted, one, SliceId(2)), lifted.stale.len()), (None, 2));
    }
}
