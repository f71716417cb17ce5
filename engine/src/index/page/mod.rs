//! Where the newest version of each block of one extent lies.
//!
//! | form   | holds                                    | for                                                            |
//! |--------|------------------------------------------|----------------------------------------------------------------|
//! | one    | a span, within the slab                  | scattered writes: nothing else is allocated                    |
//! | few    | spans, sorted, 22 bytes each             | up to 32 of them                                               |
//! | packed | 13 bytes a block, a bit for each that is | more, written in no order                                      |
//! | runs   | 16 bytes a run, 4 a block                | more, where positions and versions go on in equal steps        |
//!
//! A page changes its form by being taken apart into spans and built again. When it does is decided where it is put to,
//! so that how much memory it takes follows from what it holds, and not from how it came to. Cleared blocks are spans
//! in every form. Nothing in a page points outside of it.

mod column;
mod packed;
mod runs;
mod span;
#[cfg(test)]
mod tests;

use super::{Entry, Found};
use crate::log::Position;
use column::{Code, Eras, Stored};
use packed::{PACKED_BYTES, PackedColumns};
use runs::{CHECKSUM_BYTES, RUN_BYTES, RunColumns, RunCounter};
pub use span::{InExtent, NOWHERE, Span};
use torus_schema::ids::Version;
use torus_schema::limits::BLOCKS_PER_EXTENT;

/// More spans become columns: from here on those are smaller, and quicker to change.
const FEW_MAX: usize = 32;
/// Fewer become spans again; apart from FEW_MAX, so that a page on the border does not go back and forth.
const LARGE_MIN: usize = FEW_MAX / 2;
/// After so many changes a packed page is looked at: it may have become runs. Costs some nanoseconds a change.
const CHANGES_UNTIL_LOOK: u16 = 256;
/// Clearing more than that rebuilds the page instead of changing it block by block.
const CLEARED_ONE_BY_ONE_MAX: u16 = 32;

/// Data of a page with many blocks.
pub trait Columns {
    fn get(&self, block: InExtent) -> Option<Stored>;
    fn set(&mut self, block: InExtent, stored: Stored);
    /// Blocks of one version at consecutive positions, none of which is there.
    fn set_run(&mut self, first: InExtent, position: u32, code: Code, checksums: &[u32]);
    fn remove(&mut self, block: InExtent);
    fn is_free(&self, first: InExtent, count: u16) -> bool;
    fn blocks(&self) -> usize;
    fn heap_bytes(&self) -> usize;
    fn for_each(&self, each: impl FnMut(InExtent, Stored));
}

pub struct Large<C> {
    columns: C,
    eras: Eras,
    /// Sorted, apart from each other and from every block of the columns.
    cleared: Vec<Span>,
    highest: Version,
    /// Since the form was chosen or looked at.
    changes: u16,
    was_full: bool,
}

#[derive(Default)]
pub enum Page {
    #[default]
    Empty,
    One(Span),
    Few(Box<[Span]>),
    Packed(Box<Large<PackedColumns>>),
    Runs(Box<Large<RunColumns>>),
}

// With the extent's number 32 bytes in the slab: what is left for one block after the hash table took its share.
const _: () = assert!(size_of::<Page>() == 24);

impl<C: Columns> Large<C> {
    fn new(columns: C, eras: Eras, cleared: Vec<Span>, highest: Version) -> Box<Self> {
        Box::new(Self { columns, eras, cleared, highest, changes: 0, was_full: false })
    }

    fn get(&self, block: InExtent) -> Found {
        match self.columns.get(block) {
            Some(stored) => Found::Data(self.eras.entry(stored)),
            None => span::at(&self.cleared, block).map_or(Found::Never, Span::found),
        }
    }

    fn put(&mut self, block: InExtent, entry: Entry) {
        assert_ne!(entry.position.0, span::NOWHERE, "block {block}: no data lies in the superblock");
        if !self.cleared.is_empty() {
            span::cut(&mut self.cleared, block, block + 1);
            column::shrink(&mut self.cleared);
        }
        let stored = self.eras.store(entry);
        self.columns.set(block, stored);
        self.highest = self.highest.max(entry.version);
        self.changes += 1;
    }

