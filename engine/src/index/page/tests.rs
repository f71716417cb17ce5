//! Pages in every form against a plain map: whatever a page has become, it answers as the map does.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use torus_schema::ids::Epoch;

const BLOCKS: u16 = BLOCKS_PER_EXTENT as u16;

fn entry(position: u32, epoch: u32, sequence: u64) -> Entry {
    Entry { position: Position(position), checksum: position ^ 0xffff, version: Version::new(Epoch(epoch), sequence) }
}

fn scatter(block: u16) -> u16 {
    (u32::from(block) * 421 % u32::from(BLOCKS)) as u16
}

/// Its share of the slab and the hash table is not in it.
fn bytes_per_block(page: &Page, blocks: usize) -> f64 {
    page.heap_bytes() as f64 / blocks as f64
}

#[test]
fn a_page_written_in_order_is_runs_and_in_no_order_is_packed() {
    let (mut runs, mut packed) = (Page::default(), Page::default());
    for block in 0..BLOCKS {
        runs.put(block, entry(7 + 2 * u32::from(block), 1, 3 * u64::from(block)));
        let (place, scattered) = (scatter(block), u32::from(block) * 7919);
        packed.put(place, entry(1 + scattered, 1, u64::from(scattered)));
    }
    assert!(matches!(runs, Page::Runs(_)) && matches!(packed, Page::Packed(_)));
    assert!(bytes_per_block(&runs, 1024) < 4.5 && bytes_per_block(&packed, 1024) < 14.0);
    for block in 0..BLOCKS {
        assert_eq!(runs.get(block), Found::Data(entry(7 + 2 * u32::from(block), 1, 3 * u64::from(block))));
        let scattered = u32::from(block) * 7919;
        assert_eq!(packed.get(scatter(block)), Found::Data(entry(1 + scattered, 1, u64::from(scattered))));
    }
    assert_eq!(runs.highest(), Version::new(Epoch(1), 3 * 1023));
}

#[test]
fn runs_that_are_overwritten_here_and_there_become_packed_and_runs_again_when_they_are_written_anew() {
    let mut page = Page::default();
    (0..BLOCKS).for_each(|block| page.put(block, entry(1 + u32::from(block), 1, 1)));
    assert!(matches!(page, Page::Runs(_)));
    (0..BLOCKS).step_by(2).for_each(|block| page.put(block, entry(90_000 + 77 * u32::from(block), 1, 2)));
    assert!(matches!(page, Page::Packed(_)));
    (0..BLOCKS).for_each(|block| page.put(block, entry(200_000 + u32::from(block), 2, 1)));
    assert!(matches!(page, Page::Runs(_)));
    (0..BLOCKS).for_each(|block| assert_eq!(page.get(block), Found::Data(entry(200_000 + u32::from(block), 2, 1))));
}

#[test]
fn a_page_that_fills_from_its_end_becomes_runs_when_it_is_full() {
    let mut page = Page::default();
    (0..BLOCKS).rev().for_each(|block| page.put(block, entry(1 + u32::from(block), 1, 1)));
    assert!(matches!(page, Page::Runs(_)));
    assert!(bytes_per_block(&page, 1024) < 4.5);
}

#[test]
fn a_page_that_is_cleared_gets_small_again() {
    let mut page = Page::default();
    (0..BLOCKS).for_each(|block| page.put(block, entry(1 + 5000 * u32::from(block), 1, 1)));
    let mut hidden = 0;
    page.clear(3, BLOCKS - 3, Version::new(Epoch(1), 2), &mut |_, _| hidden += 1);
    assert_eq!(hidden, BLOCKS - 3);
    assert!(matches!(&page, Page::Few(spans) if spans.len() == 4));
    page.forget_below(Version::new(Epoch(1), 2), &mut |_, _| {});
    assert!(page.is_empty());
}

#[test]
fn epochs_and_sequences_that_come_and_go_leave_nothing_behind() {
    let mut page = Page::default();
    (0..60).for_each(|block| page.put(block, entry(1 + 1000 * u32::from(block), 0, 1)));
    for epoch in 0..70_000 {
        page.put(0, entry(1, epoch, u64::from(epoch) << 30));
        page.put(1, entry(2, 1, u64::from(epoch) << 30));
    }
    assert_eq!(page.get(0), Found::Data(entry(1, 69_999, 69_999 << 30)));
    assert_eq!(page.get(7), Found::Data(entry(7001, 0, 1)));
    assert!(bytes_per_block(&page, 60) < 30.0, "{}", page.heap_bytes());
}

#[test]
fn every_block_may_be_of_an_epoch_of_its_own() {
    let mut page = Page::default();
    for round in 0..3u32 {
        (0..BLOCKS).for_each(|block| page.put(block, entry(1 + u32::from(block), 5000 * round + u32::from(block), 9)));
    }
    for block in 0..BLOCKS {
        assert_eq!(page.get(block), Found::Data(entry(1 + u32::from(block), 10_000 + u32::from(block), 9)));
    }
}

#[derive(Debug, Clone)]
enum Step {
    Put(u16, Entry),
    /// Blocks, and the first one's place and version.
    PutRun(u16, u16, Entry),
    Sequential {
        first: u16,
        count: u16,
        position_step: u32,
        version_step: u64,
        entry: Entry,
    },
    Scattered {
        first: u16,
        count: u16,
        entry: Entry,
    },
    Relocate(u16, u16, u32),
    Clear(u16, u16, Version),
    Forget(Version),
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let sequence = prop_oneof![0u64..200, Just(u64::from(column::LOW_MASK) - 3), (0u64..1 << 18).prop_map(|s| s << 30)];
    (1u32..1 << 20, 1u32..5, sequence).prop_map(|(position, epoch, sequence)| entry(position, epoch, sequence))
}

