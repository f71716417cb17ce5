//! Everything `torusadm status` looks at: the metadata store, and the nodes that answer in time.

use super::AdminError;
use super::snapshot::{self, Cluster, Nodes, Statuses};
use futures::StreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use torus_rpc::control::{self, ControlError, ShardDamage, ShardInstances};
use torus_rpc::metadata::Metadata;
use torus_schema::ids::{NodeId, VolumeId};
use torus_schema::records::{DeletingRecord, OwnerRecord, ResyncRecord, VolumeRecord, keys};

/// Nodes asked at once; each question takes a thread for as long as it lasts.
const NODES_AT_ONCE: usize = 64;

pub struct Facts {
    pub cluster: Cluster,
    pub nodes: Nodes,
    pub volumes: Vec<VolumeRecord>,
    pub statuses: Statuses,
    pub owners: BTreeMap<VolumeId, OwnerRecord>,
    pub resyncs: BTreeMap<VolumeId, ResyncRecord>,
    pub deleting: BTreeMap<VolumeId, DeletingRecord>,
    pub told: Told,
    /// Volumes that were there, or being deleted, before the nodes were asked or afterwards.
    pub known: BTreeSet<VolumeId>,
}

/// What the nodes said themselves.
#[derive(Default)]
pub struct Told {
    pub instances: BTreeMap<NodeId, Vec<ShardInstances>>,
    pub damage: BTreeMap<NodeId, Vec<ShardDamage>>,
    /// Why a node with a heartbeat said nothing.
    pub silent: BTreeMap<NodeId, String>,
}

/// Nodes that do not answer within `patience` are listed, not waited for.
pub async fn gather<M: Metadata>(metadata: &M, patience: Duration) -> Result<Facts, AdminError> {
    let known = existing(metadata).await?;
    let told = ask(&Nodes::read(metadata).await?, patience).await;
    read(metadata, told, known).await
}

/// What the metadata store says beside what was `told`; `known`: volumes that were there before.
pub async fn read<M: Metadata>(metadata: &M, told: Told, mut known: BTreeSet<VolumeId>) -> Result<Facts, AdminError> {
    known.extend(existing(metadata).await?);
    Ok(Facts {
        cluster: Cluster::read(metadata).await?,
        nodes: Nodes::read(metadata).await?,
        volumes: snapshot::volumes(metadata).await?,
        statuses: snapshot::statuses(metadata).await?,
        owners: snapshot::by_volume(metadata, &keys::owners()).await?,
        resyncs: snapshot::by_volume(metadata, &keys::resyncs()).await?,
        deleting: snapshot::by_volume(metadata, &keys::deletings()).await?,
        told,
        known,
    })
}

/// Read before the nodes are asked, so that a volume deleted while they answer is not taken for an orphan.
async fn existing<M: Metadata>(metadata: &M) -> Result<BTreeSet<VolumeId>, AdminError> {
    let volumes = snapshot::volumes(metadata).await?.into_iter().map(|volume| volume.id);
    let deleting = snapshot::by_volume::<_, DeletingRecord>(metadata, &keys::deletings()).await?;
    Ok(volumes.chain(deleting.into_keys()).collect())
}

type Answer = (Result<Vec<ShardInstances>, ControlError>, Result<Vec<ShardDamage>, ControlError>);

async fn ask(nodes: &Nodes, patience: Duration) -> Told {
    let up = nodes.records.values().filter(|record| nodes.heartbeats.contains_key(&record.id));
    let questions = up.map(|record| async move {
        let instances = control::ask_instances(&record.control, None, patience);
        let damage = control::ask_damage(&record.control, 0, patience);
        (record.id, futures::future::join(instances, damage).await)
    });
    let answers: Vec<(NodeId, Answer)> =
        futures::stream::iter(questions).buffer_unordered(NODES_AT_ONCE).collect().await;
    let mut told = Told::default();
    for (id, (instances, damage)) in answers {
        match instances {
            Ok(instances) => _ = told.instances.insert(id, instances),
            Err(error) => _ = told.silent.insert(id, error.to_string()),
        }
        match damage {
            Ok(damage) => _ = told.damage.insert(id, damage),
            Err(error) => _ = told.silent.insert(id, error.to_string()),
        }
    }
    told
}
