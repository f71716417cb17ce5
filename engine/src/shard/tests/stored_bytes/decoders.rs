//! Every decoder of bytes on a shard's disk; and footers that say what no shard would.

use super::image::{SEGMENT_BLOCKS, SEGMENTS};
use super::mutation::Chance;
use crate::log::batch::UncheckedHeader;
use crate::log::footer::Trailer;
use crate::log::record::{Record, decode_all};
use crate::log::segment::Opening;
use crate::log::superblock::decode_either;
use crate::log::{BLOCK, Geometry, Position, SegmentIndex};
use torus_schema::ids::{BlockIndex, Epoch, SliceId, Version};
use torus_schema::limits::SEQUENCE_MAX;

/// As each of the structures that a disk may hold; as how many of them it is sound. What comes out is dropped: what it
/// is, other tests say.
pub fn decode_as_anything(bytes: &[u8], chance: &mut Chance) -> usize {
    let mut sound = usize::from(decode_either(bytes).is_ok()) + usize::from(Opening::decode(bytes).is_ok());
    if let Ok(header) = UncheckedHeader::decode(bytes) {
        header.header_blocks();
        sound += usize::from(header.finalize(bytes).is_ok());
    }
    let geometry = geometry();
    for trailer in [Trailer::decode_first(bytes), Trailer::decode_last(bytes)].into_iter().flatten() {
        let (blocks, tail) = (trailer.blocks() as usize, trailer.tail_blocks() as usize);
        let end = bytes.len() / BLOCK * BLOCK;
        drop(trailer.tail(&bytes[end.saturating_sub(tail.saturating_mul(BLOCK))..end]));
        let body = &bytes[end.saturating_sub(blocks.saturating_mul(BLOCK))..end];
        assert!(trailer.data_blocks() <= trailer.blocks());
        drop(trailer.entries(geometry, body).map(|entries| entries.count()));
        sound += usize::from(trailer.finalize(geometry, body).is_ok());
    }
    let start = chance.below(bytes.len().min(200));
    drop(decode_all(bytes.get(start..).unwrap_or_default(), chance.u64() as u32 >> chance.below(32)));
    sound
}

pub fn geometry() -> Geometry {
    Geometry { segments: SEGMENTS as u32, blocks: SEGMENT_BLOCKS as u32 }
}

/// First block and bytes of a footer of that image with another content, its checksums right.
pub fn changed_footer(image: &[u8], chance: &mut Chance) -> Option<(usize, Vec<u8>)> {
    let geometry = geometry();
    let segment = SegmentIndex(chance.below(SEGMENTS as usize) as u32);
    let end = (geometry.first(segment).0 + geometry.blocks) as usize;
    let trailer = Trailer::decode_last(&image[(end - 1) * BLOCK..end * BLOCK]).ok()?;
    let start = end - trailer.blocks() as usize;
    let mut footer = trailer.finalize(geometry, &image[start * BLOCK..end * BLOCK]).ok()?;
    for _ in 0..1 + chance.below(4) {
        let count = footer.records.len();
        match chance.below(8) {
            0 => footer.end_batch.0 = chance.number(),
            1 => footer.first_batch.0 = chance.number(),
            2 => footer.durable.0 = chance.number(),
            3 if count > 1 => footer.records.swap(0, count - 1),
            4 if count > 1 => drop(footer.records.pop()),
            5 if count > 1 => footer.records[0] = footer.records[chance.below(count)].clone(),
            _ if count > 0 => change_record(&mut footer.records[chance.below(count)], chance),
            _ => {}
        }
    }
    let bytes = footer.encode();
    let first = end.checked_sub(bytes.len() / BLOCK).filter(|first| *first > geometry.first(segment).0 as usize);
    first.map(|first| (first, bytes))
}

fn version(chance: &mut Chance) -> Version {
    Version::new(Epoch(chance.number() as u32), chance.number() & SEQUENCE_MAX)
}

fn change_record(record: &mut Record, chance: &mut Chance) {
    match (record, chance.below(4)) {
        (Record::Data(data), 0) => data.first = BlockIndex(chance.number()),
        (Record::Data(data), 1) => data.position = Position(chance.below(300) as u32),
        (Record::Data(data), 2) => data.version = version(chance),
        (Record::Data(data), _) => data.flush_point = version(chance),
        (Record::Clear(clear), 0) => clear.first = BlockIndex(chance.number()),
        (Record::Clear(clear), 1) => clear.count = chance.number(),
        (Record::Clear(clear), 2) => clear.slice = SliceId(chance.number() as u32),
        (Record::Clear(clear), _) => clear.version = version(chance),
        (Record::Instances(instances), 0) => instances.width = 1 << chance.below(32),
        (Record::Instances(instances), 1) => instances.ring_slices = 1 << chance.below(32),
        (Record::Instances(instances), 2) => instances.generation.0 = chance.number(),
        (Record::Instances(instances), _) => instances.slices.push(SliceId(chance.number() as u32)),
        (Record::Open(open), 0) => open.epoch = Epoch(chance.number() as u32),
        (Record::Open(open), _) => open.flush_point = version(chance),
        (other, _) => *other = Record::Drop(other.volume()),
    }
}
