//! Where the newest version of each block of one extent lies, in 16 bytes for a block with data.
//!
//! A page starts as a sorted list and becomes an array where that is smaller. Cleared blocks are runs. A version is
//! held in 8 bytes: 48 bits of sequence and the place of its epoch in the page's own list of epochs, since few epochs
//! ever meet in one extent. Nothing in a page points outside of it.

use super::{Entry, Found};
use crate::log::Position;
use torus_schema::ids::{Epoch, Version};
use torus_schema::limits::BLOCKS_PER_EXTENT;

/// 18 bytes a block in the list, 16 in the array whether or not the block is there; the list is also slower to change.
const SPARSE_BLOCKS_MAX: usize = 512;
/// Position 0 is the superblock, so no data lies there.
const NOWHERE: u32 = 0;

const _: () = assert!(BLOCKS_PER_EXTENT <= u16::MAX as u64);

/// A block's place in its extent.
pub type InExtent = u16;

#[derive(Clone, Copy)]
struct Packed {
    /// Sequence in the upper 48 bits, slot of the epoch below.
    version: u64,
    position: u32,
    checksum: u32,
}

const ABSENT: Packed = Packed { version: 0, position: NOWHERE, checksum: 0 };
const _: () = assert!(size_of::<Packed>() == 16);

