//! Deleting a volume: one transaction frees its name and writes `deleting/<uuid>`, which lists the nodes that hold
//! something of it. On that record, and on nothing else, they drop it, and each takes itself off the list.
//!
//! A node that has left the ring (its place was given to another, or it was removed) and is down will hardly ever confirm:
//! it is taken off by `peer replace`, `peer remove` and the next delete. Should it come back, what it kept is an orphan:
//! listed, never served (volumes' uuids do not come again), and freed by nobody.

use super::snapshot::{Cluster, Found, Nodes};
use super::unowned::without_owner;
use super::volume_create::slices_by_shard;
use super::{AdminError, now_s};
use futures::future::{Either, select};
use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;
use torus_rpc::metadata::{Compare, Event, Metadata, MetadataError, Revision, Transaction, Watch, Write};
use torus_rpc::runtime::{Clock, Runtime};
use torus_schema::ids::{NodeId, VolumeId};
use torus_schema::records::{DeletingRecord, OwnerRecord, VolumeRecord, decode, encode, keys};

/// Attempts against volumes that change meanwhile.
const ATTEMPTS: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    No,
    /// For the nodes to drop their instances.
    AtMost(Duration),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deleted {
    pub volume: VolumeRecord,
    /// Nodes that have not confirmed yet; they do when they are up. Address and uuid.
    pub awaited: Vec<String>,
}

/// `progress` hears which nodes are still awaited whenever one of them confirmed.
pub async fn delete<R: Runtime>(
    runtime: &R,
    name: &str,
    wait: Wait,
    mut progress: impl FnMut(&[String]),
) -> Result<Deleted, AdminError> {
    let metadata = runtime.metadata();
    let (volume, mut holders, revision) = delete_unowned(runtime, name).await?;
    // The volume is deleted, whatever becomes of earlier ones.
    if let Err(error) = wait_no_longer(metadata).await {
        tracing::warn!(%error, "earlier deletions wait on for nodes that are gone");
    }
    let nodes = Nodes::read(metadata).await?;
    let names = |holders: &[NodeId]| holders.iter().map(|id| nodes.name(*id)).collect::<Vec<_>>();
    if let Wait::AtMost(limit) = wait {
        let confirmed = pin!(confirmations(metadata, volume.id, revision, &mut holders, |left| progress(&names(left))));
        match select(confirmed, pin!(runtime.clock().sleep(limit))).await {
            Either::Left((result, _)) => result?,
            Either::Right(_) => {}
        }
    }
    Ok(Deleted { volume, awaited: names(&holders) })
}

/// No deletion waits any longer for nodes that are in the ring no more, and down.
pub(super) async fn wait_no_longer<M: Metadata>(metadata: &M) -> Result<(), AdminError> {
    for _ in 0..ATTEMPTS {
        let cluster = Cluster::read(metadata).await?;
        let nodes = Nodes::read(metadata).await?;
        let is_gone = |id: &NodeId| cluster.ring.node_by_id(*id).is_none() && !nodes.heartbeats.contains_key(id);
        let mut is_done = true;
        for entry in metadata.range(&keys::deletings()).await?.entries {
            let mut record: DeletingRecord = decode(&entry.key, &entry.value)?;
            let gone: Vec<NodeId> = record.holders.iter().copied().filter(is_gone).collect();
            if gone.is_empty() {
                continue;
            }
            record.holders.retain(|holder| !gone.contains(holder));
            let key = entry.key.clone();
            let write = match record.holders.is_empty() {
                true => Write::Delete { key },
                false => Write::Put { key, value: encode(&record), lease: None },
            };
            let guards = [
                Compare::ModRevision(entry.key, entry.mod_revision),
                Compare::ModRevision(keys::ring(), cluster.ring_entry.mod_revision),
            ];
            let down = gone.iter().map(|id| Compare::Absent(keys::heartbeat(*id)));
            let compares = guards.into_iter().chain(down).collect();
            is_done &= metadata.transact(Transaction { compares, writes: vec![write], reads: vec![] }).await?.applied;
        }
        if is_done {
            return Ok(());
        }
    }
    Err(AdminError::Contended { attempts: ATTEMPTS })
}

