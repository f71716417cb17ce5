//! How a shard comes to be: a disk is formatted once, and read anew at each start.
//!
//! The order at a start, and why: first the layout and flush point of every volume from all records, since no other
//! record can be understood or freed without them; then all records, segment by segment; then a sync and footers for what had none, so that a decision
//! about a torn tail is never made twice; only then is anything appended.

use super::gather::Gathering;
use super::peers::Peers;
use super::queue::{Queue, Syncs};
use super::replay::{self, Notes};
use super::scrub::Scrub;
use super::state::Contents;
use super::{Notify, Shard, ShardError, ShardIdentity, ShardStatistics, State};
use crate::log::footer::{Footer, Tail};
use crate::log::recovery::{self, FoundSegment, ReadFooter, Scan};
use crate::log::search::read_twice;
use crate::log::space::Space;
use crate::log::superblock::{SEGMENT_BLOCKS_MIN, SUPERBLOCK_BLOCKS, Superblock, decode_either};
use crate::log::{BLOCK, BatchNumber, FormatError, Geometry, Position, SegmentIndex};
use futures::StreamExt;
use futures::stream;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use torus_rpc::runtime::{Class, Clock, Disk, DiskError, Instant, Random, Runtime, Spawn};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::Incarnation;
use torus_schema::limits::BLOCK_BYTES;

