//! Which replicas of which slots are in sync. Pure; the one value of it in the metadata store is `StatusRecord`.
//!
//! ```text
//!           lose (listed first)              begin                settled, pulled, flushed
//!   InSync ─────────────────────► Stale ──────────────► Syncing ──────────────────────────► Finishing
//!     ▲                             ▲      any miss       │                                     │
//!     │                             └─────────────────────┘                                     │
//!     └─────────────────────────────────────────────────────────────────────────────────────────┘
//!                                      no longer listed as stale
//! ```
//! Stale, syncing and finishing are listed alike, as stale since the same version: a resync that fails leaves nothing
//! to be taken back. In the last state the transaction may have been carried out already, so that the replica can no
//! longer be done without; it is not read from either, until that is known.

use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};
use torus_schema::ids::{NodeNumber, ShardId, SliceId, Version};
use torus_schema::records::{StaleReplica, StatusRecord};

/// A shard, as its position in the session's list.
pub type ShardPosition = usize;
/// Of one slot, mostly; so many replicas have room in place.
pub type Shards = SmallVec<[ShardPosition; 4]>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    InSync,
    /// Lacks, or may lack, what is above this version.
    Stale {
        since: Version,
    },
    /// The same, and it gets every new write; each has to be done there too.
    Syncing {
        since: Version,
    },
    /// The same, and the metadata store is being told that it is in sync.
    Finishing {
        since: Version,
    },
}

impl Health {
    /// As it is listed: `None` if it is not.
    pub fn since(self) -> Option<Version> {
        match self {
            Health::InSync => None,
            Health::Stale { since } | Health::Syncing { since } | Health::Finishing { since } => Some(since),
        }
    }

    /// Goes stale only by way of the metadata store.
    fn is_held_to(self) -> bool {
        matches!(self, Health::InSync | Health::Finishing { .. })
    }

    fn is_required(self) -> bool {
        !matches!(self, Health::Stale { .. })
    }
}

