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

    /// All at once: what is scattered on the disk costs one wait, not one each.
    async fn read_pieces(&self, pieces: &[Piece], chunks: &mut Chunks<R>) -> Vec<BlockIndex> {
        let reads = pieces.iter().map(|piece| async {
            let mut chunks = Chunks::<R>::new();
            let damaged = self.read_piece(piece, &mut chunks).await;
            (chunks, damaged)
        });
        let mut damaged = Vec::new();
        for (read, found) in futures::future::join_all(reads).await {
            chunks.extend(read);
            damaged.extend(found);
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
        let good = bytes.chunks(BLOCK).zip(checksums).all(|(block, checksum)| crc32c::crc32c(block) == *checksum);
        good.then_some(bytes)
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
