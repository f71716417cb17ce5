//! Blocks that were written one after the other, as runs: positions and versions go on in equal steps, so only the
//! checksums are held for each block.

use super::Columns;
use super::column::{Code, LOW_MASK, Stored, grow, heap_bytes, shrink};
use super::span::InExtent;
use torus_schema::limits::BLOCKS_PER_EXTENT;

#[derive(Clone, Copy, Debug)]
struct Run {
    first: InExtent,
    /// Where the checksums of its blocks begin; they end where those of the next run begin.
    at: u16,
    position: u32,
    low: u32,
    era: u16,
    /// From block to block. Headers may lie between two positions, writes to other extents between two versions.
    position_step: u8,
    version_step: u8,
}

/// Beside the checksums of its blocks.
pub const RUN_BYTES: usize = size_of::<Run>();
pub const CHECKSUM_BYTES: usize = size_of::<u32>();
const _: () = assert!(RUN_BYTES == 16);

impl Run {
    /// Without its checksum.
    fn one(block: InExtent, at: u16, stored: Stored) -> Self {
        let Stored { position, code: Code { era, low }, .. } = stored;
        Self { first: block, at, position, low, era, position_step: 0, version_step: 0 }
    }

    fn position(&self, number: u16) -> u32 {
        self.position + u32::from(number) * u32::from(self.position_step)
    }

    fn low(&self, number: u16) -> u32 {
        self.low + u32::from(number) * u32::from(self.version_step)
    }

    /// The run that begins at that block of it.
    fn from(&self, number: u16) -> Run {
        let (first, at) = (self.first + number, self.at + number);
        Run { first, at, position: self.position(number), low: self.low(number), ..*self }
    }

    /// The run with its steps, if it can go on with the block behind its last.
    fn extended(&self, count: u16, stored: Stored) -> Option<Run> {
        let position_step = stored.position.checked_sub(self.position(count - 1))?.try_into().ok()?;
        let version_step = stored.code.low.checked_sub(self.low(count - 1))?.try_into().ok()?;
        let same = self.position_step == position_step && self.version_step == version_step;
        let fits = self.era == stored.code.era && (count == 1 || same);
        fits.then_some(Run { position_step, version_step, ..*self })
    }

    /// The run with its steps, if it can begin with that block already.
    fn prepended(&self, count: u16, block: InExtent, stored: Stored) -> Option<Run> {
        let second = Stored { position: self.position, checksum: 0, code: Code { era: self.era, low: self.low } };
        let run = Run::one(block, self.at, stored).extended(1, second)?;
        let same = run.position_step == self.position_step && run.version_step == self.version_step;
        (block + 1 == self.first && (count == 1 || same)).then_some(run)
    }
}

/// How many runs there would be of these, which come in the order of their blocks.
#[derive(Default)]
pub struct RunCounter {
    last: Option<(Run, u16)>,
    pub runs: usize,
}

impl RunCounter {
    pub fn see(&mut self, block: InExtent, stored: Stored) {
        let goes_on = self.last.filter(|(run, count)| run.first + count == block);
        let extended = goes_on.and_then(|(run, count)| run.extended(count, stored).map(|run| (run, count + 1)));
        if extended.is_none() {
            self.runs += 1;
        }
        self.last = extended.or(Some((Run::one(block, 0, stored), 1)));
    }
}

#[derive(Default)]
pub struct RunColumns {
    runs: Vec<Run>,
    checksums: Vec<u32>,
}

impl Columns for RunColumns {
    fn get(&self, block: InExtent) -> Option<Stored> {
        let (number, run) = self.find(block)?;
        let (low, checksum) = (run.low(number), self.checksums[usize::from(run.at + number)]);
        debug_assert!(low <= LOW_MASK);
        Some(Stored { position: run.position(number), checksum, code: Code { era: run.era, low } })
    }

    fn set(&mut self, block: InExtent, stored: Stored) {
        self.remove(block);
        let behind = self.runs.partition_point(|run| run.first < block);
        let at = self.runs.get(behind).map_or(self.checksums.len() as u16, |run| run.at);
        let before = behind.checked_sub(1).filter(|before| self.runs[*before].first + self.count(*before) == block);
        let extended = before.and_then(|before| self.runs[before].extended(self.count(before), stored));
        let prepended = self.runs.get(behind).and_then(|run| run.prepended(self.count(behind), block, stored));
        let next = match (extended, prepended) {
            (Some(run), _) => {
                self.runs[behind - 1] = run;
                behind
            }
            (None, Some(run)) => {
                self.runs[behind] = run;
                behind + 1
            }
            (None, None) => {
                self.insert_run(behind, Run::one(block, at, stored));
                behind + 1
            }
        };
        self.runs[next..].iter_mut().for_each(|run| run.at += 1);
        grow(&mut self.checksums, 1, BLOCKS_PER_EXTENT as usize);
        self.checksums.insert(usize::from(at), stored.checksum);
    }

