//! Tells the shards who else holds what: the ring and the addresses in the node records, followed. A shard asks its
//! peers for what it finds damaged; without this it would have nobody to ask.

use crate::node::shards::Shards;
use crate::shard::PeerTable;
use futures::future::{Either, select};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use thiserror::Error;
use torus_rpc::metadata::{Metadata, MetadataError, Revision, Watch};
use torus_schema::ids::{ClusterId, NodeId};
use torus_schema::records::{self, NodeRecord, RecordError, keys};
use torus_schema::ring::record::RingRecord;
use torus_schema::ring::table::{Ring, RingError};

#[derive(Debug, Error)]
pub enum PeersError {
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// Until something cannot be read; call it again then.
pub async fn follow<M: Metadata>(metadata: &M, cluster: ClusterId, shards: &Shards) -> Result<Infallible, PeersError> {
    loop {
        let nodes = metadata.range(&keys::nodes()).await?;
        // Read after the nodes, and both watched from before either: no change falls in between.
        let since = Revision(nodes.revision.0 + 1);
        let mut node_changes = metadata.watch(&keys::nodes(), since).await?;
        let mut ring_changes = metadata.watch(&keys::ring(), since).await?;
        let mut known: BTreeMap<NodeId, NodeRecord> = BTreeMap::new();
        for entry in nodes.entries {
            let record: NodeRecord = records::decode(&entry.key, &entry.value)?;
            known.insert(record.id, record);
        }
        let table = match metadata.get(&keys::ring()).await? {
            Some(entry) => {
                let ring = Ring::from_record(records::decode::<RingRecord>(&entry.key, &entry.value)?)?;
                PeerTable::from_ring(cluster, &ring, &known)
            }
            None => PeerTable::default(),
        };
        shards.set_peers(&Arc::new(table));
        match select(pin!(node_changes.next()), pin!(ring_changes.next())).await {
            Either::Left((events, _)) | Either::Right((events, _)) => drop(events?),
        }
    }
}
