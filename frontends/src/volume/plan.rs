//! A byte range of the volume, cut into what single frames can carry. Pure.

use std::ops::Range;
use torus_schema::ids::BlockIndex;
use torus_schema::limits::{BLOCK_BYTES, BLOCKS_PER_EXTENT, BLOCKS_PER_FRAME_MAX};

/// Whole blocks of one extent, few enough for one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub first: BlockIndex,
    pub count: u32,
}

impl Piece {
    pub fn bytes(self) -> usize {
        self.count as usize * BLOCK_BYTES as usize
    }
}

/// The blocks that the bytes touch, whole or in part.
pub fn blocks_touched(offset: u64, length: u64) -> Range<u64> {
    offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES)
}

pub fn is_whole_blocks(offset: u64, length: u64) -> bool {
    offset.is_multiple_of(BLOCK_BYTES) && length.is_multiple_of(BLOCK_BYTES)
}

/// The blocks that the bytes cover whole; empty (never reversed) if there are none.
pub fn blocks_covered(offset: u64, length: u64) -> Range<u64> {
    let first = offset.div_ceil(BLOCK_BYTES);
    first..((offset + length) / BLOCK_BYTES).max(first)
}

/// All of it, if one piece holds it.
pub fn only_piece(blocks: &Range<u64>) -> Option<Piece> {
    let mut pieces = pieces(blocks.clone());
    let first = pieces.next()?;
    pieces.next().is_none().then_some(first)
}

pub fn pieces(blocks: Range<u64>) -> impl Iterator<Item = Piece> {
    let mut next = blocks.start;
    std::iter::from_fn(move || {
        if next >= blocks.end {
            return None;
        }
        let extent_end = (next / BLOCKS_PER_EXTENT + 1) * BLOCKS_PER_EXTENT;
        let end = blocks.end.min(extent_end).min(next + BLOCKS_PER_FRAME_MAX);
        let piece = Piece { first: BlockIndex(next), count: (end - next) as u32 };
        next = end;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_inside_one_block_touches_it_and_covers_none() {
        assert_eq!(blocks_touched(4097, 10), 1..2);
        assert!(blocks_covered(4097, 10).is_empty());
        assert_eq!(blocks_covered(4096, 4096), 1..2);
        assert_eq!(blocks_covered(1, 8192), 1..2);
    }

    proptest! {
        #[test]
        fn pieces_are_the_range_in_order_and_none_crosses_an_extent(start in 0u64..5000, count in 0u64..5000) {
            let mut next = start;
            for piece in pieces(start..start + count) {
                prop_assert_eq!(piece.first.0, next);
                prop_assert!(piece.count >= 1 && u64::from(piece.count) <= BLOCKS_PER_FRAME_MAX);
                next += u64::from(piece.count);
                prop_assert_eq!(piece.first.extent(), BlockIndex(next - 1).extent());
            }
            prop_assert_eq!(next, start + count);
        }
    }
}
