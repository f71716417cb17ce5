//! Entries side by side in the order of their blocks, 13 bytes each, with a bit for each block of the extent that is
//! there. Eight groups of 128 blocks, so that little moves when a block is put between others, and counting bits below
//! one takes two words.

use super::Columns;
use super::column::{Code, LOW_BITS, LOW_MASK, Stored, grow, heap_bytes, shrink};
use super::span::InExtent;
use torus_schema::limits::BLOCKS_PER_EXTENT;

const GROUP_BLOCKS: usize = 128;
const GROUPS: usize = BLOCKS_PER_EXTENT as usize / GROUP_BLOCKS;
const _: () = assert!(GROUPS * GROUP_BLOCKS == BLOCKS_PER_EXTENT as usize);

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Packed {
    position: u32,
    checksum: u32,
    /// The code's low bits, and above them the lower bits of its era.
    low: u32,
    /// The upper bits of its era.
    era: u8,
}

/// Of a block with data, in this form.
pub const PACKED_BYTES: usize = size_of::<Packed>();
const _: () = assert!(PACKED_BYTES == 13);
/// Of an era, in `low`.
const ERA_LOW_BITS: u32 = 32 - LOW_BITS;

impl Packed {
    fn new(stored: Stored) -> Self {
        let Stored { position, checksum, code } = stored;
        let era = u32::from(code.era);
        Self { position, checksum, low: era << LOW_BITS | code.low, era: (era >> ERA_LOW_BITS) as u8 }
    }

    fn stored(self) -> Stored {
        let era = u16::from(self.era) << ERA_LOW_BITS | (self.low >> LOW_BITS) as u16;
        Stored { position: self.position, checksum: self.checksum, code: Code { era, low: self.low & LOW_MASK } }
    }
}

#[derive(Default)]
pub struct PackedColumns {
    present: [u128; GROUPS],
    groups: [Vec<Packed>; GROUPS],
}

/// Group, bit of the block in it, and how many are there before it.
fn locate(present: &[u128; GROUPS], block: InExtent) -> (usize, u128, usize) {
    let group = usize::from(block) / GROUP_BLOCKS;
    let bit = 1 << (usize::from(block) % GROUP_BLOCKS);
    (group, bit, (present[group] & (bit - 1)).count_ones() as usize)
}

impl Columns for PackedColumns {
    fn get(&self, block: InExtent) -> Option<Stored> {
        let (group, bit, at) = locate(&self.present, block);
        (self.present[group] & bit != 0).then(|| self.groups[group][at].stored())
    }

    fn set(&mut self, block: InExtent, stored: Stored) {
        let (group, bit, at) = locate(&self.present, block);
        let entries = &mut self.groups[group];
        if self.present[group] & bit != 0 {
            entries[at] = Packed::new(stored);
            return;
        }
        grow(entries, 1, GROUP_BLOCKS);
        entries.insert(at, Packed::new(stored));
        self.present[group] |= bit;
    }

    fn remove(&mut self, block: InExtent) {
        let (group, bit, at) = locate(&self.present, block);
        if self.present[group] & bit != 0 {
            self.groups[group].remove(at);
            self.present[group] &= !bit;
            shrink(&mut self.groups[group]);
        }
    }

    fn set_run(&mut self, first: InExtent, position: u32, code: Code, checksums: &[u32]) {
        for (number, checksum) in (0u16..).zip(checksums) {
            let position = position + u32::from(number);
            self.set(first + number, Stored { position, checksum: *checksum, code });
        }
    }

    fn is_free(&self, first: InExtent, count: u16) -> bool {
        (first..first + count).all(|block| {
            let (group, bit) = (usize::from(block) / GROUP_BLOCKS, 1u128 << (usize::from(block) % GROUP_BLOCKS));
            self.present[group] & bit == 0
        })
    }

    fn blocks(&self) -> usize {
        self.groups.iter().map(Vec::len).sum()
    }

    fn heap_bytes(&self) -> usize {
        self.groups.iter().map(heap_bytes).sum()
    }

    fn for_each(&self, mut each: impl FnMut(InExtent, Stored)) {
        for (group, entries) in self.groups.iter().enumerate() {
            let mut left = self.present[group];
            for entry in entries {
                each((group * GROUP_BLOCKS) as InExtent + left.trailing_zeros() as InExtent, entry.stored());
                left &= left - 1;
            }
        }
    }
}

impl PackedColumns {
    /// Room for what is about to be put, exactly.
    pub fn reserve(&mut self, blocks: impl Iterator<Item = InExtent>) {
        let mut counts = [0; GROUPS];
        blocks.for_each(|block| counts[usize::from(block) / GROUP_BLOCKS] += 1);
        self.groups.iter_mut().zip(counts).for_each(|(group, count)| group.reserve_exact(count));
    }

    /// A block behind all that are there.
    pub fn push(&mut self, block: InExtent, stored: Stored) {
        let group = usize::from(block) / GROUP_BLOCKS;
        debug_assert_eq!(self.present[group] >> (usize::from(block) % GROUP_BLOCKS), 0);
        self.present[group] |= 1 << (usize::from(block) % GROUP_BLOCKS);
        self.groups[group].push(Packed::new(stored));
    }
}
