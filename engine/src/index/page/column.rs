//! What the larger forms of a page have in common: versions in 5 bytes, and lists that grow by little.

use crate::index::Entry;
use crate::log::Position;
use torus_schema::ids::{Epoch, Version};
use torus_schema::limits::{BLOCKS_PER_EXTENT, SEQUENCE_MAX};

/// Of a sequence, in the code itself; the upper bits are the era's.
pub const LOW_BITS: u32 = 29;
pub const LOW_MASK: u32 = (1 << LOW_BITS) - 1;
/// The other bits of a code's five bytes.
const ERAS_MAX: usize = 1 << (40 - LOW_BITS);
/// Below so many, none are looked for that are not used any more.
const ERAS_FEW: usize = 8;

// Every block of an extent may be of an era of its own, and one more while a block is replaced.
const _: () = assert!(ERAS_MAX > BLOCKS_PER_EXTENT as usize);
const _: () = assert!(SEQUENCE_MAX >> LOW_BITS <= u32::MAX as u64);

/// Versions of one epoch and near each other: what they have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Era {
    epoch: u32,
    /// Of the sequence.
    upper: u32,
}

/// A version as its era's place in the page's list and the rest of the sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Code {
    pub era: u16,
    /// LOW_BITS of it are used.
    pub low: u32,
}

/// What a block's entry becomes within a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stored {
    pub position: u32,
    pub checksum: u32,
    pub code: Code,
}

/// The eras of a page. Few ever meet in one extent: 2^29 writes of a volume are one.
#[derive(Default)]
pub struct Eras {
    list: Vec<Era>,
    /// So long a list is looked through for what is not used.
    crowded: usize,
}

impl Eras {
    pub fn version(&self, code: Code) -> Version {
        let era = self.list[usize::from(code.era)];
        Version { epoch: Epoch(era.epoch), sequence: u64::from(era.upper) << LOW_BITS | u64::from(code.low) }
    }

    pub fn code(&mut self, version: Version) -> Code {
        let era = Era { epoch: version.epoch.0, upper: (version.sequence >> LOW_BITS) as u32 };
        // Backwards: the newest is the likely one.
        let place = self.list.iter().rposition(|other| *other == era).unwrap_or_else(|| {
            assert!(self.list.len() < ERAS_MAX, "a crowded list is cleaned out before more is put");
            self.list.reserve_exact(1);
            self.list.push(era);
            self.list.len() - 1
        });
        Code { era: place as u16, low: version.sequence as u32 & LOW_MASK }
    }

    /// Time to take the page apart and build it again, which forgets eras that are not used.
    pub fn is_crowded(&self) -> bool {
        self.list.len() >= self.crowded.max(ERAS_FEW)
    }

    /// After the page was built: all there are, are used.
    pub fn settle(&mut self) {
        self.crowded = (2 * self.list.len()).min(ERAS_MAX);
    }

    pub fn heap_bytes(&self) -> usize {
        heap_bytes(&self.list)
    }

    pub fn store(&mut self, entry: Entry) -> Stored {
        Stored { position: entry.position.0, checksum: entry.checksum, code: self.code(entry.version) }
    }

    pub fn entry(&self, stored: Stored) -> Entry {
        let version = self.version(stored.code);
        Entry { position: Position(stored.position), checksum: stored.checksum, version }
    }
}

pub fn heap_bytes<T>(list: &Vec<T>) -> usize {
    list.capacity() * size_of::<T>()
}

/// Room for `more`, by a 16th of what is there: memory, not time, is what a page saves.
pub fn grow<T>(list: &mut Vec<T>, more: usize, max: usize) {
    let needed = list.len() + more;
    if needed > list.capacity() {
        let wanted = needed.max((list.len() + (list.len() / 16).max(2)).min(max));
        list.reserve_exact(wanted - list.len());
    }
}

/// After blocks went away: what is not used is given back once it is much.
pub fn shrink<T>(list: &mut Vec<T>) {
    if list.capacity() > 16 && list.len() < list.capacity() / 4 * 3 {
        list.shrink_to_fit();
    }
}
