//! What is said of several rounds: the middle, and how far the others lay from it.

use serde::{Deserialize, Serialize};

/// A machine that is shared has good and bad seconds; a mean would mix them, a best would hide them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
    pub rounds: Vec<f64>,
}

impl Spread {
    /// `None` of no rounds at all.
    pub fn of(rounds: Vec<f64>) -> Option<Self> {
        let mut sorted = rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
        Some(Self { median, low, high, rounds })
    }

    /// `12.3 k (11.0–13.1)`
    pub fn thousands(&self) -> String {
        let k = |value: f64| format!("{:.1}", value / 1000.0);
        format!("{} k ({}–{})", k(self.median), k(self.low), k(self.high))
    }

    pub fn with_range(&self, digits: usize) -> String {
        format!("{:.digits$} ({:.digits$}–{:.digits$})", self.median, self.low, self.high)
    }
}

/// Each round's own quotient: what both sides of a round suffered cancels out.
pub fn ratio(of: &[f64], to: &[f64]) -> Option<Spread> {
    Spread::of(of.iter().zip(to).filter(|(_, to)| **to > 0.0).map(|(of, to)| of / to).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_in_the_middle() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 9.0]).unwrap().median, 3.0);
        assert_eq!(Spread::of(vec![4.0, 1.0, 9.0, 2.0]).unwrap().median, 3.0);
        assert_eq!(Spread::of(vec![]), None);
    }

    #[test]
    fn rounds_are_kept_in_their_order() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!((spread.low, spread.high), (1.0, 3.0));
        assert_eq!(spread.rounds, [3.0, 1.0, 2.0]);
    }

    #[test]
    fn a_ratio_compares_within_rounds() {
        let slow_second_round = ratio(&[5.0, 1.0], &[10.0, 2.0]).unwrap();
        assert_eq!((slow_second_round.low, slow_second_round.high), (0.5, 0.5));
    }
}
