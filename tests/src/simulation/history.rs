//! What every 512-byte sector may read as. A sector holds the number of the write that filled it, 0 when it was never
//! written or cleared last; writes to one sector follow each other, so its writes are a list and a value is a
//! position in it.
//!
//! Promises checked, after the protocol's model:
//! * P1: a read is never older than what was answered or read before a flush which succeeded
//! * P2: within a session reads never go back, and are never older than the last answered write
//! * P3: as long as the power of no node failed, P2 holds across sessions

use std::collections::BTreeMap;

pub const SECTOR_BYTES: u64 = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Written {
    value: u64,
    answered: bool,
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
}

impl History {
    pub fn submitted(&mut self, sector: u64, value: u64) {
        self.sectors.entry(sector).or_default().writes.push(Written { value, answered: false });
    }

    pub fn answered(&mut self, sector: u64, value: u64) {
        let state = self.sectors.get_mut(&sector).expect("it was submitted");
        let position = state.writes.iter().rposition(|written| written.value == value).expect("it was submitted");
        state.writes[position].answered = true;
        state.floor = state.floor.max(position + 1);
    }

    /// What was answered or read before a flush; taken at its start, applied when it succeeds.
    pub fn before_flush(&self) -> Vec<(u64, usize)> {
        self.sectors.iter().map(|(sector, state)| (*sector, state.floor)).collect()
    }

    pub fn flushed(&mut self, before: Vec<(u64, usize)>) {
        for (sector, position) in before {
            let state = self.sectors.get_mut(&sector).expect("sectors are never forgotten");
            state.flushed = state.flushed.max(position);
            state.floor = state.floor.max(position);
        }
    }

    /// The power failed on all that held unflushed data: only what was flushed is promised.
    pub fn power_lost(&mut self) {
        for state in self.sectors.values_mut() {
            state.floor = state.flushed;
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
        // Positions at which the value was written, newest last; 0 is also what stands before all writes.
        let mut positions = state.writes.iter().enumerate().filter(|(_, w)| w.value == value).map(|(at, _)| at + 1);
        let newest = positions.next_back().or((value == 0).then_some(0));
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
        history.submitted(1, 10);
        assert!(read(&mut history, 1, 0).is_ok());
        history.answered(1, 10);
        assert!(read(&mut history, 1, 0).is_err());
        history.submitted(1, 11);
        assert!(read(&mut history, 1, 10).is_ok());
        assert!(read(&mut history, 1, 11).is_ok());
        assert!(read(&mut history, 1, 10).is_err(), "reads went back");
    }

    #[test]
    fn only_what_was_answered_before_a_flush_survives_the_power_failing() {
        let mut history = History::default();
        history.submitted(1, 10);
        history.answered(1, 10);
        let before = history.before_flush();
        history.submitted(1, 11);
        history.answered(1, 11);
        history.flushed(before);
        assert!(read(&mut history, 1, 10).is_err());
        history.power_lost();
        assert!(read(&mut history, 1, 10).is_ok());
        assert!(read(&mut history, 1, 0).is_err());
    }

    #[test]
    fn a_read_beside_a_write_may_see_either_and_none_after_it_goes_back() {
        let mut history = History::default();
        history.submitted(1, 10);
        let floor = history.floor(1);
        history.answered(1, 10);
        assert!(history.read(1, 0, floor).is_ok(), "it started before the answer");
        assert!(read(&mut history, 1, 0).is_err());
    }
}
