//! What a stale replica has to do about a block, by what it has and what the source has. Pure.
//!
//! What the source has up to `through` is final: every write up to there is settled, and later ones are sent to the
//! target too. So of two versions up to there the source's counts, even if it is the older one.
//!
//! | here           | at the source      | to do                                                                   |
//! |----------------|--------------------|-------------------------------------------------------------------------|
//! | above through  | anything           | nothing: a later write, on its way to the source or there               |
//! | the same       | the same           | nothing; another content under one version is a conflict                |
//! | older, nothing | anything           | take the source's                                                       |
//! | newer, zeros   | older, zeros       | nothing: they read the same                                             |
//! | newer          | older, data        | take back every version here above it                                   |
//! | newer, data    | older, zeros       | a clear, of the version the epoch began with: above all that was before |
//!
//! The last row takes nothing back: whatever older version stands in the log, known or not, the clear hides it.

use crate::index::Found;
use std::cmp::Ordering;
use torus_rpc::message::{Descriptor, Run};
use torus_schema::ids::{BlockIndex, Epoch, Version};
use torus_schema::limits::BLOCKS_PER_FRAME_MAX;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Nothing,
    Pull,
    TakeBack,
    Zeros,
    /// Two things under one version.
    Conflict,
}

/// What the source has of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Theirs {
    pub version: Version,
    /// Otherwise it reads as zeros.
    pub data: bool,
    /// If it is known.
    pub checksum: Option<u32>,
}

pub fn step(ours: Found, theirs: Theirs, through: Version) -> Step {
    let (version, data) = (ours.version(), matches!(ours, Found::Data(_)));
    if version > through {
        return Step::Nothing;
    }
    match version.cmp(&theirs.version) {
        Ordering::Less => Step::Pull,
        Ordering::Equal => {
            let differs = match ours {
                Found::Data(entry) => theirs.checksum.is_some_and(|checksum| checksum != entry.checksum),
                Found::Cleared(_) | Found::Never => false,
            };
            if data != theirs.data || differs { Step::Conflict } else { Step::Nothing }
        }
        Ordering::Greater if theirs.data => Step::TakeBack,
        Ordering::Greater if !data => Step::Nothing,
        Ordering::Greater if version < beginning_of(through.epoch) => Step::Zeros,
        Ordering::Greater => Step::TakeBack,
    }
}

/// Above every version of earlier epochs, and drawn by no write.
pub fn beginning_of(epoch: Epoch) -> Version {
    Version::new(epoch, 0)
}

/// The blocks of these records in ranges that one frame can ask for, ascending.
pub fn frames(descriptors: &[Descriptor]) -> Vec<(BlockIndex, u32)> {
    let mut frames: Vec<(BlockIndex, u32)> = Vec::new();
    for descriptor in descriptors {
        let (mut at, end) = (descriptor.first.0, descriptor.first.0 + u64::from(descriptor.count));
        while at < end {
            let frame = at / BLOCKS_PER_FRAME_MAX;
            let part_end = end.min((frame + 1) * BLOCKS_PER_FRAME_MAX);
            match frames.last_mut() {
                Some((first, count)) if first.0 / BLOCKS_PER_FRAME_MAX == frame => *count = (part_end - first.0) as u32,
                _ => frames.push((BlockIndex(at), (part_end - at) as u32)),
            }
            at = part_end;
        }
    }
    frames
}

/// Block by block; `None`: they are not `count` blocks.
pub fn theirs_of(runs: &[Run], count: u32) -> Option<Vec<Theirs>> {
    let total: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
    let each = |run: &Run| {
        let theirs = Theirs { version: run.version, data: run.data, checksum: None };
        std::iter::repeat_n(theirs, run.count as usize)
    };
    (total == u64::from(count)).then(|| runs.iter().flat_map(each).collect())
}

/// One thing to be fetched: data of neighbours, by a read, or a clear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Job {
    Read { first: BlockIndex, count: u32 },
    Clear { first: BlockIndex, count: u32, version: Version },
}

impl Job {
    pub fn first(&self) -> BlockIndex {
        let (Job::Read { first, .. } | Job::Clear { first, .. }) = self;
        *first
    }

    /// Blocks that become zeros.
    pub fn cleared(&self) -> u64 {
        if let Job::Clear { count, .. } = self { u64::from(*count) } else { 0 }
    }

