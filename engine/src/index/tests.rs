//! The index against a plain map of blocks: writes and clears with versions in any order.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use torus_schema::ids::Epoch;

const VOLUME: VolumeId = VolumeId(uuid::Uuid::nil());
const EXTENTS: u64 = 6;

fn placement() -> Placement {
    Placement::new(VOLUME, 2, 2)
}

fn place(block: u64) -> Place {
    let block = BlockIndex(block);
    Place { volume: VOLUME, slice: placement().slice_of(block.extent()), block }
}

fn version(sequence: u64) -> Version {
    Version::new(Epoch(1), sequence)
}

fn entry(position: u32, sequence: u64) -> Entry {
    Entry { position: Position(position), checksum: position, version: version(sequence) }
}

fn range(slice: SliceId, first: u64, end: u64) -> ClearRange {
    ClearRange { volume: VOLUME, slice, first: BlockIndex(first), end: BlockIndex(end) }
}

#[test]
fn a_late_write_below_a_clear_of_an_extent_never_written_loses() {
    let mut index = Index::default();
    let slice = place(0).slice;
    index.clear(range(slice, 0, 1 << 40), version(9), &placement(), |_, _| panic!("nothing was there"));
    assert_eq!(index.volumes[&VOLUME].pages.len(), 0);
    assert_eq!(index.apply(place(3), entry(77, 8), AtTie::NewcomerWins), Applied::Superseded { by: version(9) });
    assert_eq!(index.find(place(3)), Found::Cleared(version(9)));
    assert_eq!(index.apply(place(3), entry(78, 10), AtTie::NewcomerWins), Applied::Current { replaced: None });
}

#[test]
fn clearing_a_whole_volume_of_a_pebibyte_makes_no_page() {
    let mut index = Index::default();
    for slice in placement().slices() {
        index.clear(range(*slice, 0, 1 << 38), version(1), &placement(), |_, _| panic!("nothing was there"));
    }
    let volume = &index.volumes[&VOLUME];
    assert_eq!((volume.pages.len(), volume.cleared.len()), (0, 2));
    let (first, next) = index.describe(VOLUME, Version::ZERO, BlockIndex(0), (&placement(), None), 5);
    assert_eq!(first.len(), 5);
    assert!(first.iter().all(|descriptor| descriptor.count == 1024 && descriptor.checksum.is_none()));
    assert_eq!(next, Some(BlockIndex(5 * 1024)));
    let (rest, _) = index.describe(VOLUME, Version::ZERO, BlockIndex(5 * 1024 + 7), (&placement(), None), 5);
    assert_eq!((rest[0].first, rest[0].count), (BlockIndex(5 * 1024 + 7), 1017));
}

#[test]
fn only_what_is_still_current_moves() {
    let mut index = Index::default();
    index.apply(place(3), entry(77, 8), AtTie::NewcomerWins);
    assert!(index.relocate(place(3), Position(77), Position(99)));
    assert!(!index.relocate(place(3), Position(77), Position(100)));
    assert!(!index.relocate(place(4), Position(77), Position(100)));
    assert_eq!(index.find(place(3)), Found::Data(Entry { position: Position(99), ..entry(77, 8) }));
}

#[test]
fn of_two_copies_the_standing_one_stays_where_that_is_asked_for() {
    let mut index = Index::default();
    index.apply(place(3), entry(77, 8), AtTie::NewcomerWins);
    assert_eq!(index.apply(place(3), entry(99, 8), AtTie::StandingWins), Applied::Superseded { by: version(8) });
    assert_eq!(index.find(place(3)), Found::Data(entry(77, 8)));
}

#[test]
fn a_run_says_what_its_blocks_one_by_one_would() {
    let checksums = [1, 2, 3, 4, 5, 6];
    let run =
        |sequence| Run { first: place(2), version: version(sequence), position: Position(50), checksums: &checksums };
    let mut index = Index::default();
    index.apply(place(3), entry(77, 8), AtTie::NewcomerWins);
    index.apply(place(5), entry(78, 4), AtTie::NewcomerWins);
    index.apply(place(6), entry(79, 5), AtTie::NewcomerWins);
    let mut told = Vec::new();
    index.apply_run(run(5), AtTie::StandingWins, |number, applied| told.push((number, applied)));
    let expected = [
        (1, Applied::Superseded { by: version(8) }),
        (3, Applied::Current { replaced: Some(entry(78, 4)) }),
        (4, Applied::Superseded { by: version(5) }),
    ];
    assert_eq!(told, expected);
    assert_eq!((index.blocks(), index.find(place(4)).version()), (6, version(5)));
    index.apply_run(run(9), AtTie::NewcomerWins, |_, applied| assert!(matches!(applied, Applied::Current { .. })));
    let found = index.find_range(place(2), 6);
    assert!(found.iter().zip(1..).all(|(found, number)| found.entry().is_some_and(|e| e.checksum == number)));
    index.clear(range(place(0).slice, 0, 4), version(10), &placement(), |_, _| {});
    assert_eq!(index.blocks(), 4);
    index.drop_volume(VOLUME, |_| {});
    assert_eq!(index.blocks(), 0);
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64),
    Clear(usize, u64, u64, u64),
}