#[derive(Clone, Debug)]
pub struct Replicas {
    /// The volume's slices, by slot.
    slices: Vec<SliceId>,
    shards: Vec<ShardId>,
    slots: Vec<Vec<(ShardPosition, Health)>>,
    min: usize,
    /// So many have to be in sync for the volume to be owned at all.
    least: usize,
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
        Self { slices: placed.into_iter().map(|(slice, _)| slice).collect(), shards, slots, min, least: min }
    }

    /// For who only repairs: as long as one replica has everything the others can be filled from it. Nobody is answered
    /// meanwhile, so nothing is promised that fewer than the minimum have.
    pub fn for_repair(self) -> Self {
        Self { least: 1, ..self }
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

    /// Those that have to have every new write.
    pub fn required(&self, slot: usize) -> impl Iterator<Item = ShardPosition> + '_ {
        self.slots[slot].iter().filter(|(_, health)| health.is_required()).map(|(shard, _)| *shard)
    }

    pub fn is_required(&self, slot: usize, shard: ShardPosition) -> bool {
        self.required(slot).any(|other| other == shard)
    }

    pub fn requires(&self, shard: ShardPosition) -> bool {
        self.healths(shard).any(|(_, health)| health.is_required())
    }

    /// It may be in sync for all that is known: what it loses has to be replayed to it.
    pub fn is_held_to(&self, slot: usize, shard: ShardPosition) -> bool {
        self.slots[slot].iter().any(|(other, health)| *other == shard && health.is_held_to())
    }

    fn healths(&self, shard: ShardPosition) -> impl Iterator<Item = (usize, Health)> + '_ {
        let of_slot = move |(slot, replicas): (usize, &Vec<(ShardPosition, Health)>)| {
            let found = replicas.iter().find(|(other, _)| *other == shard);
            found.map(|(_, health)| (slot, *health))
        };
        self.slots.iter().enumerate().filter_map(of_slot)
    }

    /// Slices of which the shard is an in-sync replica, or may be one.
    pub fn slices_held_to(&self, shard: ShardPosition) -> Vec<SliceId> {
        let held = self.healths(shard).filter(|(_, health)| health.is_held_to());
        held.map(|(slot, _)| self.slices[slot]).collect()
    }

    /// Slices of which the shard is an in-sync replica.
    pub fn slices_in_sync_on(&self, shard: ShardPosition) -> Vec<SliceId> {
        let held = (0..self.slots.len()).filter(|slot| self.is_in_sync(*slot, shard));
        held.map(|slot| self.slices[slot]).collect()
    }

    pub fn holds_in_sync(&self, shard: ShardPosition) -> bool {
        (0..self.slots.len()).any(|slot| self.is_in_sync(slot, shard))
    }

    /// Of which the shard is a replica that has been given up, or is being brought back: slot, slice, mark.
    pub fn listed(&self, shard: ShardPosition) -> Vec<(usize, SliceId, Version)> {
        let listed = |(slot, health): (usize, Health)| Some((slot, self.slices[slot], health.since()?));
        self.healths(shard).filter_map(listed).collect()
    }

    pub fn is_syncing(&self, shard: ShardPosition) -> bool {
        self.healths(shard).any(|(_, health)| matches!(health, Health::Syncing { .. }))
    }

    pub fn is_finishing(&self, shard: ShardPosition) -> bool {
        self.healths(shard).any(|(_, health)| matches!(health, Health::Finishing { .. }))
    }

    /// All of these slots, which are stale there: from now on it gets every write.
    pub fn begin_sync(&mut self, shard: ShardPosition, slots: &[usize]) {
        self.change(shard, |slot, health| match health {
            Health::Stale { since } if slots.contains(&slot) => Health::Syncing { since },
            other => other,
        });
    }

    /// What was syncing there is stale as before.
    pub fn abort_sync(&mut self, shard: ShardPosition) {
        self.change(shard, |_, health| match health {
            Health::Syncing { since } => Health::Stale { since },
            other => other,
        });
    }

    /// What is syncing there is about to be in sync.
    pub fn finish_sync(&mut self, shard: ShardPosition) {
        self.change(shard, |_, health| match health {
            Health::Syncing { since } => Health::Finishing { since },
            other => other,
        });
    }

    /// What is finishing is in sync.
    pub fn sync_finishing(&mut self) {
        for (_, health) in self.slots.iter_mut().flatten() {
            if let Health::Finishing { .. } = health {
                *health = Health::InSync;
            }
        }
    }

    /// Nothing of these slices can be trusted there, which is stale already.
    pub fn distrust(&mut self, shard: ShardPosition, slices: &[SliceId]) {
        let of_slot = self.slices.clone();
        self.change(shard, |slot, health| match health {
            Health::Stale { .. } if slices.contains(&of_slot[slot]) => Health::Stale { since: Version::ZERO },
            other => other,
        });
    }

    fn change(&mut self, shard: ShardPosition, change: impl Fn(usize, Health) -> Health) {
        for (slot, replicas) in self.slots.iter_mut().enumerate() {
            for (_, health) in replicas.iter_mut().filter(|(other, _)| *other == shard) {
                *health = change(slot, *health);
            }
        }
    }

    /// The metadata store lists `listed` now. What is listed there as it is here stays: a resync may have begun or ended
    /// meanwhile.
    pub fn adopt(&mut self, listed: &Replicas) {
        for (ours, theirs) in self.slots.iter_mut().flatten().zip(listed.slots.iter().flatten()) {
            if ours.1.since() != theirs.1.since() {
                ours.1 = theirs.1;
            }
        }
    }

    /// All slots of these shards become stale, or none does.
    pub fn lose(&mut self, lost: &BTreeSet<ShardPosition>, since: Version) -> Result<(), BelowMinimum> {
        for slot in 0..self.slots.len() {
            let remaining = self.in_sync(slot).filter(|shard| !lost.contains(shard)).count();
            if remaining < self.min && remaining < self.in_sync(slot).count() {
                return Err(BelowMinimum { slice: self.slices[slot], remaining, min: self.min });
            }
        }
        for (shard, health) in self.slots.iter_mut().flatten().filter(|(shard, _)| lost.contains(shard)) {
            debug_assert!(!matches!(health, Health::Finishing { .. }), "shard {shard}: its outcome is known first");
            *health = Health::Stale { since: health.since().unwrap_or(since) };
        }
        Ok(())
    }

    /// Whether a slice is in sync on both.
    pub fn share_in_sync(&self, one: ShardPosition, other: ShardPosition) -> bool {
        (0..self.slots.len()).any(|slot| self.is_in_sync(slot, one) && self.is_in_sync(slot, other))
    }

    /// Each slice that is in sync on the shard keeps the minimum without it and without all of these.
    pub fn can_spare(&self, shard: ShardPosition, others: &BTreeSet<ShardPosition>) -> Result<(), BelowMinimum> {
        for slot in (0..self.slots.len()).filter(|slot| self.is_in_sync(*slot, shard)) {
            let remaining = self.in_sync(slot).filter(|other| *other != shard && !others.contains(other)).count();
            if remaining < self.min {
                return Err(BelowMinimum { slice: self.slices[slot], remaining, min: self.min });
            }
        }
        Ok(())
    }

    /// One shard never had these slices: nothing of them can be trusted. Who serves clients does not go on if fewer than
    /// the minimum are left.
    pub fn lose_slices(&mut self, lost: ShardPosition, missing: &[SliceId]) -> Result<(), BelowMinimum> {
        self.lose_slices_down_to(self.least, lost, missing)
    }

    /// The same at an attach, which found it so and answered nobody yet: the one replica that has everything is enough to
    /// fill the others. Without any nothing is changed: it may turn up again.
    pub fn find_missing(&mut self, lost: ShardPosition, missing: &[SliceId]) -> Result<(), BelowMinimum> {
        self.lose_slices_down_to(1, lost, missing)
    }

    fn lose_slices_down_to(
        &mut self,
        least: usize,
        lost: ShardPosition,
        missing: &[SliceId],
    ) -> Result<(), BelowMinimum> {
        for slot in 0..self.slots.len() {
            let slice = self.slices[slot];
            if missing.contains(&slice) && self.is_in_sync(slot, lost) {
                let remaining = self.in_sync(slot).count() - 1;
                if remaining < least {
                    return Err(BelowMinimum { slice, remaining, min: least });
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
        self.slots.iter().flatten().filter_map(|(_, health)| health.since()).min()
    }

    /// Below the minimum already, so that writes would have too few copies; for who repairs: there is none.
    pub fn below_minimum(&self) -> Option<BelowMinimum> {
        (0..self.slots.len()).find_map(|slot| {
            let (remaining, min) = (self.in_sync(slot).count(), self.least);
            (remaining < min).then_some(BelowMinimum { slice: self.slices[slot], remaining, min })
        })
    }

    /// Without the times, which `StatusKeeper` knows.
    /// Without its count of changes.
    pub fn to_status(&self) -> StatusRecord {
        let mut stale: BTreeMap<(NodeNumber, Version), Vec<SliceId>> = BTreeMap::new();
        for (slot, replicas) in self.slots.iter().enumerate() {
            for (shard, health) in replicas {
                if let Some(since) = health.since() {
                    stale.entry((self.shards[*shard].node, since)).or_default().push(self.slices[slot]);
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
    fn a_replica_that_syncs_is_written_to_and_not_read_and_listed_as_before() {
        let mut replicas = Replicas::new(three_nodes(), 2, &StatusRecord::default());
        replicas.lose(&BTreeSet::from([1]), Version::new(Epoch(3), 17)).unwrap();
        let listed = replicas.to_status();
        replicas.begin_sync(1, &[0, 2]);
        assert_eq!(replicas.required(0).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(replicas.required(1).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(replicas.in_sync(0).collect::<Vec<_>>(), [0, 2]);
        assert!(replicas.is_syncing(1) && !replicas.is_held_to(0, 1));
        assert_eq!(replicas.to_status(), listed);
        replicas.abort_sync(1);
        assert!(!replicas.requires(1));
        assert_eq!(replicas.lowest_since(), Some(Version::new(Epoch(3), 17)));
        assert_eq!(replicas.to_status(), listed);
    }

    #[test]
    fn a_resync_that_is_being_reported_can_no_longer_be_given_up() {
        let mut replicas = Replicas::new(three_nodes(), 2, &StatusRecord::default());
        replicas.lose(&BTreeSet::from([1]), Version::new(Epoch(3), 17)).unwrap();
        replicas.begin_sync(1, &[0, 1, 2, 3]);
        replicas.finish_sync(1);
        let mut next = replicas.clone();
        next.sync_finishing();
        assert_eq!(next.to_status(), StatusRecord::default());
        replicas.abort_sync(1);
        assert!(replicas.is_finishing(1) && replicas.is_held_to(3, 1) && !replicas.is_in_sync(3, 1));
        replicas.adopt(&next);
        assert_eq!(replicas.slices_in_sync_on(1).len(), 4);
    }

    #[test]
    fn what_becomes_of_a_resync_while_another_replica_is_marked_is_not_undone_by_that() {
        let mut replicas = Replicas::new(three_nodes(), 1, &StatusRecord::default());
        replicas.lose(&BTreeSet::from([1]), Version::new(Epoch(3), 17)).unwrap();
        replicas.begin_sync(1, &[0, 1, 2, 3]);
        let mut next = replicas.clone();
        next.lose(&BTreeSet::from([2]), Version::new(Epoch(3), 20)).unwrap();
        replicas.abort_sync(1);
        replicas.adopt(&next);
        assert!(!replicas.is_syncing(1) && !replicas.holds_in_sync(2));
    }

    #[test]
    fn who_repairs_may_find_that_one_is_left_and_not_give_up_any_of_its_own_accord() {
        let mut replicas = Replicas::new(three_nodes(), 2, &StatusRecord::default()).for_repair();
        replicas.lose(&BTreeSet::from([0]), Version::ZERO).unwrap();
        assert!(replicas.lose(&BTreeSet::from([1]), Version::ZERO).is_err());
        replicas.lose_slices(1, &[SliceId(0), SliceId(3)]).unwrap();
        assert_eq!(replicas.below_minimum(), None);
        assert!(replicas.lose_slices(2, &[SliceId(3)]).is_err());
        let mut client = Replicas::new(three_nodes(), 2, &replicas.to_status());
        assert!(client.find_missing(2, &[SliceId(3)]).is_err() && client.lose_slices(2, &[SliceId(2)]).is_err());
        assert_eq!(client.below_minimum().map(|below| (below.slice, below.remaining)), Some((SliceId(0), 1)));
    }

    #[test]
    fn the_minimum_is_never_undercut_and_nothing_changes_when_it_would_be() {
        let mut replicas = Replicas::new(three_nodes(), 2, &StatusRecord::default());
        let below = replicas.lose(&BTreeSet::from([0, 1]), Version::ZERO).unwrap_err();
        assert_eq!((below.remaining, below.min), (1, 2));
        assert_eq!(replicas.to_status(), StatusRecord::default());
    }
}
