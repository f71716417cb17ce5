//! A few blocks of an extent, each known by itself: what a page is while it holds little, and what it is taken apart
//! into whenever it changes its form.

use crate::index::{Entry, Found};
use crate::log::Position;
use torus_schema::ids::{Epoch, Version};
use torus_schema::limits::{BLOCKS_PER_EXTENT, SEQUENCE_MAX};

/// A block's place in its extent.
pub type InExtent = u16;

/// Position 0 is the superblock, so no data lies there.
pub const NOWHERE: u32 = 0;

/// One block with data, or some that were cleared at one version. 22 bytes, so that a page of one block lies in the
/// slab and nowhere else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, packed(2))]
pub struct Span {
    pub first: InExtent,
    pub count: u16,
    epoch: u32,
    sequence_low: u32,
    sequence_high: u16,
    /// NOWHERE: cleared.
    position: u32,
    checksum: u32,
}

const _: () = assert!(size_of::<Span>() == 22);
const _: () = assert!(BLOCKS_PER_EXTENT < u16::MAX as u64);
const _: () = assert!(SEQUENCE_MAX < 1 << 48);

impl Span {
    pub fn data(block: InExtent, entry: Entry) -> Self {
        assert_ne!(entry.position.0, NOWHERE, "block {block}: no data lies in the superblock");
        Self { position: entry.position.0, checksum: entry.checksum, ..Self::cleared(block, 1, entry.version) }
    }

    pub fn cleared(first: InExtent, count: u16, version: Version) -> Self {
        let (sequence_low, sequence_high) = (version.sequence as u32, (version.sequence >> 32) as u16);
        Self { first, count, epoch: version.epoch.0, sequence_low, sequence_high, position: NOWHERE, checksum: 0 }
    }

    pub fn end(&self) -> InExtent {
        self.first + self.count
    }

    pub fn is_data(&self) -> bool {
        self.position != NOWHERE
    }

    pub fn version(&self) -> Version {
        let sequence = u64::from(self.sequence_high) << 32 | u64::from(self.sequence_low);
        Version { epoch: Epoch(self.epoch), sequence }
    }

    pub fn entry(&self) -> Option<Entry> {
        let entry = Entry { position: Position(self.position), checksum: self.checksum, version: self.version() };
        self.is_data().then_some(entry)
    }

    pub fn found(&self) -> Found {
        self.entry().map_or_else(|| Found::Cleared(self.version()), Found::Data)
    }
}

/// The span that holds the block; `spans` are sorted and apart from each other.
pub fn at(spans: &[Span], block: InExtent) -> Option<&Span> {
    let behind = spans.partition_point(|span| span.first <= block);
    spans[..behind].last().filter(|span| block < span.end())
}

/// No span holds one of the blocks first..end.
pub fn is_free(spans: &[Span], first: InExtent, end: InExtent) -> bool {
    let at = spans.partition_point(|span| span.end() <= first);
    spans.get(at).is_none_or(|span| span.first >= end)
}

/// Cuts the blocks first..end out.
pub fn cut(spans: &mut Vec<Span>, first: InExtent, end: InExtent) {
    let from = spans.partition_point(|span| span.end() <= first);
    let to = spans.partition_point(|span| span.first < end);
    if from >= to {
        return;
    }
    let (left, right) = (spans[from], spans[to - 1]);
    let left = (left.first < first).then(|| Span { count: first - left.first, ..left });
    let right = (right.end() > end).then(|| Span { first: end, count: right.end() - end, ..right });
    if to - from == 1 && left.is_some() && right.is_some() {
        spans.reserve_exact(1);
    }
    spans.splice(from..to, left.into_iter().chain(right));
}

/// Puts a span where others may be: it takes their place. Neighbours that were cleared at one version become one.
pub fn put(spans: &mut Vec<Span>, span: Span) {
    cut(spans, span.first, span.end());
    let at = spans.partition_point(|other| other.first < span.first);
    match spans[..at].last_mut() {
        Some(before) if joins(before, &span) => before.count += span.count,
        _ => {
            spans.reserve_exact(1);
            spans.insert(at, span);
        }
    }
}

fn joins(before: &Span, span: &Span) -> bool {
    !before.is_data() && !span.is_data() && before.end() == span.first && before.version() == span.version()
}
