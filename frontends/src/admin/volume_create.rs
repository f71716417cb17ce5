//! Making a volume: its name and record first, then its instances on every shard that is to hold a slice, durably and
//! explicitly, and only then may it be attached. A crash in between leaves a volume `creating`, which can be deleted.

use super::snapshot::{Cluster, Found, Nodes};
use super::volume_delete::{self, Wait};
use super::{AdminError, draw_uuid, now_s};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::{Either, select};
use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;
use torus_rpc::message::{Answer, Envelope, Operation};
use torus_rpc::metadata::{Compare, Metadata, MetadataError, Revision, Transaction, Write};
use torus_rpc::runtime::{Clock, Connect, Link, Peer, Runtime};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{Epoch, Incarnation, ShardId, SliceId, Version, VolumeId};
use torus_schema::limits::{BLOCK_BYTES, REPLICAS_MAX, VOLUME_BYTES_MAX, VOLUME_NAME_BYTES_MAX, WIDTH_DEFAULT};
use torus_schema::records::{NameRecord, PlacementsRecord, VolumeRecord, VolumeState, decode, encode, keys};
use torus_schema::ring::Ring;
use torus_schema::ring::placement::Placement;

/// Whom the token of CreateInstances is made out to.
const TOKEN_OWNER: &str = "create";
/// Shards told at once.
const SHARDS_AT_ONCE: usize = 64;
/// Changes that lose the race against another this often are given up.
const ATTEMPTS: u32 = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewVolume {
    pub name: String,
    pub size_bytes: u64,
    /// `None`: the cluster's default.
    pub replicas: Option<u8>,
    /// `None`: one less than replicas, at least 1.
    pub min_replicas: Option<u8>,
    pub width: Option<u32>,
    pub write_through: bool,
}

/// Ends within `deadline`: two thirds of it for the shards, the rest to undo what was begun if one of them fails.
pub async fn create<R: Runtime>(runtime: &R, new: &NewVolume, deadline: Duration) -> Result<VolumeRecord, AdminError> {
    check_name(&new.name)?;
    check_size(new.size_bytes)?;
    let (cluster, record, revision) = write_record(runtime, new).await?;
    let nodes = Nodes::read(runtime.metadata()).await?;
    let told = tell_shards(runtime, &cluster, &nodes, &record, deadline * 2 / 3).await;
    if let Err((place, because)) = told {
        let undone = undo(runtime, &record.name).await;
        return Err(AdminError::Instances { name: record.name, place, because, undone });
    }
    make_ready(runtime.metadata(), record, revision).await
}

pub fn check_name(name: &str) -> Result<(), AdminError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let because = if name.is_empty() {
        "it is empty"
    } else if name.len() > VOLUME_NAME_BYTES_MAX {
        "it is too long"
    } else if name.starts_with(['-', '.']) {
        "it begins with . or -"
    } else if !name.bytes().all(allowed) {
        "it has other characters"
    } else {
        return Ok(());
    };
    Err(AdminError::Name { name: name.to_string(), because })
}

pub fn check_size(found: u64) -> Result<(), AdminError> {
    if found == 0 {
        return Err(AdminError::SizeZero);
    }
    if found > VOLUME_BYTES_MAX {
        return Err(AdminError::SizeTooLarge { found, limit: VOLUME_BYTES_MAX });
    }
    if !found.is_multiple_of(BLOCK_BYTES) {
        let below = found - found % BLOCK_BYTES;
        return Err(AdminError::SizeUneven { found, below, above: below + BLOCK_BYTES });
    }
    Ok(())
}

/// The record, if this cluster can hold such a volume.
fn plan_record(cluster: &Cluster, new: &NewVolume, id: VolumeId) -> Result<VolumeRecord, AdminError> {
    let replicas = new.replicas.unwrap_or(cluster.record.replicas);
    if replicas == 0 || replicas > REPLICAS_MAX {
        return Err(AdminError::Replicas { found: replicas });
    }
    let min_replicas = new.min_replicas.unwrap_or(replicas.saturating_sub(1).max(1));
    if min_replicas == 0 || min_replicas > replicas {
        return Err(AdminError::MinReplicas { found: min_replicas, replicas });
    }
    let slices = cluster.ring.slices();
    let width = new.width.unwrap_or(WIDTH_DEFAULT.min(slices));
    if !width.is_power_of_two() || width > slices {
        return Err(AdminError::Width { found: width, slices });
    }
    if usize::from(replicas) > cluster.ring.replicas_max() {
        return Err(AdminError::TooFewNodes { replicas, nodes: cluster.ring.nodes().len() });
    }
    Ok(VolumeRecord {
        id,
        name: new.name.clone(),
        size_bytes: new.size_bytes,
        replicas,
        min_replicas,
        width,
        placement: id,
        generation: cluster.ring.generation(),
        state: VolumeState::Creating,
        write_through: new.write_through,
        created_s: now_s(),
    })
}

