//! Where the newest version of every block lies: a cache of the log, made anew at each start.
//!
//! A table finds a volume's page by its extent, the page its block. The highest version wins, in whatever order
//! records come: one that is lower than what is there does not become current. What loses is handed back to the
//! caller, who accounts for its space.
//!
//! * `table`    the pages of a volume
//! * `page`     the blocks of one extent
//! * `cleared`  whole extents that were cleared
//! * `bulk`     many blocks of one extent at once

pub mod bulk;
pub mod cleared;
mod page;
mod table;

use crate::log::Position;
use cleared::ClearedExtents;
use page::InExtent;
use table::PageTable;
use torus_rpc::message::{Descriptor, Few};
use torus_schema::hash::Map;
use torus_schema::ids::{BlockIndex, ExtentIndex, SliceId, Version, VolumeId};
use torus_schema::limits::BLOCKS_PER_EXTENT;
use torus_schema::ring::placement::Placement;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    pub position: Position,
    pub checksum: u32,
    pub version: Version,
}

/// What is known of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    Never,
    Cleared(Version),
    Data(Entry),
}

impl Found {
    /// Zero where nothing was written.
    pub fn version(&self) -> Version {
        match self {
            Found::Never => Version::ZERO,
            Found::Cleared(version) => *version,
            Found::Data(entry) => entry.version,
        }
    }

    fn entry(&self) -> Option<Entry> {
        if let Found::Data(entry) = self { Some(*entry) } else { None }
    }
}

/// What became of a record of data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Applied {
    /// It is current; what was current lies there, if it lies anywhere.
    Current { replaced: Option<Entry> },
    /// Something newer is current.
    Superseded { by: Version },
}

/// Which of two copies of one version becomes current.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AtTie {
    NewcomerWins,
    StandingWins,
}

#[derive(Default)]
pub struct Index {
    volumes: Map<VolumeId, VolumeIndex>,
}

#[derive(Default)]
struct VolumeIndex {
    pages: PageTable,
    cleared: Map<SliceId, ClearedExtents>,
    /// That have data.
    blocks: u64,
}

/// Consecutive blocks of one record, within one extent: they have one version, and lie one behind the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run<'a> {
    pub first: Place,
    pub version: Version,
    /// Of the first block.
    pub position: Position,
    /// One for each block.
    pub checksums: &'a [u32],
}

impl Run<'_> {
    fn entry(&self, number: usize) -> Entry {
        let position = Position(self.position.0 + number as u32);
        Entry { position, checksum: self.checksums[number], version: self.version }
    }
}

/// A block of a volume, and the slice its extent lies in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub volume: VolumeId,
    pub slice: SliceId,
    pub block: BlockIndex,
}

/// The blocks of first..end that lie in the slice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClearRange {
    pub volume: VolumeId,
    pub slice: SliceId,
    pub first: BlockIndex,
    pub end: BlockIndex,
}

fn in_extent(block: BlockIndex) -> InExtent {
    block.in_extent() as InExtent
}

impl VolumeIndex {
    fn find(&self, slice: SliceId, block: BlockIndex) -> Found {
        let found = self.pages.get(block.extent()).map_or(Found::Never, |page| page.get(in_extent(block)));
        // What a page holds is above its extent's clear, or it would have been forgotten.
        if found != Found::Never {
            return found;
        }
        match self.cleared_version(slice, block.extent()) {
            Version::ZERO => Found::Never,
            version => Found::Cleared(version),
        }
    }

    fn cleared_version(&self, slice: SliceId, extent: ExtentIndex) -> Version {
        self.cleared.get(&slice).map_or(Version::ZERO, |cleared| cleared.version(extent))
    }
}

impl Index {
    pub fn find(&self, place: Place) -> Found {
        self.volumes.get(&place.volume).map_or(Found::Never, |volume| volume.find(place.slice, place.block))
    }

    /// `count` blocks within one extent.
    pub fn find_range(&self, first: Place, count: u32) -> Few<Found> {
        let all = |found| Few::from_elem(found, count as usize);
        let Some(volume) = self.volumes.get(&first.volume) else { return all(Found::Never) };
        let nothing = match volume.cleared_version(first.slice, first.block.extent()) {
            Version::ZERO => Found::Never,
            version => Found::Cleared(version),
        };
        let Some(page) = volume.pages.get(first.block.extent()) else { return all(nothing) };
        let start = in_extent(first.block);
        let found = (start..start + count as InExtent).map(|block| page.get(block));
        found.map(|found| if found == Found::Never { nothing } else { found }).collect()
    }