    /// What it moves.
    pub fn blocks(&self) -> u32 {
        match self {
            Job::Read { count, .. } => *count,
            Job::Clear { .. } => 1,
        }
    }
}

/// Adds a block to the jobs, to the last one if it can.
pub fn add_job(jobs: &mut Vec<Job>, block: BlockIndex, theirs: Theirs, read_blocks_max: u32) {
    match jobs.last_mut() {
        Some(Job::Read { first, count })
            if theirs.data
                && first.0 + u64::from(*count) == block.0
                && first.extent() == block.extent()
                && *count < read_blocks_max =>
        {
            *count += 1;
        }
        Some(Job::Clear { first, count, version })
            if !theirs.data
                && *version == theirs.version
                && first.0 + u64::from(*count) == block.0
                && first.extent() == block.extent() =>
        {
            *count += 1;
        }
        _ if theirs.data => jobs.push(Job::Read { first: block, count: 1 }),
        _ => jobs.push(Job::Clear { first: block, count: 1, version: theirs.version }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Entry;
    use crate::log::Position;

    fn version(sequence: u64) -> Version {
        Version::new(Epoch(2), sequence)
    }

    fn data(sequence: u64) -> Found {
        Found::Data(Entry { position: Position(1), checksum: 7, version: version(sequence) })
    }

    fn theirs(sequence: u64, data: bool) -> Theirs {
        Theirs { version: version(sequence), data, checksum: None }
    }

    #[test]
    fn up_to_the_mark_the_source_counts_even_where_it_is_older() {
        let through = Version::new(Epoch(3), 5);
        let step = |ours, theirs| step(ours, theirs, through);
        assert_eq!(step(data(4), theirs(6, true)), Step::Pull);
        assert_eq!(step(Found::Never, theirs(6, false)), Step::Pull, "a clear has to be known here too");
        assert_eq!(step(data(6), theirs(6, true)), Step::Nothing);
        assert_eq!(step(data(8), theirs(6, true)), Step::TakeBack);
        assert_eq!(step(Found::Cleared(version(8)), theirs(6, true)), Step::TakeBack);
        assert_eq!(step(data(8), theirs(6, false)), Step::Zeros);
        assert_eq!(step(Found::Cleared(version(8)), theirs(6, false)), Step::Nothing);
        let live = Entry { position: Position(1), checksum: 7, version: Version::new(Epoch(3), 6) };
        assert_eq!(step(Found::Data(live), theirs(6, true)), Step::Nothing);
        let ours = Entry { version: Version::new(Epoch(3), 4), ..live };
        assert_eq!(step(Found::Data(ours), theirs(6, false)), Step::TakeBack, "no clear would stand above it");
    }

    #[test]
    fn two_things_under_one_version_are_a_conflict_and_nothing_is_done() {
        let through = Version::new(Epoch(3), 5);
        assert_eq!(step(data(6), theirs(6, false), through), Step::Conflict);
        let other = Theirs { checksum: Some(8), ..theirs(6, true) };
        assert_eq!(step(data(6), other, through), Step::Conflict);
        let same = Theirs { checksum: Some(7), ..other };
        assert_eq!(step(data(6), same, through), Step::Nothing);
    }

    #[test]
    fn records_are_asked_for_in_ranges_of_a_frame_and_of_one_extent() {
        let record = |first, count| Descriptor { first: BlockIndex(first), count, version: version(1), checksum: None };
        let asked = frames(&[record(3, 1), record(9, 2), record(300, 1), record(1024, 600)]);
        let expected = [(3, 8), (300, 1), (1024, 256), (1280, 256), (1536, 88)];
        assert_eq!(asked, expected.map(|(first, count)| (BlockIndex(first), count)));
    }

    #[test]
    fn neighbours_are_fetched_together_up_to_a_limit() {
        let mut jobs = Vec::new();
        for block in [1, 2, 3, 4, 6, 1023, 1024] {
            add_job(&mut jobs, BlockIndex(block), theirs(block, true), 3);
        }
        for block in [1030, 1031] {
            add_job(&mut jobs, BlockIndex(block), theirs(9, false), 3);
        }
        let read = |first, count| Job::Read { first: BlockIndex(first), count };
        let clear = Job::Clear { first: BlockIndex(1030), count: 2, version: version(9) };
        assert_eq!(jobs, [read(1, 3), read(4, 1), read(6, 1), read(1023, 1), read(1024, 1), clear]);
    }
}