/// Takes the name and places the volume by the ring as it is; also the revision at which that happened.
async fn write_record<R: Runtime>(
    runtime: &R,
    new: &NewVolume,
) -> Result<(Cluster, VolumeRecord, Revision), AdminError> {
    let metadata = runtime.metadata();
    let id = VolumeId(draw_uuid(runtime));
    for _ in 0..ATTEMPTS {
        let cluster = Cluster::read(metadata).await?;
        let record = plan_record(&cluster, new, id)?;
        let put = |key, value| Write::Put { key, value, lease: None };
        let transaction = Transaction {
            compares: vec![
                Compare::Absent(keys::name(&new.name)),
                Compare::ModRevision(keys::ring(), cluster.ring_entry.mod_revision),
            ],
            writes: vec![
                put(keys::name(&new.name), encode(&NameRecord { volume: id })),
                put(keys::volume(id), encode(&record)),
                put(keys::placements(), encode(&PlacementsRecord { last: id })),
            ],
            reads: vec![keys::name(&new.name), keys::volume(id)],
        };
        let reads = match metadata.transact(transaction).await {
            Ok(result) => result.reads,
            // Whether it took place shows by what stands there now.
            Err(error @ MetadataError::Unknown { .. }) => {
                let reads =
                    super::snapshot::read_together(metadata, vec![keys::name(&new.name), keys::volume(id)]).await;
                reads.ok().filter(|reads| reads.iter().all(Option::is_some)).ok_or(error)?
            }
            Err(error) => return Err(error.into()),
        };
        let mut reads = reads.into_iter();
        let (name, volume) = (reads.next().flatten(), reads.next().flatten());
        if let Some(volume) = volume {
            return Ok((cluster, record, volume.mod_revision));
        }
        if let Some(name) = name {
            let volume = decode::<NameRecord>(&name.key, &name.value)?.volume;
            return Err(AdminError::NameTaken { name: new.name.clone(), volume });
        }
    }
    Err(AdminError::Contended { attempts: ATTEMPTS })
}

/// Which of the volume's slices each shard holds.
pub(super) fn slices_by_shard(ring: &Ring, record: &VolumeRecord) -> BTreeMap<ShardId, Vec<SliceId>> {
    let mut by_shard: BTreeMap<ShardId, Vec<SliceId>> = BTreeMap::new();
    for &slice in Placement::new(record.placement, record.width, ring.slices()).slices() {
        for &shard in ring.replicas(slice, record.replicas) {
            by_shard.entry(shard).or_default().push(slice);
        }
    }
    by_shard
}

/// On one shard, in the generation it is to have them in now.
pub(super) async fn create_instances_on<R: Runtime>(
    runtime: &R,
    cluster: &Cluster,
    nodes: &Nodes,
    record: &VolumeRecord,
    shard: ShardId,
    slices: Vec<SliceId>,
    limit: Duration,
) -> Result<(), AdminError> {
    let key = ClusterKey::from_hex(&cluster.record.key)?;
    let failed = |because| AdminError::InstancesOn { name: record.name.clone(), shard: shard.to_string(), because };
    let peer = peer_of(cluster, nodes, shard).map_err(failed)?;
    let record =
        VolumeRecord { generation: cluster.ring.instance_generation(shard.node, record.generation), ..record.clone() };
    let operation = creation(&key, cluster, &record, slices);
    let call = pin!(tell(runtime, &peer, &record, &operation));
    match select(call, pin!(runtime.clock().sleep(limit))).await {
        Either::Left((result, _)) => result.map_err(failed),
        Either::Right(_) => Err(failed(format!("{} did not answer within {limit:?}", peer.address))),
    }
}

fn creation(key: &ClusterKey, cluster: &Cluster, record: &VolumeRecord, slices: Vec<SliceId>) -> Operation {
    Operation::CreateInstances {
        token: key.sign(record.id, Epoch(0), TOKEN_OWNER),
        placement: record.placement,
        width: record.width,
        ring_slices: cluster.ring.slices(),
        slices,
    }
}

