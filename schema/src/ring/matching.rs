//! Rows to targets of limited capacity, by augmenting paths: a row whose targets are all full takes the place of
//! another row that can go elsewhere. What is found is maximal, so that a row left over could not be served at all.

use std::collections::VecDeque;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edge {
    pub target: usize,
    /// Costs nothing: the data is there already. Free edges are tried first.
    pub free: bool,
}

pub(super) struct Matching {
    pub spare: Vec<u32>,
    pub assigned: Vec<Option<usize>>,
    rows: Vec<Vec<usize>>,
    /// Full for good: no path from it reaches a target with room, and none will.
    closed: Vec<bool>,
}

impl Matching {
    pub fn new(rows: usize, capacity: Vec<u32>) -> Self {
        let targets = capacity.len();
        Self {
            spare: capacity,
            assigned: vec![None; rows],
            rows: vec![Vec::new(); targets],
            closed: vec![false; targets],
        }
    }

    pub fn assign(&mut self, row: usize, target: usize) {
        assert!(self.assigned[row].is_none() && self.spare[target] > 0);
        self.spare[target] -= 1;
        self.assigned[row] = Some(target);
        self.rows[target].push(row);
    }

    /// Assigns the row, moving others along a path if need be; false if there is no such path.
    pub fn augment(&mut self, row: usize, edges: &[Vec<Edge>]) -> bool {
        // For each target reached: the row that would go there.
        let mut reached: Vec<Option<usize>> = vec![None; self.spare.len()];
        let mut queue = VecDeque::new();
        self.reach(row, edges, &mut reached, &mut queue);
        while let Some(target) = queue.pop_front() {
            if self.spare[target] > 0 {
                self.follow_back(row, target, &reached);
                return true;
            }
            for index in 0..self.rows[target].len() {
                let next = self.rows[target][index];
                self.reach(next, edges, &mut reached, &mut queue);
            }
        }
        for (target, reached) in reached.iter().enumerate() {
            self.closed[target] |= reached.is_some();
        }
        false
    }

    fn reach(&self, row: usize, edges: &[Vec<Edge>], reached: &mut [Option<usize>], queue: &mut VecDeque<usize>) {
        // Backwards, since what is pushed to the front last is tried first.
        for edge in edges[row].iter().rev() {
            if self.closed[edge.target] || reached[edge.target].is_some() {
                continue;
            }
            reached[edge.target] = Some(row);
            if edge.free { queue.push_front(edge.target) } else { queue.push_back(edge.target) }
        }
    }

    fn follow_back(&mut self, row: usize, last: usize, reached: &[Option<usize>]) {
        let mut target = last;
        self.spare[last] -= 1;
        loop {
            let moved = reached[target].expect("only targets that were reached are on the path");
            let left = self.assigned[moved].replace(target);
            self.rows[target].push(moved);
            match left {
                Some(left) => {
                    self.rows[left].retain(|&other| other != moved);
                    target = left;
                }
                None => break assert_eq!(moved, row),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_without_room_moves_another_to_make_some() {
        let edge = |target| Edge { target, free: true };
        let edges = [vec![edge(0), edge(1)], vec![edge(0)]];
        let mut matching = Matching::new(2, vec![1, 1]);
        matching.assign(0, 0);
        assert!(matching.augment(1, &edges));
        assert_eq!(matching.assigned, [Some(1), Some(0)]);
        assert_eq!(matching.spare, [0, 0]);
    }

    #[test]
    fn a_row_that_cannot_be_served_leaves_the_others_where_they_are() {
        let edges = [vec![Edge { target: 0, free: false }], vec![Edge { target: 0, free: false }]];
        let mut matching = Matching::new(2, vec![1, 5]);
        assert!(matching.augment(0, &edges));
        assert!(!matching.augment(1, &edges));
        assert_eq!(matching.assigned, [Some(0), None]);
    }
}
