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
/// A line of memory of them.
const NEAR_RUNS: usize = 64 / RUN_BYTES;

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
        let behind = self.behind(block);
        if let Some((index, number)) = self.holds(behind, block) {
            return self.replace(index, number, block, stored);
        }
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
        let (count, behind) = (checksums.len() as u16, self.behind(first));
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
        let behind = self.behind(first);
        let free_before = behind == 0 || self.runs[behind - 1].first + self.count(behind - 1) <= first;
        free_before && self.runs.get(behind).is_none_or(|run| run.first >= first + count)
    }

    fn remove(&mut self, block: InExtent) {
        let Some((index, number)) = self.holds(self.behind(block), block) else { return };
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

    /// A block that is there gets another version: checksums stay where they are, and of the runs only its own and its
    /// neighbours change.
    fn replace(&mut self, index: usize, number: u16, block: InExtent, stored: Stored) {
        let (run, count) = (self.runs[index], self.count(index));
        let at = run.at + number;
        self.checksums[usize::from(at)] = stored.checksum;
        let left = (number > 0).then_some((run, number));
        let right = (number + 1 < count).then(|| (run.from(number + 1), count - number - 1));
        let is_behind = |before: &usize| self.runs[*before].first + self.count(*before) == block;
        let before = index.checked_sub(1).filter(|before| left.is_none() && is_behind(before));
        let is_next = |next: &usize| self.runs.get(*next).is_some_and(|next| next.first == block + 1);
        let next = Some(index + 1).filter(|next| right.is_none() && is_next(next));
        let to_extend = left.or_else(|| before.map(|before| (self.runs[before], self.count(before))));
        let to_prepend = right.or_else(|| next.map(|next| (self.runs[next], self.count(next))));
        let (left, right) = (left.map(|(run, _)| run), right.map(|(run, _)| run));
        if let Some(extended) = to_extend.and_then(|(run, count)| run.extended(count, stored)) {
            match before {
                Some(before) => {
                    self.runs[before] = extended;
                    self.put_in_place(index, [None, None, right]);
                }
                None => self.put_in_place(index, [Some(extended), None, right]),
            }
        } else if let Some(prepended) = to_prepend.and_then(|(run, count)| run.prepended(count, block, stored)) {
            let prepended = Run { at, ..prepended };
            match next {
                Some(next) => {
                    self.runs[next] = prepended;
                    self.put_in_place(index, [left, None, None]);
                }
                None => self.put_in_place(index, [left, Some(prepended), None]),
            }
        } else {
            self.put_in_place(index, [left, Some(Run::one(block, at, stored)), right]);
        }
    }

    /// These take the place of one run.
    fn put_in_place(&mut self, index: usize, runs: [Option<Run>; 3]) {
        let mut put = index;
        for run in runs.into_iter().flatten() {
            if put == index {
                self.runs[put] = run;
            } else {
                self.insert_run(put, run);
            }
            put += 1;
        }
        if put == index {
            self.runs.remove(index);
            shrink(&mut self.runs);
        }
    }

    /// How many runs begin at or before the block. Most pages are runs of about the same length: looked for from where it
    /// would be then, in steps that double, so that few lines of memory are touched.
    fn behind(&self, block: InExtent) -> usize {
        let (runs, count) = (&self.runs, self.runs.len());
        let guess = usize::from(block) * count / BLOCKS_PER_EXTENT as usize;
        let (mut low, mut high, mut step) = (0, count, NEAR_RUNS);
        if runs.get(guess).is_some_and(|run| run.first <= block) {
            low = guess + 1;
            while low + step < count {
                if runs[low + step].first > block {
                    high = low + step;
                    break;
                }
                low += step + 1;
                step *= 2;
            }
        } else {
            high = guess.min(count);
            while high > step {
                if runs[high - step].first <= block {
                    low = high - step + 1;
                    break;
                }
                high -= step;
                step *= 2;
            }
        }
        low + runs[low..high].partition_point(|run| run.first <= block)
    }

    /// Which block of which run it is, if it is one of the run before `behind`.
    fn holds(&self, behind: usize, block: InExtent) -> Option<(usize, u16)> {
        let index = behind.checked_sub(1)?;
        let number = block - self.runs[index].first;
        (number < self.count(index)).then_some((index, number))
    }

    /// Which block of which run.
    fn find(&self, block: InExtent) -> Option<(u16, Run)> {
        let (index, number) = self.holds(self.behind(block), block)?;
        Some((number, self.runs[index]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn stored(position: u32, version: u32) -> Stored {
        Stored { position, checksum: position ^ 0x5555, code: Code { era: 1, low: version } }
    }

    fn check(columns: &RunColumns, expected: &BTreeMap<InExtent, Stored>) {
        let mut found = BTreeMap::new();
        columns
            .for_each(|block, stored| assert!(found.insert(block, stored).is_none(), "block {block} is there twice"));
        assert_eq!(&found, expected);
        for block in 0..BLOCKS_PER_EXTENT as InExtent {
            assert_eq!(columns.get(block), expected.get(&block).copied(), "block {block}");
        }
        assert!(columns.runs.windows(2).all(|two| two[0].at < two[1].at && two[0].first < two[1].first));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// What is put beside, between and over runs joins them, goes on with them and cuts them.
        #[test]
        fn runs_are_a_map_however_they_are_overwritten(
            changes in prop::collection::vec((0u16..40, 1u16..12, 0u32..3, any::<bool>()), 1..60),
            spread in 1u16..25,
        ) {
            let (mut columns, mut expected) = (RunColumns::default(), BTreeMap::new());
            for (number, (first, count, step, removes)) in changes.into_iter().enumerate() {
                for block in (first..first + count).map(|block| block * spread) {
                    if removes && step == 0 {
                        columns.remove(block);
                        expected.remove(&block);
                        continue;
                    }
                    // Often as if a run before it went on.
                    let position = 1000 + u32::from(block) * step + (number as u32 % 2);
                    let put = stored(position, 7 * step + u32::from(block) * (step / 2));
                    columns.set(block, put);
                    expected.insert(block, put);
                }
            }
            check(&columns, &expected);
        }
    }
}
