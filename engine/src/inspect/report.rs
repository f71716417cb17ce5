//! What `inspect` tells, as data: the fields of `--output json`. Numbers that may pass 2^53 are strings.

use super::open::Opened;
use crate::disk::area::BlockArea;
use crate::log::FORMAT_VERSION;
use crate::shard::survey::{SegmentState, Survey, SurveyedSegment};
use serde::Serialize;
use std::path::PathBuf;
use torus_schema::limits::BLOCK_BYTES;

#[derive(Debug, Serialize)]
pub struct NodeInspection {
    pub data_dir: Option<PathBuf>,
    /// Of `torus.json`.
    pub cluster: Option<String>,
    pub node: Option<String>,
    /// It was being grown when it ended.
    pub growing_to_shard_bytes: Option<u64>,
    pub shards: Vec<ShardInspection>,
}

#[derive(Debug, Serialize)]
pub struct ShardInspection {
    pub path: PathBuf,
    pub offset_bytes: u64,
    pub superblock: SuperblockInspection,
    pub volumes: Vec<String>,
    /// Instances created in batches below this number lack records; 0: nothing was ever lost.
    pub lost_below_after_a_start: String,
    pub live_bytes: u64,
    pub segments_free: usize,
    pub segments_sealed: usize,
    pub segments_unsealed: usize,
    pub segments_lost: usize,
    pub segments: Vec<SegmentInspection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records: Option<Vec<RecordInspection>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verified>,
}

#[derive(Debug, Serialize)]
pub struct SuperblockInspection {
    pub format_version: u32,
    pub cluster: String,
    pub node: String,
    pub shard: u16,
    pub size_bytes: u64,
    pub segment_bytes: u64,
    pub revision: String,
    pub lost_below: String,
}

#[derive(Debug, Serialize)]
pub struct SegmentInspection {
    pub segment: u32,
    pub state: &'static str,
    pub offset_bytes: u64,
    /// Counts openings of segments over the shard's life: the lower, the older.
    pub sequence: Option<String>,
    pub opened_s: Option<u64>,
    pub first_batch: Option<String>,
    pub end_batch: Option<String>,
    pub live_blocks: u32,
    /// 0 to 1, of all the blocks of the segment.
    pub live_share: f64,
    pub note_bytes: u64,
}

/// One record with data of the block that was asked for.
#[derive(Debug, Serialize)]
pub struct RecordInspection {
    pub segment: u32,
    pub sequence: String,
    /// Of the block, on the shard's disk, in blocks.
    pub position: u32,
    pub epoch: u32,
    pub version_sequence: String,
    pub checksum: String,
    /// It can still be asked for: it is the newest, or kept for a version that may come back.
    pub is_needed: bool,
    /// What lies there has this checksum.
    pub is_intact: bool,
}

#[derive(Debug, Default, Serialize)]
pub struct Verified {
    pub blocks: u64,
    pub damaged_blocks: u64,
    /// Of those, what a client could ask for.
    pub damaged_needed_blocks: u64,
    /// The first of them.
    pub damaged: Vec<DamagedBlock>,
}

#[derive(Debug, Serialize)]
pub struct DamagedBlock {
    pub volume: String,
    pub block: u64,
    pub offset_bytes: u64,
    pub is_needed: bool,
    pub because: String,
}

impl NodeInspection {
    pub fn new(opened: &Opened) -> Self {
        let identity = opened.identity.as_ref();
        Self {
            data_dir: opened.path.clone(),
            cluster: identity.map(|identity| identity.cluster.to_string()),
            node: identity.map(|identity| identity.node.to_string()),
            growing_to_shard_bytes: identity.and_then(|identity| Some(identity.growing.as_ref()?.shard_bytes)),
            shards: Vec::new(),
        }
    }
}

impl ShardInspection {
    pub fn new(area: &BlockArea, found: &Survey) -> Self {
        let superblock = &found.superblock;
        let count = |state| found.segments.iter().filter(|segment| segment.state == state).count();
        Self {
            path: area.path.clone(),
            offset_bytes: area.offset_bytes,
            superblock: SuperblockInspection {
                format_version: FORMAT_VERSION,
                cluster: superblock.cluster.to_string(),
                node: superblock.node.to_string(),
                shard: superblock.shard.0,
                size_bytes: superblock.size_bytes,
                segment_bytes: superblock.segment_bytes,
                revision: superblock.revision.to_string(),
                lost_below: superblock.lost_below.0.to_string(),
            },
            volumes: found.volumes.iter().map(ToString::to_string).collect(),
            lost_below_after_a_start: found.lost_below.0.to_string(),
            live_bytes: found.segments.iter().map(|segment| u64::from(segment.live_blocks) * BLOCK_BYTES).sum(),
            segments_free: count(SegmentState::Free),
            segments_sealed: count(SegmentState::Sealed),
            segments_unsealed: count(SegmentState::Unsealed),
            segments_lost: count(SegmentState::Lost),
            segments: found.segments.iter().map(|segment| SegmentInspection::new(segment, found)).collect(),
            records: None,
            verified: None,
        }
    }
}

impl SegmentInspection {
    fn new(segment: &SurveyedSegment, found: &Survey) -> Self {
        let is_used = segment.identity.is_some();
        let batch = |number: u64| is_used.then(|| number.to_string());
        Self {
            segment: segment.segment.0,
            state: state_name(segment.state),
            offset_bytes: crate::log::Geometry::offset(found.geometry.first(segment.segment)),
            sequence: segment.identity.map(|identity| identity.sequence.to_string()),
            opened_s: segment.opened_s,
            first_batch: batch(segment.batches.0.0),
            end_batch: batch(segment.batches.1.0),
            live_blocks: segment.live_blocks,
            live_share: f64::from(segment.live_blocks) / f64::from(found.geometry.blocks),
            note_bytes: segment.note_bytes,
        }
    }
}

fn state_name(state: SegmentState) -> &'static str {
    match state {
        SegmentState::Free => "free",
        SegmentState::Sealed => "sealed",
        SegmentState::Unsealed => "unsealed",
        SegmentState::Lost => "lost",
    }
}
