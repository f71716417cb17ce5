//! `--auto-join`: a node that is not in the ring adds itself, as `torusadm peer add` would. Only where no volume
//! exists: with volumes a changed ring means data to move, which is an operator's decision.

use thiserror::Error;
use torus_rpc::metadata::{Compare, Entry, Metadata, MetadataError, Transaction, Write};
use torus_schema::ids::RingGeneration;
use torus_schema::limits::RING_BYTES_MAX;
use torus_schema::records::{self, NodeRecord, RecordError, keys};
use torus_schema::ring::planner::{PlanNode, plan};
use torus_schema::ring::record::{RingRecord, RingShard};
use torus_schema::ring::table::{Ring, RingError};

/// Each failed attempt means that another node joined meanwhile.
const ATTEMPTS: u32 = 100;

#[derive(Debug, PartialEq, Eq)]
pub enum Joined {
    Already,
    Now(RingGeneration),
    /// So many volumes exist.
    Refused {
        volumes: usize,
    },
}

#[derive(Debug, Error)]
pub enum JoinError {
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("there is no ring under {key}; was the cluster made by `torusadm init`?")]
    NoRing { key: String },
    #[error("the ring with this node would take {found} bytes, at most {limit} can be stored")]
    TooLarge { found: usize, limit: usize },
    #[error("the ring was changed by others {attempts} times in a row; join with `torusadm peer add`")]
    Contended { attempts: u32 },
}

/// Adds the node to the ring, if nobody changed it and no volume appeared meanwhile.
pub async fn join<M: Metadata>(metadata: &M, node: &NodeRecord) -> Result<Joined, JoinError> {
    for _ in 0..ATTEMPTS {
        // Read before the volumes: whoever creates one afterwards changes it.
        let placements = metadata.get(&keys::placements()).await?;
        let key = keys::ring();
        let entry = metadata.get(&key).await?.ok_or_else(|| JoinError::NoRing { key: key.clone() })?;
        let ring = Ring::from_record(records::decode::<RingRecord>(&key, &entry.value)?)?;
        if ring.node_by_id(node.id).is_some() {
            return Ok(Joined::Already);
        }
        let volumes = metadata.range(&keys::volumes()).await?.entries.len();
        if volumes > 0 {
            return Ok(Joined::Refused { volumes });
        }
        let nodes: Vec<PlanNode> = ring.nodes().iter().map(PlanNode::from).chain([plan_node(node)]).collect();
        let record = plan(&ring, &nodes);
        let value = records::encode(&record);
        if value.len() > RING_BYTES_MAX {
            return Err(JoinError::TooLarge { found: value.len(), limit: RING_BYTES_MAX });
        }
        if metadata.transact(replace(&entry, placements, value)).await?.applied {
            return Ok(Joined::Now(record.generation));
        }
    }
    Err(JoinError::Contended { attempts: ATTEMPTS })
}

fn replace(ring: &Entry, placements: Option<Entry>, value: Vec<u8>) -> Transaction {
    let no_volume_meanwhile = match placements {
        Some(entry) => Compare::ModRevision(entry.key, entry.mod_revision),
        None => Compare::Absent(keys::placements()),
    };
    let unchanged = Compare::ModRevision(ring.key.clone(), ring.mod_revision);
    let write = Write::Put { key: ring.key.clone(), value, lease: None };
    Transaction { compares: vec![unchanged, no_volume_meanwhile], writes: vec![write], reads: vec![] }
}

fn plan_node(record: &NodeRecord) -> PlanNode {
    let shards = record.shards.iter();
    PlanNode {
        id: record.id,
        host: record.host.clone(),
        zone: record.zone.clone(),
        rack: record.rack.clone(),
        shards: shards.map(|shard| RingShard { index: shard.index, weight_bytes: shard.size_bytes }).collect(),
    }
}
