//! What a start believes of what it finds. D is the highest "durable" number in any opening, header or footer: every
//! batch up to it was once synced.
//!
//! | opening      | footer           | the segment is                                                             |
//! |--------------|------------------|----------------------------------------------------------------------------|
//! | zeros        | none             | empty: openings are synced before batches follow, so there is none in it   |
//! | good         | same use         | sealed: the footer lists what was whole once; damage shows when it is read |
//! | good         | other use, none  | unsealed: read batch by batch, below                                       |
//! | unreadable   | good             | sealed, if no header of a later use is found in it, else lost              |
//! | unreadable   | none             | lost: it was in use and cannot be read                                     |
//!
//! In an unsealed segment every block that is not inside a batch is tried as a header (a hole, left by a batch that was
//! lost while others in flight were not, hides nothing behind it). A header of another nonce is a remainder of an
//! earlier use, one that names another position was misdirected: neither is a header.
//!
//! | batch                        | up to D                             | above D                                  |
//! |------------------------------|-------------------------------------|------------------------------------------|
//! | header and payload good      | keep                                | keep: what is whole may stay             |
//! | header good, payload damaged | keep: its blocks answer `Damaged`   | drop those records: a torn tail          |
//! | header missing               | lost: what it held is unknown       | nothing: it was never acknowledged a sync|
//!
//! *Lost* is told to every writer (`Superblock::lost_below`), who then treats the instances as never filled.
//! Afterwards all that was unsealed gets a footer, so that a decision is made once: numbers are then known to be
//! durable that were not when it was made.

use super::batch::{BatchHeader, UncheckedHeader};
use super::record::Record;
use super::segment::{Footer, Opening, UncheckedFooter, footer_blocks};
use super::{BLOCK, BatchNumber, Geometry, Position, SegmentIdentity, SegmentIndex};
use std::collections::BTreeMap;
use torus_rpc::runtime::{Disk, DiskError};
use torus_schema::limits::BLOCK_BYTES;

/// Blocks read at once while a segment is searched.
const WINDOW_BLOCKS: u32 = 256;

/// One segment that holds something.
pub struct FoundSegment {
    pub identity: SegmentIdentity,
    pub first_batch: BatchNumber,
    pub end_batch: BatchNumber,
    /// `None`: sealed, its footer says. Otherwise it has to be given a footer with these.
    pub unsealed: Option<Vec<Record>>,
}

pub struct Scan {
    /// In the order of their opening.
    pub segments: Vec<FoundSegment>,
    /// Something that was durable is gone, and nobody knows what.
    pub lost: bool,
    pub durable: BatchNumber,
    pub next_batch: BatchNumber,
    pub next_sequence: u64,
}

/// `footer_seen` is told the records of each sealed segment.
pub async fn scan<D: Disk>(
    disk: &D,
    geometry: Geometry,
    mut footer_seen: impl FnMut(SegmentIndex, &[Record]),
) -> Result<Scan, DiskError> {
    let mut scan = Scan {
        segments: Vec::new(),
        lost: false,
        durable: BatchNumber(0),
        next_batch: BatchNumber(1),
        next_sequence: 1,
    };
    let mut unsealed = Vec::new();
    // By sequence, of every segment that is there: numbers of one end where those of the next begin.
    let mut first_batches = BTreeMap::new();
    for segment in (0..geometry.segments).map(SegmentIndex) {
        match classify(disk, geometry, segment).await? {
            Class::Empty => {}
            Class::Sealed(footer) => {
                footer_seen(segment, &footer.records);
                scan.note(footer.identity, footer.end_batch, footer.durable);
                first_batches.insert(footer.identity.sequence, footer.first_batch);
                let Footer { identity, first_batch, end_batch, .. } = footer;
                scan.segments.push(FoundSegment { identity, first_batch, end_batch, unsealed: None });
            }
            Class::Unsealed { opening, end_batch } => {
                let batches = find_batches(disk, geometry, opening.identity).await?;
                scan.note(opening.identity, opening.first_batch, opening.durable);
                first_batches.insert(opening.identity.sequence, opening.first_batch);
                for batch in &batches {
                    scan.note(opening.identity, BatchNumber(batch.number.0 + 1), batch.durable);
                }
                unsealed.push(Unsealed { opening, end_batch, batches });
            }
            Class::Lost => {
                tracing::error!(segment = segment.0, "a segment was in use and cannot be read: its records are lost");
                scan.lost = true;
            }
        }
    }
    scan.next_batch = scan.next_batch.max(BatchNumber(scan.durable.0 + 1));
    for found in unsealed {
        let next = first_batches.get(&(found.opening.identity.sequence + 1)).copied();
        scan.decide(disk, found, next).await?;
    }
    scan.segments.sort_by_key(|found| found.identity.sequence);
    Ok(scan)
}

