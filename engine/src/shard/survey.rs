//! What a start would believe of a disk, for `inspect`: the very steps of a start, over a disk that keeps their writes
//! to itself.

use super::ShardError;
use super::start::{Now, read_superblock, recover};
use super::state::Contents;
use crate::disk::overlay::OverlayDisk;
use crate::log::record::{Data, Record};
use crate::log::recovery;
use crate::log::superblock::Superblock;
use crate::log::{BatchNumber, Geometry, Position, SegmentIdentity, SegmentIndex};
use std::time::Duration;
use torus_rpc::runtime::{DiskError, Instant};
use torus_schema::hash::Set;
use torus_schema::ids::VolumeId;
use torus_schema::limits::BLOCK_BYTES;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentState {
    Free,
    /// It has a footer.
    Sealed,
    /// It was being written, or its footer cannot be read: a start reads all of it, and gives it one.
    Unsealed,
    /// It was in use and cannot be read.
    Lost,
}

#[derive(Clone, Copy, Debug)]
pub struct SurveyedSegment {
    pub segment: SegmentIndex,
    pub state: SegmentState,
    /// `None`: it is free, or lost.
    pub identity: Option<SegmentIdentity>,
    /// Second since 1970.
    pub opened_s: Option<u64>,
    /// Number of the first batch, and of the one behind the last.
    pub batches: (BatchNumber, BatchNumber),
    /// Blocks of data that are needed.
    pub live_blocks: u32,
    pub note_bytes: u64,
}

pub struct Survey {
    /// As it stands there.
    pub superblock: Superblock,
    pub geometry: Geometry,
    /// All, in the order in which they lie.
    pub segments: Vec<SurveyedSegment>,
    pub volumes: Vec<VolumeId>,
    /// The start would find that something durable is gone: instances older than this are refused then.
    pub lost_below: BatchNumber,
    contents: Contents,
}

pub async fn survey(disk: &OverlayDisk) -> Result<Survey, ShardError> {
    let superblock = read_superblock(disk).await?.map_err(ShardError::Superblock)?.superblock;
    if superblock.size_bytes != disk.area().bytes {
        return Err(ShardError::Size { found: disk.area().bytes, expected: superblock.size_bytes });
    }
    let geometry = Geometry::new(superblock.size_bytes, superblock.segment_bytes);
    let mut after = superblock.clone();
    let (contents, scan) = recover(disk, geometry, &mut after, Now { now: Instant(Duration::ZERO), unix_s: 0 }).await?;
    let mut segments: Vec<SurveyedSegment> =
        (0..geometry.segments).map(|segment| unused(disk, geometry, SegmentIndex(segment))).collect();
    for found in &scan.segments {
        let segment = found.identity.segment;
        let (live_blocks, note_bytes) = contents.space.needed(segment);
        let state =
            if ends_were_written(disk, geometry, segment) { SegmentState::Unsealed } else { SegmentState::Sealed };
        segments[segment.0 as usize] = SurveyedSegment {
            segment,
            state,
            identity: Some(found.identity),
            opened_s: found.opened_s,
            batches: (found.first_batch, found.end_batch),
            live_blocks,
            note_bytes,
        };
    }
    let mut volumes: Vec<VolumeId> = contents.volumes.keys().copied().collect();
    volumes.sort();
    Ok(Survey { superblock, geometry, segments, volumes, lost_below: after.lost_below, contents })
}

/// A start writes into a segment that is none of those it found only to empty it.
fn unused(disk: &OverlayDisk, geometry: Geometry, segment: SegmentIndex) -> SurveyedSegment {
    let state = if ends_were_written(disk, geometry, segment) { SegmentState::Lost } else { SegmentState::Free };
    let batches = (BatchNumber(0), BatchNumber(0));
    SurveyedSegment { segment, state, identity: None, opened_s: None, batches, live_blocks: 0, note_bytes: 0 }
}

fn ends_were_written(disk: &OverlayDisk, geometry: Geometry, segment: SegmentIndex) -> bool {
    let last = geometry.first(segment).0 + geometry.blocks - 1;
    disk.was_written(Geometry::offset(Position(last)) / BLOCK_BYTES)
}

impl Survey {
    /// Of one segment, from its footer; `None` if it has none that can be read.
    pub async fn records(
        &self,
        disk: &OverlayDisk,
        segment: &SurveyedSegment,
    ) -> Result<Option<Vec<Record>>, DiskError> {
        let Some(identity) = segment.identity else { return Ok(None) };
        let footer = recovery::footer_of(disk, self.geometry, segment.segment, Some(identity.sequence)).await?;
        Ok(footer.map(|footer| footer.records))
    }

    /// Positions that are needed though they were superseded.
    pub fn pinned_in(&self, segment: SegmentIndex) -> Set<Position> {
        self.contents.pinned_in(segment)
    }

    /// That block of the record can still be asked for.
    pub fn needs(&self, data: &Data, number: usize, pinned: &Set<Position>) -> bool {
        self.contents.needs(data, number, pinned)
    }
}
