//! Deleted volumes: a node drops its instances on the record `deleting/<uuid>` and on nothing else, and confirms by
//! taking itself off the record's list. The last one deletes the record.

use std::convert::Infallible;
use std::future::Future;
use thiserror::Error;
use torus_rpc::metadata::{Compare, Entry, Event, Metadata, MetadataError, Revision, Transaction, Watch, Write};
use torus_schema::ids::{NodeId, VolumeId};
use torus_schema::records::{self, DeletingRecord, RecordError, keys};

#[derive(Debug, Error)]
pub enum DeletingError {
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("volume {volume} could not be dropped: {because}")]
    Drop { volume: VolumeId, because: String },
}

/// Where a volume's instances are. Dropping one that is not known is no error: the node may never have got it, or
/// have dropped it and died before it confirmed.
pub trait Instances {
    fn drop_volume(&self, volume: VolumeId) -> impl Future<Output = Result<(), String>>;
}

/// Drops what is deleted already and then what will be, until the watch or a drop fails; call it again then.
pub async fn follow<M: Metadata, I: Instances>(
    metadata: &M,
    node: NodeId,
    instances: &I,
) -> Result<Infallible, DeletingError> {
    let existing = metadata.range(&keys::deletings()).await?;
    let mut watch = metadata.watch(&keys::deletings(), Revision(existing.revision.0 + 1)).await?;
    for entry in existing.entries {
        confirm(metadata, node, instances, entry).await?;
    }
    loop {
        for event in watch.next().await? {
            if let Event::Put(entry) = event {
                confirm(metadata, node, instances, entry).await?;
            }
        }
    }
}

async fn confirm<M: Metadata, I: Instances>(
    metadata: &M,
    node: NodeId,
    instances: &I,
    entry: Entry,
) -> Result<(), DeletingError> {
    let mut entry = entry;
    let mut is_dropped = false;
    loop {
        let record: DeletingRecord = records::decode(&entry.key, &entry.value)?;
        if !record.holders.contains(&node) {
            return Ok(());
        }
        if !is_dropped {
            let dropped = instances.drop_volume(record.volume).await;
            dropped.map_err(|because| DeletingError::Drop { volume: record.volume, because })?;
            tracing::info!(volume = %record.volume, "dropped a deleted volume");
            is_dropped = true;
        }
        let result = metadata.transact(without(node, &entry, record)).await?;
        if result.applied {
            return Ok(());
        }
        // Another node confirmed in between: what stands there now is tried again.
        match result.reads.into_iter().next().flatten() {
            Some(now) => entry = now,
            None => return Ok(()),
        }
    }
}

fn without(node: NodeId, entry: &Entry, mut record: DeletingRecord) -> Transaction {
    record.holders.retain(|holder| *holder != node);
    let key = entry.key.clone();
    let write = if record.holders.is_empty() {
        Write::Delete { key: key.clone() }
    } else {
        Write::Put { key: key.clone(), value: records::encode(&record), lease: None }
    };
    let compare = Compare::ModRevision(key.clone(), entry.mod_revision);
    Transaction { compares: vec![compare], writes: vec![write], reads: vec![key] }
}
