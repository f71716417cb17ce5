//! What runs on a node beside its shards: its heartbeat, repairs of what nobody has attached, and the deletion of what
//! was deleted.

use super::Whole;
use crate::simulation::cluster::{Runtime, SimulatedShard};
use std::rc::Rc;
use std::time::Duration;
use torus_engine::node::deleting::{self, Instances};
use torus_frontends::volume::RepairOwner;
use torus_rpc::metadata::{Metadata, MetadataError, Transaction, Write};
use torus_rpc::runtime::simulated::World;
use torus_rpc::runtime::{Clock, Runtime as _};
use torus_schema::ids::{NodeId, VolumeId};
use torus_schema::limits::{HEARTBEAT_INTERVAL, HEARTBEAT_LEASE_TTL};
use torus_schema::records::{HeartbeatRecord, encode, keys};

const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The shards of one node.
struct OfNode(World, Vec<SimulatedShard>);

impl Instances for OfNode {
    async fn drop_volume(&self, volume: VolumeId) -> Result<(), String> {
        for (number, shard) in self.1.iter().enumerate() {
            let dropped = shard.drop_volume(volume).await.map_err(|error| error.to_string());
            self.0.note(|| format!("shard {number} of a node drops {volume}: {dropped:?}"));
            dropped?;
        }
        Ok(())
    }
}

impl Whole {
    pub(super) async fn start_node(&self, number: usize) {
        self.world.note(|| format!("node-{number} starts"));
        for place in &self.cluster.nodes[number].shards {
            let disk = place.disk.borrow();
            disk.reappear();
            disk.fail_writes(0);
            disk.fail_syncs(0);
            disk.fail_reads(0);
        }
        self.cluster.start_node(number).await;
        self.equip(number);
    }

    /// All of it is in the node's process and ends with it.
    pub(super) fn equip(&self, number: usize) {
        let node = &self.cluster.nodes[number];
        let process = node.process.get().expect("it was just started");
        let id = node.id;
        let owner = RepairOwner::new(self.cluster.runtime_of(number), id, node.host.clone());
        self.world.spawn(process, async move { owner.run().await });
        let runtime = self.cluster.runtime_of(number);
        self.world.spawn(process, async move {
            loop {
                let error = beat(&runtime, id).await;
                tracing::debug!(%id, ?error, "heartbeat");
                runtime.clock().sleep(RETRY_AFTER).await;
            }
        });
        let shards = node.shards.iter().filter_map(|place| place.shard.borrow().clone()).collect();
        let (runtime, shards) = (self.cluster.runtime_of(number), Rc::new(OfNode(self.world.clone(), shards)));
        self.world.spawn(process, async move {
            loop {
                let Err(error) = deleting::follow(runtime.metadata(), id, &*shards).await;
                tracing::debug!(%id, %error, "deletions");
                runtime.clock().sleep(RETRY_AFTER).await;
            }
        });
    }
}

/// Until something about it fails.
async fn beat(runtime: &Runtime, node: NodeId) -> Result<(), MetadataError> {
    let store = runtime.metadata();
    let lease = store.grant_lease(HEARTBEAT_LEASE_TTL).await?;
    let beat = HeartbeatRecord { node, updated_s: 0, started_s: 0, shards: vec![] };
    let write = Write::Put { key: keys::heartbeat(node), value: encode(&beat), lease: Some(lease) };
    store.transact(Transaction { writes: vec![write], ..Transaction::default() }).await?;
    loop {
        runtime.clock().sleep(HEARTBEAT_INTERVAL).await;
        store.keep_alive(lease).await?;
    }
}
