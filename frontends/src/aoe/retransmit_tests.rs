//! Orders in which writes and their copies can arrive, and what is taken of them.

use super::*;
use proptest::prelude::*;

const A: MacAddr = MacAddr(2, 0, 0, 0, 0, 1);
const B: MacAddr = MacAddr(2, 0, 0, 0, 0, 2);
const START: Duration = Duration::from_secs(1000);

/// As the Linux driver makes it.
fn tag(count: u32, tick: u32) -> Tag {
    Tag((count & 0x7fff) << 16 | tick & 0xffff)
}

fn after(millis: u64) -> Duration {
    START + Duration::from_millis(millis)
}

#[test]
fn an_original_that_comes_after_its_retransmission_and_a_newer_write_is_not_applied() {
    let mut history = History::default();
    let (original, again, newer) = (tag(1, 100), tag(2, 400), tag(3, 500));
    for write in [again, newer] {
        assert_eq!(history.admit(START, A, write, &(0..1024)), Verdict::Apply);
        history.ended(A, write, &(0..1024), true);
    }
    assert_eq!(history.admit(START, A, original, &(0..1024)), Verdict::Late);
    assert_eq!(history.admit(START, A, original, &(512..1024)), Verdict::Late, "a part of it");
    assert_eq!(history.admit(START, A, original, &(1024..2048)), Verdict::Apply, "elsewhere nothing is newer");
}

#[test]
fn the_same_frame_twice_is_applied_once_and_answered_twice() {
    let mut history = History::default();
    assert_eq!(history.admit(START, A, tag(1, 1), &(0..512)), Verdict::Apply);
    assert_eq!(history.admit(START, A, tag(1, 1), &(0..512)), Verdict::UnderWay);
    history.ended(A, tag(1, 1), &(0..512), true);
    assert_eq!(history.admit(START, A, tag(1, 1), &(0..512)), Verdict::AnswerAgain);
    assert_eq!(history.admit(START, A, tag(2, 1), &(0..512)), Verdict::Apply);
    history.ended(A, tag(2, 1), &(0..512), false);
    assert_eq!(history.admit(START, A, tag(2, 1), &(0..512)), Verdict::Apply, "the first attempt failed");
}

#[test]
fn a_tag_that_is_used_for_another_write_is_that_ones() {
    let mut history = History::default();
    assert_eq!(history.admit(START, A, tag(1, 1), &(0..512)), Verdict::Apply);
    assert_eq!(history.admit(START, A, tag(1, 1), &(512..1024)), Verdict::Apply);
    history.ended(A, tag(1, 1), &(0..512), true);
    assert_eq!(history.admit(START, A, tag(1, 1), &(512..1024)), Verdict::UnderWay, "it was the other that ended");
}

#[test]
fn two_that_overlap_and_come_in_order_are_both_applied() {
    let mut history = History::default();
    assert_eq!(history.admit(START, A, tag(7, 9), &(0..1024)), Verdict::Apply);
    assert_eq!(history.admit(START, A, tag(8, 9), &(512..1536)), Verdict::Apply);
    assert_eq!(history.admit(START, A, tag(7, 9), &(0..1024)), Verdict::UnderWay);
}

#[test]
fn the_tick_decides_and_within_a_tick_the_count_both_beyond_their_ends() {
    let older = |a: Tag, b: Tag| {
        assert!(a.is_older_than(b), "{a:x?} {b:x?}");
        assert!(!b.is_older_than(a), "{a:x?} {b:x?}");
    };
    older(tag(1, 5), tag(2, 5));
    older(tag(0x7fff, 5), tag(0, 5));
    // 16,384 frames later the count alone says the opposite.
    older(tag(0, 5), tag(0x4001, 6));
    older(tag(9, 0xffff), tag(10, 0));
    assert!(!tag(3, 3).is_older_than(tag(3, 3)));
}

#[test]
fn what_is_older_than_a_frame_can_live_is_forgotten() {
    let mut history = History::default();
    assert_eq!(history.admit(START, A, tag(9, 30_000), &(0..512)), Verdict::Apply);
    history.ended(A, tag(9, 30_000), &(0..512), true);
    // The host started anew: its ticks and counts are any.
    assert_eq!(history.admit(after(7_999), A, tag(1, 1), &(0..512)), Verdict::Late);
    assert_eq!(history.admit(after(8_000), A, tag(1, 1), &(0..512)), Verdict::Apply);
}

#[test]
fn sources_know_nothing_of_each_other() {
    let mut history = History::default();
    assert_eq!(history.admit(START, A, tag(5, 5), &(0..512)), Verdict::Apply);
    assert_eq!(history.admit(START, B, tag(1, 1), &(0..512)), Verdict::Apply);
}