enum Entries {
    /// Sorted by block; the two lists run side by side.
    Sparse(Vec<InExtent>, Vec<Packed>),
    /// One for each block of the extent.
    Dense(Box<[Packed]>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct ClearedRun {
    first: InExtent,
    count: u16,
    version: u64,
}

impl ClearedRun {
    fn end(&self) -> u16 {
        self.first + self.count
    }
}

pub struct Page {
    entries: Entries,
    /// Sorted, apart from each other and from every entry.
    cleared: Vec<ClearedRun>,
    epochs: Vec<Epoch>,
    highest: Version,
}

impl Default for Page {
    fn default() -> Self {
        Self {
            entries: Entries::Sparse(Vec::new(), Vec::new()),
            cleared: Vec::new(),
            epochs: Vec::new(),
            highest: Version::ZERO,
        }
    }
}

impl Page {
    /// No version in the page is above it.
    pub fn highest(&self) -> Version {
        self.highest
    }

    pub fn is_empty(&self) -> bool {
        let entries = match &self.entries {
            Entries::Sparse(blocks, _) => blocks.is_empty(),
            Entries::Dense(array) => array.iter().all(|packed| packed.position == NOWHERE),
        };
        entries && self.cleared.is_empty()
    }

    pub fn get(&self, block: InExtent) -> Found {
        if let Some(packed) = self.packed(block) {
            return self.unpack(packed);
        }
        let after = self.cleared.partition_point(|run| run.first <= block);
        match after.checked_sub(1).map(|at| self.cleared[at]) {
            Some(run) if block < run.end() => Found::Cleared(self.version(run.version)),
            _ => Found::Never,
        }
    }

    /// Puts data; what was there is forgotten, whatever its version: the caller has compared.
    pub fn put(&mut self, block: InExtent, entry: Entry) {
        self.uncover(block, 1);
        let version = self.pack(entry.version);
        self.set(block, Packed { version, position: entry.position.0, checksum: entry.checksum });
    }

    /// The block has moved, under the same version.
    pub fn relocate(&mut self, block: InExtent, position: Position) {
        let packed = self.packed(block).expect("only a block that was found is moved");
        self.set(block, Packed { position: position.0, ..packed });
    }

    /// Blocks first..first + count below `version` become cleared; `replaced` is told of the data this hides.
    pub fn clear(&mut self, first: InExtent, count: u16, version: Version, replaced: &mut impl FnMut(InExtent, Found)) {
        let packed = self.pack(version);
        let mut run: Option<ClearedRun> = None;
        for block in first..first + count {
            let found = self.get(block);
            if found.version() > version {
                run.take().into_iter().for_each(|run| self.insert_run(run));
                continue;
            }
            if matches!(found, Found::Data(_)) {
                replaced(block, found);
                self.set(block, ABSENT);
            }
            match &mut run {
                Some(run) => run.count += 1,
                None => run = Some(ClearedRun { first: block, count: 1, version: packed }),
            }
        }
        run.into_iter().for_each(|run| self.insert_run(run));
    }

    /// Forgets all below `version`, because something outside the page says so for the whole extent.
    pub fn forget_below(&mut self, version: Version, replaced: &mut impl FnMut(InExtent, Found)) {
        for block in 0..BLOCKS_PER_EXTENT as InExtent {
            let Some(packed) = self.packed(block) else { continue };
            let found = self.unpack(packed);
            if found.version() <= version {
                replaced(block, found);
                self.set(block, ABSENT);
            }
        }
        let kept = self.cleared.iter().copied().filter(|run| self.version(run.version) > version).collect();
        self.cleared = kept;
    }

    /// Every block with data, in order.
    pub fn for_each_data(&self, mut each: impl FnMut(InExtent, Found)) {
        match &self.entries {
            Entries::Sparse(blocks, packed) => {
                blocks.iter().zip(packed).for_each(|(block, packed)| each(*block, self.unpack(*packed)))
            }
            Entries::Dense(array) => (0..).zip(array.iter()).for_each(|(block, packed)| {
                if packed.position != NOWHERE {
                    each(block, self.unpack(*packed));
                }
            }),
        }
    }

    fn packed(&self, block: InExtent) -> Option<Packed> {
        let packed = match &self.entries {
            Entries::Sparse(blocks, packed) => packed[blocks.binary_search(&block).ok()?],
            Entries::Dense(array) => array[usize::from(block)],
        };
        (packed.position != NOWHERE).then_some(packed)
    }

    fn set(&mut self, block: InExtent, value: Packed) {
        match &mut self.entries {
            Entries::Dense(array) => array[usize::from(block)] = value,
            Entries::Sparse(blocks, packed) => match (blocks.binary_search(&block), value.position) {
                (Ok(at), NOWHERE) => {
                    blocks.remove(at);
                    packed.remove(at);
                }
                (Err(_), NOWHERE) => {}
                (Ok(at), _) => packed[at] = value,
                (Err(at), _) => {
                    blocks.insert(at, block);
                    packed.insert(at, value);
                }
            },
        }
        self.grow();
    }

    fn grow(&mut self) {
        let Entries::Sparse(blocks, packed) = &self.entries else { return };
        if blocks.len() <= SPARSE_BLOCKS_MAX {
            return;
        }
        let mut array = vec![ABSENT; BLOCKS_PER_EXTENT as usize].into_boxed_slice();
        blocks.iter().zip(packed).for_each(|(block, packed)| array[usize::from(*block)] = *packed);
        self.entries = Entries::Dense(array);
    }

    /// Cuts the range out of the cleared runs.
    fn uncover(&mut self, first: InExtent, count: u16) {
        let end = first + count;
        let from = self.cleared.partition_point(|run| run.end() <= first);
        let to = self.cleared.partition_point(|run| run.first < end);
        if from >= to {
            return;
        }
        let (left, right) = (self.cleared[from], self.cleared[to - 1]);
        let mut kept = Vec::with_capacity(2);
        if left.first < first {
            kept.push(ClearedRun { count: first - left.first, ..left });
        }
        if right.end() > end {
            kept.push(ClearedRun { first: end, count: right.end() - end, ..right });
        }
        self.cleared.splice(from..to, kept);
    }

    fn insert_run(&mut self, run: ClearedRun) {
        self.uncover(run.first, run.count);
        let at = self.cleared.partition_point(|other| other.first < run.first);
        match at.checked_sub(1).map(|before| &mut self.cleared[before]) {
            Some(before) if before.end() == run.first && before.version == run.version => before.count += run.count,
            _ => self.cleared.insert(at, run),
        }
    }

    fn version(&self, packed: u64) -> Version {
        Version::new(self.epochs[(packed & 0xffff) as usize], packed >> 16)
    }

    fn unpack(&self, packed: Packed) -> Found {
        let (version, checksum) = (self.version(packed.version), packed.checksum);
        Found::Data(Entry { position: Position(packed.position), checksum, version })
    }

    fn pack(&mut self, version: Version) -> u64 {
        self.highest = self.highest.max(version);
        // Backwards: the newest epoch is the likely one.
        let slot = self.epochs.iter().rposition(|epoch| *epoch == version.epoch).unwrap_or_else(|| {
            if self.epochs.len() > usize::from(u16::MAX) {
                self.forget_unused_epochs();
            }
            self.epochs.push(version.epoch);
            self.epochs.len() - 1
        });
        version.sequence << 16 | slot as u64
    }

    /// An extent has far fewer blocks than a slot has values, so afterwards there is room.
    fn forget_unused_epochs(&mut self) {
        let old = std::mem::take(&mut self.epochs);
        let mut kept: Vec<Epoch> = Vec::new();
        let mut renumber = |packed: &mut u64| {
            let epoch = old[(*packed & 0xffff) as usize];
            let slot = kept.iter().position(|other| *other == epoch).unwrap_or_else(|| {
                kept.push(epoch);
                kept.len() - 1
            });
            *packed = (*packed & !0xffff) | slot as u64;
        };
        let entries: &mut [Packed] = match &mut self.entries {
            Entries::Sparse(_, packed) => packed,
            Entries::Dense(array) => array,
        };
        entries.iter_mut().filter(|entry| entry.position != NOWHERE).for_each(|entry| renumber(&mut entry.version));
        self.cleared.iter_mut().for_each(|run| renumber(&mut run.version));
        self.epochs = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn entry(position: u32, epoch: u32, sequence: u64) -> Entry {
        Entry {
            position: Position(position),
            checksum: position ^ 0xffff,
            version: Version::new(Epoch(epoch), sequence),
        }
    }

    #[test]
    fn a_page_that_fills_up_answers_as_before() {
        let mut page = Page::default();
        for block in (0..1024u16).rev() {
            page.put(block, entry(u32::from(block) + 1, 1, u64::from(block)));
        }
        assert!(matches!(page.entries, Entries::Dense(_)));
        for block in 0..1024u16 {
            assert_eq!(page.get(block), Found::Data(entry(u32::from(block) + 1, 1, u64::from(block))));
        }
        assert_eq!(page.highest(), Version::new(Epoch(1), 1023));
    }

    #[test]
    fn more_epochs_than_slots_are_survived() {
        let mut page = Page::default();
        page.put(7, entry(9, 0, 1));
        for epoch in 0..70_000 {
            page.put(0, entry(1, epoch, 5));
        }
        assert_eq!(page.get(0), Found::Data(entry(1, 69_999, 5)));
        assert_eq!(page.get(7), Found::Data(entry(9, 0, 1)));
    }

    proptest::proptest! {
        #[test]
        fn a_page_is_a_map_of_versions(steps in proptest::collection::vec((0u8..3, 0u16..60, 1u16..20, 1u64..50), 1..60)) {
            let (mut page, mut model) = (Page::default(), BTreeMap::<u16, Found>::new());
            for (kind, first, count, sequence) in steps {
                let version = Version::new(Epoch(1), sequence);
                let mut hidden = Vec::new();
                match kind {
                    0 => {
                        page.put(first, entry(u32::from(count), 1, sequence));
                        model.insert(first, Found::Data(entry(u32::from(count), 1, sequence)));
                    }
                    1 => {
                        page.clear(first, count, version, &mut |block, found| hidden.push((block, found)));
                        for block in first..first + count {
                            let before = model.get(&block).copied().unwrap_or(Found::Never);
                            if before.version() <= version {
                                if matches!(before, Found::Data(_)) {
                                    assert!(hidden.contains(&(block, before)));
                                }
                                model.insert(block, Found::Cleared(version));
                            }
                        }
                    }
                    _ => {
                        page.forget_below(version, &mut |block, found| hidden.push((block, found)));
                        for (block, found) in &model {
                            let data = matches!(found, Found::Data(_)) && found.version() <= version;
                            assert_eq!(data, hidden.contains(&(*block, *found)));
                        }
                        model.retain(|_, found| found.version() > version);
                    }
                }
                for block in 0..100 {
                    assert_eq!(page.get(block), model.get(&block).copied().unwrap_or(Found::Never));
                }
                assert_eq!(page.is_empty(), model.is_empty());
            }
        }
    }
}