/// A repair is no reason to keep a volume.
async fn delete_unowned<R: Runtime>(
    runtime: &R,
    name: &str,
) -> Result<(VolumeRecord, Vec<NodeId>, Revision), AdminError> {
    let (_, unowned) = without_owner(runtime, name).await?;
    let result = write_deleting(runtime.metadata(), name).await;
    unowned.release(runtime).await;
    result
}

/// Also who holds something of it, and the revision of the record.
async fn write_deleting<M: Metadata>(
    metadata: &M,
    name: &str,
) -> Result<(VolumeRecord, Vec<NodeId>, Revision), AdminError> {
    for _ in 0..ATTEMPTS {
        let cluster = Cluster::read(metadata).await?;
        let found = Found::read(metadata, name).await?;
        if let Some(owner) = &found.owner {
            return Err(attached(name, owner));
        }
        let holders = holders(&cluster, &found.record)?;
        let id = found.record.id;
        let record = DeletingRecord { volume: id, holders: holders.clone() };
        let removed = [keys::name(name), keys::volume(id), keys::status(id), keys::epoch(id)];
        let deletes = removed.into_iter().map(|key| Write::Delete { key });
        let put = Write::Put { key: keys::deleting(id), value: encode(&record), lease: None };
        let transaction = Transaction {
            compares: vec![
                Compare::ModRevision(keys::name(name), found.name_entry.mod_revision),
                Compare::ModRevision(keys::volume(id), found.entry.mod_revision),
                Compare::Absent(keys::owner(id)),
                Compare::ModRevision(keys::ring(), cluster.ring_entry.mod_revision),
            ],
            writes: deletes.chain([put]).collect(),
            reads: vec![],
        };
        match metadata.transact(transaction).await {
            Ok(result) if result.applied => return Ok((found.record, holders, result.revision)),
            Ok(_) => {}
            // Whether it took place shows by what stands there now; nodes may have been quick.
            Err(error @ MetadataError::Unknown { .. }) => {
                let range = metadata.range(&keys::volume(id)).await.map_err(|_| error.clone())?;
                if !range.entries.is_empty() {
                    return Err(error.into());
                }
                let left = metadata.range(&keys::deleting(id)).await?;
                let left_record = left.entries.first().map(|entry| decode::<DeletingRecord>(&entry.key, &entry.value));
                let left_holders = left_record.transpose()?.map_or_else(Vec::new, |record| record.holders);
                return Ok((found.record, left_holders, left.revision));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(AdminError::Contended { attempts: ATTEMPTS })
}

pub(super) fn attached(name: &str, owner: &OwnerRecord) -> AdminError {
    AdminError::Attached {
        name: name.to_string(),
        host: owner.host.clone(),
        process: owner.process.clone(),
        pid: owner.pid,
        age_s: now_s().saturating_sub(owner.attached_s),
    }
}

fn holders(cluster: &Cluster, record: &VolumeRecord) -> Result<Vec<NodeId>, AdminError> {
    let ring = &cluster.ring;
    if usize::from(record.replicas) > ring.replicas_max() {
        let (name, nodes) = (record.name.clone(), ring.nodes().len());
        return Err(AdminError::Misplaced { name, replicas: record.replicas, nodes });
    }
    let shards = slices_by_shard(ring, record);
    let nodes: BTreeSet<NodeId> = shards.keys().filter_map(|shard| ring.node(shard.node)).map(|node| node.id).collect();
    Ok(nodes.into_iter().collect())
}

/// Follows the record until it is gone; `holders` is who is left.
async fn confirmations<M: Metadata>(
    metadata: &M,
    volume: VolumeId,
    revision: Revision,
    holders: &mut Vec<NodeId>,
    mut progress: impl FnMut(&[NodeId]),
) -> Result<(), AdminError> {
    if holders.is_empty() {
        return Ok(());
    }
    let key = keys::deleting(volume);
    let mut watch = metadata.watch(&key, Revision(revision.0 + 1)).await?;
    loop {
        progress(holders);
        for event in watch.next().await? {
            match event {
                Event::Put(entry) => *holders = decode::<DeletingRecord>(&entry.key, &entry.value)?.holders,
                Event::Deleted { .. } => {
                    holders.clear();
                    return Ok(());
                }
            }
        }
    }
}
