//! The sequences under way, and with them the flush point: one below the lowest write that is not yet settled on
//! every replica that has to have it (protocol rule 1).
//!
//! Not the highest acknowledged one: sequence 1 may still be on its way to a replica that has flushed 2, and would
//! never be sent to it again (interleaving 4).

use std::collections::VecDeque;
use torus_schema::limits::SEQUENCE_MAX;

#[derive(Debug)]
pub struct Window {
    /// Sequence of the first entry of `resolved`; everything below is settled.
    lowest: u64,
    resolved: VecDeque<bool>,
}

impl Default for Window {
    /// Sequence 0 of an epoch is what its reconcile made durable.
    fn default() -> Self {
        Self { lowest: 1, resolved: VecDeque::new() }
    }
}

impl Window {
    /// The next sequence; unresolved until `resolve`. `None` when the epoch has none left.
    pub fn begin(&mut self) -> Option<u64> {
        let sequence = self.lowest + self.resolved.len() as u64;
        if sequence > SEQUENCE_MAX {
            return None;
        }
        self.resolved.push_back(false);
        Some(sequence)
    }

    /// Every replica that has to have it has it.
    pub fn resolve(&mut self, sequence: u64) {
        assert!(sequence >= self.lowest, "sequence {sequence} was resolved before");
        let slot = &mut self.resolved[(sequence - self.lowest) as usize];
        assert!(!*slot, "sequence {sequence} was resolved before");
        *slot = true;
        while self.resolved.front() == Some(&true) {
            self.resolved.pop_front();
            self.lowest += 1;
        }
    }

    /// The last one given.
    pub fn drawn(&self) -> u64 {
        self.lowest + self.resolved.len() as u64 - 1
    }

    /// Everything up to and including it is settled.
    pub fn settled_through(&self) -> u64 {
        self.lowest - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flush_point_stays_below_the_lowest_write_under_way() {
        let mut window = Window::default();
        let sequences: Vec<_> = (0..4).map(|_| window.begin().unwrap()).collect();
        assert_eq!(sequences, [1, 2, 3, 4]);
        window.resolve(2);
        window.resolve(3);
        assert_eq!((window.settled_through(), window.drawn()), (0, 4));
        window.resolve(1);
        assert_eq!(window.settled_through(), 3);
        window.resolve(4);
        assert_eq!(window.settled_through(), 4);
        assert_eq!(window.begin(), Some(5));
    }
}
