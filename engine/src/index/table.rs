//! The pages of a volume: a hash table of 4-byte numbers beside a slab of 32-byte slots.
//!
//! An extent of which one block is written costs its slot and its share of the table, 38 to 44 bytes. A map of pages
//! would cost twice that, since a table may be less than half full and every empty place has the size of a page.

use super::page::Page;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use std::hash::BuildHasher;
use torus_schema::hash::Keys;
use torus_schema::ids::ExtentIndex;

/// Of a chunk of the slab: it grows without moving, and a small volume takes 4 KiB.
const CHUNK_SLOTS: usize = 128;

struct Slot {
    /// Of a slot that is not used: the next such, and END behind the last.
    extent: u64,
    page: Page,
}

const _: () = assert!(size_of::<Slot>() == 32);
const END: u64 = u64::MAX;

pub struct PageTable {
    numbers: HashTable<u32>,
    chunks: Vec<Box<[Slot]>>,
    hasher: Keys,
    first_unused: u64,
    /// Of the pages, beside their slots.
    pages_bytes: usize,
}

impl Default for PageTable {
    fn default() -> Self {
        let (numbers, hasher) = (HashTable::new(), Keys::default());
        Self { numbers, chunks: Vec::new(), hasher, first_unused: END, pages_bytes: 0 }
    }
}

fn slot(chunks: &[Box<[Slot]>], number: u32) -> &Slot {
    &chunks[number as usize / CHUNK_SLOTS][number as usize % CHUNK_SLOTS]
}

fn slot_mut(chunks: &mut [Box<[Slot]>], number: u32) -> &mut Slot {
    &mut chunks[number as usize / CHUNK_SLOTS][number as usize % CHUNK_SLOTS]
}

impl PageTable {
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    pub fn get(&self, extent: ExtentIndex) -> Option<&Page> {
        let hash = self.hasher.hash_one(extent.0);
        let number = self.numbers.find(hash, |number| slot(&self.chunks, *number).extent == extent.0)?;
        Some(&slot(&self.chunks, *number).page)
    }

    /// Lets the extent's page be changed, which is made if there is none and goes if it is empty afterwards.
    pub fn change<T>(&mut self, extent: ExtentIndex, change: impl FnOnce(&mut Page) -> T) -> T {
        let Self { numbers, chunks, hasher, first_unused, pages_bytes } = self;
        let hash = hasher.hash_one(extent.0);
        let is_wanted = |number: &u32| slot(chunks, *number).extent == extent.0;
        let entry = numbers.entry(hash, is_wanted, |number| hasher.hash_one(slot(chunks, *number).extent));
        let entry = match entry {
            Entry::Occupied(entry) => entry,
            Entry::Vacant(entry) => {
                if *first_unused == END {
                    *first_unused = add_chunk(chunks);
                }
                let number = u32::try_from(*first_unused).expect("a shard has fewer extents than blocks");
                let made = slot_mut(chunks, number);
                *first_unused = std::mem::replace(&mut made.extent, extent.0);
                entry.insert(number)
            }
        };
        let number = *entry.get();
        let changed = slot_mut(chunks, number);
        let before = changed.page.heap_bytes();
        let result = change(&mut changed.page);
        *pages_bytes = *pages_bytes - before + changed.page.heap_bytes();
        if changed.page.is_empty() {
            entry.remove();
            changed.extent = std::mem::replace(first_unused, u64::from(number));
        }
        result
    }

    /// In no order.
    pub fn iter(&self) -> impl Iterator<Item = (ExtentIndex, &Page)> {
        let slots = self.chunks.iter().flatten().filter(|slot| !slot.page.is_empty());
        slots.map(|slot| (ExtentIndex(slot.extent), &slot.page))
    }

    /// As it was asked for; what an allocator adds is not in it.
    pub fn heap_bytes(&self) -> usize {
        let slab =
            self.chunks.capacity() * size_of::<Box<[Slot]>>() + self.chunks.len() * CHUNK_SLOTS * size_of::<Slot>();
        self.numbers.allocation_size() + slab + self.pages_bytes
    }
}

/// The first of its slots, each of which names the next.
fn add_chunk(chunks: &mut Vec<Box<[Slot]>>) -> u64 {
    let first = (chunks.len() * CHUNK_SLOTS) as u64;
    let end = first + CHUNK_SLOTS as u64;
    let next = |number: u64| if number + 1 == end { END } else { number + 1 };
    chunks.push((first..end).map(|number| Slot { extent: next(number), page: Page::Empty }).collect());
    first
}