/// Creates the instances everywhere, or says where that failed first and why.
async fn tell_shards<R: Runtime>(
    runtime: &R,
    cluster: &Cluster,
    nodes: &Nodes,
    record: &VolumeRecord,
    limit: Duration,
) -> Result<(), (String, String)> {
    let key = ClusterKey::from_hex(&cluster.record.key).map_err(|error| ("the cluster".into(), error.to_string()))?;
    let shards = slices_by_shard(&cluster.ring, record);
    let calls = shards.into_iter().map(|(shard, slices)| {
        let key = &key;
        async move {
            let peer = peer_of(cluster, nodes, shard).map_err(|because| (format!("shard {shard}"), because))?;
            let place = format!("shard {} of node {}", shard.shard, nodes.name(peer.node));
            let operation = creation(key, cluster, record, slices);
            let call = pin!(tell(runtime, &peer, record, &operation));
            match select(call, pin!(runtime.clock().sleep(limit))).await {
                Either::Left((result, _)) => result.map_err(|because| (place, because)),
                Either::Right(_) => Err((place, format!("{} did not answer within {limit:?}", peer.address))),
            }
        }
    });
    let mut results = futures::stream::iter(calls).buffer_unordered(SHARDS_AT_ONCE);
    while let Some(result) = results.next().await {
        result?;
    }
    Ok(())
}

pub(super) fn peer_of(cluster: &Cluster, nodes: &Nodes, shard: ShardId) -> Result<Peer, String> {
    let node = cluster.ring.node(shard.node).ok_or("the ring has no such node")?;
    let record = nodes.records.get(&node.id).ok_or_else(|| format!("node {} never joined the cluster", node.id))?;
    let data = record.shards.iter().find(|known| known.index == shard.shard);
    let data = data.ok_or_else(|| format!("node {} has no such shard", nodes.name(node.id)))?;
    Ok(Peer { cluster: cluster.record.id, node: node.id, shard: shard.shard, address: data.address.clone() })
}

async fn tell<R: Runtime>(
    runtime: &R,
    peer: &Peer,
    record: &VolumeRecord,
    operation: &Operation,
) -> Result<(), String> {
    let envelope = Envelope {
        volume: record.id,
        epoch: Epoch(0),
        incarnation: Incarnation(0),
        generation: record.generation,
        flush_point: Version::ZERO,
    };
    let link = runtime.connect().connect(peer).await.map_err(|error| error.to_string())?;
    let (reply, _) = link.call(&envelope, operation, &Bytes::new()).await.map_err(|error| error.to_string())?;
    match reply.answer {
        Answer::Created => Ok(()),
        Answer::Refused(refusal) => Err(refusal.to_string()),
        other => Err(format!("{} answered {other:?}, expected Created", peer.address)),
    }
}

/// What was done about the volume that could not be finished, for the error.
async fn undo<R: Runtime>(runtime: &R, name: &str) -> String {
    match volume_delete::delete(runtime, name, Wait::No, |_| {}).await {
        Ok(_) => "it was removed again; start that node and try again".to_string(),
        Err(error) => format!("`volume delete {name}` removes what was begun (tried now: {error})"),
    }
}

async fn make_ready<M: Metadata>(
    metadata: &M,
    record: VolumeRecord,
    revision: Revision,
) -> Result<VolumeRecord, AdminError> {
    let ready = VolumeRecord { state: VolumeState::Ready, ..record };
    let key = keys::volume(ready.id);
    let transaction = Transaction {
        compares: vec![Compare::ModRevision(key.clone(), revision)],
        writes: vec![Write::Put { key, value: encode(&ready), lease: None }],
        reads: vec![],
    };
    let unfinished = |because| AdminError::Unfinished { name: ready.name.clone(), because };
    let applied = match metadata.transact(transaction).await {
        Ok(result) => result.applied,
        // Whether it took place shows by what stands there now.
        Err(error @ MetadataError::Unknown { .. }) => {
            let found = Found::read(metadata, &ready.name).await.ok();
            found.filter(|found| found.record == ready).map(|_| true).ok_or_else(|| unfinished(error))?
        }
        Err(error) => return Err(unfinished(error)),
    };
    if applied { Ok(ready) } else { Err(AdminError::DeletedMeanwhile { name: ready.name }) }
}
