//! All shards of the node, as its main thread sees them.

use crate::control::{Answered, NodeReport, Reporter, ShardReport};
use crate::node::deleting::Instances;
use crate::node::executor::{Beside, Numbers, ShardThread, ShardThreadError};
use crate::node::membership::now_s;
use crate::node::scrub::Scrubber;
use crate::shard::{Conflict, DamageReport, Damaged, ListedDamage, PeerTable, ScrubPass, ScrubReport};
use futures::future::try_join_all;
use std::rc::Rc;
use std::sync::Arc;
use torus_rpc::control::{
    ConflictingBlock, DamagedBlock, ScrubOrder, ScrubStatus, ShardDamage, ShardInstances, ShardStages,
};
use torus_rpc::runtime::Instant;
use torus_schema::ids::{ShardIndex, VolumeId};
use torus_schema::limits::{DAMAGE_TOLD_MAX, SEGMENT_BYTES};
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

    pub fn indexes(&self) -> Vec<ShardIndex> {
        self.threads.iter().map(|thread| thread.index).collect()
    }

    pub fn set_peers(&self, table: &Arc<PeerTable>) {
        self.threads.iter().for_each(|thread| thread.set_peers(table.clone()));
    }

    /// Of each shard, with the number of its segments.
    pub async fn scrub_reports(&self) -> Result<Vec<(ShardIndex, ScrubReport, u32)>, ShardThreadError> {
        let numbers = try_join_all(self.threads.iter().map(ShardThread::numbers)).await?;
        let reports = self.threads.iter().zip(&numbers);
        Ok(reports.map(|(thread, told)| (thread.index, told.scrub, told.health.statistics.segments)).collect())
    }

    pub fn start_scrub(&self, index: ShardIndex, pass: ScrubPass, rate_bytes_s: u64) {
        let thread = self.threads.iter().find(|thread| thread.index == index);
        thread.into_iter().for_each(|thread| thread.start_scrub(pass, rate_bytes_s));
    }

    pub async fn stop_scrub(&self, index: ShardIndex) -> Result<Option<ScrubPass>, ShardThreadError> {
        match self.threads.iter().find(|thread| thread.index == index) {
            Some(thread) => thread.stop_scrub().await,
            None => Ok(None),
        }
    }

    pub async fn damage(&self, limit: u32) -> Result<Vec<ShardDamage>, ShardThreadError> {
        let limit = limit.min(DAMAGE_TOLD_MAX) as usize;
        let reports = try_join_all(self.threads.iter().map(|thread| thread.damage(limit))).await?;
        Ok(self.threads.iter().zip(&reports).map(|(thread, report)| damage_of(thread.index, report)).collect())
    }

    pub async fn held(&self, only: Option<VolumeId>) -> Result<Vec<ShardInstances>, ShardThreadError> {
        try_join_all(self.threads.iter().map(|thread| thread.held(only))).await
    }

    pub async fn stages(&self, only: Option<VolumeId>) -> Result<Vec<ShardStages>, ShardThreadError> {
        try_join_all(self.threads.iter().map(|thread| thread.stages(only))).await
    }

    /// False: there is no such shard, or its thread has ended.
    pub fn run(&self, index: ShardIndex, beside: Beside) -> bool {
        let thread = self.threads.iter().find(|thread| thread.index == index);
        thread.is_some_and(|thread| thread.run(beside))
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
    ShardUsage { index: report.index, used_bytes: report.live_bytes, free_bytes, failed: report.failed.clone() }
}

fn report_of(index: ShardIndex, numbers: &Numbers) -> ShardReport {
    let shard = &numbers.health.statistics;
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
        damaged: shard.damaged,
        damaged_found: shard.damaged_found,
        repaired: shard.repaired,
        conflicts: shard.conflicts,
        failed: numbers.health.failed.clone(),
        failures: numbers.health.failures,
    }
}

fn damage_of(index: ShardIndex, report: &DamageReport) -> ShardDamage {
    let age_s = |since: Instant| report.now.since(since).as_secs();
    let block = |listed: &ListedDamage| {
        let Damaged { volume, block, version, position, .. } = listed.damaged;
        let (found_by, age_s, attempts) = (listed.by.name().to_string(), age_s(listed.since), listed.attempts);
        DamagedBlock { volume, block, version, position: position.0, found_by, age_s, attempts }
    };
    let conflict = |conflict: &Conflict| {
        let &Conflict { volume, block, version, checksum_here, checksum_there, ref peer, since } = conflict;
        let (peer_node, peer_shard, age_s) = (peer.node, peer.shard, age_s(since));
        ConflictingBlock { volume, block, version, checksum_here, checksum_there, peer_node, peer_shard, age_s }
    };
    ShardDamage {
        index,
        damaged: report.counts.damaged,
        conflicts: report.counts.conflicting,
        blocks: report.blocks.iter().map(block).collect(),
        conflict_list: report.conflicts.iter().map(conflict).collect(),
    }
}

/// What the control port answers.
pub struct NodeReporter {
    pub record: NodeRecord,
    pub started_s: u64,
    pub shards: Rc<Shards>,
    pub scrubber: Rc<Scrubber>,
}

impl Reporter for NodeReporter {
    fn report(&self) -> Answered<NodeReport> {
        let (record, started_s, shards) = (self.record.clone(), self.started_s, self.shards.clone());
        Box::pin(async move {
            let reports = shards.report().await.map_err(|error| error.to_string())?;
            let usage = reports.iter().map(usage_of).collect();
            let heartbeat = HeartbeatRecord { node: record.id, updated_s: now_s(), started_s, shards: usage };
            Ok(NodeReport { node: to_text(&record), heartbeat: to_text(&heartbeat), shards: reports })
        })
    }

    fn scrub(&self, order: ScrubOrder) -> Answered<ScrubStatus> {
        let scrubber = self.scrubber.clone();
        Box::pin(async move { scrubber.order(order).await.map_err(|error| error.to_string()) })
    }

    fn damage(&self, limit: u32) -> Answered<Vec<ShardDamage>> {
        let shards = self.shards.clone();
        Box::pin(async move { shards.damage(limit).await.map_err(|error| error.to_string()) })
    }

    fn instances(&self, only: Option<VolumeId>) -> Answered<Vec<ShardInstances>> {
        let shards = self.shards.clone();
        Box::pin(async move { shards.held(only).await.map_err(|error| error.to_string()) })
    }

    fn stages(&self, only: Option<VolumeId>) -> Answered<Vec<ShardStages>> {
        let shards = self.shards.clone();
        Box::pin(async move { shards.stages(only).await.map_err(|error| error.to_string()) })
    }
}

fn to_text(record: &impl serde::Serialize) -> String {
    String::from_utf8(records::encode(record)).expect("JSON is UTF-8")
}
