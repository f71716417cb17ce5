//! Blocks from the disk. Each is verified against the checksum in the index, which the client made; what does not
//! match is read once more and then answered as damaged, never as zeros or as older data (rule 15).

use super::course::{Done, Span};
use super::damage::{Damaged, FoundBy};
use super::{Chunks, Shard};
use crate::index::{Entry, Found, Place};
use crate::log::{BLOCK, Geometry, Position, SegmentIndex};
use smallvec::smallvec;
use std::ops::{Deref, Range};
use std::rc::Rc;
use torus_rpc::message::{Answer, Checksums, Few, Refusal, Run};
use torus_rpc::runtime::{Clock, Disk, Instant, Runtime};
use torus_schema::ids::BlockIndex;

/// So many blocks of no interest are read rather than asking the disk twice: they take it about as long.
const GAP_BLOCKS_MAX: u32 = 4;
/// More is not read at once for several pieces.
const WINDOW_BLOCKS_MAX: u32 = 256;

/// A part of what one disk read gave, without a copy.
#[derive(Clone)]
pub struct Chunk<B> {
    bytes: B,
    range: Range<usize>,
}

impl<B: Deref<Target = [u8]>> Deref for Chunk<B> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

/// Neighbours in the volume that are neighbours on the disk.
struct Piece {
    block: BlockIndex,
    position: Position,
    checksums: Checksums,
}

/// One read of the disk for several pieces.
#[derive(Debug, PartialEq)]
struct Window {
    start: Position,
    blocks: u32,
    /// By their number, in order of their positions.
    pieces: Few<usize>,
}

impl Piece {
    fn blocks(&self) -> u32 {
        self.checksums.len() as u32
    }

    /// This piece of what was read from `start` on, if it is what was written.
    fn verified<B: Deref<Target = [u8]> + Clone>(&self, bytes: &B, start: Position) -> Option<Chunk<B>> {
        let from = (self.position.0 - start.0) as usize * BLOCK;
        let range = from..from + self.checksums.len() * BLOCK;
        let is_good = is_good(&bytes[range.clone()], &self.checksums);
        is_good.then(|| Chunk { bytes: bytes.clone(), range })
    }
}

fn is_good(bytes: &[u8], checksums: &[u32]) -> bool {
    bytes.chunks(BLOCK).zip(checksums).all(|(block, checksum)| crc32c::crc32c(block) == *checksum)
}

/// Keeps the segments from being reused while they are read, however the read ends.
pub(super) struct Readers<R: Runtime> {
    shard: Rc<Shard<R>>,
    segments: Few<SegmentIndex>,
}

impl<R: Runtime> Readers<R> {
    fn new(shard: &Rc<Shard<R>>, pieces: &[Piece]) -> Self {
        let geometry = shard.geometry;
        Self::of(shard, pieces.iter().map(|piece| geometry.segment_of(piece.position)).collect())
    }

    pub fn of(shard: &Rc<Shard<R>>, segments: Few<SegmentIndex>) -> Self {
        let space = &mut shard.state.borrow_mut().contents.space;
        segments.iter().for_each(|segment| space.add_reader(*segment));
        Self { shard: shard.clone(), segments }
    }
}

impl<R: Runtime> Drop for Readers<R> {
    fn drop(&mut self) {
        let freed = {
            let space = &mut self.shard.state.borrow_mut().contents.space;
            let before = space.free();
            self.segments.iter().for_each(|segment| space.remove_reader(*segment));
            space.free() > before
        };
        if freed {
            self.shard.changed.notify();
            self.shard.pump_soon();
        }
    }
}

