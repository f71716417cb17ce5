//! How a shard comes to be: a disk is formatted once, and read anew at each start.
//!
//! The order at a start, and why: first the layout and flush point of every volume from all records, since no other
//! record can be understood or freed without them; then all records, segment by segment; then a sync and footers for what had none, so that a decision
//! about a torn tail is never made twice; only then is anything appended.

use super::peers::Peers;
use super::queue::{Queue, Syncs};
use super::replay::{self, Notes};
use super::scrub::Scrub;
use super::state::Contents;
use super::{Notify, Shard, ShardError, ShardIdentity, ShardStatistics, State};
use crate::index::AtTie;
use crate::log::record::Record;
use crate::log::recovery::{self, FoundSegment, Scan};
use crate::log::segment::Footer;
use crate::log::space::Space;
use crate::log::superblock::{SUPERBLOCK_BLOCKS, Superblock, decode_either};
use crate::log::{BLOCK, BatchNumber, Geometry, Position, SegmentIndex};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use torus_rpc::runtime::{Class, Disk, DiskError, Random, Runtime, Spawn};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::Incarnation;
use torus_schema::limits::BLOCK_BYTES;

/// The reserve, and something to use.
const SEGMENTS_MIN: u32 = 6;
/// Opening, header, footer, and blocks to speak of.
const SEGMENT_BLOCKS_MIN: u64 = 16;

impl<R: Runtime> Shard<R> {
    /// Makes the disk a shard without data. Refuses one that is a shard already.
    pub async fn format(
        _runtime: &R,
        disk: &R::Disk,
        identity: ShardIdentity,
        segment_bytes: u64,
    ) -> Result<(), ShardError> {
        if !segment_bytes.is_multiple_of(BLOCK_BYTES) || segment_bytes < SEGMENT_BLOCKS_MIN * BLOCK_BYTES {
            return Err(ShardError::SegmentSize { found: segment_bytes, expected: SEGMENT_BLOCKS_MIN * BLOCK_BYTES });
        }
        let size_bytes = disk.size_bytes();
        let geometry = Geometry::new(size_bytes, segment_bytes);
        if geometry.segments < SEGMENTS_MIN {
            let expected = u64::from(SEGMENTS_MIN + 1) * segment_bytes;
            return Err(ShardError::TooSmall { found: size_bytes, expected });
        }
        if let Ok(found) = read_superblock(disk).await? {
            return Err(ShardError::Formatted { node: found.node, shard: found.shard });
        }
        // What an earlier use of the disk left must not be taken for segments of ours.
        for segment in (0..geometry.segments).map(SegmentIndex) {
            clear_ends(disk, geometry, segment).await?;
        }
        disk.sync().await?;
        let ShardIdentity { cluster, node, shard } = identity;
        let (revision, lost_below) = (1, BatchNumber(0));
        let superblock = Superblock { cluster, node, shard, size_bytes, segment_bytes, revision, lost_below };
        write_superblock(disk, &superblock).await?;
        Ok(())
    }

    /// Recovers, and starts the cleaner.
    pub async fn open(
        runtime: R,
        disk: R::Disk,
        identity: ShardIdentity,
        cluster_key: ClusterKey,
    ) -> Result<Rc<Shard<R>>, ShardError> {
        let mut superblock = read_superblock(&disk).await?.map_err(ShardError::Superblock)?;
        check_owner(&superblock, identity)?;
        if superblock.size_bytes != disk.size_bytes() {
            return Err(ShardError::Size { found: disk.size_bytes(), expected: superblock.size_bytes });
        }
        let geometry = Geometry::new(superblock.size_bytes, superblock.segment_bytes);
        let (contents, scan) = recover(&disk, geometry, &mut superblock).await?;
        let state = State {
            contents,
            queue: Queue::new(scan.next_batch, scan.next_sequence),
            syncs: Syncs::default(),
            seals_in_flight: 0,
            incarnation: Incarnation(runtime.random().u128()),
            lost_below: superblock.lost_below,
            failed: None,
            closing: false,
            cleaner_stopped: false,
            repairer_stopped: false,
            scrub: Scrub::default(),
            statistics: ShardStatistics::default(),
        };
        let shard = Rc::new(Shard {
            runtime,
            disk,
            key: cluster_key,
            geometry,
            state: RefCell::new(state),
            changed: Notify::default(),
            background: Notify::default(),
            peers: Peers::new(identity),
            gone: RefCell::default(),
            pump_planned: Cell::new(false),
        });
        shard.runtime.spawn().spawn(Class::Background, shard.clone().clean_forever());
        shard.runtime.spawn().spawn(Class::Background, shard.clone().repair_forever());
        shard.runtime.spawn().spawn(Class::Background, shard.clone().scrub_forever());
        Ok(shard)
    }
}

