//! Every decoder of bytes on a shard's disk.

use super::mutation::Chance;
use crate::log::batch::UncheckedHeader;
use crate::log::record::decode_all;
use crate::log::segment::{Opening, UncheckedFooter};
use crate::log::superblock::decode_either;

/// As each of the structures that a disk may hold. What comes out is dropped: what it is, other tests say.
pub fn decode_as_anything(bytes: &[u8], chance: &mut Chance) {
    drop(decode_either(bytes));
    drop(Opening::decode(bytes));
    if let Ok(header) = UncheckedHeader::decode(bytes) {
        header.header_blocks();
        drop(header.finalize(bytes));
    }
    if let Ok(footer) = UncheckedFooter::decode(bytes) {
        footer.blocks();
        drop(footer.finalize(bytes));
    }
    let start = chance.below(bytes.len().min(200));
    drop(decode_all(bytes.get(start..).unwrap_or_default(), chance.u64() as u32 >> chance.below(32)));
}
