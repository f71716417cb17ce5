//! Which replicas of which slots are in sync. Pure; the one value of it in the metadata store is `StatusRecord`.

use std::collections::{BTreeMap, BTreeSet};
use torus_schema::ids::{NodeNumber, ShardId, SliceId, Version};
use torus_schema::records::{StaleReplica, StatusRecord};

/// A shard, as its position in the session's list.
pub type ShardPosition = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    InSync,
    /// Lacks, or may lack, what is above this version.
    Stale {
        since: Version,
    },
}

#[derive(Clone, Debug)]
pub struct Replicas {
    /// The volume's slices, by slot.
    slices: Vec<SliceId>,
    shards: Vec<ShardId>,
    slots: Vec<Vec<(ShardPosition, Health)>>,
    min: usize,
}

/// A slice would have too few replicas left in sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BelowMinimum {
    pub slice: SliceId,
    pub remaining: usize,
    pub min: usize,
}

impl Replicas {
    /// `placed`: the slices of the volume with the shards that hold each, best first.
    pub fn new(placed: Vec<(SliceId, Vec<ShardId>)>, min: usize, status: &StatusRecord) -> Self {
        assert!(min >= 1);
        let shards: BTreeSet<ShardId> = placed.iter().flat_map(|(_, shards)| shards.iter().copied()).collect();
        let shards: Vec<ShardId> = shards.into_iter().collect();
        let slots = placed.iter().map(|(slice, replicas)| {
            let health = |shard: &ShardId| stale_since(status, shard.node, *slice);
            replicas
                .iter()
                .map(|shard| (shards.binary_search(shard).expect("the list was made of all"), health(shard)))
                .collect()
        });
        let slots = slots.collect();
        Self { slices: placed.into_iter().map(|(slice, _)| slice).collect(), shards, slots, min }
    }

    pub fn shards(&self) -> &[ShardId] {
        &self.shards
    }

    pub fn slot_count(&self) -> usize {
        self.slots.len()
    }

    pub fn in_sync(&self, slot: usize) -> impl Iterator<Item = ShardPosition> + '_ {
        self.slots[slot].iter().filter(|(_, health)| *health == Health::InSync).map(|(shard, _)| *shard)
    }

    pub fn is_in_sync(&self, slot: usize, shard: ShardPosition) -> bool {
        self.in_sync(slot).any(|other| other == shard)
    }

    /// Slices of which the shard is an in-sync replica.
    pub fn slices_in_sync_on(&self, shard: ShardPosition) -> Vec<SliceId> {
        let held = (0..self.slots.len()).filter(|slot| self.is_in_sync(*slot, shard));
        held.map(|slot| self.slices[slot]).collect()
    }

    pub fn holds_in_sync(&self, shard: ShardPosition) -> bool {
        (0..self.slots.len()).any(|slot| self.is_in_sync(slot, shard))
    }

    /// All slots of these shards become stale, or none does.
    pub fn lose(&mut self, lost: &BTreeSet<ShardPosition>, since: Version) -> Result<(), BelowMinimum> {
        for slot in 0..self.slots.len() {
            let remaining = self.in_sync(slot).filter(|shard| !lost.contains(shard)).count();
            if remaining < self.min && remaining < self.in_sync(slot).count() {
                return Err(BelowMinimum { slice: self.slices[slot], remaining, min: self.min });
            }
        }
        for (shard, health) in self.slots.iter_mut().flatten() {
            if lost.contains(shard) && *health == Health::InSync {
                *health = Health::Stale { since };
            }
        }
        Ok(())
    }

    /// One shard never had these slices: nothing of them can be trusted.
    pub fn lose_slices(&mut self, lost: ShardPosition, missing: &[SliceId]) -> Result<(), BelowMinimum> {
        for slot in 0..self.slots.len() {
            let slice = self.slices[slot];
            if missing.contains(&slice) && self.is_in_sync(slot, lost) {
                let remaining = self.in_sync(slot).count() - 1;
                if remaining < self.min {
                    return Err(BelowMinimum { slice, remaining, min: self.min });
                }
                for (shard, health) in &mut self.slots[slot] {
                    if *shard == lost {
                        *health = Health::Stale { since: Version::ZERO };
                    }
                }
            }
        }
        Ok(())
    }

    /// The lowest mark of a stale replica.
    pub fn lowest_since(&self) -> Option<Version> {
        let since = |(_, health): &(ShardPosition, Health)| match health {
            Health::Stale { since } => Some(*since),
            Health::InSync => None,
        };
        self.slots.iter().flatten().filter_map(since).min()
    }

    /// Below the minimum already, so that writes would have too few copies.
    pub fn below_minimum(&self) -> Option<BelowMinimum> {
        (0..self.slots.len()).find_map(|slot| {
            let remaining = self.in_sync(slot).count();
            (remaining < self.min).then_some(BelowMinimum { slice: self.slices[slot], remaining, min: self.min })
        })
    }

    /// Without the times, which `StatusKeeper` knows.
    /// Without its count of changes.
    pub fn to_status(&self) -> StatusRecord {
        let mut stale: BTreeMap<(NodeNumber, Version), Vec<SliceId>> = BTreeMap::new();
        for (slot, replicas) in self.slots.iter().enumerate() {
            for (shard, health) in replicas {
                if let Health::Stale { since } = health {
                    stale.entry((self.shards[*shard].node, *since)).or_default().push(self.slices[slot]);
                }
            }
        }
        let entry = |((node, since), slices): ((NodeNumber, Version), Vec<SliceId>)| StaleReplica {
            node,
            since: since.into(),
            stale_s: 0,
            slices,
        };
        StatusRecord { changes: 0, stale: stale.into_iter().map(entry).collect() }
    }
}

