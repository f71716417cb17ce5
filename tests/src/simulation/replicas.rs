//! A look at the replicas themselves, past any client: which are in sync, and what each has.

use super::cluster::{Cluster, KEY, ShardPlace, joined};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::time::Duration;
use torus_rpc::control::ShardInstances;
use torus_rpc::message::{Answer, Envelope, Operation};
use torus_rpc::metadata::Metadata;
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{BlockIndex, Epoch, NodeId, Version, VolumeId};
use torus_schema::records::{NameRecord, StatusRecord, decode, keys};

/// Version and checksum of each block; `None`: it reads as zeros, whether it was cleared or never written.
pub type Blocks = Vec<Option<(Version, u32)>>;

impl Cluster {
    pub async fn volume_id(&self, name: &str) -> VolumeId {
        let key = keys::name(name);
        let entry = self.store.get(&key).await.expect("available").expect("the volume is there");
        decode::<NameRecord>(&key, &entry.value).expect("ours").volume
    }

    /// Which replicas of the volume are stale.
    pub async fn status(&self, name: &str) -> StatusRecord {
        let key = keys::status(self.volume_id(name).await);
        let entry = self.store.get(&key).await.expect("available");
        entry.map(|entry| decode(&key, &entry.value).expect("ours")).unwrap_or_default()
    }

    /// What the nodes that run would say of it at their control ports.
    pub fn told(&self, volume: VolumeId) -> BTreeMap<NodeId, Vec<ShardInstances>> {
        let held = |place: &ShardPlace| {
            let shard = place.shard.borrow();
            let volumes = shard.as_ref()?.held(Some(volume)).expect("its disk is well");
            Some(ShardInstances { index: place.index, failed: None, volumes })
        };
        let running = self.nodes.iter().filter(|node| node.process.get().is_some());
        running.map(|node| (node.id, node.shards.iter().filter_map(held).collect())).collect()
    }

    /// Somebody owns the volume meanwhile. Panics after `patience`.
    pub async fn all_in_sync(&self, name: &str, patience: Duration) {
        let deadline = self.world.now().after(patience);
        loop {
            let status = self.status(name).await;
            if status.stale.is_empty() {
                return;
            }
            assert!(self.world.now() < deadline, "seed {}: {status:?} after {patience:?}", self.world.seed());
            self.world.sleep(Duration::from_millis(1)).await;
        }
    }

    /// What the node's disk has of the blocks.
    pub async fn blocks_of(&self, node: usize, volume: VolumeId, first: u64, count: u64) -> Blocks {
        let shard = self.nodes[node].shard.borrow().clone().expect("it runs");
        let token = ClusterKey::from_hex(KEY).expect("32 bytes").sign(volume, Epoch(0), "peer");
        let mut blocks = Blocks::new();
        for block in (first..first + count).map(BlockIndex) {
            let operation = Operation::PeerRead { token, first: block, count: 1, data: true };
            let (reply, chunks) = shard.handle(Envelope { volume, ..Envelope::NONE }, operation, Bytes::new()).await;
            let Answer::Read { runs, checksums } = reply.answer else {
                panic!("seed {}: node {node}, block {block}: {:?}", self.world.seed(), reply.answer);
            };
            let bytes = joined(&chunks);
            if let Some(checksum) = checksums.first() {
                assert_eq!(crc32c::crc32c(&bytes), *checksum);
            }
            blocks.push(checksums.first().map(|checksum| (runs[0].version, *checksum)));
        }
        blocks
    }

    /// Of a volume with a replica on every node, all of them in sync and nothing under way.
    pub async fn assert_identical(&self, name: &str, first: u64, count: u64) {
        let volume = self.volume_id(name).await;
        let expected = self.blocks_of(0, volume, first, count).await;
        for node in 1..self.nodes.len() {
            let found = self.blocks_of(node, volume, first, count).await;
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let (seed, block) = (self.world.seed(), first + at as u64);
                assert_eq!(found, expected, "seed {seed}: block {block} on node {node}, as it is on node 0");
            }
        }
    }
}