#[test]
fn programs_tags_have_no_order() {
    let mut history = History::default();
    let (high, low) = (Tag(1 << 31 | 9), Tag(1 << 31 | 3));
    assert_eq!(history.admit(START, A, high, &(0..512)), Verdict::Apply);
    assert_eq!(history.admit(START, A, low, &(0..512)), Verdict::Apply);
    history.ended(A, low, &(0..512), true);
    assert_eq!(history.admit(START, A, low, &(0..512)), Verdict::AnswerAgain);
    assert_eq!(history.admit(START, A, tag(1, 1), &(0..512)), Verdict::Apply, "the kernel's are another's");
}

#[test]
fn a_write_that_another_process_took_makes_older_ones_late() {
    let mut history = History::default();
    history.note(START, A, tag(2, 2), &(0..512));
    assert_eq!(history.admit(START, A, tag(1, 1), &(0..512)), Verdict::Late);
    assert_eq!(history.admit(START, A, tag(2, 2), &(0..512)), Verdict::Apply, "it was not ours to answer then");
}

#[test]
fn when_memory_is_full_everything_older_is_refused_instead() {
    let mut history = History::default();
    let count = AOE_WRITES_REMEMBERED_MAX as u32 + 10;
    for number in 1..=count {
        let first = u64::from(number) * 512;
        // A new tick every thousand frames.
        let verdict = history.admit(START, A, tag(number, number / 1000), &(first..first + 512));
        assert_eq!(verdict, Verdict::Apply, "{number}");
    }
    assert!(history.sources[&(A, false)].known.len() <= AOE_WRITES_REMEMBERED_MAX);
    assert_eq!(history.admit(START, A, tag(9, 0), &(512..1024)), Verdict::Late, "forgotten, and so refused");
    assert_eq!(history.admit(after(8_000), A, tag(9, 0), &(512..1024)), Verdict::Apply);
}

#[test]
fn a_flood_of_sources_takes_a_bounded_room_and_ends() {
    let mut history = History::default();
    let source = |number: usize| MacAddr(2, 0, 0, 0, (number >> 8) as u8, number as u8);
    for number in 0..AOE_SOURCES_MAX {
        assert_eq!(history.admit(START, source(number), tag(1, 1), &(0..512)), Verdict::Apply);
    }
    assert_eq!(history.admit(START, source(AOE_SOURCES_MAX), tag(1, 1), &(0..512)), Verdict::TooManySources);
    assert_eq!(history.admit(after(8_000), source(AOE_SOURCES_MAX), tag(1, 1), &(0..512)), Verdict::Apply);
    assert_eq!(history.sources.len(), 1);
}

/// Sectors and who wrote them, beside the history: what a disk would have.
#[derive(Clone, Debug)]
struct Sent {
    first: u64,
    sectors: u64,
    /// How much later than it was sent it arrives, and its copies.
    arrivals: Vec<u64>,
}

fn sent() -> impl Strategy<Value = Sent> {
    let arrivals = proptest::collection::vec(0u64..3000, 1..4);
    (0u64..12, 1u64..4, arrivals).prop_map(|(first, sectors, arrivals)| Sent { first, sectors, arrivals })
}

proptest! {
    /// However frames are delayed, reordered and doubled within their lifetime: no sector ever goes back to what was
    /// sent before what it holds.
    #[test]
    fn no_sector_ever_goes_back(writes in proptest::collection::vec(sent(), 1..60), begin in any::<u32>()) {
        let mut history = History::default();
        let mut arrivals = Vec::new();
        for (number, write) in writes.iter().enumerate() {
            for delay in &write.arrivals {
                arrivals.push((number as u64 * 10 + delay, number));
            }
        }
        arrivals.sort();
        let mut holds = [None; 16];
        for (at, number) in arrivals {
            let Sent { first, sectors, .. } = writes[number];
            let tag = tag(begin.wrapping_add(number as u32), (begin >> 3).wrapping_add(number as u32 * 10));
            let range = first * 512..(first + sectors) * 512;
            if history.admit(after(at), A, tag, &range) == Verdict::Apply {
                history.ended(A, tag, &range, true);
                for sector in first..first + sectors {
                    let before = holds[sector as usize].replace(number);
                    prop_assert!(before.is_none_or(|before| before < number), "sector {sector}: {before:?}, {number}");
                }
            }
        }
        // And each that was the newest of its sectors when it arrived first was taken.
        prop_assert!(holds.iter().any(Option::is_some));
    }
}
