//! Many blocks of one extent at once: its page is taken apart, they are put over what it held one after the other, and
//! it is built once. A page in which as many blocks are put one by one moves what it holds for each of them.

use super::page::{InExtent, NOWHERE, Page, Span};
use super::{Entry, Index, Place, Run, in_extent};
use crate::log::Position;
use torus_schema::ids::{BlockIndex, Version};
use torus_schema::limits::BLOCKS_PER_EXTENT;

/// What is known of a block: nothing at version zero, cleared if it lies nowhere.
#[derive(Clone, Copy)]
struct Slot {
    version: Version,
    position: u32,
    checksum: u32,
}

impl Slot {
    fn cleared(version: Version) -> Self {
        Self { version, position: NOWHERE, checksum: 0 }
    }

    fn data(entry: Entry) -> Self {
        assert_ne!(entry.position.0, NOWHERE, "no data lies in the superblock");
        Self { version: entry.version, position: entry.position.0, checksum: entry.checksum }
    }

    fn entry(self) -> Option<Entry> {
        let entry = Entry { position: Position(self.position), checksum: self.checksum, version: self.version };
        (self.position != NOWHERE).then_some(entry)
    }
}

/// Room that is used again for each extent.
pub struct Scratch {
    slots: Vec<Slot>,
    /// That were cleared.
    spans: Vec<Span>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { slots: vec![Slot::cleared(Version::ZERO); BLOCKS_PER_EXTENT as usize], spans: Vec::new() }
    }
}

/// A block whose record is not current (any more), and the version that is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superseded {
    pub block: BlockIndex,
    pub old: Entry,
    pub by: Version,
}

impl Scratch {
    /// As the page says, and below that a clear of the whole extent.
    fn load(&mut self, page: &Page, cleared: Version) {
        self.slots.fill(Slot::cleared(cleared));
        for span in page.cleared() {
            self.slots[usize::from(span.first)..usize::from(span.end())].fill(Slot::cleared(span.version()));
        }
        page.for_each_data(|block, found| {
            if let Some(entry) = found.entry() {
                self.slots[usize::from(block)] = Slot::data(entry);
            }
        });
    }

    /// What a page has to say besides that clear, and how many blocks of it are data.
    fn page(&mut self, cleared: Version) -> (Page, usize) {
        let Self { slots, spans } = self;
        spans.clear();
        let mut blocks = 0;
        for (block, slot) in (0..).zip(&*slots) {
            if slot.position != NOWHERE {
                blocks += 1;
            } else if slot.version != cleared {
                match spans.last_mut() {
                    Some(last) if last.end() == block && last.version() == slot.version => last.count += 1,
                    _ => spans.push(Span::cleared(block, 1, slot.version)),
                }
            }
        }
        let data = (0..).zip(&*slots).filter_map(|(block, slot)| Some((block, slot.entry()?)));
        (Page::of(data, blocks, spans), blocks)
    }

    /// Of two copies of one version the newcomer wins. What is not current then, if anything, and by what.
    fn put(&mut self, block: InExtent, entry: Entry) -> Option<(Entry, Version)> {
        let slot = &mut self.slots[usize::from(block)];
        let standing = *slot;
        if standing.version > entry.version {
            return Some((entry, standing.version));
        }
        *slot = Slot::data(entry);
        standing.entry().map(|old| (old, entry.version))
    }
}

impl Index {
    /// Blocks with data in the extent.
    pub fn blocks_near(&self, place: Place) -> usize {
        let page = self.volumes.get(&place.volume).and_then(|volume| volume.pages.get(place.block.extent()));
        page.map_or(0, Page::blocks)
    }

    /// As `apply_run` for each of the runs in order; the newcomer wins a tie. All lie in the extent of `place`.
    pub fn apply_extent<'a>(
        &mut self,
        place: Place,
        runs: impl Iterator<Item = Run<'a>>,
        scratch: &mut Scratch,
        superseded: &mut Vec<Superseded>,
    ) {
        let extent = place.block.extent();
        let volume = self.volumes.entry(place.volume).or_default();
        let cleared = volume.cleared_version(place.slice, extent);
        let mut added = 0;
        volume.pages.change(extent, |page| {
            scratch.load(page, cleared);
            let before = page.blocks();
            for run in runs {
                debug_assert_eq!(run.first.block.extent(), extent);
                let first = in_extent(run.first.block);
                for number in 0..run.checksums.len() {
                    if let Some((old, by)) = scratch.put(first + number as InExtent, run.entry(number)) {
                        let block = BlockIndex(run.first.block.0 + number as u64);
                        superseded.push(Superseded { block, old, by });
                    }
                }
            }
            let (built, blocks) = scratch.page(cleared);
            *page = built;
            added = blocks - before;
        });
        volume.blocks += added as u64;
    }
}