struct Unsealed {
    opening: Opening,
    /// From a trailer whose records cannot be read.
    end_batch: Option<BatchNumber>,
    batches: Vec<BatchHeader>,
}

impl Scan {
    fn note(&mut self, identity: SegmentIdentity, next_batch: BatchNumber, durable: BatchNumber) {
        self.next_sequence = self.next_sequence.max(identity.sequence + 1);
        self.next_batch = self.next_batch.max(next_batch);
        self.durable = self.durable.max(durable);
    }

    /// The second table above.
    async fn decide<D: Disk>(
        &mut self,
        disk: &D,
        found: Unsealed,
        next_first: Option<BatchNumber>,
    ) -> Result<(), DiskError> {
        let Unsealed { opening, end_batch, batches } = found;
        let mut end = batches.iter().map(|batch| batch.number.0 + 1).max().unwrap_or(opening.first_batch.0);
        // Numbers of a segment are consecutive; where it ended is known from its trailer or the next segment's opening.
        let expected_end = end_batch.or(next_first).unwrap_or(self.next_batch).0;
        let durable_end = expected_end.min(self.durable.0 + 1);
        let found_durable = batches.iter().filter(|batch| batch.number.0 < durable_end).count() as u64;
        if found_durable < durable_end.saturating_sub(opening.first_batch.0) {
            let segment = opening.identity.segment.0;
            let (first, expected) = (opening.first_batch.0, durable_end);
            tracing::error!(segment, first, expected, found_durable, "batches that were durable are gone");
            self.lost = true;
        }
        end = end.max(durable_end);
        let mut records = Vec::new();
        for batch in batches {
            let torn_tail = batch.number > self.durable;
            for record in batch.records {
                if !torn_tail || is_whole(disk, &record).await? {
                    records.push(record);
                }
            }
        }
        let (identity, first_batch) = (opening.identity, opening.first_batch);
        let end_batch = BatchNumber(end);
        self.segments.push(FoundSegment { identity, first_batch, end_batch, unsealed: Some(records) });
        Ok(())
    }
}

enum Class {
    Empty,
    Sealed(Footer),
    Unsealed { opening: Opening, end_batch: Option<BatchNumber> },
    Lost,
}

/// The first table above.
async fn classify<D: Disk>(disk: &D, geometry: Geometry, segment: SegmentIndex) -> Result<Class, DiskError> {
    let first = disk.read(Geometry::offset(geometry.first(segment)), BLOCK).await?;
    let opening = Opening::decode(&first).ok().filter(|opening| opening.identity.segment == segment);
    let trailer = read_trailer(disk, geometry, segment).await?;
    let same_use = |opening: &Opening, trailer: &UncheckedFooter| opening.identity == trailer.identity;
    match (opening, trailer) {
        (Some(opening), Some(trailer)) if same_use(&opening, &trailer) => {
            let end_batch = Some(trailer.end_batch);
            let footer = read_footer(disk, geometry, trailer).await?;
            Ok(footer.map_or(Class::Unsealed { opening, end_batch }, Class::Sealed))
        }
        (Some(opening), _) => Ok(Class::Unsealed { opening, end_batch: None }),
        (None, None) if first.iter().all(|byte| *byte == 0) => Ok(Class::Empty),
        (None, None) => Ok(Class::Lost),
        (None, Some(trailer)) => {
            let sequence = trailer.identity.sequence;
            let headers = find_headers(disk, geometry, segment, |identity| identity.sequence > sequence).await?;
            let footer = read_footer(disk, geometry, trailer).await?;
            Ok(footer.filter(|_| headers.is_empty()).map_or(Class::Lost, Class::Sealed))
        }
    }
}

async fn read_trailer<D: Disk>(
    disk: &D,
    geometry: Geometry,
    segment: SegmentIndex,
) -> Result<Option<UncheckedFooter>, DiskError> {
    let last = Position(geometry.first(segment).0 + geometry.blocks - 1);
    let block = disk.read(Geometry::offset(last), BLOCK).await?;
    let fits = |trailer: &UncheckedFooter| {
        trailer.identity.segment == segment && trailer.blocks() < u64::from(geometry.blocks)
    };
    Ok(UncheckedFooter::decode(&block).ok().filter(fits))
}

async fn read_footer<D: Disk>(
    disk: &D,
    geometry: Geometry,
    trailer: UncheckedFooter,
) -> Result<Option<Footer>, DiskError> {
    let first = geometry.first(trailer.identity.segment).0 + geometry.blocks - trailer.blocks() as u32;
    let bytes = disk.read(Geometry::offset(Position(first)), (trailer.blocks() * BLOCK_BYTES) as usize).await?;
    Ok(trailer.finalize(&bytes).ok().filter(|footer| lies_inside(&footer.records, geometry, footer.identity.segment)))
}

