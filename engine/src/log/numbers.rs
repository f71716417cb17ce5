//! Which batches were durable and are gone: batches are numbered without a gap over the whole log, so those of a
//! segment run from where it begins to where the next one does. Pure.
//!
//! Where a segment begins is known from any of its headers, from its footer, from the footer of the one before, or
//! from an opening that was written while it had no footer. If from none of these, it has no batch that is there, and
//! is looked at together with the one before it.

use super::BatchNumber;
use std::collections::BTreeMap;
use std::ops::Range;

/// Where segments begin, by sequence.
#[derive(Default)]
pub struct Begins(BTreeMap<u64, BatchNumber>);

impl Begins {
    /// Of what is said the highest counts: after a loss the one before may not reach up to it.
    pub fn say(&mut self, sequence: u64, first: BatchNumber) {
        let known = self.0.entry(sequence).or_insert(first);
        *known = first.max(*known);
    }

    fn of(&self, sequence: u64) -> Option<BatchNumber> {
        self.0.get(&sequence).copied()
    }
}

/// A segment without a footer.
pub struct Unsealed {
    pub sequence: u64,
    /// As its opening says.
    pub at_least: BatchNumber,
    /// Batches that are there.
    pub found: Vec<BatchNumber>,
}

pub struct Decision {
    /// Numbers of each segment, in the order of the argument.
    pub ranges: Vec<Range<BatchNumber>>,
    /// Durable, and neither found nor in a segment with a footer.
    pub missing: u64,
    /// There may be more of them: it is not known where a segment ended.
    pub end_unknown: bool,
}

/// `unsealed` by sequence; `last`: the highest sequence of any segment.
pub fn decide(unsealed: &[Unsealed], begins: &Begins, durable: BatchNumber, last: u64) -> Decision {
    let mut decision = Decision { ranges: Vec::new(), missing: 0, end_unknown: false };
    let durable_end = BatchNumber(durable.0 + 1);
    let mut rest = unsealed;
    while let Some(group_first) = rest.first() {
        let count = group_length(rest, begins);
        let (group, behind) = rest.split_at(count);
        rest = behind;
        let first = begins.of(group_first.sequence).unwrap_or(BatchNumber(0)).max(group_first.at_least);
        let group_last = group[count - 1].sequence;
        let end = begins.of(group_last + 1);
        decision.end_unknown |= end.is_none() && group_last < last;
        let expected = first..end.unwrap_or(durable_end).min(durable_end);
        // Each is there once: `search` believes a header only where it says that it stands.
        let found = group.iter().flat_map(|segment| &segment.found).filter(|number| expected.contains(number)).count();
        decision.missing += expected.end.0.saturating_sub(expected.start.0).saturating_sub(found as u64);
        let mut at = first;
        for segment in group {
            let begin = begins.of(segment.sequence).unwrap_or(at).max(at);
            let behind_found = segment.found.iter().max().map_or(begin, |number| BatchNumber(number.0 + 1));
            let known_end = begins.of(segment.sequence + 1);
            let is_last = segment.sequence == group_last;
            let least_end = if is_last { known_end.unwrap_or(durable_end) } else { begin };
            at = behind_found.max(least_end).max(begin);
            decision.ranges.push(begin..at);
        }
    }
    decision
}

/// Up to the first segment whose successor's beginning is known, or that has none at hand.
fn group_length(unsealed: &[Unsealed], begins: &Begins) -> usize {
    let follows = |at: usize| unsealed.get(at + 1).is_some_and(|next| next.sequence == unsealed[at].sequence + 1);
    let goes_on = |at: &usize| begins.of(unsealed[*at].sequence + 1).is_none() && follows(*at);
    (0..unsealed.len()).take_while(goes_on).count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(sequence: u64, at_least: u64, found: &[u64]) -> Unsealed {
        Unsealed { sequence, at_least: BatchNumber(at_least), found: found.iter().copied().map(BatchNumber).collect() }
    }

    fn begins(known: &[(u64, u64)]) -> Begins {
        let mut begins = Begins::default();
        known.iter().for_each(|(sequence, first)| begins.say(*sequence, BatchNumber(*first)));
        begins
    }

    fn numbers(decision: &Decision) -> Vec<(u64, u64)> {
        decision.ranges.iter().map(|range| (range.start.0, range.end.0)).collect()
    }

    #[test]
    fn what_is_above_the_durable_mark_is_not_missed() {
        let segments = [segment(3, 10, &[10, 12]), segment(4, 11, &[])];
        let decision = decide(&segments, &begins(&[(3, 10)]), BatchNumber(10), 4);
        assert_eq!((decision.missing, decision.end_unknown), (0, false));
        assert_eq!(numbers(&decision), vec![(10, 13), (13, 13)]);
        assert_eq!(decide(&segments, &begins(&[(3, 10)]), BatchNumber(11), 4).missing, 1, "a durable one is");
    }

    #[test]
    fn an_opening_made_ahead_says_less_than_its_headers_do() {
        // Made when number 11 was the next; the segment before it took batches up to 14 after that.
        let segments = [segment(4, 11, &[15, 16])];
        assert_eq!(decide(&segments, &begins(&[(4, 15)]), BatchNumber(16), 4).missing, 0);
        let decision = decide(&segments, &begins(&[(4, 15)]), BatchNumber(17), 4);
        assert_eq!((decision.missing, numbers(&decision)), (1, vec![(15, 18)]));
    }

    #[test]
    fn a_segment_without_any_header_is_counted_with_the_one_before() {
        // Nothing says whether 12 was in the one or in the other, and it does not matter.
        let segments = [segment(3, 10, &[10, 11]), segment(4, 11, &[]), segment(5, 11, &[13])];
        let known = begins(&[(3, 10), (5, 13)]);
        let decision = decide(&segments, &known, BatchNumber(11), 5);
        assert_eq!((decision.missing, numbers(&decision)), (0, vec![(10, 12), (12, 13), (13, 14)]));
        assert_eq!(decide(&segments, &known, BatchNumber(12), 5).missing, 1);
    }

    #[test]
    fn a_later_opening_tells_where_a_segment_began_whose_headers_were_lost_and_whose_predecessor_is_gone() {
        // 11 to 14 stood in a segment that was emptied and became number 5.
        let segments = [segment(4, 11, &[]), segment(5, 15, &[])];
        assert_eq!(decide(&segments, &begins(&[(4, 15)]), BatchNumber(14), 5).missing, 0);
        assert_eq!(decide(&segments, &begins(&[]), BatchNumber(14), 5).missing, 4, "without it all might be missing");
    }

    #[test]
    fn an_old_segment_is_bounded_by_its_own_trailer() {
        let segments = [segment(4, 10, &[10, 11])];
        let decision = decide(&segments, &begins(&[(4, 10), (5, 12)]), BatchNumber(90), 30);
        assert_eq!((decision.missing, decision.end_unknown, numbers(&decision)), (0, false, vec![(10, 12)]));
        let decision = decide(&segments, &begins(&[(4, 10)]), BatchNumber(90), 30);
        assert!(decision.end_unknown, "nobody knows what followed");
    }

    #[test]
    fn after_a_loss_a_segment_begins_where_it_says_and_not_where_the_one_before_ended() {
        let segments = [segment(4, 20, &[20, 21])];
        assert_eq!(decide(&segments, &begins(&[(4, 12), (4, 20)]), BatchNumber(21), 4).missing, 0);
    }
}
