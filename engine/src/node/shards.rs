//! All shards of the node, as its main thread sees them.

use crate::control::{NodeReport, Reporter, ShardReport};
use crate::node::deleting::Instances;
use crate::node::executor::{Numbers, ShardThread, ShardThreadError};
use crate::node::membership::now_s;
use futures::future::try_join_all;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use torus_schema::ids::{ShardIndex, VolumeId};
use torus_schema::limits::SEGMENT_BYTES;
use torus_schema::records::{self, HeartbeatRecord, NodeRecord, ShardUsage};

pub struct Shards {
    threads: Vec<ShardThread>,
}

impl Shards {
    pub fn new(threads: Vec<ShardThread>) -> Self {
        Self { threads }
    }

    /// For the heartbeat.
    pub async fn usage(&self) -> Result<Vec<ShardUsage>, ShardThreadError> {
        let reports = self.report().await?;
        Ok(reports.iter().map(usage_of).collect())
    }

    pub async fn report(&self) -> Result<Vec<ShardReport>, ShardThreadError> {
        let numbers = try_join_all(self.threads.iter().map(ShardThread::numbers)).await?;
        Ok(self.threads.iter().zip(&numbers).map(|(thread, numbers)| report_of(thread.index, numbers)).collect())
    }

    /// All at once; each makes its data durable.
    pub async fn close(&self) -> Result<(), ShardThreadError> {
        try_join_all(self.threads.iter().map(ShardThread::close)).await.map(drop)
    }
}

impl Instances for Shards {
    async fn drop_volume(&self, volume: VolumeId) -> Result<(), String> {
        let dropped = try_join_all(self.threads.iter().map(|thread| thread.drop_volume(volume))).await;
        dropped.map(drop).map_err(|error| error.to_string())
    }
}

fn usage_of(report: &ShardReport) -> ShardUsage {
    let free_bytes = u64::from(report.segments_free) * SEGMENT_BYTES;
    ShardUsage { index: report.index, used_bytes: report.live_bytes, free_bytes }
}

fn report_of(index: ShardIndex, numbers: &Numbers) -> ShardReport {
    let shard = &numbers.shard;
    ShardReport {
        index,
        segments: shard.segments,
        segments_free: shard.segments_free,
        live_bytes: shard.live_bytes,
        volumes: shard.volumes,
        connections: numbers.connections,
        reads: shard.reads,
        writes: shard.writes,
        flushes: shard.flushes,
        batches: shard.batches,
        syncs: shard.syncs,
        bytes_appended: shard.bytes_appended,
        checksum_errors: shard.checksum_errors,
        refused: shard.refused,
        index_blocks: shard.index_blocks,
        index_bytes: shard.index_bytes,
    }
}

/// What the control port answers.
pub struct NodeReporter {
    pub record: NodeRecord,
    pub started_s: u64,
    pub shards: Rc<Shards>,
}

impl Reporter for NodeReporter {
    fn report(&self) -> Pin<Box<dyn Future<Output = Result<NodeReport, String>>>> {
        let (record, started_s, shards) = (self.record.clone(), self.started_s, self.shards.clone());
        Box::pin(async move {
            let reports = shards.report().await.map_err(|error| error.to_string())?;
            let usage = reports.iter().map(usage_of).collect();
            let heartbeat = HeartbeatRecord { node: record.id, updated_s: now_s(), started_s, shards: usage };
            Ok(NodeReport { node: to_text(&record), heartbeat: to_text(&heartbeat), shards: reports })
        })
    }
}

fn to_text(record: &impl serde::Serialize) -> String {
    String::from_utf8(records::encode(record)).expect("JSON is UTF-8")
}