fn stale_since(status: &StatusRecord, node: NodeNumber, slice: SliceId) -> Health {
    let listed = status.stale.iter().find(|stale| stale.node == node && stale.slices.contains(&slice));
    listed.map_or(Health::InSync, |stale| Health::Stale { since: stale.since.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::ids::{Epoch, ShardIndex};

    fn shard(node: u32) -> ShardId {
        ShardId { node: NodeNumber(node), shard: ShardIndex(0) }
    }

    fn three_nodes() -> Vec<(SliceId, Vec<ShardId>)> {
        (0..4).map(|slice| (SliceId(slice), vec![shard(1), shard(2), shard(3)])).collect()
    }

    #[test]
    fn the_status_lists_exceptions_only_and_reads_back() {
        let mut replicas = Replicas::new(three_nodes(), 2, &StatusRecord::default());
        assert_eq!(replicas.to_status(), StatusRecord::default());
        let since = Version::new(Epoch(3), 17);
        replicas.lose(&BTreeSet::from([1]), since).unwrap();
        let status = replicas.to_status();
        assert_eq!(status.stale.len(), 1);
        assert_eq!(status.stale[0].node, NodeNumber(2));
        let again = Replicas::new(three_nodes(), 2, &status);
        assert_eq!(again.in_sync(0).collect::<Vec<_>>(), [0, 2]);
        assert!(!again.holds_in_sync(1));
    }

    #[test]
    fn a_replica_that_is_stale_keeps_its_mark_when_it_is_lost_again() {
        let mut replicas = Replicas::new(three_nodes(), 1, &StatusRecord::default());
        replicas.lose(&BTreeSet::from([0]), Version::new(Epoch(1), 5)).unwrap();
        replicas.lose(&BTreeSet::from([0, 1]), Version::new(Epoch(1), 9)).unwrap();
        let since: Vec<_> = replicas.to_status().stale.iter().map(|stale| stale.since.sequence).collect();
        assert_eq!(since, [5, 9]);
    }

    #[test]
    fn the_minimum_is_never_undercut_and_nothing_changes_when_it_would_be() {
        let mut replicas = Replicas::new(three_nodes(), 2, &StatusRecord::default());
        let below = replicas.lose(&BTreeSet::from([0, 1]), Version::ZERO).unwrap_err();
        assert_eq!((below.remaining, below.min), (1, 2));
        assert_eq!(replicas.to_status(), StatusRecord::default());
    }
}
