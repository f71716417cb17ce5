//! How a shard comes to be: a disk is formatted once, and read anew at each start.
//!
//! The order at a start, and why: first the layout and flush point of every volume from all records, since no other
//! record can be understood or freed without them; then all records, segment by segment; then a sync and footers for what had none, so that a decision
//! about a torn tail is never made twice; only then is anything appended.

use super::queue::{Queue, Syncs};
use super::state::Contents;
use super::volumes::Instance;
use super::{Notify, Shard, ShardError, ShardIdentity, ShardStatistics, State};
use crate::index::AtTie;
use crate::log::record::Record;
use crate::log::recovery::{self, FoundSegment, Scan};
use crate::log::segment::Footer;
use crate::log::space::Space;
use crate::log::superblock::{SUPERBLOCK_BLOCKS, Superblock, decode_either};
use crate::log::{BLOCK, BatchNumber, Geometry, Position, SegmentIndex};
use ahash::{AHashMap, AHashSet};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use torus_rpc::runtime::{Class, Disk, DiskError, Random, Runtime, Spawn};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{BlockIndex, Incarnation, SliceId, Version, VolumeId};
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
            let first = geometry.first(segment).0;
            for block in [first, first + geometry.blocks - 1].map(Position) {
                if disk.read(Geometry::offset(block), BLOCK).await?.iter().any(|byte| *byte != 0) {
                    write_block(disk, Geometry::offset(block), &[0; BLOCK]).await?;
                }
            }
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
            statistics: ShardStatistics::default(),
        };
        let shard = Rc::new(Shard {
            runtime,
            disk,
            key: cluster_key,
            geometry,
            state: RefCell::new(state),
            changed: Notify::default(),
            pump_planned: Cell::new(false),
        });
        shard.runtime.spawn().spawn(Class::Background, shard.clone().clean_forever());
        Ok(shard)
    }
}

fn check_owner(found: &Superblock, expected: ShardIdentity) -> Result<(), ShardError> {
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
    let mut notes = Vec::new();
    let mut see = |segment: SegmentIndex, records: &[Record]| {
        for record in records {
            contents.foresee(record);
            if record.payload_blocks() == 0 {
                notes.push((segment, record.clone()));
            }
        }
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
    // Sealed ones first, so that at a tie an unsealed segment, the last one written to, is the one that loses.
    scan.segments.sort_by_key(|found| (found.unsealed.is_some(), found.identity.sequence));
    for found in &scan.segments {
        replay(disk, geometry, found, &mut contents).await?;
    }
    count_notes(&mut scan.segments, notes, &mut contents);
    forget_needless_data(&mut scan.segments, &contents);
    seal_all(disk, geometry, &mut scan).await?;
    scan.segments.iter().for_each(|found| contents.space.sealed(found.identity.segment));
    Ok((contents, scan))
}

/// Of two copies of one version the one in the later segment counts, as it did before; but not if that segment was
/// still open. A cleaner that was cut short has begun a segment with nothing but copies: it is then empty again. If it
/// counted, a shard that dies again and again while it cleans would eat the last free segments, and with none left
/// nothing could ever be cleaned.
async fn replay<D: Disk>(
    disk: &D,
    geometry: Geometry,
    found: &FoundSegment,
    contents: &mut Contents,
) -> Result<(), ShardError> {
    let segment = found.identity.segment;
    match &found.unsealed {
        Some(records) => records.iter().for_each(|record| contents.replay(record, AtTie::StandingWins)),
        None => {
            let read = recovery::footer_of(disk, geometry, segment).await?;
            let footer = read.ok_or(ShardError::Unsteady { segment: segment.0 })?;
            footer.records.iter().for_each(|record| contents.replay(record, AtTie::NewcomerWins));
        }
    }
    Ok(())
}

/// Each thing that has to be remembered is counted where it is said last; for the same reason as above, segments that
/// were open are asked only for what nobody else says.
/// What they say needlessly does not get into their footer, or the next start would count it.
fn count_notes(segments: &mut [FoundSegment], notes: Vec<(SegmentIndex, Record)>, contents: &mut Contents) {
    let mut by_segment: AHashMap<SegmentIndex, Vec<Record>> = AHashMap::new();
    notes.into_iter().for_each(|(segment, note)| by_segment.entry(segment).or_default().push(note));
    let (sealed, open): (Vec<_>, Vec<_>) = segments.iter_mut().partition(|found| found.unsealed.is_none());
    let mut said = Said::default();
    for found in sealed.into_iter().rev() {
        let segment = found.identity.segment;
        for note in by_segment.remove(&segment).unwrap_or_default() {
            if said.is_new(&note, contents) {
                contents.space.add_note(segment, note.bytes());
            }
        }
    }
    for found in open {
        let segment = found.identity.segment;
        let mut counted = 0;
        found.unsealed.iter_mut().for_each(|records| {
            records.retain(|record| {
                let keep = record.payload_blocks() > 0 || said.is_new(record, contents);
                counted += if keep && record.payload_blocks() == 0 { record.bytes() } else { 0 };
                keep
            })
        });
        contents.space.add_note(segment, counted);
    }
}

/// A copy that lost a tie must lose it at the next start too, when its segment is sealed.
fn forget_needless_data(segments: &mut [FoundSegment], contents: &Contents) {
    for found in segments {
        let pinned = contents.pinned_in(found.identity.segment);
        let needed = |record: &Record| match record {
            Record::Data(data) => (0..data.checksums.len()).any(|number| contents.needs(data, number, &pinned)),
            _ => true,
        };
        found.unsealed.iter_mut().for_each(|records| records.retain(needed));
    }
}

/// What the notes counted so far say.
#[derive(Default)]
struct Said {
    drops: AHashSet<VolumeId>,
    opens: AHashSet<VolumeId>,
    instances: AHashSet<(VolumeId, SliceId)>,
    clears: AHashSet<(VolumeId, SliceId, BlockIndex, u64, Version)>,
}

impl Said {
    fn is_new(&mut self, note: &Record, contents: &Contents) -> bool {
        let volume = contents.volumes.get(&note.volume());
        match (note, volume) {
            (Record::Drop(id), _) => self.drops.insert(*id),
            (Record::Open(open), Some(volume)) => open.epoch == volume.epoch && self.opens.insert(open.volume),
            (Record::Instances(record), Some(volume)) => {
                let (generation, created) = (record.generation, record.created);
                let current = |slice: &&SliceId| volume.slices.get(slice) == Some(&Instance { generation, created });
                // Not `any`: all of them are said with it.
                record
                    .slices
                    .iter()
                    .filter(current)
                    .filter(|slice| self.instances.insert((record.volume, **slice)))
                    .count()
                    > 0
            }
            (Record::Clear(clear), Some(_)) => {
                let key = (clear.volume, clear.slice, clear.first, clear.count, clear.version);
                !contents.is_superfluous(clear) && self.clears.insert(key)
            }
            _ => false,
        }
    }
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

async fn read_superblock<D: Disk>(disk: &D) -> Result<Result<Superblock, crate::log::FormatError>, DiskError> {
    let bytes = disk.read(0, (SUPERBLOCK_BLOCKS * BLOCK_BYTES) as usize).await?;
    Ok(decode_either(&bytes))
}

/// One copy after the other, so that one is always good.
async fn write_superblock<D: Disk>(disk: &D, superblock: &Superblock) -> Result<(), DiskError> {
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