    fn set_run(&mut self, first: InExtent, position: u32, code: Code, checksums: &[u32]) {
        let (count, behind) = (checksums.len() as u16, self.runs.partition_point(|run| run.first < first));
        let at = self.runs.get(behind).map_or(self.checksums.len() as u16, |run| run.at);
        let Code { era, low } = code;
        let goes_on = behind.checked_sub(1).map(|before| self.runs[before]).is_some_and(|before| {
            let length = at - before.at;
            let same_steps = length > 1 && before.position_step == 1 && before.version_step == 0;
            let stored = Stored { position, checksum: 0, code };
            same_steps && before.first + length == first && before.extended(length, stored).is_some()
        });
        if !goes_on {
            let position_step = u8::from(count > 1);
            self.insert_run(behind, Run { first, at, position, low, era, position_step, version_step: 0 });
        }
        self.runs[behind + usize::from(!goes_on)..].iter_mut().for_each(|run| run.at += count);
        grow(&mut self.checksums, checksums.len(), BLOCKS_PER_EXTENT as usize);
        self.checksums.splice(usize::from(at)..usize::from(at), checksums.iter().copied());
    }

    fn is_free(&self, first: InExtent, count: u16) -> bool {
        let behind = self.runs.partition_point(|run| run.first < first);
        let free_before = behind == 0 || self.runs[behind - 1].first + self.count(behind - 1) <= first;
        free_before && self.runs.get(behind).is_none_or(|run| run.first >= first + count)
    }

    fn remove(&mut self, block: InExtent) {
        let Some((number, _)) = self.find(block) else { return };
        let index = self.runs.partition_point(|run| run.first <= block) - 1;
        let (run, count) = (self.runs[index], self.count(index));
        let next = match (number, count) {
            (0, 1) => {
                self.runs.remove(index);
                index
            }
            (0, _) => {
                // Its checksums begin where they did: those of the block are gone.
                self.runs[index] = Run { at: run.at, ..run.from(1) };
                index + 1
            }
            (number, count) if number == count - 1 => index + 1,
            (number, _) => {
                let right = run.from(number + 1);
                self.insert_run(index + 1, right);
                index + 1
            }
        };
        self.runs[next..].iter_mut().for_each(|run| run.at -= 1);
        self.checksums.remove(usize::from(run.at + number));
        shrink(&mut self.checksums);
        shrink(&mut self.runs);
    }

    fn blocks(&self) -> usize {
        self.checksums.len()
    }

    fn heap_bytes(&self) -> usize {
        heap_bytes(&self.runs) + heap_bytes(&self.checksums)
    }

    fn for_each(&self, mut each: impl FnMut(InExtent, Stored)) {
        for (index, run) in self.runs.iter().enumerate() {
            for number in 0..self.count(index) {
                let code = Code { era: run.era, low: run.low(number) };
                let checksum = self.checksums[usize::from(run.at + number)];
                each(run.first + number, Stored { position: run.position(number), checksum, code });
            }
        }
    }
}

impl RunColumns {
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// Room for what is about to be put, exactly.
    pub fn reserve(&mut self, blocks: usize, runs: usize) {
        self.checksums.reserve_exact(blocks);
        self.runs.reserve_exact(runs);
    }

    /// A block behind all that are there.
    pub fn push(&mut self, block: InExtent, stored: Stored) {
        let at = self.checksums.len() as u16;
        let goes_on = self.runs.last_mut().filter(|last| last.first + (at - last.at) == block);
        match goes_on.and_then(|last| Some((last.extended(at - last.at, stored)?, last))) {
            Some((extended, last)) => *last = extended,
            None => self.runs.push(Run::one(block, at, stored)),
        }
        self.checksums.push(stored.checksum);
    }

    fn insert_run(&mut self, index: usize, run: Run) {
        grow(&mut self.runs, 1, BLOCKS_PER_EXTENT as usize);
        self.runs.insert(index, run);
    }

    fn count(&self, index: usize) -> u16 {
        let end = self.runs.get(index + 1).map_or(self.checksums.len() as u16, |next| next.at);
        end - self.runs[index].at
    }

    /// Which block of which run.
    fn find(&self, block: InExtent) -> Option<(u16, Run)> {
        let index = self.runs.partition_point(|run| run.first <= block).checked_sub(1)?;
        let (run, number) = (self.runs[index], block - self.runs[index].first);
        (number < self.count(index)).then_some((number, run))
    }
}