    /// At an equal version both are copies of the same data, and `at_tie` says which becomes current.
    pub fn apply(&mut self, place: Place, entry: Entry, at_tie: AtTie) -> Applied {
        let (position, version, checksums) = (entry.position, entry.version, &[entry.checksum]);
        let mut applied = Applied::Current { replaced: None };
        self.apply_run(Run { first: place, version, position, checksums }, at_tie, |_, told| applied = told);
        applied
    }

    /// As `apply` for each block in order, in one look for the page. `told` hears of those (by their number in the run)
    /// that do not simply become current where nothing was.
    pub fn apply_run(&mut self, run: Run<'_>, at_tie: AtTie, mut told: impl FnMut(usize, Applied)) {
        let (first, count) = (in_extent(run.first.block), run.checksums.len());
        assert!(usize::from(first) + count <= BLOCKS_PER_EXTENT as usize, "{run:?}: a run lies within one extent");
        let extent = run.first.block.extent();
        let volume = self.volumes.entry(run.first.volume).or_default();
        let cleared = volume.cleared_version(run.first.slice, extent);
        let beaten = |found: Version| found > run.version || (at_tie == AtTie::StandingWins && found == run.version);
        let is_below_clear = cleared != Version::ZERO && beaten(cleared);
        let mut added = 0;
        volume.pages.change(extent, |page| {
            if !is_below_clear && count > 1 && page.is_free(first, count as u16) {
                page.put_run(first, run.entry(0), run.checksums);
                added = count as u64;
                return;
            }
            for number in 0..count {
                let block = first + number as InExtent;
                // What a page holds is above its extent's clear, or it would have been forgotten.
                let found = match page.get(block) {
                    Found::Never if cleared != Version::ZERO => Found::Cleared(cleared),
                    found => found,
                };
                if found != Found::Never && beaten(found.version()) {
                    told(number, Applied::Superseded { by: found.version() });
                    continue;
                }
                page.put(block, run.entry(number));
                let replaced = found.entry();
                match replaced {
                    Some(_) => told(number, Applied::Current { replaced }),
                    None => added += 1,
                }
            }
        });
        volume.blocks += added;
    }

    /// `replaced` is told of each block with data that this hides.
    pub fn clear(
        &mut self,
        range: ClearRange,
        version: Version,
        placement: &Placement,
        mut replaced: impl FnMut(Place, Entry),
    ) {
        // Nobody can ask for such a slice; and whoever looks for its extents in the range would look for ever.
        if !placement.slices().contains(&range.slice) {
            return;
        }
        let volume = self.volumes.entry(range.volume).or_default();
        let mut hidden = 0;
        let mut tell = |extent: ExtentIndex, block: InExtent, found: Found| {
            hidden += 1;
            let block = BlockIndex(extent.first_block().0 + u64::from(block));
            let place = Place { volume: range.volume, slice: range.slice, block };
            found.entry().into_iter().for_each(|entry| replaced(place, entry));
        };
        let (head, whole, tail) = cut(range.first, range.end);
        for (first, count) in [head, tail].into_iter().flatten() {
            let extent = first.extent();
            if placement.slice_of(extent) == range.slice && volume.cleared_version(range.slice, extent) < version {
                let mut hide = |block, found| tell(extent, block, found);
                volume.pages.change(extent, |page| page.clear(in_extent(first), count, version, &mut hide));
            }
        }
        let Some((first, end)) = whole else {
            volume.blocks -= hidden;
            return;
        };
        volume.cleared.entry(range.slice).or_default().insert(first, end, version);
        let inside = |extent: &ExtentIndex| *extent >= first && *extent < end;
        let pages = &volume.pages;
        // Whichever is fewer: the extents of the range, or those that have a page.
        let touched: Vec<ExtentIndex> = if end.0 - first.0 <= pages.len() as u64 {
            (first.0..end.0).map(ExtentIndex).filter(|extent| pages.get(*extent).is_some()).collect()
        } else {
            pages.iter().map(|(extent, _)| extent).filter(inside).collect()
        };
        for extent in touched.into_iter().filter(|extent| placement.slice_of(*extent) == range.slice) {
            let mut hide = |block, found| tell(extent, block, found);
            volume.pages.change(extent, |page| page.forget_below(version, &mut hide));
        }
        volume.blocks -= hidden;
    }

    /// The block's record was copied by the cleaner; false if something newer is current, or it lies elsewhere.
    pub fn relocate(&mut self, place: Place, from: Position, to: Position) -> bool {
        let Some(volume) = self.volumes.get_mut(&place.volume) else { return false };
        volume.pages.change(place.block.extent(), |page| {
            let block = in_extent(place.block);
            let here = page.get(block).entry().is_some_and(|entry| entry.position == from);
            if here {
                page.relocate(block, to);
            }
            here
        })
    }

