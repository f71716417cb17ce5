//! Write amplification: a shard, so and so full, is overwritten at random until what it costs no longer changes.
//!
//! The block file is small so that this ends, and its segments are small too (4 MiB instead of 64), so that there are as
//! many of them as on a disk of some size: what cleaning costs hangs on their number and on the spare part, not on their
//! length. Footers, openings and the sync at each opening are so sixteen times as frequent as in production.

use super::analytic::{self, BlockClass};
use super::bed::{BLOCK, Bed, Content, Counters, Writer, fill};
use crate::error::Result;
use crate::random::Random;
use crate::report::table;
use futures::future::join_all;
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;
use torus_schema::limits::{GIB, MIB};

const SHARD_BYTES: u64 = GIB;
const QUICK_BYTES: u64 = 128 * MIB;
pub const SEGMENT_BYTES: u64 = 4 * MIB;
/// The writer of a volume flushes after 64 MiB; what is not flushed is kept, which on a file this small would be a good
/// part of the spare space.
pub const FLUSH_BYTES: u64 = 4 * MIB;
const DEPTH: usize = 32;
const PERCENTS: [u64; 3] = [70, 80, 90];
/// Beyond it the theory knows no end.
const RHO_MAX: f64 = 0.999;
/// Half sizes of the live data that are written before it counts, and then.
const WARM_UP_HALVES: usize = 6;
const MEASURED_HALVES: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Pattern {
    Uniform,
    /// Four fifths of the writes go to one fifth of the blocks.
    EightyTwenty,
}

impl Pattern {
    fn classes(self) -> &'static [BlockClass] {
        match self {
            Pattern::Uniform => &analytic::UNIFORM,
            Pattern::EightyTwenty => &analytic::EIGHTY_TWENTY,
        }
    }

    /// Hot blocks are strewn over the volume: nothing about their place gives them away.
    fn block(self, random: &mut Random, blocks: u64) -> u64 {
        match self {
            Pattern::Uniform => random.below(blocks),
            Pattern::EightyTwenty => {
                let hot = random.below(5) > 0;
                let group = random.below(blocks / 5) * 5;
                group + if hot { 0 } else { 1 + random.below(4) }
            }
        }
    }
}

#[derive(Serialize)]
pub struct Row {
    pattern: Pattern,
    /// Of the block file's segments, filled with blocks that can be read.
    percent_full: u64,
    /// What the shard took of that before it refused, if it refused.
    percent_taken: f64,
    figures: Option<Figures>,
}

/// Of a shard that is as full as was asked for.
#[derive(Serialize)]
struct Figures {
    /// The shard says that clients should stop.
    says_full: bool,
    /// It refused a write for want of space, and that was the end.
    refused: bool,
    /// Live blocks by the room for blocks in all segments but the ones kept free.
    rho: f64,
    /// Blocks written and moved, by blocks written: what the theory is about.
    amplification: f64,
    /// The same in each half size since the first, to see whether it has come to rest.
    amplification_by_halves: Vec<f64>,
    log_bytes_per_byte: f64,
    disk_bytes_per_byte: f64,
    client_mib_per_second: f64,
    segments_cleaned: u64,
    analytic_in_turn: f64,
    analytic_apart: f64,
}

pub async fn measure(folder: &Path, quick: bool) -> Result<Vec<Row>> {
    let bytes = if quick { QUICK_BYTES } else { SHARD_BYTES };
    let mut rows = Vec::new();
    for pattern in [Pattern::Uniform, Pattern::EightyTwenty] {
        for percent in PERCENTS {
            eprintln!("bench: cleaning, {pattern:?} at {percent} %");
            rows.push(measure_one(folder, bytes, pattern, percent).await?);
        }
    }
    Ok(rows)
}

async fn measure_one(folder: &Path, bytes: u64, pattern: Pattern, percent: u64) -> Result<Row> {
    let bed = Bed::make(folder, "cleaning", bytes, SEGMENT_BYTES, FLUSH_BYTES).await?;
    let segments = u64::from(bed.shard.statistics().segments);
    let segment_blocks = SEGMENT_BYTES / BLOCK as u64;
    let blocks = segments * segment_blocks * percent / 100;
    let taken = fill(&bed.writer, blocks).await?;
    let figures = if taken == blocks { Some(overwritten(&bed, pattern, blocks).await?) } else { None };
    bed.close().await?;
    let percent_taken = taken as f64 / (segments * segment_blocks) as f64 * 100.0;
    Ok(Row { pattern, percent_full: percent, percent_taken, figures })
}

