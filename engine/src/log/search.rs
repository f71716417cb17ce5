//! Batches of a segment that has no footer, found block by block: the second table of `recovery`.
//!
//! A block that is not inside a batch is tried as a header. So a hole, left by a batch that was lost while others in
//! flight were not, hides nothing behind it. What names another use of the segment is a remainder of that, and what
//! names another position was misdirected, or is a guest's copy: neither is a header.

use super::batch::{BatchHeader, UncheckedHeader};
use super::footer::{Trailer, is_in_a_volume};
use super::record::Record;
use super::{BLOCK, Geometry, Position, SegmentIdentity, SegmentIndex};
use torus_rpc::runtime::{Disk, DiskError};

/// Blocks read at once.
const WINDOW_BLOCKS: u32 = 256;

pub struct FoundBatch {
    pub header: BatchHeader,
    /// Of its payload, what is not as the header says or cannot be read.
    pub damaged: Vec<Position>,
}

#[derive(Default)]
pub struct Search {
    /// In the order they lie there.
    pub batches: Vec<FoundBatch>,
    /// The copy at the footer's start.
    pub trailer: Option<Trailer>,
}

/// An error is taken for damage if it comes twice.
pub async fn read_twice<D: Disk>(disk: &D, position: Position, blocks: u32) -> Result<D::Bytes, DiskError> {
    let (offset, bytes) = (Geometry::offset(position), blocks as usize * BLOCK);
    match disk.read(offset, bytes).await {
        Ok(read) => Ok(read),
        Err(error) => {
            tracing::warn!(%error, "a read at the start failed; it is tried once more");
            disk.read(offset, bytes).await
        }
    }
}

/// Batches of the segment whose identity is `wanted`, their payload verified.
pub async fn search<D: Disk>(
    disk: &D,
    geometry: Geometry,
    segment: SegmentIndex,
    wanted: impl Fn(&SegmentIdentity) -> bool,
) -> Search {
    let first = geometry.first(segment).0;
    let end = first + geometry.blocks;
    let mut window = Window { disk, end, held: None, narrow_until: 0 };
    let mut search = Search::default();
    let mut at = first + 1;
    while at < end {
        let Some(block) = window.get(at, 1).await else {
            at += 1;
            continue;
        };
        let trailer = Trailer::decode_first(block).ok();
        let fits = |trailer: &Trailer| wanted(&trailer.identity) && u64::from(at) + trailer.blocks() == u64::from(end);
        search.trailer = search.trailer.or(trailer.filter(fits));
        let header = UncheckedHeader::decode(block).ok();
        let header = header.filter(|header| {
            let blocks = u64::from(header.header_blocks()) + u64::from(header.payload_blocks);
            header.position == Position(at) && wanted(&header.identity) && u64::from(at) + blocks <= u64::from(end)
        });
        let batch = match header {
            Some(header) => read_batch(&mut window, geometry, at, header).await,
            None => None,
        };
        at += batch.as_ref().map_or(1, |(_, blocks)| *blocks);
        search.batches.extend(batch.map(|(batch, _)| batch));
    }
    search
}

/// The batch and its blocks.
async fn read_batch<D: Disk>(
    window: &mut Window<'_, D>,
    geometry: Geometry,
    at: u32,
    header: UncheckedHeader,
) -> Option<(FoundBatch, u32)> {
    let (header_blocks, payload_blocks) = (header.header_blocks(), header.payload_blocks);
    let header = header.finalize(window.get(at, header_blocks).await?).ok()?;
    if !header.records.iter().all(|record| lies_inside(record, geometry, header.identity.segment)) {
        return None;
    }
    let mut damaged = Vec::new();
    for record in &header.records {
        let Record::Data(data) = record else { continue };
        // At once, which is what is in the window, unless something in it cannot be read.
        let together = window.get(data.position.0, data.checksums.len() as u32).await.is_some();
        for (position, checksum) in (data.position.0..).map(Position).zip(&data.checksums) {
            let block = if together { window.held(position.0, 1) } else { window.get(position.0, 1).await };
            if block.is_none_or(|block| crc32c::crc32c(block) != *checksum) {
                damaged.push(position);
            }
        }
    }
    Some((FoundBatch { header, damaged }, header_blocks + payload_blocks))
}

/// Positions are used to read and to account, so what a header says is not taken on trust.
fn lies_inside(record: &Record, geometry: Geometry, segment: SegmentIndex) -> bool {
    let Record::Data(data) = record else { return true };
    let blocks = data.checksums.len() as u64;
    geometry.holds_payload(segment, data.position, blocks) && is_in_a_volume(data.first, blocks)
}

/// What was read last, so that going through a segment reads it once.
struct Window<'a, D: Disk> {
    disk: &'a D,
    /// Of the segment.
    end: u32,
    held: Option<(u32, D::Bytes)>,
    /// Up to there something cannot be read: no more is asked for than is wanted.
    narrow_until: u32,
}

impl<D: Disk> Window<'_, D> {
    /// `None`: it cannot be read.
    async fn get(&mut self, at: u32, blocks: u32) -> Option<&[u8]> {
        if blocks == 0 {
            return Some(&[]);
        }
        if self.held(at, blocks).is_none() {
            let wide = blocks.max(WINDOW_BLOCKS).min(self.end - at);
            let read = match at >= self.narrow_until {
                true => read_twice(self.disk, Position(at), wide).await.ok(),
                false => None,
            };
            let read = match read {
                Some(bytes) => bytes,
                None => {
                    self.narrow_until = self.narrow_until.max(at + wide);
                    let unreadable = |error: DiskError| tracing::error!(%error, "a block cannot be read");
                    read_twice(self.disk, Position(at), blocks).await.map_err(unreadable).ok()?
                }
            };
            self.held = Some((at, read));
        }
        self.held(at, blocks)
    }

    fn held(&self, at: u32, blocks: u32) -> Option<&[u8]> {
        let (start, bytes) = self.held.as_ref()?;
        let from = at.checked_sub(*start)? as usize * BLOCK;
        bytes.get(from..from + blocks as usize * BLOCK)
    }
}
