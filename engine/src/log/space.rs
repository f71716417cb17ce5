//! Which segment is used for what, and how much of it is still needed.
//!
//! ```text
//!       opening made           batches         full             footer written      nothing needed
//!  Free ───────────► Prepared ────────► Open ────────► Sealing ───────────► Sealed ───────────► Emptied
//!    ▲                                                                                             │
//!    └──────────────────── a sync that started later is done, nobody reads from it ────────────────┘
//! ```
//! Emptied is not Free: what made the last of its records superfluous (a newer record, a copy by the cleaner) has to be
//! durable before its place is taken, or a crash would lose both.
//!
//! Needed are: *live* blocks (current in the index, or superseded at a version above the volume's F), and *notes*, the
//! records without payload.

use super::{Geometry, Position, SegmentIndex};
use torus_schema::limits::{BLOCK_BYTES, RESERVE_PERCENT};

/// Segments that only the cleaner may start on: it needs one at most to free one.
pub const CLEANER_SEGMENTS: u32 = 1;
/// With this many free or fewer no client data is taken, but clears, opens and drops still are, since they free space.
pub const NOTE_SEGMENTS: u32 = 2;
/// The reserve at least, in segments: the two above, the open one, and one being sealed.
pub const RESERVE_SEGMENTS_MIN: u32 = 4;

/// How a victim is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    /// The fewest needed blocks.
    Greedy,
    CostBenefit,
}

/// Counts syncs of one run of a shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct SyncNumber(pub u64);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Usage {
    Free,
    /// As good as free, but its opening names its next use.
    Prepared,
    Open,
    Sealing,
    Sealed,
    Emptied {
        needs: SyncNumber,
    },
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    usage: Usage,
    live: u32,
    note_bytes: u64,
    readers: u32,
    /// Cleaning it failed: it holds something that cannot be read.
    stuck: bool,
    /// Of the opening that stands on the disk, also of a free segment; `None`: it was never used.
    sequence: Option<u64>,
    /// When the youngest of its blocks was written, as the sequence of the segment it was first written to.
    changed: u64,
}

pub struct Space {
    geometry: Geometry,
    segments: Vec<Segment>,
    free: u32,
    live: u64,
    note_bytes: u64,
    /// What fits into one segment at least.
    payload_blocks: u32,
    sync_started: SyncNumber,
    sync_completed: SyncNumber,
    /// The highest sequence of an opening.
    last_sequence: u64,
}

