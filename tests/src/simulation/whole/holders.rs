//! What may be lost though it was answered, and what may not.
//!
//! Until it is flushed, an answered write is on the disks of all replicas in sync, where a power failure takes it. Who
//! attaches next takes it from whichever of them still has it (protocol rule 4), and does without those it cannot reach
//! (rule 3) as long as `min_replicas` stay. So it may be gone only if the power of as many nodes failed, which may be
//! all that are asked, *and* no node is left that has had everything since the last attach and nothing wrong with it: a
//! *holder*. A lost answer or two make no holder unreachable.

use super::{AREA_BLOCKS, AREAS, Volume, Whole};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use torus_rpc::metadata::Metadata;
use torus_schema::ids::{BlockIndex, ExtentIndex, VolumeId};
use torus_schema::records::{VolumeRecord, decode, keys};
use torus_schema::ring::placement::Placement;

/// Nodes that hold each extent that is worked on.
pub(super) type Places = BTreeMap<ExtentIndex, BTreeSet<usize>>;

/// How many troubles each node has.
pub(super) type Ailing = Rc<RefCell<BTreeMap<usize, usize>>>;

/// As long as it lives the node is not to be counted on.
pub(super) struct Trouble {
    node: usize,
    ailing: Ailing,
}

impl Drop for Trouble {
    fn drop(&mut self) {
        *self.ailing.borrow_mut().get_mut(&self.node).expect("it was counted") -= 1;
    }
}

impl Whole {
    /// Something is wrong with the node, or with what reaches it.
    pub(super) fn ails(&self, node: usize) -> Trouble {
        *self.ailing.borrow_mut().entry(node).or_default() += 1;
        for volume in self.volumes.borrow().values() {
            volume.holders.borrow_mut().remove(&node);
        }
        Trouble { node, ailing: self.ailing.clone() }
    }

    pub(super) async fn places(&self, id: VolumeId) -> Places {
        let ring = self.cluster.ring().await;
        let key = keys::volume(id);
        let entry = self.cluster.store.get(&key).await.expect("available").expect("it was just created");
        let record: VolumeRecord = decode(&key, &entry.value).expect("ours");
        let placement = Placement::new(record.placement, record.width, ring.slices());
        let extents =
            AREAS.iter().flat_map(|first| *first..first + AREA_BLOCKS).map(|block| BlockIndex(block).extent());
        let nodes_of = |extent: ExtentIndex| {
            let shards = ring.replicas(placement.slice_of(extent), record.replicas).iter();
            let nodes = shards.map(|shard| ring.node(shard.node).expect("of the ring").id);
            nodes.map(|id| self.cluster.nodes.iter().position(|node| node.id == id).expect("of the cluster")).collect()
        };
        extents.map(|extent| (extent, nodes_of(extent))).collect()
    }

    /// All that are in sync and well: each has everything that was answered, and gets everything from now on.
    pub(super) async fn count_holders(&self, volume: &Volume) {
        let (ring, status) = (self.cluster.ring().await, self.status(volume.id).await);
        let stale = |node: usize| {
            let id = self.cluster.nodes[node].id;
            status.stale.iter().any(|stale| ring.node(stale.node).is_none_or(|of_ring| of_ring.id == id))
        };
        let ailing = |node: usize| self.ailing.borrow().get(&node).is_some_and(|troubles| *troubles > 0);
        *volume.holders.borrow_mut() =
            (0..self.cluster.nodes.len()).filter(|node| !ailing(*node) && !stale(*node)).collect();
        self.world.note(|| format!("well and in sync: {:?}, held by {:?}", volume.holders.borrow(), volume.places));
    }
}

impl Volume {
    pub(super) fn forget_what_may_be_lost(&self, min_replicas: u8) {
        if self.powerless.borrow().len() < usize::from(min_replicas) {
            return;
        }
        let holders = self.holders.borrow();
        self.workload
            .history
            .borrow_mut()
            .power_lost_where(|block| self.places.get(&block.extent()).is_none_or(|nodes| nodes.is_disjoint(&holders)));
    }
}