/// Of a segment that holds nothing of ours: an opening or a trailer there would be believed.
pub(super) async fn clear_ends<D: Disk>(disk: &D, geometry: Geometry, segment: SegmentIndex) -> Result<(), DiskError> {
    let first = geometry.first(segment).0;
    for block in [first, first + geometry.blocks - 1].map(Position) {
        if disk.read(Geometry::offset(block), BLOCK).await?.iter().any(|byte| *byte != 0) {
            write_block(disk, Geometry::offset(block), &[0; BLOCK]).await?;
        }
    }
    Ok(())
}

pub(super) fn check_owner(found: &Superblock, expected: ShardIdentity) -> Result<(), ShardError> {
    let other = |field, found: String, expected: String| Err(ShardError::OtherOwner { field, found, expected });
    if found.cluster != expected.cluster {
        return other("cluster", found.cluster.to_string(), expected.cluster.to_string());
    }
    if found.node != expected.node {
        return other("node", found.node.to_string(), expected.node.to_string());
    }
    if found.shard != expected.shard {
        return other("shard", found.shard.to_string(), expected.shard.to_string());
    }
    Ok(())
}

async fn recover<D: Disk>(
    disk: &D,
    geometry: Geometry,
    superblock: &mut Superblock,
) -> Result<(Contents, Scan), ShardError> {
    let mut contents = Contents::new(Space::new(geometry));
    let mut notes = Notes::default();
    let mut see = |segment: SegmentIndex, records: &[Record]| {
        records.iter().for_each(|record| contents.foresee(record));
        notes.see(segment, records);
    };
    let mut scan = recovery::scan(disk, geometry, &mut see).await?;
    for found in &scan.segments {
        see(found.identity.segment, found.unsealed.as_deref().unwrap_or_default());
    }
    if scan.lost {
        // Before the footers: they make what is missing look as if it had never been.
        superblock.lost_below = scan.next_batch;
        superblock.revision += 1;
        write_superblock(disk, superblock).await?;
    }
    scan.segments.iter().for_each(|found| contents.space.found(found.identity.segment));
    for segment in scan.segments.iter().filter(|found| found.unsealed.is_none()).map(|found| found.identity.segment) {
        let footer = recovery::footer_of(disk, geometry, segment).await?;
        let footer = footer.ok_or(ShardError::Unsteady { segment: segment.0 })?;
        footer.records.iter().for_each(|record| contents.replay(record, AtTie::NewcomerWins));
    }
    replay::replay_unsealed(&mut scan.segments, &notes, &mut contents);
    notes.count(&scan.segments, &mut contents);
    seal_all(disk, geometry, &mut scan).await?;
    scan.segments.iter().for_each(|found| contents.space.sealed(found.identity.segment));
    Ok((contents, scan))
}

async fn seal_all<D: Disk>(disk: &D, geometry: Geometry, scan: &mut Scan) -> Result<(), DiskError> {
    // What was read may have come from a cache that loses it yet.
    disk.sync().await?;
    // Not a number higher than what was decided by: a crash before the last footer is durable decides again.
    let durable = scan.durable;
    for found in &mut scan.segments {
        let Some(records) = found.unsealed.take() else { continue };
        let FoundSegment { identity, first_batch, end_batch, .. } = *found;
        let footer = Footer { identity, first_batch, end_batch, durable, records };
        recovery::write_footer(disk, geometry, &footer).await?;
    }
    disk.sync().await
}

pub(super) async fn read_superblock<D: Disk>(
    disk: &D,
) -> Result<Result<Superblock, crate::log::FormatError>, DiskError> {
    let bytes = disk.read(0, (SUPERBLOCK_BLOCKS * BLOCK_BYTES) as usize).await?;
    Ok(decode_either(&bytes))
}

/// One copy after the other, so that one is always good.
pub(super) async fn write_superblock<D: Disk>(disk: &D, superblock: &Superblock) -> Result<(), DiskError> {
    for copy in 0..SUPERBLOCK_BLOCKS {
        write_block(disk, copy * BLOCK_BYTES, &superblock.encode()).await?;
        disk.sync().await?;
    }
    Ok(())
}

async fn write_block<D: Disk>(disk: &D, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
    let mut buffer = disk.allocate(bytes.len());
    buffer.copy_from_slice(bytes);
    disk.write(offset, buffer).await
}
