//! What every 512-byte sector may read as. A sector holds the number of the write that filled it, 0 when it was never
//! written or cleared last; writes to one sector follow each other, so its writes are a list and a value is a
//! position in it.
//!
//! Promises checked, after the protocol's model:
//! * P1: a read is never older than what was answered or read before a flush which succeeded
//! * P2: within a session reads never go back, and are never older than the last answered write
//! * P3: as long as the power of no node failed, P2 holds across sessions
//! * P4: what a writer begins after a later one has attached is never answered and never read
//! * P5: a block is the whole of what some write left: who sees one sector of a write sees all of it in that block,
//!   but for what was written over it since

use std::collections::BTreeMap;
use torus_schema::ids::BlockIndex;

pub const SECTOR_BYTES: u64 = 512;
const SECTORS_PER_BLOCK: u64 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Written {
    value: u64,
    /// Of the writer; 0: it is not told, and P4 not checked.
    epoch: u64,
    /// A later writer had attached already.
    fenced: bool,
    answered: bool,
    /// The power failed before it was answered, on all that may have had it.
    power_lost: bool,
}

#[derive(Debug, Default)]
struct Sector {
    /// In the order in which they were submitted; an unanswered one may take effect at any later time.
    writes: Vec<Written>,
    /// One above the position of the oldest value that may still be read; 0: never written.
    floor: usize,
    /// The same, for what survives every crash.
    flushed: usize,
}

#[derive(Debug, Default)]
pub struct History {
    sectors: BTreeMap<u64, Sector>,
    pub reads_checked: u64,
    newest_epoch: u64,
    /// The first promise that was seen broken other than by a read.
    pub broken: Option<String>,
}

impl Sector {
    /// One above the position of the last such write; 0 is also what stands before all writes.
    fn newest(&self, value: u64) -> Option<usize> {
        let found = self.writes.iter().rposition(|written| written.value == value && !written.fenced);
        found.map(|at| at + 1).or((value == 0).then_some(0))
    }
}

impl History {
    /// A writer serves in this epoch from now on.
    pub fn attached(&mut self, epoch: u64) {
        self.newest_epoch = self.newest_epoch.max(epoch);
    }

    pub fn submitted(&mut self, sector: u64, value: u64, epoch: u64) {
        let fenced = epoch != 0 && epoch < self.newest_epoch;
        let written = Written { value, epoch, fenced, answered: false, power_lost: false };
        self.sectors.entry(sector).or_default().writes.push(written);
    }

    pub fn answered(&mut self, sector: u64, value: u64, epoch: u64) {
        let state = self.sectors.get_mut(&sector).expect("it was submitted");
        let same = |written: &Written| written.value == value && written.epoch == epoch;
        let position = state.writes.iter().rposition(same).expect("it was submitted");
        state.writes[position].answered = true;
        if state.writes[position].fenced {
            let newest = self.newest_epoch;
            self.broken.get_or_insert_with(|| {
                format!("sector {sector}: {value}, begun in epoch {epoch} after {newest} had attached, was answered")
            });
            return;
        }
        // The replicas had answered and the writer stood still until it was succeeded: it could not replay.
        if state.writes[position].power_lost && epoch != 0 && epoch < self.newest_epoch {
            return;
        }
        state.floor = state.floor.max(position + 1);
    }

    /// What was answered or read before a flush; taken at its start, applied when it succeeds.
    pub fn before_flush(&self) -> Vec<(u64, usize)> {
        self.sectors.iter().map(|(sector, state)| (*sector, state.floor)).collect()
    }

    /// A writer that was succeeded meanwhile promises nothing about what its successor wrote.
    pub fn flushed(&mut self, before: Vec<(u64, usize)>, epoch: u64) {
        if epoch != 0 && epoch < self.newest_epoch {
            return;
        }
        for (sector, position) in before {
            let state = self.sectors.get_mut(&sector).expect("sectors are never forgotten");
            state.flushed = state.flushed.max(position);
            state.floor = state.floor.max(position);
        }
    }

    /// The power failed on all that held unflushed data: only what was flushed is promised.
    pub fn power_lost(&mut self) {
        self.power_lost_where(|_| true);
    }

    /// The same for those blocks.
    pub fn power_lost_where(&mut self, lost: impl Fn(BlockIndex) -> bool) {
        for (sector, state) in &mut self.sectors {
            if lost(BlockIndex(sector / SECTORS_PER_BLOCK)) {
                state.floor = state.flushed;
                state.writes.iter_mut().filter(|write| !write.answered).for_each(|write| write.power_lost = true);
            }
        }
    }

    /// What a read of the sector that starts now must not be older than.
    pub fn floor(&self, sector: u64) -> usize {
        self.sectors.get(&sector).map_or(0, |state| state.floor)
    }

