//! Frames that were sent again, were duplicated or come late: which writes are applied.
//!
//! Linux sends an unanswered write again under a *new* tag (`newtag` in drivers/block/aoe/aoecmd.c): the low 16 bits are
//! the tick at which it was sent, bits 16 to 30 count what is sent to the target. So two writes of one initiator can
//! arrive in the wrong order, and an original can come after its retransmission was answered and after a newer write to
//! the same sectors: applied then, it would take that one back, though it was acknowledged.
//!
//! So of each source the tag is kept that last wrote to each sector, for as long as a frame can live in a segment
//! (`AOE_FRAME_LIFETIME`), and of a write it is asked:
//!
//! | its tag                                                | then |
//! |--------------------------------------------------------|------|
//! | equals one that is under way, with the same sectors     | nothing: that one's answer comes |
//! | equals one that was answered, with the same sectors     | answered again, not applied again |
//! | older than that of an overlapping write                 | nothing: it is an original whose retransmission was taken, or one that is overtaken and will be sent again |
//! | newer, or nothing overlaps                              | applied |
//!
//! *Older*: by the tick first and by the count within one tick, each in serial arithmetic. The count alone is not
//! enough: it comes round in a third of a second at 100,000 frames/s. The ticks come round in 65 s (1000 a second) at
//! the earliest, so 32 s are told apart, more than anything is kept.
//!
//! *Reset*: by time only. An initiator that restarts counts from anew, at another tick: what it writes to sectors that it
//! wrote in its last seconds may be taken for late until those are forgotten; it sends again, for 180 s. Nothing that
//! it sends can be taken for its restart: it asks for the configuration and identifies at other times as well.
//!
//! Tags with bit 31 are those of programs (the Linux driver leaves them to user space); nothing is known of their order, so
//! only equal ones count.
//!
//! A process that becomes a volume's writer knows nothing of what its predecessor took. A frame that is under way to that
//! one's address does not reach another address; the addresses of interfaces are the hosts'. On the same host every
//! process that serves the address takes note of the writes that pass by, owner or not. And whoever becomes the writer,
//! again or for the first time, takes none before he has been it for a frame's lifetime: whatever was sent before, to
//! this address or to another's that answered meanwhile, is gone or known then.

use ahash::RandomState;
use pnet::util::MacAddr;
use std::collections::btree_map::{BTreeMap, Entry};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::Duration;
use torus_schema::limits::{AOE_FRAME_LIFETIME, AOE_SOURCES_MAX, AOE_WRITES_REMEMBERED_MAX};

/// A request's tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(pub u32);

const OF_PROGRAMS: u32 = 1 << 31;
const COUNT_BITS: u32 = 15;

impl Tag {
    fn is_of_program(self) -> bool {
        self.0 & OF_PROGRAMS != 0
    }

    fn is_older_than(self, other: Tag) -> bool {
        if self.is_of_program() {
            return false;
        }
        let ticks = (other.0 as u16).wrapping_sub(self.0 as u16) as i16;
        if ticks != 0 {
            return ticks > 0;
        }
        let counts = (other.0 >> 16).wrapping_sub(self.0 >> 16) & ((1 << COUNT_BITS) - 1);
        counts != 0 && counts < 1 << (COUNT_BITS - 1)
    }
}

/// Bytes of the device that a write covers; of a trim from its first to its last: too much is sent again, no more.
pub type Covered = Range<u64>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Apply,
    /// It was applied and answered: say so again.
    AnswerAgain,
    /// It is being applied: its answer comes.
    UnderWay,
    /// Overtaken by a newer write to the same sectors.
    Late,
    /// There is no room to remember another source; later there is.
    TooManySources,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It was seen, and not taken: by another process, or not yet, or it failed.
    Seen,
    UnderWay,
    Answered,
}

/// The newest write of a range, and when it came.
struct Painted {
    end: u64,
    tag: Tag,
    at: Duration,
}

struct Known {
    covered: Covered,
    tag: Tag,
    at: Duration,
}

/// The writes of one source.
#[derive(Default)]
struct Source {
    /// By the range's first byte; no two overlap.
    painted: BTreeMap<u64, Painted>,
    /// By age, so that they are forgotten in turn.
    known: VecDeque<Known>,
    fates: HashMap<Tag, (Covered, Fate, Duration), RandomState>,
    /// Newest of those that were forgotten before their time: nothing older is taken.
    floor: Option<(Tag, Duration)>,
}

/// Of one target. Times are those of the executor while it was running: what waited in a socket while the process was
/// stopped has not been seen.
#[derive(Default)]
pub struct History {
    sources: HashMap<(MacAddr, bool), Source, RandomState>,
}

impl History {
    /// Decides on a write, and remembers it if it is to be applied.
    pub fn admit(&mut self, now: Duration, from: MacAddr, tag: Tag, covered: &Covered) -> Verdict {
        let Some(source) = self.source(now, from, tag) else { return Verdict::TooManySources };
        match source.fates.get(&tag) {
            Some((same, Fate::Answered, _)) if same == covered => return Verdict::AnswerAgain,
            Some((same, Fate::UnderWay, _)) if same == covered => return Verdict::UnderWay,
            _ => {}
        }
        if source.is_late(tag, covered) {
            return Verdict::Late;
        }
        source.remember(now, tag, covered, Fate::UnderWay);
        Verdict::Apply
    }

