//! What the index takes in time and memory: `cargo run --release -p torus-engine --example index_speed [MILLION_BLOCKS]`.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;
use torus_engine::index::{AtTie, Entry, Index, Place, Run};
use torus_engine::log::Position;
use torus_schema::ids::{BlockIndex, Epoch, SliceId, Version, VolumeId};

fn place(block: u64) -> Place {
    Place { volume: VolumeId(uuid::Uuid::nil()), slice: SliceId(1), block: BlockIndex(block) }
}

/// Of this thread: what others do on the machine is not in it, but for the memory they use.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every thread has this clock").into()
}

/// Nanoseconds of processor time for each of `count`.
fn time(count: u64, each: impl FnMut(u64)) -> f64 {
    let start = processor_time();
    (0..count).for_each(each);
    (processor_time() - start).as_nanos() as f64 / count as f64
}

/// Knows no order that a prefetcher knows.
fn scatter(number: u64, blocks: u64) -> u64 {
    let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 31).wrapping_mul(0xd6e8_feb8_6659_fd93);
    ((u128::from(mixed ^ mixed >> 32) * u128::from(blocks)) >> 64) as u64
}

fn random(blocks: u64, percent: u64) {
    let (mut index, span) = (Index::default(), blocks * 100 / percent);
    let put = |index: &mut Index, block: u64, sequence: u64| {
        let (position, version) = (Position(sequence as u32 + 1), Version::new(Epoch(1), sequence + 1));
        let entry = Entry { position, checksum: block as u32, version };
        index.apply(place(scatter(block, span)), entry, AtTie::NewcomerWins);
    };
    let insert = time(blocks, |number| put(&mut index, number, number));
    let (mut found, stride) = (0, 7_368_787);
    let look_up = time(blocks, |number| {
        found += u64::from(index.find(place(scatter(number * stride % blocks, span))).version() > Version::ZERO);
    });
    assert_eq!(found, blocks);
    let overwrite = time(blocks, |number| put(&mut index, number * stride % blocks, number + blocks));
    report(&format!("random, {percent} %"), &index, &[("insert", insert), ("hit", look_up), ("again", overwrite)]);
}

fn sequential(blocks: u64, together: u64) {
    let mut index = Index::default();
    let checksums = vec![7; together as usize];
    let insert = time(blocks / together, |write| {
        let (position, version) = (Position((write * (together + 1)) as u32 + 1), Version::new(Epoch(1), write + 1));
        let run = Run { first: place(write * together), version, position, checksums: &checksums };
        index.apply_run(run, AtTie::NewcomerWins, |_, _| {});
    });
    let (mut found, stride) = (0, 7_368_787);
    let written = blocks / together * together;
    let look_up = time(written, |number| {
        found += u64::from(index.find(place(number * stride % written)).version() > Version::ZERO);
    });
    assert_eq!(found, written);
    let times = [("insert", insert / together as f64), ("hit", look_up)];
    report(&format!("in order, {together} together"), &index, &times);
}

fn report(name: &str, index: &Index, times: &[(&str, f64)]) {
    let blocks = index.blocks();
    let times: Vec<String> = times.iter().map(|(name, time)| format!("{name} {time:5.1} ns")).collect();
    println!(
        "{name:24} {blocks:9} blocks {:5.1} B each, {}",
        index.memory_bytes() as f64 / blocks as f64,
        times.join(", ")
    );
}

fn main() {
    let millions: u64 = std::env::args().nth(1).map_or(10, |text| text.parse().expect("millions of blocks"));
    // The extent's size divides both.
    let blocks = millions * 1_024_000;
    [1, 10, 100].into_iter().for_each(|percent| random(blocks, percent));
    [1, 16, 256].into_iter().for_each(|together| sequential(blocks, together));
}