impl Space {
    pub fn new(geometry: Geometry) -> Self {
        let segment = Segment {
            usage: Usage::Free,
            live: 0,
            note_bytes: 0,
            readers: 0,
            stuck: false,
            sequence: None,
            changed: 0,
        };
        Self {
            geometry,
            segments: vec![segment; geometry.segments as usize],
            free: geometry.segments,
            live: 0,
            note_bytes: 0,
            payload_blocks: geometry.payload_blocks(),
            sync_started: SyncNumber(0),
            sync_completed: SyncNumber(0),
            last_sequence: 0,
        }
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub fn free(&self) -> u32 {
        self.free
    }

    /// Blocks that are needed.
    pub fn live(&self) -> u64 {
        self.live
    }

    fn reserve(&self) -> u32 {
        RESERVE_SEGMENTS_MIN.max((u64::from(self.geometry.segments) * RESERVE_PERCENT).div_ceil(100) as u32)
    }

    /// The cleaner works while fewer are free. Not the whole reserve: the longer it waits, the less there is to copy.
    /// One in a hundred and twenty-eight is what a burst may take while one segment is cleaned.
    pub fn wants_cleaning(&self) -> bool {
        self.free < self.cleaning_start()
    }

    fn cleaning_start(&self) -> u32 {
        RESERVE_SEGMENTS_MIN.max(self.geometry.segments / 128)
    }

    /// What is needed eats the reserve: clients should stop. One sixteenth stays for what cleaning cannot squeeze out.
    pub fn is_full(&self) -> bool {
        let segments = u64::from(self.geometry.segments.saturating_sub(self.reserve()));
        let capacity = segments * u64::from(self.payload_blocks - self.payload_blocks / 16);
        self.live + note_blocks(self.note_bytes) > capacity
    }

    /// The free segment to write to next: the one whose remainder is oldest, since notes are kept as long as what they
    /// are about may stand anywhere; a new one only if there is no other, so that the disk fills from its start. It is
    /// counted as free until it is begun.
    pub fn prepare_one(&mut self) -> Option<SegmentIndex> {
        let free = (0u32..).zip(&self.segments).filter(|(_, segment)| segment.usage == Usage::Free);
        let (at, _) = free.min_by_key(|(_, segment)| (segment.sequence.is_none(), segment.sequence))?;
        self.segments[at as usize].usage = Usage::Prepared;
        Some(SegmentIndex(at))
    }

    /// From now on batches go there. Its opening is durable: nothing it held before can be found any more.
    pub fn begin(&mut self, segment: SegmentIndex, sequence: u64) {
        self.last_sequence = self.last_sequence.max(sequence);
        let entry = self.at(segment);
        assert_eq!(entry.usage, Usage::Prepared);
        entry.usage = Usage::Open;
        entry.sequence = Some(sequence);
        entry.changed = 0;
        self.free -= 1;
    }

    /// At a start: it holds records. `sealed` follows when all records of all segments are accounted for; until then
    /// it is not known to be empty.
    pub fn found(&mut self, segment: SegmentIndex, sequence: u64) {
        self.last_sequence = self.last_sequence.max(sequence);
        let entry = self.at(segment);
        assert_eq!(entry.usage, Usage::Free);
        entry.usage = Usage::Sealing;
        entry.sequence = Some(sequence);
        self.free -= 1;
    }

    /// Of all openings that stand on the disk: what was only ever in segments opened before it is nowhere any more.
    pub fn lowest_sequence(&self) -> Option<u64> {
        self.segments.iter().filter_map(|segment| segment.sequence).min()
    }

    pub fn sealing(&mut self, segment: SegmentIndex) {
        assert_eq!(self.at(segment).usage, Usage::Open);
        self.at(segment).usage = Usage::Sealing;
    }

    pub fn sealed(&mut self, segment: SegmentIndex) {
        assert_eq!(self.at(segment).usage, Usage::Sealing);
        self.at(segment).usage = Usage::Sealed;
        self.look_at(segment);
    }

    pub fn add_live(&mut self, position: Position) {
        self.add_live_run(position, 1);
    }

    /// So many blocks from `first` on, within one segment.
    pub fn add_live_run(&mut self, first: Position, count: u32) {
        let segment = self.geometry.segment_of(first);
        let entry = self.at(segment);
        assert!(!matches!(entry.usage, Usage::Free | Usage::Emptied { .. }), "{segment:?} is {:?}", entry.usage);
        entry.live += count;
        entry.changed = entry.changed.max(entry.sequence.unwrap_or_default());
        self.live += u64::from(count);
    }

    /// A copy is as old as what it is a copy of.
    pub fn add_moved(&mut self, from: Position, to: Position) {
        let from = self.geometry.segment_of(from);
        let changed = self.at(from).changed;
        let segment = self.geometry.segment_of(to);
        let entry = self.at(segment);
        assert!(!matches!(entry.usage, Usage::Free | Usage::Emptied { .. }), "{segment:?} is {:?}", entry.usage);
        entry.live += 1;
        entry.changed = entry.changed.max(changed);
        self.live += 1;
    }

    pub fn remove_live(&mut self, position: Position) {
        let segment = self.geometry.segment_of(position);
        self.at(segment).live -= 1;
        self.at(segment).stuck = false;
        self.live -= 1;
        self.look_at(segment);
    }

    pub fn add_note(&mut self, segment: SegmentIndex, bytes: usize) {
        self.at(segment).note_bytes += bytes as u64;
        self.note_bytes += bytes as u64;
    }

    pub fn remove_note(&mut self, segment: SegmentIndex, bytes: usize) {
        self.at(segment).note_bytes -= bytes as u64;
        self.note_bytes -= bytes as u64;
        self.look_at(segment);
    }

    /// All its notes were carried elsewhere or are superfluous.
    pub fn forget_notes(&mut self, segment: SegmentIndex) {
        self.note_bytes -= self.at(segment).note_bytes;
        self.at(segment).note_bytes = 0;
        self.look_at(segment);
    }

    pub fn add_reader(&mut self, segment: SegmentIndex) {
        self.at(segment).readers += 1;
    }

    pub fn remove_reader(&mut self, segment: SegmentIndex) {
        self.at(segment).readers -= 1;
        self.reclaim(segment);
    }

    pub fn set_stuck(&mut self, segment: SegmentIndex) {
        self.at(segment).stuck = true;
    }

    /// What could not be read in it can be.
    pub fn unstick(&mut self, segment: SegmentIndex) {
        self.at(segment).stuck = false;
    }

    pub fn sync_started(&mut self, number: SyncNumber) {
        self.sync_started = number;
    }

    pub fn sync_completed(&mut self, number: SyncNumber) {
        self.sync_completed = number;
        (0..self.geometry.segments).map(SegmentIndex).for_each(|segment| self.reclaim(segment));
    }

    /// There is a segment that only a sync keeps from being free.
    pub fn sync_would_free(&self) -> bool {
        let waits = |segment: &Segment| {
            matches!(segment.usage, Usage::Emptied { needs } if needs > self.sync_completed) && segment.readers == 0
        };
        self.segments.iter().any(waits)
    }

    /// There is a segment that only a reader keeps from being free.
    pub fn reader_holds_one(&self) -> bool {
        self.segments.iter().any(|segment| matches!(segment.usage, Usage::Emptied { .. }) && segment.readers > 0)
    }

    /// The one to clean next, if cleaning it gains anything. In need the one that gives most, and a smaller gain will do.
    pub fn victim(&self) -> Option<SegmentIndex> {
        self.victim_by(if self.free <= NOTE_SEGMENTS { Choice::Greedy } else { Choice::CostBenefit })
    }

    pub fn victim_by(&self, choice: Choice) -> Option<SegmentIndex> {
        let part = if self.free <= NOTE_SEGMENTS { 16 } else { 8 };
        let gain = (self.payload_blocks / part).max(1);
        let now = self.last_sequence;
        // Higher is better. Benefit by cost is (1 - u) × age / (1 + u): reading all of it and writing u of it gives
        // 1 - u, which stays given back the longer, the longer what is left has not changed.
        let merit = |segment: &Segment| {
            let (room, cost) = (u64::from(self.payload_blocks), self.cost(segment));
            let age = match choice {
                Choice::Greedy => 1,
                Choice::CostBenefit => (now + 1).saturating_sub(segment.changed).max(1),
            };
            ((u128::from(room - cost) * u128::from(age)) << 32) / u128::from(room + cost)
        };
        (0u32..)
            .zip(&self.segments)
            .filter(|(_, segment)| segment.usage == Usage::Sealed && !segment.stuck)
            .filter(|(_, segment)| self.cost(segment) + u64::from(gain) <= u64::from(self.payload_blocks))
            .max_by_key(|(at, segment)| (merit(segment), std::cmp::Reverse(*at)))
            .map(|(at, _)| SegmentIndex(at))
    }

    /// Blocks that cleaning it would write.
    fn cost(&self, segment: &Segment) -> u64 {
        u64::from(segment.live) + note_blocks(segment.note_bytes)
    }

    /// Blocks of data and bytes of notes in it that are needed.
    pub fn needed(&self, segment: SegmentIndex) -> (u32, u64) {
        let segment = &self.segments[segment.0 as usize];
        (segment.live, segment.note_bytes)
    }

    pub fn usage(&self, segment: SegmentIndex) -> Usage {
        self.segments[segment.0 as usize].usage
    }

    /// Of the opening that stands there.
    pub fn sequence(&self, segment: SegmentIndex) -> Option<u64> {
        self.segments[segment.0 as usize].sequence
    }

    fn at(&mut self, segment: SegmentIndex) -> &mut Segment {
        &mut self.segments[segment.0 as usize]
    }

    /// After something was taken from it.
    fn look_at(&mut self, segment: SegmentIndex) {
        let needs = SyncNumber(self.sync_started.0 + 1);
        let entry = self.at(segment);
        if entry.usage == Usage::Sealed && entry.live == 0 && entry.note_bytes == 0 {
            entry.usage = Usage::Emptied { needs };
        }
    }

    fn reclaim(&mut self, segment: SegmentIndex) {
        let completed = self.sync_completed;
        let entry = self.at(segment);
        if matches!(entry.usage, Usage::Emptied { needs } if needs <= completed) && entry.readers == 0 {
            entry.usage = Usage::Free;
            entry.stuck = false;
            self.free += 1;
        }
    }
}

/// A note stands in a batch header and in the footer.
fn note_blocks(bytes: u64) -> u64 {
    (2 * bytes).div_ceil(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Space {
        Space::new(Geometry { segments: 8, blocks: 64 })
    }

    #[test]
    fn an_emptied_segment_is_free_only_after_a_sync_that_started_later_and_without_readers() {
        let mut space = space();
        let segment = space.prepare_one().unwrap();
        space.begin(segment, 1);
        let position = space.geometry().first(segment);
        space.add_live(position);
        space.sealing(segment);
        space.sealed(segment);
        space.sync_started(SyncNumber(1));
        space.add_reader(segment);
        space.remove_live(position);
        assert!(matches!(space.usage(segment), Usage::Emptied { .. }));
        space.sync_completed(SyncNumber(1));
        assert!(matches!(space.usage(segment), Usage::Emptied { .. }), "the sync had started before");
        space.sync_started(SyncNumber(2));
        space.sync_completed(SyncNumber(2));
        assert!(matches!(space.usage(segment), Usage::Emptied { .. }), "it is being read");
        space.remove_reader(segment);
        assert_eq!((space.usage(segment), space.free()), (Usage::Free, 8));
    }

    #[test]
    fn the_victim_is_the_sealed_segment_with_the_fewest_needed_blocks() {
        let mut space = space();
        for live in [20, 5, 9] {
            let segment = space.prepare_one().unwrap();
            space.begin(segment, 1);
            (0..live).for_each(|block| space.add_live(Position(space.geometry().first(segment).0 + block)));
            if live != 5 {
                space.sealing(segment);
                space.sealed(segment);
            }
        }
        assert_eq!(space.victim(), Some(SegmentIndex(2)));
        space.set_stuck(SegmentIndex(2));
        assert_eq!(space.victim(), Some(SegmentIndex(0)));
    }

    #[test]
    fn a_segment_holds_at_least_what_is_counted_on() {
        for blocks in [16, 64, 256, 16384] {
            let fits = Geometry { segments: 8, blocks }.payload_blocks();
            assert!(fits * 10 >= blocks * 6 && fits < blocks, "{fits} of {blocks}");
        }
    }
}