    /// A write that is not taken here: what is older must not be taken after it.
    pub fn note(&mut self, now: Duration, from: MacAddr, tag: Tag, covered: &Covered) {
        if let Some(source) = self.source(now, from, tag)
            && !source.is_late(tag, covered)
        {
            source.remember(now, tag, covered, Fate::Seen);
        }
    }

    /// What came of an admitted write: one that failed may be tried again under the same tag.
    pub fn ended(&mut self, from: MacAddr, tag: Tag, covered: &Covered, applied: bool) {
        let source = self.sources.get_mut(&(from, tag.is_of_program()));
        // Another write may have the same tag by now.
        if let Some((same, fate, _)) = source.and_then(|source| source.fates.get_mut(&tag))
            && same == covered
        {
            *fate = if applied { Fate::Answered } else { Fate::Seen };
        }
    }

    fn source(&mut self, now: Duration, from: MacAddr, tag: Tag) -> Option<&mut Source> {
        let key = (from, tag.is_of_program());
        if !self.sources.contains_key(&key) && self.sources.len() >= AOE_SOURCES_MAX {
            self.sources.values_mut().for_each(|source| source.forget(now));
            self.sources.retain(|_, source| !source.known.is_empty() || source.floor.is_some());
            if self.sources.len() >= AOE_SOURCES_MAX {
                return None;
            }
        }
        let source = self.sources.entry(key).or_default();
        source.forget(now);
        Some(source)
    }
}

fn is_over(at: Duration, now: Duration) -> bool {
    now.saturating_sub(at) >= AOE_FRAME_LIFETIME
}

impl Source {
    fn is_late(&self, tag: Tag, covered: &Covered) -> bool {
        let below = self.floor.is_some_and(|(floor, _)| tag.is_older_than(floor));
        below || self.overlapping(covered).any(|(_, painted)| tag.is_older_than(painted.tag))
    }

    /// From the last one back, so that one search finds them all.
    fn overlapping(&self, range: &Covered) -> impl Iterator<Item = (u64, &Painted)> {
        let start = range.start;
        let from_the_end = self.painted.range(..range.end).rev();
        from_the_end.take_while(move |(_, painted)| painted.end > start).map(|(first, painted)| (*first, painted))
    }

    fn remember(&mut self, now: Duration, tag: Tag, covered: &Covered, fate: Fate) {
        if self.known.len() >= AOE_WRITES_REMEMBERED_MAX {
            self.forget_oldest();
        }
        if covered.is_empty() {
            return;
        }
        self.paint(covered, tag, now);
        self.fates.insert(tag, (covered.clone(), fate, now));
        self.known.push_back(Known { covered: covered.clone(), tag, at: now });
    }

    /// Nothing else is left in the range; what reached into it is cut.
    fn paint(&mut self, range: &Covered, tag: Tag, now: Duration) {
        let firsts: Vec<u64> = self.overlapping(range).map(|(first, _)| first).collect();
        for first in firsts {
            let Some(Painted { end, tag, at }) = self.painted.remove(&first) else { continue };
            if first < range.start {
                self.painted.insert(first, Painted { end: range.start, tag, at });
            }
            if end > range.end {
                self.painted.insert(range.end, Painted { end, tag, at });
            }
        }
        self.painted.insert(range.start, Painted { end: range.end, tag, at: now });
    }

    fn forget(&mut self, now: Duration) {
        while self.known.front().is_some_and(|known| is_over(known.at, now)) {
            self.drop_front();
        }
        if self.floor.is_some_and(|(_, at)| is_over(at, now)) {
            self.floor = None;
        }
    }

    /// Before its time: everything that is older is refused in its stead, wherever it writes.
    fn forget_oldest(&mut self) {
        if let Some(known) = self.drop_front()
            && !known.tag.is_of_program()
        {
            let newest = match self.floor {
                Some((floor, _)) if known.tag.is_older_than(floor) => floor,
                _ => known.tag,
            };
            self.floor = Some((newest, known.at));
        }
    }

    fn drop_front(&mut self) -> Option<Known> {
        let known = self.known.pop_front()?;
        // What has the same tag and is younger came again under it.
        let is_this = |painted: &Painted| painted.tag == known.tag && painted.at <= known.at;
        match self.painted.entry(known.covered.start) {
            Entry::Occupied(whole) if is_this(whole.get()) && whole.get().end == known.covered.end => {
                whole.remove();
            }
            // Others have been painted over parts of it.
            _ => {
                let left = self.overlapping(&known.covered).filter(|(_, painted)| is_this(painted));
                let firsts: Vec<u64> = left.map(|(first, _)| first).collect();
                for first in firsts {
                    self.painted.remove(&first);
                }
            }
        }
        if self.fates.get(&known.tag).is_some_and(|(_, _, at)| *at <= known.at) {
            self.fates.remove(&known.tag);
        }
        Some(known)
    }
}

#[cfg(test)]
#[path = "retransmit_tests.rs"]
mod tests;