    fn put_run(&mut self, first: InExtent, entry: Entry, checksums: &[u32]) {
        let code = self.eras.code(entry.version);
        self.columns.set_run(first, entry.position.0, code, checksums);
        self.highest = self.highest.max(entry.version);
        self.changes = self.changes.saturating_add(checksums.len() as u16);
    }

    fn put_cleared(&mut self, cleared: Span) {
        (cleared.first..cleared.end()).for_each(|block| self.columns.remove(block));
        span::put(&mut self.cleared, cleared);
        self.highest = self.highest.max(cleared.version());
    }

    fn is_free(&self, first: InExtent, count: u16) -> bool {
        span::is_free(&self.cleared, first, first + count) && self.columns.is_free(first, count)
    }

    fn spans(&self) -> Vec<Span> {
        let mut spans = Vec::with_capacity(self.columns.blocks() + self.cleared.len() + 1);
        self.columns.for_each(|block, stored| spans.push(Span::data(block, self.eras.entry(stored))));
        if !self.cleared.is_empty() {
            spans.extend_from_slice(&self.cleared);
            spans.sort_unstable_by_key(|span| span.first);
        }
        spans
    }

    fn is_small(&self) -> bool {
        self.columns.blocks() + self.cleared.len() < LARGE_MIN
    }

    fn heap_bytes(&self) -> usize {
        let lists = self.eras.heap_bytes() + column::heap_bytes(&self.cleared);
        size_of::<Self>() + lists + self.columns.heap_bytes()
    }
}

impl Page {
    /// No version in the page is above it.
    pub fn highest(&self) -> Version {
        match self {
            Page::Packed(page) => page.highest,
            Page::Runs(page) => page.highest,
            small => small.few().iter().map(Span::version).max().unwrap_or(Version::ZERO),
        }
    }

    pub fn is_empty(&self) -> bool {
        matches!(self, Page::Empty)
    }

    /// Beside its place in the slab, in bytes as they were asked for.
    pub fn heap_bytes(&self) -> usize {
        match self {
            Page::Empty | Page::One(_) => 0,
            Page::Few(spans) => size_of_val(&**spans),
            Page::Packed(page) => page.heap_bytes(),
            Page::Runs(page) => page.heap_bytes(),
        }
    }

    pub fn get(&self, block: InExtent) -> Found {
        match self {
            Page::Packed(page) => page.get(block),
            Page::Runs(page) => page.get(block),
            small => span::at(small.few(), block).map_or(Found::Never, Span::found),
        }
    }

    /// Nothing is known of any of these blocks.
    pub fn is_free(&self, first: InExtent, count: u16) -> bool {
        match self {
            Page::Packed(page) => page.is_free(first, count),
            Page::Runs(page) => page.is_free(first, count),
            small => span::is_free(small.few(), first, first + count),
        }
    }

    /// Puts data; what was there is forgotten, whatever its version: the caller has compared.
    pub fn put(&mut self, block: InExtent, entry: Entry) {
        match self {
            Page::Packed(page) => page.put(block, entry),
            Page::Runs(page) => page.put(block, entry),
            _ => self.edit_few(|spans| span::put(spans, Span::data(block, entry))),
        }
        self.reconsider();
    }

    /// Puts blocks of one version, the first of which is `entry`, at consecutive positions, where nothing was before.
    pub fn put_run(&mut self, first: InExtent, entry: Entry, checksums: &[u32]) {
        debug_assert!(self.is_free(first, checksums.len() as u16));
        match self {
            Page::Packed(page) => page.put_run(first, entry, checksums),
            Page::Runs(page) => page.put_run(first, entry, checksums),
            _ => self.edit_few(|spans| {
                let at = spans.partition_point(|span| span.first < first);
                let numbered = (0u16..).zip(checksums);
                let entries = numbered.map(|(number, checksum)| {
                    let position = Position(entry.position.0 + u32::from(number));
                    Span::data(first + number, Entry { position, checksum: *checksum, ..entry })
                });
                spans.reserve_exact(checksums.len());
                spans.splice(at..at, entries);
            }),
        }
        self.reconsider();
    }