    /// A sector was read as `value`; `floor` is what it was when the read started: a write that was answered meanwhile
    /// need not be seen.
    pub fn read(&mut self, sector: u64, value: u64, floor: usize) -> Result<(), String> {
        self.reads_checked += 1;
        let state = self.sectors.entry(sector).or_default();
        // The power may have failed since.
        let floor = floor.min(state.floor);
        let newest = state.newest(value);
        match newest {
            Some(position) if position >= floor => {
                // A clear may stand several times; the oldest that is allowed is what was surely seen.
                let seen = if value == 0 { floor } else { position };
                state.floor = state.floor.max(seen);
                Ok(())
            }
            _ => {
                let tail = &state.writes[floor.saturating_sub(3).min(state.writes.len())..];
                Err(format!(
                    "sector {sector} (block {}) reads {value} (position {newest:?}), expected position {floor} or \
                     later, flushed {}; from position {}: {tail:?}",
                    sector / 8,
                    state.flushed,
                    floor.saturating_sub(3) + 1,
                ))
            }
        }
    }

    /// Sectors of one block as one read saw them.
    pub fn check_block(&self, seen: &[(u64, u64)]) -> Result<(), String> {
        for (sector, value) in seen.iter().filter(|(_, value)| *value != 0) {
            for (other, shown) in seen.iter().filter(|(_, shown)| shown != value) {
                let Some(state) = self.sectors.get(other) else { continue };
                let written = state.writes.iter().rposition(|written| written.value == *value);
                if let Some(at) = written
                    && state.newest(*shown).is_some_and(|newest| newest < at + 1)
                {
                    return Err(format!(
                        "a mixture: sector {sector} has {value}, which was also written to sector {other}; that has \
                         {shown}, from before it"
                    ));
                }
            }
        }
        Ok(())
    }

    pub fn sectors(&self) -> impl Iterator<Item = u64> + '_ {
        self.sectors.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(history: &mut History, sector: u64, value: u64) -> Result<(), String> {
        let floor = history.floor(sector);
        history.read(sector, value, floor)
    }

    #[test]
    fn an_answered_write_must_be_read_and_an_unanswered_one_may() {
        let mut history = History::default();
        history.submitted(1, 10, 0);
        assert!(read(&mut history, 1, 0).is_ok());
        history.answered(1, 10, 0);
        assert!(read(&mut history, 1, 0).is_err());
        history.submitted(1, 11, 0);
        assert!(read(&mut history, 1, 10).is_ok());
        assert!(read(&mut history, 1, 11).is_ok());
        assert!(read(&mut history, 1, 10).is_err(), "reads went back");
    }

    #[test]
    fn only_what_was_answered_before_a_flush_survives_the_power_failing() {
        let mut history = History::default();
        history.submitted(1, 10, 0);
        history.answered(1, 10, 0);
        let before = history.before_flush();
        history.submitted(1, 11, 0);
        history.answered(1, 11, 0);
        history.flushed(before, 0);
        assert!(read(&mut history, 1, 10).is_err());
        history.power_lost();
        assert!(read(&mut history, 1, 10).is_ok());
        assert!(read(&mut history, 1, 0).is_err());
    }

    #[test]
    fn a_read_beside_a_write_may_see_either_and_none_after_it_goes_back() {
        let mut history = History::default();
        history.submitted(1, 10, 0);
        let floor = history.floor(1);
        history.answered(1, 10, 0);
        assert!(history.read(1, 0, floor).is_ok(), "it started before the answer");
        assert!(read(&mut history, 1, 0).is_err());
    }

    #[test]
    fn what_a_fenced_writer_begins_must_not_be_answered_or_read() {
        let mut history = History::default();
        history.attached(1);
        history.submitted(1, 10, 1);
        history.attached(2);
        history.submitted(1, 11, 2);
        history.submitted(1, 12, 1);
        assert!(read(&mut history, 1, 10).is_ok(), "it was begun in time");
        assert!(read(&mut history, 1, 12).is_err());
        history.answered(1, 11, 2);
        assert_eq!(history.broken, None);
        history.answered(1, 12, 1);
        assert!(history.broken.is_some());
    }

    #[test]
    fn a_flush_of_a_writer_that_was_succeeded_covers_nothing_of_its_successor() {
        let mut history = History::default();
        history.attached(2);
        history.submitted(1, 10, 2);
        history.answered(1, 10, 2);
        let before = history.before_flush();
        history.flushed(before, 1);
        history.power_lost();
        assert!(read(&mut history, 1, 0).is_ok());
    }

    #[test]
    fn a_writer_that_stood_still_while_the_power_failed_and_it_was_succeeded_promises_nothing_by_its_answer() {
        for succeeded in [false, true] {
            let mut history = History::default();
            history.attached(1);
            history.submitted(1, 10, 1);
            history.power_lost();
            history.attached(if succeeded { 2 } else { 1 });
            history.answered(1, 10, 1);
            assert_eq!(read(&mut history, 1, 0).is_ok(), succeeded);
        }
    }

    #[test]
    fn half_a_write_is_found_unless_the_other_half_was_written_over() {
        let mut history = History::default();
        for sector in 8..10 {
            history.submitted(sector, 10, 0);
            history.submitted(sector, 11, 0);
        }
        assert!(history.check_block(&[(8, 11), (9, 11)]).is_ok());
        assert!(history.check_block(&[(8, 11), (9, 10)]).is_err());
        assert!(history.check_block(&[(8, 0), (9, 10)]).is_err());
        history.submitted(9, 12, 0);
        assert!(history.check_block(&[(8, 11), (9, 12)]).is_ok());
        assert!(history.check_block(&[(8, 10), (9, 12)]).is_ok(), "the one in between may never have been done");
    }
}