async fn overwritten(bed: &Bed, pattern: Pattern, blocks: u64) -> Result<Figures> {
    let random = Rc::new(RefCell::new(Random::new(blocks)));
    let (mut by_halves, mut free_segments, mut refused) = (Vec::new(), Vec::new(), false);
    let (mut before, mut started) = (Counters::now(&bed.shard)?, Instant::now());
    let mut written = 0;
    for half in 0..WARM_UP_HALVES + MEASURED_HALVES {
        if half == WARM_UP_HALVES {
            (before, started, written) = (Counters::now(&bed.shard)?, Instant::now(), 0);
        }
        let since = Counters::now(&bed.shard)?;
        let done = overwrite(&bed.writer, blocks / 2, || pattern.block(&mut random.borrow_mut(), blocks)).await?;
        written += done;
        by_halves.push(amplification_of(done, &since, &Counters::now(&bed.shard)?));
        free_segments.push(f64::from(bed.shard.statistics().segments_free));
        refused = done < blocks / 2;
        if refused {
            break;
        }
    }
    let (after, took) = (Counters::now(&bed.shard)?, started.elapsed());
    let free = free_segments.iter().sum::<f64>() / free_segments.len() as f64;
    let segments = f64::from(after.shard.segments) - free;
    let client_bytes = (written * BLOCK as u64) as f64;
    let per_byte = |bytes: u64| bytes as f64 / client_bytes;
    let amplification = amplification_of(written, &before, &after);
    let disk_bytes_per_byte = per_byte(after.disk_bytes - before.disk_bytes);
    // Headers and footers take part of the room.
    let room = segments * (SEGMENT_BYTES / BLOCK as u64) as f64 * amplification / disk_bytes_per_byte;
    let rho = (blocks as f64 / room).min(RHO_MAX);
    Ok(Figures {
        says_full: after.shard.full,
        refused,
        rho,
        amplification,
        amplification_by_halves: by_halves,
        log_bytes_per_byte: per_byte(after.shard.bytes_appended - before.shard.bytes_appended),
        disk_bytes_per_byte,
        client_mib_per_second: client_bytes / MIB as f64 / took.as_secs_f64(),
        segments_cleaned: after.shard.segments_cleaned - before.shard.segments_cleaned,
        analytic_in_turn: analytic::in_turn(pattern.classes(), rho),
        analytic_apart: analytic::apart(pattern.classes(), rho),
    })
}

fn amplification_of(written: u64, before: &Counters, after: &Counters) -> f64 {
    1.0 + (after.shard.blocks_moved - before.shard.blocks_moved) as f64 / written as f64
}

/// Returns how many were written: fewer if the shard refused one.
async fn overwrite(writer: &Writer, count: u64, block: impl FnMut() -> u64) -> Result<u64> {
    let content = Content::of_blocks(1);
    let (left, full, done) = (Cell::new(count), Cell::new(false), Cell::new(0));
    let block = RefCell::new(block);
    let work = async || -> Result<()> {
        while left.get() > 0 && !full.get() {
            left.set(left.get() - 1);
            let at = (block.borrow_mut())();
            if writer.write_if_room(at, &content).await? {
                done.set(done.get() + 1);
            } else {
                full.set(true);
            }
        }
        Ok(())
    };
    join_all((0..DEPTH).map(|_| work())).await.into_iter().collect::<Result<()>>()?;
    Ok(done.get())
}

pub fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        let name = format!("{:?}, {} %", row.pattern, row.percent_full);
        let Some(figures) = &row.figures else {
            let refused = format!("took {:.1} % and refused the rest", row.percent_taken);
            return [vec![name], vec![String::new(); 7], vec![refused]].concat();
        };
        let note = match (figures.refused, figures.says_full) {
            (true, _) => "refused an overwrite",
            (_, true) => "says full",
            _ => "",
        };
        vec![
            name,
            format!("{:.3}", figures.rho),
            format!("{:.2}", figures.amplification),
            format!("{:.2}", figures.analytic_in_turn),
            format!("{:.2}", figures.analytic_apart),
            format!("{:.2}", figures.log_bytes_per_byte),
            format!("{:.2}", figures.disk_bytes_per_byte),
            format!("{:.0}", figures.client_mib_per_second),
            note.to_string(),
        ]
    };
    let header = [
        "4 KiB overwrites, % of the file live",
        "live ÷ room",
        "amplification",
        "theory: in turn",
        "theory: hot apart",
        "log bytes/byte",
        "disk bytes/byte",
        "MiB/s",
        "",
    ];
    println!("{}", table(&header, rows.iter().map(cells)));
}