/// Footers read at once: the disk is busy while one is applied, and little memory is held.
const FOOTERS_IN_FLIGHT: usize = 6;
/// Of what a start decided, until it is there as it was written.
const WRITES_MAX: usize = 3;
/// The reserve, and something to use.
const SEGMENTS_MIN: u32 = 6;

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
            let Superblock { node, shard, .. } = found.superblock;
            return Err(ShardError::Formatted { node, shard });
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
        let found = read_superblock(&disk).await?.map_err(ShardError::Superblock)?;
        check_owner(&found.superblock, identity)?;
        if found.superblock.size_bytes != disk.size_bytes() {
            return Err(ShardError::Size { found: disk.size_bytes(), expected: found.superblock.size_bytes });
        }
        mend_superblock(&disk, &found).await?;
        let mut superblock = found.superblock;
        let geometry = Geometry::new(superblock.size_bytes, superblock.segment_bytes);
        let (contents, scan) = recover(&disk, geometry, &mut superblock, Now::of(&runtime)).await?;
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
            resyncs: Default::default(),
            gone: RefCell::default(),
            pump_planned: Cell::new(false),
            header: RefCell::default(),
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
    for block in [first, first + 1, first + geometry.blocks - 1].map(Position) {
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

/// What a start goes by besides the disk.
pub(super) struct Now {
    pub now: Instant,
    pub unix_s: u64,
}

impl Now {
    fn of<R: Runtime>(runtime: &R) -> Self {
        Self { now: runtime.clock().now(), unix_s: runtime.clock().unix_seconds() }
    }
}

pub(super) async fn recover<D: Disk>(
    disk: &D,
    geometry: Geometry,
    superblock: &mut Superblock,
    now: Now,
) -> Result<(Contents, Scan), ShardError> {
    let mut contents = Contents::new(Space::new(geometry));
    let mut notes = Notes::default();
    let mut scan = recovery::scan(disk, geometry).await?;
    scan.segments.iter().for_each(|found| foresee(found, &mut contents, &mut notes));
    scan.segments.iter().for_each(|found| contents.space.found(found.identity.segment, found.identity.sequence));
    for damaged in replay_sealed(disk, geometry, &scan, &mut contents).await {
        scan.unseal(disk, geometry, damaged).await;
        foresee(&scan.segments[damaged], &mut contents, &mut notes);
    }
    if scan.lost {
        // Before the footers: they make what is missing look as if it had never been.
        superblock.lost_below = scan.next_batch;
        superblock.revision += 1;
        write_superblock(disk, superblock).await?;
    }
    replay::replay_unsealed(&mut scan.segments, &notes, &mut contents);
    notes.count(&scan.segments, &mut contents);
    scan.segments.iter().for_each(|found| replay::list_damage(found, &mut contents, now.now));
    seal_all(disk, geometry, &mut scan, now.unix_s).await?;
    scan.segments.iter().for_each(|found| contents.space.sealed(found.identity.segment));
    Ok((contents, scan))
}

fn foresee(found: &FoundSegment, contents: &mut Contents, notes: &mut Notes) {
    let segment = found.identity.segment;
    if let Some(ReadFooter { tail, .. }) = &found.footer {
        tail.volumes.iter().for_each(|said| contents.foresee_flush_point(said.volume, said.flush_point));
        tail.notes.iter().for_each(|note| contents.foresee(note));
        notes.see(segment, &tail.notes);
    }
    let unsealed = found.unsealed.as_deref().unwrap_or_default();
    unsealed.iter().for_each(|record| contents.foresee(record));
    notes.see(segment, unsealed);
}

/// Applies what footers list, in the order of the segments. Gives the places of those whose footer is damaged.
async fn replay_sealed<D: Disk>(disk: &D, geometry: Geometry, scan: &Scan, contents: &mut Contents) -> Vec<usize> {
    let sealed = scan.segments.iter().enumerate().filter_map(|(at, found)| Some((at, found.footer.as_ref()?)));
    let read = |(at, footer)| async move { (at, footer, recovery::read_data(disk, geometry, footer).await) };
    let mut all = stream::iter(sealed).map(read).buffered(FOOTERS_IN_FLIGHT);
    let (mut damaged, mut gathering) = (Vec::new(), Gathering::default());
    while let Some((at, footer, data)) = all.next().await {
        let Some(entries) = data.as_ref().and_then(|data| footer.entries(geometry, data)) else {
            damaged.push(at);
            continue;
        };
        let Tail { volumes, notes } = &footer.tail;
        notes.iter().for_each(|note| gathering.replay_note(note, contents));
        gathering.take(volumes, entries, contents);
        if gathering.is_full() {
            gathering.apply(contents);
        }
    }
    gathering.apply(contents);
    damaged
}

async fn seal_all<D: Disk>(disk: &D, geometry: Geometry, scan: &mut Scan, sealed_s: u64) -> Result<(), ShardError> {
    // What was read may have come from a cache that loses it yet.
    disk.sync().await?;
    // Not a number higher than what was decided by: a crash before the last footer is durable decides again.
    let durable = scan.durable;
    let mended = scan.segments.iter().flat_map(|found| &found.mended);
    let mut decided: Vec<(Position, Vec<u8>)> = mended.map(|header| (header.position, header.encode())).collect();
    for found in &mut scan.segments {
        let Some(records) = found.unsealed.take() else { continue };
        let FoundSegment { identity, first_batch, end_batch, batches, .. } = *found;
        let footer = Footer { identity, first_batch, end_batch, durable, batches, sealed_s, records };
        decided.push(recovery::footer_at(geometry, &footer));
    }
    write_and_verify(disk, &decided).await?;
    for segment in &scan.unreadable {
        empty(disk, geometry, *segment).await?;
    }
    Ok(())
}

/// Durable, and read back: if a torn tail's header and the footer that leaves it out were both lost on their way, the
/// next start would find again what this one decided never was.
async fn write_and_verify<D: Disk>(disk: &D, decided: &[(Position, Vec<u8>)]) -> Result<(), ShardError> {
    let mut lost = None;
    for _ in 0..WRITES_MAX {
        for (position, bytes) in decided {
            write_block(disk, Geometry::offset(*position), bytes).await?;
        }
        disk.sync().await?;
        lost = None;
        for (position, bytes) in decided {
            let read = read_twice(disk, *position, (bytes.len() / BLOCK) as u32).await;
            if read.is_ok_and(|read| read[..] == bytes[..]) {
                continue;
            }
            lost = Some(Geometry::offset(*position));
        }
        let Some(offset) = lost else { return Ok(()) };
        tracing::warn!(offset, "what was written and synced is not what is read there");
    }
    lost.map_or(Ok(()), |offset| Err(ShardError::NotKept { offset }))
}

/// What a segment held is lost, and that is said where it lasts: the next start must not find it lost once more.
async fn empty<D: Disk>(disk: &D, geometry: Geometry, segment: SegmentIndex) -> Result<(), DiskError> {
    let first = geometry.first(segment).0;
    // Each is synced before the next: cut short, it is still lost or already empty, never something else.
    for block in [first + geometry.blocks - 1, first + 1, first].map(Position) {
        write_block(disk, Geometry::offset(block), &[0; BLOCK]).await?;
        disk.sync().await?;
    }
    Ok(())
}

/// The copy that counts, and which of the two are not like it.
pub(super) struct FoundSuperblock {
    pub superblock: Superblock,
    stale: Vec<u64>,
}

pub(super) async fn read_superblock<D: Disk>(disk: &D) -> Result<Result<FoundSuperblock, FormatError>, DiskError> {
    let mut bytes = vec![0; SUPERBLOCK_BLOCKS as usize * BLOCK];
    let mut failed = None;
    for (copy, block) in (0u32..).zip(bytes.chunks_mut(BLOCK)) {
        match read_twice(disk, Position(copy), 1).await {
            Ok(read) => block.copy_from_slice(&read),
            Err(error) => failed = Some(error),
        }
    }
    let superblock = match (decode_either(&bytes), failed) {
        // That one could not be read may be all that is wrong.
        (Err(_), Some(error)) => return Err(error),
        (Err(because), None) => return Ok(Err(because)),
        (Ok(superblock), _) => superblock,
    };
    let good = superblock.encode();
    let stale = (0u64..).zip(bytes.chunks(BLOCK)).filter(|(_, block)| **block != good).map(|(copy, _)| copy).collect();
    Ok(Ok(FoundSuperblock { superblock, stale }))
}

/// With one copy there is nothing to make up for the next damage.
async fn mend_superblock<D: Disk>(disk: &D, found: &FoundSuperblock) -> Result<(), DiskError> {
    for copy in &found.stale {
        tracing::warn!(copy, "a copy of the superblock is damaged or old: it is written anew from the other");
        write_block(disk, copy * BLOCK_BYTES, &found.superblock.encode()).await?;
        disk.sync().await?;
    }
    Ok(())
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
