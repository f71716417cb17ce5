//! What stands on a shard's disk: the formats, the segments and what a start makes of them.
//!
//! ```text
//! block 0, 1   the superblock, twice
//! block 16 …   segments of equal size, each:
//!              opening · batch · batch · … · (unused) · footer, ending at the segment's end
//! batch        header with its records, then the payload blocks of those that have data
//! ```
//!
//! Nothing is overwritten: a record is appended, and superseded by one with a higher version somewhere behind. A batch
//! is one write. A segment that is full gets a footer with all its records, after a sync over them; so a segment with
//! a footer is whole, and one without is read batch by batch.
//!
//! * `bytes`       little-endian fields, bounds checked
//! * `superblock`  whose disk it is
//! * `record`      what a batch and a footer list
//! * `batch`       header of one write
//! * `segment`     its opening, which names this use of it
//! * `footer`      its records once more
//! * `space`       which segment is free, full, being cleaned, and how much of it lives
//! * `policy`      what cleaning costs, in a model
//! * `recovery`    what a start believes, as a table
//! * `search`      batches of a segment without a footer
//! * `numbers`     which batches were durable and are gone

pub mod batch;
mod bytes;
pub mod footer;
mod numbers;
#[cfg(test)]
mod policy;
pub mod record;
pub mod recovery;
pub mod search;
pub mod segment;
pub mod space;
pub mod superblock;

use thiserror::Error;
use torus_schema::limits::BLOCK_BYTES;

/// Of every structure below; a program that finds another refuses.
pub const FORMAT_VERSION: u32 = 3;
/// First block of the first segment; aligned for devices that like it.
pub const SEGMENTS_START_BLOCK: u64 = 16;
/// A block in bytes, as a length in memory.
pub const BLOCK: usize = BLOCK_BYTES as usize;

/// Bytes from the disk that are not what was expected there.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FormatError {
    #[error("{what}: magic {found:?}, expected {expected:?}")]
    Magic { what: &'static str, found: [u8; 8], expected: [u8; 8] },
    #[error("{what}: format version {found}, expected {expected}; use the program that wrote it")]
    Version { what: &'static str, found: u32, expected: u32 },
    #[error("{what}: checksum {found:08x}, expected {expected:08x}")]
    Checksum { what: &'static str, found: u32, expected: u32 },
    #[error("{what}: {field} is {found}, expected {expected}")]
    Field { what: &'static str, field: &'static str, found: u64, expected: u64 },
    #[error("{what}: ends after {found} bytes, expected {expected}")]
    Short { what: &'static str, found: usize, expected: usize },
}

/// A block of the shard's disk, counted from its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Position(pub u32);

/// A segment of the shard, counted from the first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SegmentIndex(pub u32);

/// Counts batches of a shard over its whole life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct BatchNumber(pub u64);

/// One opening of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentIdentity {
    pub segment: SegmentIndex,
    /// 64 random bits: a guest cannot forge a header inside its payload, and what an earlier use of the segment left
    /// behind is not taken for part of this one.
    pub nonce: u64,
    /// Counts openings over the whole shard.
    pub sequence: u64,
}

/// Where segments lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    pub segments: u32,
    /// Of one segment.
    pub blocks: u32,
}

impl Geometry {
    pub fn new(size_bytes: u64, segment_bytes: u64) -> Self {
        let blocks = segment_bytes / BLOCK_BYTES;
        let segments = (size_bytes / BLOCK_BYTES).saturating_sub(SEGMENTS_START_BLOCK) / blocks;
        Self { segments: segments as u32, blocks: blocks as u32 }
    }

    pub fn first(&self, segment: SegmentIndex) -> Position {
        Position(SEGMENTS_START_BLOCK as u32 + segment.0 * self.blocks)
    }

    pub fn segment_of(&self, position: Position) -> SegmentIndex {
        SegmentIndex((position.0 - SEGMENTS_START_BLOCK as u32) / self.blocks)
    }

    /// Bytes from the disk's start.
    pub fn offset(position: Position) -> u64 {
        u64::from(position.0) * BLOCK_BYTES
    }

    /// So many blocks from `position` on lie in the segment, behind its opening.
    pub fn holds_payload(&self, segment: SegmentIndex, position: Position, blocks: u64) -> bool {
        // Not by `first`: neither segment nor position need be of this disk.
        let first = SEGMENTS_START_BLOCK + u64::from(segment.0) * u64::from(self.blocks);
        let start = u64::from(position.0);
        start > first && start + blocks <= first + u64::from(self.blocks)
    }

    /// Blocks of data that surely fit into one segment, each a record of its own, when written in batches of some
    /// size: what cleaning can count on.
    pub fn payload_blocks(&self) -> u32 {
        let record = record::DATA_BYTES + 4;
        let fits = |data: usize| {
            let batches = data.div_ceil(64).max(1);
            let headers = batches * (batch::FIXED_BYTES + 64 * record).div_ceil(BLOCK);
            let footer = footer::footer_blocks(data * record);
            1 + data + headers + footer <= self.blocks as usize
        };
        (0..self.blocks as usize).rev().find(|data| fits(*data)).unwrap_or(0) as u32
    }
}
