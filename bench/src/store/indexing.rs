//! The index alone: what a block costs in time and memory, by how much of its volume is written and in what order.
//!
//! Time is this thread's CPU time: nothing here waits, and so what else runs takes no part but its place in the caches.
//! Memory is what the allocator gave, its own overhead included, not what the index says of itself.

use super::bed::{BLOCK, volume};
use crate::count::allocator;
use crate::error::Result;
use crate::random::Random;
use crate::report::table;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::hint::black_box;
use std::time::Duration;
use torus_engine::index::{AtTie, Entry, Index, Place};
use torus_engine::log::Position;
use torus_schema::ids::{BlockIndex, Epoch, SliceId, Version};
use torus_schema::limits::{GIB, TIB};

const VOLUME_BLOCKS: u64 = 32 * GIB / BLOCK as u64;
const QUICK_BLOCKS: u64 = GIB / BLOCK as u64;
const LOOK_UPS: u64 = 2_000_000;
const PERCENTS: [u64; 3] = [1, 10, 100];

/// How the volume came to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Pattern {
    /// 4 KiB here and there over the whole volume, each under a version of its own.
    Random,
    /// 64 KiB here and there, neighbours under one version.
    Random64KiB,
    /// From the volume's start on, 1 MiB under one version, as mkfs, dd or a restore do.
    Sequential,
}

const PATTERNS: [Pattern; 3] = [Pattern::Random, Pattern::Random64KiB, Pattern::Sequential];

impl Pattern {
    fn blocks_per_write(self) -> u64 {
        match self {
            Pattern::Random => 1,
            Pattern::Random64KiB => 16,
            Pattern::Sequential => 256,
        }
    }

    /// The first block of each write, in order.
    fn writes(self, volume_blocks: u64, percent: u64) -> Vec<u64> {
        let each = self.blocks_per_write();
        let places = volume_blocks / each;
        let count = (places * percent / 100) as usize;
        let mut starts: Vec<u64> = match self {
            Pattern::Sequential => (0..count as u64).collect(),
            _ => Random::new(1).shuffled(places),
        };
        starts.truncate(count);
        starts.iter_mut().for_each(|start| *start *= each);
        starts
    }
}

#[derive(Serialize)]
pub struct Row {
    pattern: Pattern,
    percent_written: u64,
    blocks: u64,
    insert_ns: f64,
    overwrite_ns: f64,
    look_up_ns: f64,
    bytes_per_block: f64,
    /// Of the index of a node that stores 1 TiB written so.
    extrapolated_bytes_for_1_tib: f64,
}

pub fn measure(quick: bool) -> Result<Vec<Row>> {
    let volume_blocks = if quick { QUICK_BLOCKS } else { VOLUME_BLOCKS };
    eprintln!("bench: index");
    let cases = PATTERNS.into_iter().flat_map(|pattern| PERCENTS.map(|percent| (pattern, percent)));
    Ok(cases.map(|(pattern, percent)| measure_one(pattern, percent, volume_blocks)).collect())
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has had it since 2.6.12");
    Duration::from(time)
}

fn place(block: u64) -> Place {
    Place { volume: volume(), slice: SliceId(0), block: BlockIndex(block) }
}

fn measure_one(pattern: Pattern, percent: u64, volume_blocks: u64) -> Row {
    let writes = pattern.writes(volume_blocks, percent);
    let blocks = writes.len() as u64 * pattern.blocks_per_write();
    // Counting costs time, so memory is measured by doing the same once more.
    let counted = insert_counted(pattern, &writes);
    let mut index = Index::default();
    let per_block = |started: Duration, blocks: u64| (cpu_time() - started).as_nanos() as f64 / blocks as f64;
    let started = cpu_time();
    insert(&mut index, pattern, &writes, 0);
    let insert_ns = per_block(started, blocks);
    let mut random = Random::new(2);
    let started = cpu_time();
    for _ in 0..LOOK_UPS {
        let write = writes[random.below(writes.len() as u64) as usize];
        black_box(index.find(place(write + random.below(pattern.blocks_per_write()))));
    }
    let look_up_ns = per_block(started, LOOK_UPS);
    let started = cpu_time();
    insert(&mut index, pattern, &writes, writes.len() as u64);
    let overwrite_ns = per_block(started, blocks);
    let bytes_per_block = counted as f64 / blocks as f64;
    Row {
        pattern,
        percent_written: percent,
        blocks,
        insert_ns,
        overwrite_ns,
        look_up_ns,
        bytes_per_block,
        extrapolated_bytes_for_1_tib: bytes_per_block * (TIB / BLOCK as u64) as f64,
    }
}

fn insert_counted(pattern: Pattern, writes: &[u64]) -> u64 {
    allocator::start_weighing();
    let mut index = Index::default();
    insert(&mut index, pattern, writes, 0);
    let bytes = allocator::weighed();
    drop(index);
    bytes
}

/// As a log gives them: one block lies behind the other, in the order of writing.
fn insert(index: &mut Index, pattern: Pattern, writes: &[u64], sequence: u64) {
    let each = pattern.blocks_per_write();
    for (number, first) in (0u64..).zip(writes) {
        let version = Version::new(Epoch(1), sequence + number + 1);
        for block in 0..each {
            let position = Position((16 + number * each + block) as u32);
            let entry = Entry { position, checksum: block as u32, version };
            black_box(index.apply(place(first + block), entry, AtTie::NewcomerWins));
        }
    }
}

pub fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        vec![
            format!("{:?}, {} %", row.pattern, row.percent_written),
            format!("{:.0}", row.insert_ns),
            format!("{:.0}", row.overwrite_ns),
            format!("{:.0}", row.look_up_ns),
            format!("{:.1}", row.bytes_per_block),
            format!("{:.2}", row.extrapolated_bytes_for_1_tib / GIB as f64),
        ]
    };
    let header = [
        "index: pattern, % of the volume written",
        "insert ns/block",
        "overwrite ns/block",
        "look-up ns",
        "bytes/block",
        "GiB for 1 TiB stored so",
    ];
    println!("{}", table(&header, rows.iter().map(cells)));
}
