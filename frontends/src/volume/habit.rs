//! What a client does after a write. One that flushes after each, a database's log or a file system's journal, gets its
//! next write made durable at once: the replicas' round trip and their fdatasync are then one, and the flush that
//! follows finds every shard clean and asks nobody (protocol rule 8: a FUA write is a flush of its one record). Pure.

/// So many writes in a row have to be flushed before another, until the next is taken for one of them.
const FLUSHED_ALONE_MIN: u32 = 4;

#[derive(Debug, Default)]
pub(super) struct Habit {
    /// Writes begun since the last flush did.
    unflushed: u32,
    /// How often in a row there was exactly one.
    alone: u32,
}

impl Habit {
    /// A write or clear begins that does not ask to be durable. Whether a flush is to be expected before another does.
    pub fn writes(&mut self) -> bool {
        self.unflushed = self.unflushed.saturating_add(1);
        if self.unflushed > 1 {
            self.alone = 0;
        }
        self.alone >= FLUSHED_ALONE_MIN
    }

    /// A flush of the client's begins; one that has nothing to flush says nothing.
    pub fn flushes(&mut self) {
        match std::mem::take(&mut self.unflushed) {
            0 => {}
            1 => self.alone = self.alone.saturating_add(1),
            _ => self.alone = 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flushed_alone(habit: &mut Habit, times: u32) -> Vec<bool> {
        let expected = |_| {
            let expected = habit.writes();
            habit.flushes();
            expected
        };
        (0..times).map(expected).collect()
    }

    #[test]
    fn a_flush_is_expected_after_some_that_came_after_one_write_each() {
        let mut habit = Habit::default();
        assert_eq!(flushed_alone(&mut habit, 6), [false, false, false, false, true, true]);
        habit.flushes();
        assert!(habit.writes(), "a flush of nothing changes nothing");
    }

    #[test]
    fn one_that_does_not_come_is_not_expected_again_for_a_while() {
        let mut habit = Habit::default();
        flushed_alone(&mut habit, 5);
        assert!(habit.writes(), "the only one that is made durable in vain");
        assert!(!habit.writes());
        habit.flushes();
        assert_eq!(flushed_alone(&mut habit, 5), [false, false, false, false, true]);
    }

    #[test]
    fn several_writes_under_way_at_once_are_flushed_together_as_ever() {
        let mut habit = Habit::default();
        for _ in 0..20 {
            assert!(!(0..2).any(|_| habit.writes()));
            habit.flushes();
        }
    }
}
