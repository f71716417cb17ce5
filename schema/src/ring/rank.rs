//! Who of several nodes goes first for a volume: an order that all of them know without asking each other, and that is
//! another one for each volume.

use crate::ids::{NodeId, VolumeId};
use xxhash_rust::xxh3::xxh3_64;

/// How many of `nodes` come before `node`.
pub fn rank(volume: VolumeId, node: NodeId, nodes: impl IntoIterator<Item = NodeId>) -> usize {
    let own = (draw(volume, node), node);
    nodes.into_iter().filter(|other| (draw(volume, *other), *other) < own).count()
}

fn draw(volume: VolumeId, node: NodeId) -> u64 {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&volume.to_bytes());
    bytes[16..].copy_from_slice(&node.to_bytes());
    xxh3_64(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_node_has_a_rank_of_its_own_and_volumes_have_different_firsts() {
        let nodes: Vec<NodeId> = (0..5).map(|node| NodeId::from_bytes([node; 16])).collect();
        let mut firsts = BTreeSet::new();
        for volume in (0..64).map(|volume| VolumeId::from_bytes([volume; 16])) {
            let ranks: Vec<usize> = nodes.iter().map(|node| rank(volume, *node, nodes.clone())).collect();
            assert_eq!(ranks.iter().collect::<BTreeSet<_>>().len(), nodes.len());
            firsts.insert(ranks.iter().position(|rank| *rank == 0).unwrap());
        }
        assert_eq!(firsts.len(), nodes.len());
    }
}