impl<R: Runtime> Shard<R> {
    /// Within one extent, checked.
    /// `began`: when it was begun with.
    pub(super) async fn read(self: &Rc<Self>, first: Place, count: u32, began: Instant) -> Result<Done<R>, Refusal> {
        let found = {
            let state = &mut *self.state.borrow_mut();
            state.statistics.reads += 1;
            state.contents.index.find_range(first, count)
        };
        let pieces = pieces_of(first.block, &found);
        let readers = Readers::new(self, &pieces);
        let mut chunks = Chunks::<R>::new();
        let damaged = match &pieces[..] {
            [piece] => self.read_piece(piece, &mut chunks).await,
            pieces => Box::pin(self.read_pieces(pieces, &mut chunks)).await,
        };
        let span = Span { began, ended: self.runtime.clock().now() };
        drop(readers);
        if let Some(block) = damaged.first().copied() {
            self.note_all(first, &found, &damaged);
            return Err(Refusal::Damaged { block });
        }
        // What was never written is not on the disk.
        let disk = (!pieces.is_empty()).then_some(span);
        let checksums = pieces.into_iter().flat_map(|piece| piece.checksums).collect();
        Ok(Done { answer: Answer::Read { runs: runs_of(&found), checksums }, chunks, disk })
    }

    /// All at once: what is scattered on the disk costs one wait, not one each, and what lies close together one read.
    async fn read_pieces(&self, pieces: &[Piece], chunks: &mut Chunks<R>) -> Vec<BlockIndex> {
        let windows = windows_of(pieces, |position| self.geometry.segment_of(position));
        let reads = windows.iter().map(|window| async {
            let read = self.disk.read(Geometry::offset(window.start), window.blocks as usize * BLOCK).await.ok();
            let verified = |number: &usize| {
                let chunk = read.as_ref().and_then(|bytes| pieces[*number].verified(bytes, window.start));
                (*number, chunk)
            };
            window.pieces.iter().map(verified).collect::<Few<_>>()
        });
        let mut verified: Vec<_> = pieces.iter().map(|_| None).collect();
        for (number, chunk) in futures::future::join_all(reads).await.into_iter().flatten() {
            verified[number] = chunk;
        }
        let mut damaged = Vec::new();
        for (piece, chunk) in pieces.iter().zip(verified) {
            match chunk {
                Some(chunk) => chunks.push(chunk),
                None => damaged.extend(self.read_again(piece, chunks).await),
            }
        }
        damaged
    }

    /// Gives the blocks that cannot be read as they were written.
    async fn read_piece(&self, piece: &Piece, chunks: &mut Chunks<R>) -> Vec<BlockIndex> {
        if let Some(bytes) = self.read_verified(piece.position, &piece.checksums).await {
            chunks.push(Chunk { range: 0..bytes.len(), bytes });
            return Vec::new();
        }
        Box::pin(self.read_again(piece, chunks)).await
    }

    /// Block by block: one may be all that is wrong, and it may have been the transfer.
    async fn read_again(&self, piece: &Piece, chunks: &mut Chunks<R>) -> Vec<BlockIndex> {
        let mut damaged = Vec::new();
        for (number, checksum) in (0u32..).zip(&piece.checksums) {
            let position = Position(piece.position.0 + number);
            match self.read_verified(position, &[*checksum]).await {
                Some(bytes) => chunks.push(Chunk { range: 0..bytes.len(), bytes }),
                None => damaged.push(BlockIndex(piece.block.0 + u64::from(number))),
            }
        }
        damaged
    }

    fn note_all(&self, first: Place, found: &[Found], damaged: &[BlockIndex]) {
        for block in damaged {
            let Found::Data(entry) = found[(block.0 - first.block.0) as usize] else { continue };
            let Entry { position, checksum, version } = entry;
            let damaged = Damaged { volume: first.volume, block: *block, version, checksum, position };
            self.note_damaged(damaged, FoundBy::Read);
        }
    }

    pub(super) async fn read_verified(
        &self,
        position: Position,
        checksums: &[u32],
    ) -> Option<<R::Disk as Disk>::Bytes> {
        let bytes = self.disk.read(Geometry::offset(position), checksums.len() * BLOCK).await.ok()?;
        is_good(&bytes, checksums).then_some(bytes)
    }
}