    /// The block has moved, under the same version.
    pub fn relocate(&mut self, block: InExtent, position: Position) {
        let entry = self.get(block).entry().expect("only a block that was found is moved");
        self.put(block, Entry { position, ..entry });
    }

    /// Blocks first..first + count up to `version` become cleared; `replaced` is told of the data this hides.
    pub fn clear(&mut self, first: InExtent, count: u16, version: Version, replaced: &mut impl FnMut(InExtent, Found)) {
        let mut runs: Vec<Span> = Vec::new();
        for block in first..first + count {
            let found = self.get(block);
            if found.version() > version {
                continue;
            }
            if matches!(found, Found::Data(_)) {
                replaced(block, found);
            }
            match runs.last_mut() {
                Some(run) if run.end() == block => run.count += 1,
                _ => runs.push(Span::cleared(block, 1, version)),
            }
        }
        runs.into_iter().for_each(|run| self.put_cleared(run));
        self.reconsider();
    }

    /// Forgets all up to `version`, because something outside the page says so for the whole extent.
    pub fn forget_below(&mut self, version: Version, replaced: &mut impl FnMut(InExtent, Found)) {
        let mut spans = self.spans();
        spans.retain(|span| {
            let forgotten = span.version() <= version;
            if forgotten && span.is_data() {
                replaced(span.first, span.found());
            }
            !forgotten
        });
        *self = Page::build(spans);
    }

    /// Every block with data, in order.
    pub fn for_each_data(&self, mut each: impl FnMut(InExtent, Found)) {
        let stored = |eras: &Eras, stored| Found::Data(eras.entry(stored));
        match self {
            Page::Packed(page) => page.columns.for_each(|block, entry| each(block, stored(&page.eras, entry))),
            Page::Runs(page) => page.columns.for_each(|block, entry| each(block, stored(&page.eras, entry))),
            small => small.few().iter().filter(|span| span.is_data()).for_each(|span| each(span.first, span.found())),
        }
    }

    /// With data.
    pub fn blocks(&self) -> usize {
        match self {
            Page::Packed(page) => page.columns.blocks(),
            Page::Runs(page) => page.columns.blocks(),
            small => small.few().iter().filter(|span| span.is_data()).count(),
        }
    }

    /// Spans of blocks that were cleared.
    pub fn cleared(&self) -> impl Iterator<Item = &Span> {
        let spans = match self {
            Page::Packed(page) => &page.cleared,
            Page::Runs(page) => &page.cleared,
            small => small.few(),
        };
        spans.iter().filter(|span| !span.is_data())
    }

    /// Of a page that is not large.
    fn few(&self) -> &[Span] {
        match self {
            Page::One(span) => std::slice::from_ref(span),
            Page::Few(spans) => spans,
            _ => &[],
        }
    }

    /// Of a page that is not large.
    fn edit_few(&mut self, edit: impl FnOnce(&mut Vec<Span>)) {
        let mut spans = match std::mem::take(self) {
            Page::Few(spans) => spans.into_vec(),
            Page::One(span) => vec![span],
            _ => Vec::new(),
        };
        edit(&mut spans);
        *self = Page::build(spans);
    }

    fn put_cleared(&mut self, cleared: Span) {
        match self {
            Page::Packed(page) if cleared.count <= CLEARED_ONE_BY_ONE_MAX => page.put_cleared(cleared),
            Page::Runs(page) if cleared.count <= CLEARED_ONE_BY_ONE_MAX => page.put_cleared(cleared),
            page => {
                let mut spans = page.spans();
                span::put(&mut spans, cleared);
                *page = Page::build(spans);
            }
        }
    }

    fn spans(&self) -> Vec<Span> {
        match self {
            Page::Packed(page) => page.spans(),
            Page::Runs(page) => page.spans(),
            small => small.few().to_vec(),
        }
    }