    /// The block's record of `version` never was: without it, it is as `below` says, or as an older clear of the whole
    /// extent does. `below` is what is current if that is newer.
    pub fn take_back(&mut self, place: Place, version: Version, below: Found) {
        let Some(volume) = self.volumes.get_mut(&place.volume) else { return };
        let (extent, block) = (place.block.extent(), in_extent(place.block));
        let whole = volume.cleared_version(place.slice, extent);
        let was_whole = whole == version;
        let before = volume.find(place.slice, place.block);
        if !was_whole && before == below {
            return;
        }
        if was_whole && let Some(cleared) = volume.cleared.get_mut(&place.slice) {
            cleared.remove(extent);
        }
        volume.blocks -= u64::from(before.entry().is_some());
        let added = volume.pages.change(extent, |page| {
            // Made anew: it is rare, and a page need not know how to forget one block.
            let old = std::mem::take(page);
            for other in (0..BLOCKS_PER_EXTENT as InExtent).filter(|other| *other != block) {
                match old.get(other) {
                    Found::Data(entry) => page.put(other, entry),
                    Found::Cleared(version) => page.clear(other, 1, version, &mut |_, _| {}),
                    Found::Never if was_whole => page.clear(other, 1, whole, &mut |_, _| {}),
                    Found::Never => {}
                }
            }
            match below {
                Found::Data(entry) if was_whole || entry.version > whole => page.put(block, entry),
                Found::Cleared(below) if was_whole || below > whole => page.clear(block, 1, below, &mut |_, _| {}),
                _ => {}
            }
            page.get(block).entry().is_some()
        });
        volume.blocks += u64::from(added);
    }

    /// Every block of the range is current at a version above `version` and at most `limit`. May say no where the
    /// answer would be costly.
    pub fn is_superseded(&self, range: ClearRange, version: Version, limit: Version, placement: &Placement) -> bool {
        let Some(volume) = self.volumes.get(&range.volume) else { return false };
        let superseded = |first: BlockIndex, count: u16| {
            let mut blocks = (first.0..first.0 + u64::from(count)).map(BlockIndex);
            placement.slice_of(first.extent()) != range.slice
                || blocks.all(|block| {
                    let found = volume.find(range.slice, block).version();
                    found > version && found <= limit
                })
        };
        let (head, whole, tail) = cut(range.first, range.end);
        let ends = [head, tail].into_iter().flatten().all(|(first, count)| superseded(first, count));
        let covered = |(first, end): (ExtentIndex, ExtentIndex)| {
            let cleared = volume.cleared.get(&range.slice);
            cleared.is_some_and(|cleared| cleared.covers_above(first, end, version, limit))
                || (end.0 - first.0 == 1 && superseded(first.first_block(), BLOCKS_PER_EXTENT as u16))
        };
        ends && whole.is_none_or(covered)
    }

    /// At most `limit` newest records above `above`, from `from` on, in block order; where to go on, if there is more.
    /// Of one slice, or of all.
    pub fn describe(
        &self,
        volume: VolumeId,
        above: Version,
        from: BlockIndex,
        (placement, slice): (&Placement, Option<SliceId>),
        limit: usize,
    ) -> (Vec<Descriptor>, Option<BlockIndex>) {
        let mut descriptors = Vec::new();
        let Some(volume) = self.volumes.get(&volume) else { return (descriptors, None) };
        let (extents, more) = volume.extents_above(above, from.extent(), (placement, slice), limit + 1);
        let behind = extents.last().filter(|_| more).map(|last| ExtentIndex(last.0 + 1).first_block());
        for extent in extents {
            let slice = placement.slice_of(extent);
            let (start, end) = (from.max(extent.first_block()).0, extent.first_block().0 + BLOCKS_PER_EXTENT);
            if volume.pages.get(extent).is_none() {
                let found = volume.find(slice, BlockIndex(start));
                if !push_descriptor(&mut descriptors, BlockIndex(start), (end - start) as u32, found, limit) {
                    return (descriptors, Some(BlockIndex(start)));
                }
                continue;
            }
            for block in start..end {
                let found = volume.find(slice, BlockIndex(block));
                if found.version() > above && !push_descriptor(&mut descriptors, BlockIndex(block), 1, found, limit) {
                    return (descriptors, Some(BlockIndex(block)));
                }
            }
        }
        (descriptors, behind)
    }

    /// Those in which something was written, ascending.
    pub fn extents_of(&self, volume: VolumeId) -> Vec<ExtentIndex> {
        let pages = self.volumes.get(&volume).into_iter().flat_map(|volume| volume.pages.iter());
        let mut extents: Vec<ExtentIndex> = pages.map(|(extent, _)| extent).collect();
        extents.sort_unstable();
        extents
    }