fn pieces_of(first: BlockIndex, found: &[Found]) -> Few<Piece> {
    let mut pieces = Few::<Piece>::new();
    for (block, found) in (first.0..).map(BlockIndex).zip(found) {
        let Found::Data(entry) = found else { continue };
        match pieces.last_mut() {
            Some(piece)
                if piece.block.0 + piece.checksums.len() as u64 == block.0
                    && piece.position.0 + piece.checksums.len() as u32 == entry.position.0 =>
            {
                piece.checksums.push(entry.checksum);
            }
            _ => pieces.push(Piece { block, position: entry.position, checksums: smallvec![entry.checksum] }),
        }
    }
    pieces
}

/// What was overwritten here and there still lies between what was written with it: reading over it costs less than
/// another read. `segment_of`: nothing is read across the end of a segment.
fn windows_of<S: PartialEq>(pieces: &[Piece], segment_of: impl Fn(Position) -> S) -> Vec<Window> {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_unstable_by_key(|number| pieces[*number].position);
    let mut windows: Vec<Window> = Vec::new();
    for number in order {
        let piece = &pieces[number];
        let end = piece.position.0 + piece.blocks();
        match windows.last_mut() {
            Some(window)
                if piece.position.0 - window.start.0 <= window.blocks + GAP_BLOCKS_MAX
                    && end - window.start.0 <= WINDOW_BLOCKS_MAX
                    && segment_of(piece.position) == segment_of(window.start) =>
            {
                window.blocks = end - window.start.0;
                window.pieces.push(number);
            }
            _ => {
                let pieces = std::iter::once(number).collect();
                windows.push(Window { start: piece.position, blocks: piece.blocks(), pieces });
            }
        }
    }
    windows
}

pub(super) fn runs_of(found: &[Found]) -> Few<Run> {
    let mut runs = Few::<Run>::new();
    for found in found {
        let (version, data) = (found.version(), matches!(found, Found::Data(_)));
        match runs.last_mut() {
            Some(run) if (run.version, run.data) == (version, data) => run.count += 1,
            _ => runs.push(Run { count: 1, version, data }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(of: &[(u32, u32)]) -> Vec<Piece> {
        let piece = |(position, blocks): &(u32, u32)| Piece {
            block: BlockIndex(0),
            position: Position(*position),
            checksums: (0..*blocks).collect(),
        };
        of.iter().map(piece).collect()
    }

    /// Where they start, how long they are, and what they are for; segments of 1,000 blocks.
    fn windows(of: &[(u32, u32)]) -> Vec<(u32, u32, Vec<usize>)> {
        let windows = windows_of(&pieces(of), |position| position.0 / 1000);
        windows.into_iter().map(|window| (window.start.0, window.blocks, window.pieces.to_vec())).collect()
    }

    #[test]
    fn pieces_around_overwritten_blocks_are_one_read_and_what_is_elsewhere_is_another() {
        let overwritten_twice = [(100, 10), (700, 1), (111, 5), (40, 1), (118, 2)];
        assert_eq!(windows(&overwritten_twice), [(40, 1, vec![3]), (100, 20, vec![0, 2, 4]), (700, 1, vec![1])]);
    }

    #[test]
    fn what_is_further_away_or_in_another_segment_is_another_read() {
        let near = 10 + 5 + GAP_BLOCKS_MAX;
        assert_eq!(windows(&[(10, 5), (near, 1)]).len(), 1);
        assert_eq!(windows(&[(10, 5), (near + 1, 1)]).len(), 2);
        assert_eq!(windows(&[(999, 1), (1000, 1)]).len(), 2);
    }

    #[test]
    fn windows_are_bounded_but_a_piece_is_never_cut() {
        let alternating: Vec<_> = (0..400).map(|number| (2 * number, 1)).collect();
        let windows = windows(&alternating);
        assert!(windows.iter().all(|(_, blocks, _)| *blocks <= WINDOW_BLOCKS_MAX), "{windows:?}");
        assert_eq!(windows.iter().map(|(_, _, pieces)| pieces.len()).sum::<usize>(), 400);
        let long = WINDOW_BLOCKS_MAX + 1;
        assert_eq!(self::windows(&[(0, long), (long, 1)]), [(0, long, vec![0]), (long, 1, vec![1])]);
    }
}
