//! What of a range is stored: asked of replicas as a read is, without the data, an extent at a time.

use super::course::Course;
use super::plan::{Piece, blocks_touched};
use super::reads::{Found, Look, malformed};
use super::session::{Failure, Session};
use crate::device::{Run, VolumeError};
use bytes::Bytes;
use std::ops::Range;
use std::rc::Rc;
use torus_rpc::message::{Answer, Operation};
use torus_rpc::runtime::Runtime;
use torus_schema::ids::BlockIndex;
use torus_schema::limits::{BLOCK_BYTES, BLOCKS_PER_EXTENT, VOLUME_MAP_EXTENTS_MAX, VOLUME_MAP_RUNS_MAX};

/// Its allocation, in runs of blocks.
struct Allocation;

/// Blocks, and whether they are stored.
type BlockRun = (u64, bool);

impl Look for Allocation {
    type Found = BlockRun;
    /// No disk is asked.
    const TELLS_SERVICE_TIME: bool = false;

    fn operation(piece: Piece) -> Operation {
        Operation::Map { first: piece.first, count: piece.count }
    }

    fn take(piece: Piece, answer: Answer, _payload: Bytes) -> Result<Found<BlockRun>, Failure> {
        let Answer::Mapped { runs } = answer else {
            return Err(malformed(format!("a map was answered by {answer:?}")));
        };
        let total: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
        if total != u64::from(piece.count) || runs.iter().any(|run| run.count == 0) {
            return Err(malformed(format!("a map of {} blocks was answered by {runs:?}", piece.count)));
        }
        Ok(runs.iter().map(|run| (u64::from(run.count), run.data)).collect())
    }
}

impl<R: Runtime> Session<R> {
    /// As `Device::map`.
    pub async fn map(self: &Rc<Self>, offset: u64, length: u64) -> Result<Vec<Run>, VolumeError> {
        self.check_range(offset, length)?;
        let looks = extents(blocks_touched(offset, length)).take(VOLUME_MAP_EXTENTS_MAX as usize).map(async |piece| {
            // One at a time: a writer behind it waits for those before it in one extent, not in all.
            self.locks.passed(piece.first.0..piece.first.0 + u64::from(piece.count)).await;
            self.look::<Allocation>(piece, &Course::default()).await
        });
        let mut found = Vec::new();
        for looked in futures::future::join_all(looks).await {
            found.extend(looked?);
        }
        Ok(runs_of(&found, offset, length))
    }
}

/// Whole blocks, cut at the extents' ends.
fn extents(blocks: Range<u64>) -> impl Iterator<Item = Piece> {
    let mut next = blocks.start;
    std::iter::from_fn(move || {
        let end = blocks.end.min((next / BLOCKS_PER_EXTENT + 1) * BLOCKS_PER_EXTENT);
        let piece = (next < end).then(|| Piece { first: BlockIndex(next), count: (end - next) as u32 });
        next = end;
        piece
    })
}

/// Runs of blocks that begin with the one of `offset`, in bytes from `offset` on, neighbours of one kind together.
fn runs_of(found: &[BlockRun], offset: u64, length: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut at = offset / BLOCK_BYTES * BLOCK_BYTES;
    for (blocks, stored) in found {
        let begins = at.max(offset);
        at += blocks * BLOCK_BYTES;
        let bytes = at.min(offset + length) - begins;
        let full = runs.len() as u64 == VOLUME_MAP_RUNS_MAX;
        match runs.last_mut() {
            Some(run) if run.stored == *stored => run.bytes += bytes,
            _ if full => break,
            _ => runs.push(Run { bytes, stored: *stored }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_rpc::message::Run as Blocks;
    use torus_schema::ids::Version;

    fn run(bytes: u64, stored: bool) -> Run {
        Run { bytes, stored }
    }

    #[test]
    fn runs_begin_and_end_with_the_range_and_neighbours_of_one_kind_are_one() {
        let found = [(1, true), (2, true), (1, false), (1, true)];
        assert_eq!(runs_of(&found, 0, 5 * 4096), [run(12288, true), run(4096, false), run(4096, true)]);
        assert_eq!(runs_of(&found[..3], 100, 12289), [run(12188, true), run(101, false)]);
        assert_eq!(runs_of(&found[..1], 4095, 1), [run(1, true)]);
    }

    #[test]
    fn scattered_blocks_end_the_answer_early() {
        let scattered: Vec<_> = (0..VOLUME_MAP_RUNS_MAX + 9).map(|block| (1, block % 2 == 0)).collect();
        let runs = runs_of(&scattered, 0, u64::MAX / 2);
        assert_eq!(runs.len() as u64, VOLUME_MAP_RUNS_MAX);
        assert_eq!(runs.iter().map(|run| run.bytes).sum::<u64>(), VOLUME_MAP_RUNS_MAX * BLOCK_BYTES);
    }

    #[test]
    fn extents_are_cut_at_their_ends() {
        let found: Vec<_> = extents(1000..2050).map(|piece| (piece.first.0, piece.count)).collect();
        assert_eq!(found, [(1000, 24), (1024, 1024), (2048, 2)]);
        assert_eq!(extents(7..7).count(), 0);
    }

    #[test]
    fn an_answer_that_is_not_of_the_whole_piece_is_none() {
        let piece = Piece { first: BlockIndex(3), count: 4 };
        let mapped = |counts: &[u32]| {
            let block_run = |count: &u32| Blocks { count: *count, version: Version::ZERO, data: false };
            let answer = Answer::Mapped { runs: counts.iter().map(block_run).collect() };
            Allocation::take(piece, answer, Bytes::new())
        };
        assert_eq!(mapped(&[1, 3]).expect("whole")[..], [(1, false), (3, false)]);
        for bad in [&[3][..], &[1, 4], &[4, 0], &[]] {
            assert!(mapped(bad).is_err(), "{bad:?}");
        }
    }
}