    /// Tells of every block with data, then forgets the volume.
    pub fn drop_volume(&mut self, volume: VolumeId, mut freed: impl FnMut(Entry)) {
        let Some(index) = self.volumes.remove(&volume) else { return };
        for (_, page) in index.pages.iter() {
            page.for_each_data(|_, found| found.entry().into_iter().for_each(&mut freed));
        }
    }
}

impl Index {
    /// Blocks of the volume with data.
    pub fn blocks_of(&self, volume: VolumeId) -> u64 {
        self.volumes.get(&volume).map_or(0, |volume| volume.blocks)
    }

    /// Blocks with data.
    pub fn blocks(&self) -> u64 {
        self.volumes.values().map(|volume| volume.blocks).sum()
    }

    /// Memory it has asked for: of pages and their tables exactly, of ranges of cleared extents as they usually lie.
    pub fn memory_bytes(&self) -> u64 {
        let per_volume = size_of::<(VolumeId, VolumeIndex)>() + 1;
        let volumes = self.volumes.values().map(VolumeIndex::heap_bytes).sum::<usize>();
        (self.volumes.capacity() * 8 / 7 * per_volume + volumes) as u64
    }
}

impl VolumeIndex {
    fn heap_bytes(&self) -> usize {
        let per_slice = size_of::<(SliceId, ClearedExtents)>() + 1;
        let cleared = self.cleared.values().map(ClearedExtents::heap_bytes).sum::<usize>();
        self.pages.heap_bytes() + self.cleared.capacity() * 8 / 7 * per_slice + cleared
    }

    /// The first `limit` extents from `from` on that may hold a version above `above`, and whether there may be more.
    fn extents_above(
        &self,
        above: Version,
        from: ExtentIndex,
        (placement, slice): (&Placement, Option<SliceId>),
        limit: usize,
    ) -> (Vec<ExtentIndex>, bool) {
        let wanted = |extent: ExtentIndex| slice.is_none_or(|slice| placement.slice_of(extent) == slice);
        let pages = self.pages.iter().filter(|(extent, page)| *extent >= from && page.highest() > above);
        let pages = pages.filter(|(extent, _)| wanted(*extent));
        let mut extents: Vec<ExtentIndex> = pages.map(|(extent, _)| extent).collect();
        for (slice, cleared) in self.cleared.iter().filter(|(of, _)| slice.is_none_or(|slice| slice == **of)) {
            let ranges = cleared.ranges_from(from).filter(|(_, _, version)| *version > above);
            let inside = ranges.flat_map(|(first, end, _)| first.0..end.0).map(ExtentIndex);
            // A range may name as many extents as a volume can have; more than the limit are not needed of any slice.
            extents.extend(inside.filter(|extent| placement.slice_of(*extent) == *slice).take(limit + 1));
        }
        extents.sort_unstable();
        extents.dedup();
        let more = extents.len() > limit;
        extents.truncate(limit);
        (extents, more)
    }
}

/// False if there is no room for it.
fn push_descriptor(
    descriptors: &mut Vec<Descriptor>,
    block: BlockIndex,
    count: u32,
    found: Found,
    limit: usize,
) -> bool {
    let version = found.version();
    let checksum = match found {
        Found::Data(entry) => Some(entry.checksum),
        Found::Cleared(_) | Found::Never => None,
    };
    if let Some(last) = descriptors.last_mut()
        && checksum.is_none()
        && last.checksum.is_none()
        && last.version == version
        && last.first.0 + u64::from(last.count) == block.0
        && last.first.extent() == block.extent()
    {
        last.count += count;
        return true;
    }
    if descriptors.len() >= limit {
        return false;
    }
    descriptors.push(Descriptor { first: block, count, version, checksum });
    true
}

type Blocks = Option<(BlockIndex, u16)>;

/// A range as a part of an extent, whole extents, a part of an extent.
fn cut(first: BlockIndex, end: BlockIndex) -> (Blocks, Option<(ExtentIndex, ExtentIndex)>, Blocks) {
    let part = |first: u64, end: u64| (first < end).then_some((BlockIndex(first), (end - first) as u16));
    let whole_first = ExtentIndex(first.0.div_ceil(BLOCKS_PER_EXTENT));
    let whole_end = end.extent();
    if whole_first > whole_end {
        return (part(first.0, end.0), None, None);
    }
    let whole = (whole_first < whole_end).then_some((whole_first, whole_end));
    (part(first.0, whole_first.first_block().0.min(end.0)), whole, part(whole_end.first_block().0.max(first.0), end.0))
}

#[cfg(test)]
mod tests;