    /// Whether the form still suits what the page has come to hold.
    fn reconsider(&mut self) {
        let unsuited = match self {
            Page::Empty | Page::One(_) | Page::Few(_) => false,
            Page::Packed(page) => {
                let blocks = page.columns.blocks();
                let is_full = blocks == BLOCKS_PER_EXTENT as usize;
                let became_full = is_full && !page.was_full;
                page.was_full = is_full;
                let look = page.changes >= CHANGES_UNTIL_LOOK || became_full;
                page.eras.is_crowded() || page.is_small() || (look && page.would_be_runs())
            }
            Page::Runs(page) => {
                let (blocks, runs) = (page.columns.blocks(), page.columns.runs());
                page.eras.is_crowded() || page.is_small() || runs_bytes(blocks, runs) > packed_bytes(blocks)
            }
        };
        if unsuited {
            *self = Page::build(self.spans());
        }
    }

    /// The form that suits these, which are sorted and apart from each other.
    fn build(spans: Vec<Span>) -> Page {
        match spans[..] {
            [] => Page::Empty,
            [span] => Page::One(span),
            _ if spans.len() <= FEW_MAX => Page::Few(spans.into_boxed_slice()),
            _ => {
                let cleared = spans.iter().copied().filter(|span| !span.is_data()).collect::<Box<[_]>>().into_vec();
                let data = spans.iter().filter_map(|span| Some((span.first, span.entry()?)));
                Page::build_large(data, spans.len() - cleared.len(), cleared)
            }
        }
    }

    /// The form that suits so many blocks, which are sorted, and the others, which were cleared.
    pub fn of(data: impl Iterator<Item = (InExtent, Entry)>, blocks: usize, cleared: &[Span]) -> Page {
        if blocks + cleared.len() > FEW_MAX {
            return Page::build_large(data, blocks, cleared.into());
        }
        let mut spans: Vec<Span> =
            data.map(|(block, entry)| Span::data(block, entry)).chain(cleared.iter().copied()).collect();
        spans.sort_unstable_by_key(|span| span.first);
        Page::build(spans)
    }

    fn build_large(data: impl Iterator<Item = (InExtent, Entry)>, blocks: usize, cleared: Vec<Span>) -> Page {
        let mut highest = cleared.iter().map(Span::version).max().unwrap_or(Version::ZERO);
        let (mut eras, mut counter, runs_max) = (Eras::default(), RunCounter::default(), runs_max(blocks));
        let mut stored = Vec::with_capacity(blocks);
        for (block, entry) in data {
            highest = highest.max(entry.version);
            let entry = eras.store(entry);
            // One more than may be, and it is decided.
            if counter.runs <= runs_max {
                counter.see(block, entry);
            }
            stored.push((block, entry));
        }
        eras.settle();
        if is_much_smaller_as_runs(blocks, counter.runs) {
            let mut columns = RunColumns::default();
            columns.reserve(blocks, counter.runs);
            stored.into_iter().for_each(|(block, stored)| columns.push(block, stored));
            return Page::Runs(Large::new(columns, eras, cleared, highest));
        }
        let mut columns = PackedColumns::default();
        columns.reserve(stored.iter().map(|(block, _)| *block));
        stored.into_iter().for_each(|(block, stored)| columns.push(block, stored));
        Page::Packed(Large::new(columns, eras, cleared, highest))
    }
}

impl Large<PackedColumns> {
    fn would_be_runs(&mut self) -> bool {
        self.changes = 0;
        let mut counter = RunCounter::default();
        self.columns.for_each(|block, stored| counter.see(block, stored));
        is_much_smaller_as_runs(self.columns.blocks(), counter.runs)
    }
}

fn runs_bytes(blocks: usize, runs: usize) -> usize {
    size_of::<Large<RunColumns>>() + blocks * CHECKSUM_BYTES + runs * RUN_BYTES
}

fn packed_bytes(blocks: usize) -> usize {
    size_of::<Large<PackedColumns>>() + blocks * PACKED_BYTES
}

/// Of so many blocks, or fewer, more runs are never much smaller.
fn runs_max(blocks: usize) -> usize {
    (packed_bytes(blocks) / 4 * 3).saturating_sub(runs_bytes(blocks, 0)) / RUN_BYTES
}

/// Much, so that a page does not go back and forth.
fn is_much_smaller_as_runs(blocks: usize, runs: usize) -> bool {
    runs_bytes(blocks, runs) < packed_bytes(blocks) / 4 * 3
}