fn range() -> impl Strategy<Value = (u16, u16)> {
    let end = |(first, count): (u16, u16)| (first, count.min(BLOCKS - first));
    prop_oneof![(0..BLOCKS, 1..40u16).prop_map(end), (0..BLOCKS, 1..BLOCKS).prop_map(end)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..BLOCKS, any_entry()).prop_map(|(block, entry)| Step::Put(block, entry)),
        3 => (range(), any_entry()).prop_map(|((first, count), entry)| Step::PutRun(first, count, entry)),
        3 => (range(), 0u32..3, 0u64..300, any_entry()).prop_map(|((first, count), position_step, version_step, entry)| {
            Step::Sequential { first, count, position_step, version_step, entry }
        }),
        2 => (range(), any_entry()).prop_map(|((first, count), entry)| Step::Scattered { first, count, entry }),
        2 => (range(), 1u32..1 << 20).prop_map(|((first, count), to)| Step::Relocate(first, count, to)),
        2 => (range(), any_entry()).prop_map(|((first, count), entry)| Step::Clear(first, count, entry.version)),
        1 => any_entry().prop_map(|entry| Step::Forget(entry.version)),
    ]
}

/// One found for each block.
struct Model(Vec<Found>);

impl Model {
    fn put(&mut self, page: &mut Page, block: u16, entry: Entry) {
        page.put(block, entry);
        self.0[usize::from(block)] = Found::Data(entry);
    }

    fn run(&mut self, page: &mut Page, step: Step) {
        let next = |entry: Entry, number: u16, position_step: u32, version_step: u64| {
            let (number, Version { epoch, sequence }) = (u32::from(number), entry.version);
            self::entry(entry.position.0 + number * position_step, epoch.0, sequence + u64::from(number) * version_step)
        };
        match step {
            Step::Put(block, entry) => self.put(page, block, entry),
            Step::PutRun(first, count, entry) => {
                let blocks = usize::from(first)..usize::from(first + count);
                let free = self.0[blocks].iter().all(|found| *found == Found::Never);
                assert_eq!(page.is_free(first, count), free);
                if free {
                    let entries: Vec<Entry> = (0..count).map(|number| next(entry, number, 1, 0)).collect();
                    let checksums: Vec<u32> = entries.iter().map(|entry| entry.checksum).collect();
                    page.put_run(first, entry, &checksums);
                    (usize::from(first)..).zip(entries).for_each(|(block, entry)| self.0[block] = Found::Data(entry));
                }
            }
            Step::Sequential { first, count, position_step, version_step, entry } => (0..count)
                .for_each(|number| self.put(page, first + number, next(entry, number, position_step, version_step))),
            Step::Scattered { first, count, entry } => (0..count).for_each(|number| {
                let block = first + (u32::from(number) * 421 % u32::from(count)) as u16;
                self.put(page, block, next(entry, number, 977, 3));
            }),
            Step::Relocate(first, count, to) => (0..count).for_each(|number| {
                let (block, to) = (first + number, Position(to + u32::from(number)));
                if let Found::Data(entry) = &mut self.0[usize::from(block)] {
                    page.relocate(block, to);
                    entry.position = to;
                }
            }),
            Step::Clear(first, count, version) => {
                let mut hidden = Vec::new();
                page.clear(first, count, version, &mut |block, found| hidden.push((block, found)));
                let mut expected = Vec::new();
                let cleared = self.0[usize::from(first)..][..usize::from(count)].iter_mut();
                for (block, found) in (first..).zip(cleared).filter(|(_, found)| found.version() <= version) {
                    let before = std::mem::replace(found, Found::Cleared(version));
                    expected.extend(before.entry().map(|_| (block, before)));
                }
                assert_eq!(hidden, expected);
            }
            Step::Forget(version) => {
                let mut hidden = Vec::new();
                page.forget_below(version, &mut |block, found| hidden.push((block, found)));
                let mut expected = Vec::new();
                for (block, found) in (0..).zip(&mut self.0).filter(|(_, found)| found.version() <= version) {
                    let before = std::mem::replace(found, Found::Never);
                    expected.extend(before.entry().map(|_| (block, before)));
                }
                assert_eq!(hidden, expected);
            }
        }
    }

    fn check(&self, page: &Page) {
        let mut data = BTreeMap::new();
        page.for_each_data(|block, found| assert!(data.insert(block, found).is_none()));
        for (block, expected) in (0..).zip(&self.0) {
            assert_eq!(page.get(block), *expected, "block {block}");
            assert_eq!(data.get(&block), expected.entry().map(|_| expected));
            assert!(page.highest() >= expected.version());
        }
        assert_eq!(page.is_empty(), self.0.iter().all(|found| *found == Found::Never));
        let blocks = data.len();
        let (found, expected) = (page.heap_bytes(), 15 * blocks + 64 * (spans_of_cleared(page) + 8));
        assert!(blocks < 256 || found < expected, "{found} bytes for {blocks} blocks");
    }
}

/// And eras, of which there are no more than these steps name.
fn spans_of_cleared(page: &Page) -> usize {
    page.spans().iter().filter(|span| !span.is_data()).count()
}

proptest! {
    #[test]
    fn a_page_is_a_map_of_blocks_whatever_form_it_takes(steps in prop::collection::vec(step(), 1..50)) {
        let (mut page, mut model) = (Page::default(), Model(vec![Found::Never; usize::from(BLOCKS)]));
        for step in steps {
            model.run(&mut page, step);
            model.check(&page);
        }
    }
}