/// The footer of a segment that was seen to have one; `None` if it cannot be read any more.
pub async fn footer_of<D: Disk>(
    disk: &D,
    geometry: Geometry,
    segment: SegmentIndex,
) -> Result<Option<Footer>, DiskError> {
    match read_trailer(disk, geometry, segment).await? {
        Some(trailer) => read_footer(disk, geometry, trailer).await,
        None => Ok(None),
    }
}

/// Writes the footer of a segment all of whose records are durable.
pub async fn write_footer<D: Disk>(disk: &D, geometry: Geometry, footer: &Footer) -> Result<(), DiskError> {
    let bytes = footer.encode();
    let blocks = (bytes.len() / BLOCK) as u32;
    assert!(blocks < geometry.blocks, "room for the footer is kept while a segment fills");
    let first = geometry.first(footer.identity.segment).0 + geometry.blocks - blocks;
    let mut buffer = disk.allocate(bytes.len());
    buffer.copy_from_slice(&bytes);
    disk.write(Geometry::offset(Position(first)), buffer).await
}

/// Room that a footer over so many bytes of records takes, in blocks.
pub fn footer_room(record_bytes: usize) -> u32 {
    footer_blocks(record_bytes) as u32
}

/// Positions are used to read and to account, so what a footer or header says is not taken on trust.
fn lies_inside(records: &[Record], geometry: Geometry, segment: SegmentIndex) -> bool {
    let first = u64::from(geometry.first(segment).0);
    records.iter().all(|record| match record {
        Record::Data(data) => {
            let start = u64::from(data.position.0);
            start > first && start + data.checksums.len() as u64 <= first + u64::from(geometry.blocks)
        }
        _ => true,
    })
}

async fn find_batches<D: Disk>(
    disk: &D,
    geometry: Geometry,
    identity: SegmentIdentity,
) -> Result<Vec<BatchHeader>, DiskError> {
    find_headers(disk, geometry, identity.segment, |found| *found == identity).await
}

/// Batches of the segment whose identity is `wanted`, in the order they lie there.
async fn find_headers<D: Disk>(
    disk: &D,
    geometry: Geometry,
    segment: SegmentIndex,
    wanted: impl Fn(&SegmentIdentity) -> bool,
) -> Result<Vec<BatchHeader>, DiskError> {
    let first = geometry.first(segment).0;
    let end = first + geometry.blocks;
    let mut batches = Vec::new();
    let mut window: Option<(u32, D::Bytes)> = None;
    let mut at = first + 1;
    while at < end {
        let held = window.as_ref().filter(|(start, bytes)| at >= *start && at < *start + (bytes.len() / BLOCK) as u32);
        if held.is_none() {
            let blocks = WINDOW_BLOCKS.min(end - at);
            let bytes = disk.read(Geometry::offset(Position(at)), blocks as usize * BLOCK).await?;
            window = Some((at, bytes));
        }
        let (start, bytes) = window.as_ref().expect("just read");
        let block = &bytes[(at - start) as usize * BLOCK..][..BLOCK];
        let header = UncheckedHeader::decode(block).ok();
        let header = header.filter(|header| {
            let blocks = u64::from(header.header_blocks()) + u64::from(header.payload_blocks);
            header.position == Position(at) && wanted(&header.identity) && u64::from(at) + blocks <= u64::from(end)
        });
        let batch = match header {
            Some(header) => read_header(disk, Position(at), header).await?,
            None => None,
        };
        let batch = batch.filter(|(batch, _)| lies_inside(&batch.records, geometry, segment));
        at += batch.as_ref().map_or(1, |(_, blocks)| *blocks);
        batches.extend(batch.map(|(batch, _)| batch));
    }
    Ok(batches)
}

/// The whole header and the blocks of its batch.
async fn read_header<D: Disk>(
    disk: &D,
    position: Position,
    header: UncheckedHeader,
) -> Result<Option<(BatchHeader, u32)>, DiskError> {
    let blocks = header.header_blocks() + header.payload_blocks;
    let bytes = disk.read(Geometry::offset(position), header.header_blocks() as usize * BLOCK).await?;
    Ok(header.finalize(&bytes).ok().map(|header| (header, blocks)))
}

async fn is_whole<D: Disk>(disk: &D, record: &Record) -> Result<bool, DiskError> {
    let Record::Data(data) = record else { return Ok(true) };
    if data.checksums.is_empty() {
        return Ok(true);
    }
    let bytes = disk.read(Geometry::offset(data.position), data.checksums.len() * BLOCK).await?;
    Ok(bytes.chunks(BLOCK).zip(&data.checksums).all(|(block, checksum)| crc32c::crc32c(block) == *checksum))
}