/// A version is of a write or of a clear, never of both.
fn step() -> impl Strategy<Value = Step> {
    let block = (0..EXTENTS, prop_oneof![Just(0u64), Just(1), Just(512), Just(1023)]).prop_map(|(e, b)| e * 1024 + b);
    prop_oneof![
        (block.clone(), 1u64..30).prop_map(|(block, sequence)| Step::Write(block, 2 * sequence)),
        (0usize..2, block.clone(), block, 0u64..30).prop_map(|(slice, a, b, s)| Step::Clear(
            slice,
            a.min(b),
            a.max(b),
            2 * s + 1
        )),
    ]
}

proptest! {
    #[test]
    fn the_highest_version_of_every_block_is_found_and_described(steps in prop::collection::vec(step(), 1..40), above in 0u64..60) {
        let (placement, mut index) = (placement(), Index::default());
        let mut model: BTreeMap<u64, (u64, Option<u32>)> = BTreeMap::new();
        for (number, step) in (1u32..).zip(steps) {
            match step {
                Step::Write(block, sequence) => {
                    let current = model.get(&block).copied().unwrap_or_default();
                    let applied = index.apply(place(block), entry(number, sequence), AtTie::NewcomerWins);
                    if current.0 > sequence {
                        prop_assert_eq!(applied, Applied::Superseded { by: version(current.0) });
                    } else {
                        let replaced = current.1.map(|position| entry(position, current.0));
                        prop_assert_eq!(applied, Applied::Current { replaced });
                        model.insert(block, (sequence, Some(number)));
                    }
                }
                Step::Clear(slice, first, end, sequence) => {
                    let slice = placement.slices()[slice];
                    let mut told = Vec::new();
                    index.clear(range(slice, first, end), version(sequence), &placement, |_, entry| told.push(entry.position.0));
                    let mut expected = Vec::new();
                    for block in (first..end).filter(|block| place(*block).slice == slice) {
                        let current = model.get(&block).copied().unwrap_or_default();
                        if current.0 <= sequence {
                            expected.extend(current.1);
                            model.insert(block, (sequence, None));
                        }
                    }
                    told.sort_unstable();
                    expected.sort_unstable();
                    prop_assert_eq!(told, expected);
                    let superseded = index.is_superseded(range(slice, first, end), version(sequence), version(99), &placement);
                    let all = (first..end).filter(|block| place(*block).slice == slice).all(|block| model[&block].0 > sequence);
                    prop_assert!(!superseded || all);
                }
            }
        }
        let mut described = BTreeMap::new();
        let mut from = Some(BlockIndex(0));
        while let Some(at) = from {
            let (descriptors, next) = index.describe(VOLUME, version(above), at, (&placement, None), 3);
            prop_assert!(descriptors.len() <= 3 && next.is_none_or(|next| next > at));
            for descriptor in descriptors {
                for block in descriptor.first.0..descriptor.first.0 + u64::from(descriptor.count) {
                    prop_assert!(described.insert(block, (descriptor.version.sequence, descriptor.checksum)).is_none());
                }
            }
            from = next;
        }
        let expected: BTreeMap<_, _> = model.iter().filter(|(_, found)| found.0 > above).map(|(b, f)| (*b, *f)).collect();
        prop_assert_eq!(described, expected);
        prop_assert_eq!(index.blocks(), model.values().filter(|found| found.1.is_some()).count() as u64);
        for block in (0..EXTENTS * 1024).step_by(256).chain(model.keys().copied()) {
            let expected = match model.get(&block) {
                None => Found::Never,
                Some((sequence, None)) => Found::Cleared(version(*sequence)),
                Some((sequence, Some(position))) => Found::Data(entry(*position, *sequence)),
            };
            prop_assert_eq!(index.find(place(block)), expected);
        }
    }
}
