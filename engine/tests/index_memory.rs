//! What the index takes for each written block, counted by the allocator itself, at 1, 10 and 100 % fill, written
//! in order and in none; and that it says so of itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use torus_engine::index::{AtTie, Entry, Found, Index, Place, Run};
use torus_engine::log::Position;
use torus_schema::ids::{BlockIndex, Epoch, SliceId, Version, VolumeId};
use torus_schema::limits::BLOCKS_PER_EXTENT;

struct Counting;
static ASKED_FOR: AtomicUsize = AtomicUsize::new(0);

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED_FOR.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ASKED_FOR.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The hash table is at its emptiest here: it has just doubled.
const EXTENTS: u64 = 1000;
const BLOCKS: u64 = EXTENTS * BLOCKS_PER_EXTENT;

/// A permutation of 0..blocks.
fn scatter(number: u64, blocks: u64) -> u64 {
    (number * 2_654_435_761 + 12_345) % blocks
}

fn place(block: u64) -> Place {
    Place { volume: VolumeId(uuid::Uuid::nil()), slice: SliceId(1), block: BlockIndex(block) }
}

fn entry(number: u64) -> Entry {
    let version = Version::new(Epoch(1), number + 1);
    Entry { position: Position(number as u32 + 1), checksum: number as u32, version }
}

/// Bytes for each block of an index that `fill` made, and what it says of itself.
fn measure(name: &str, fill: impl Fn(&mut Index)) -> f64 {
    let before = ASKED_FOR.load(Relaxed);
    let mut index = Index::default();
    fill(&mut index);
    let counted = (ASKED_FOR.load(Relaxed) - before) as f64;
    let (said, blocks) = (index.memory_bytes() as f64, index.blocks());
    println!("{name:50} {blocks:8} blocks {:6.2} B each", counted / blocks as f64);
    assert!((said - counted).abs() <= counted / 10.0, "{name}: says {said}, is {counted}");
    counted / blocks as f64
}

/// So many blocks of each extent, all over it, written in no order.
fn scattered(per_extent: u64) -> impl Fn(&mut Index) {
    move |index| {
        for number in 0..EXTENTS * per_extent {
            let block = scatter(number, EXTENTS * per_extent);
            let (extent, number_in_it) = (block / per_extent, block % per_extent);
            let in_extent = (number_in_it * 421 + extent) % BLOCKS_PER_EXTENT;
            index.apply(place(extent * BLOCKS_PER_EXTENT + in_extent), entry(number), AtTie::NewcomerWins);
        }
        assert_eq!(index.blocks(), EXTENTS * per_extent);
    }
}

/// So many blocks from the start of the volume on, `together` at a time under one version, with a header before each.
fn in_order(blocks: u64, together: u64) -> impl Fn(&mut Index) {
    move |index| {
        for (write, first) in (0u64..).zip((0..blocks).step_by(together as usize)) {
            let checksums: Vec<u32> = (0..together).map(|number| (first + number) as u32).collect();
            let (position, version) = (Position((first + write) as u32 + 1), Version::new(Epoch(1), write + 1));
            let run = Run { first: place(first), version, position, checksums: &checksums };
            index.apply_run(run, AtTie::NewcomerWins, |_, _| panic!("nothing was there"));
        }
    }
}

/// One test: the allocator counts for the whole process.
#[test]
fn the_index_keeps_to_its_budget_for_each_written_block() {
    for per_extent in 1..=8 {
        assert!(measure(&format!("{per_extent} of each extent, in no order"), scattered(per_extent)) <= 64.0);
    }
    for per_extent in [10, 16, 32, 33, 64, 102, 128, 200] {
        assert!(measure(&format!("{per_extent} of each extent, in no order"), scattered(per_extent)) <= 40.0);
    }
    for per_extent in [256, 300, 400, 512, 700, 1000, 1024] {
        assert!(measure(&format!("{per_extent} of each extent, in no order"), scattered(per_extent)) <= 16.0);
    }
    for percent in [1, 10, 100] {
        for together in [1, 16, 256] {
            let blocks = (BLOCKS * percent / 100).next_multiple_of(BLOCKS_PER_EXTENT);
            let name = format!("{percent} % of the volume, in order, {together} together");
            assert!(measure(&name, in_order(blocks, together)) <= 6.0);
        }
        let name = format!("{percent} % of the volume, in no order");
        let bytes = measure(&name, |index| {
            (0..BLOCKS * percent / 100).for_each(|number| {
                index.apply(place(scatter(number, BLOCKS)), entry(number), AtTie::NewcomerWins);
            });
        });
        assert!(bytes <= if percent == 100 { 16.0 } else { 40.0 });
    }
    let overwritten = measure("all in order, then 30 % again in no order", |index| {
        in_order(BLOCKS, 16)(index);
        (0..BLOCKS * 3 / 10).for_each(|number| {
            index.apply(place(scatter(number, BLOCKS)), entry(BLOCKS + number), AtTie::NewcomerWins);
        });
    });
    assert!(overwritten <= 16.0);
    let mut index = Index::default();
    scattered(3)(&mut index);
    let before = ASKED_FOR.load(Relaxed);
    assert!(matches!(index.find(place(0)), Found::Data(_) | Found::Never));
    assert_eq!(ASKED_FOR.load(Relaxed), before, "a look-up asks for no memory");
}
