//! What a reader feels of the cleaner: the same reads alone, beside overwrites while there is still space enough, and
//! beside the same overwrites when each of them makes the cleaner work. The issue allows p99 to double from the second
//! to the third.

use super::bed::{BLOCK, Bed, Content, Writer, fill, require_room};
use super::cleaning::{FLUSH_BYTES, SEGMENT_BYTES};
use super::traffic::histogram;
use crate::error::Result;
use crate::random::Random;
use crate::report::table;
use futures::future::{join, join_all};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};
use torus_schema::limits::{GIB, MIB};

const SHARD_BYTES: u64 = 2 * GIB;
/// So much is live: at rest a block is moved more than once for each that is written.
const PERCENT: u64 = 75;
const READ_DEPTH: usize = 8;
const WRITE_DEPTH: u64 = 4;
/// Of the client, by 64 KiB: a tenth of what the shard could take, so that what is felt is the cleaner and not a queue
/// that only grows.
const WRITE_BYTES_PER_SECOND: u64 = 24 * MIB;
const WRITE_BLOCKS: u64 = 16;
/// Overwritten by half of the live data at full speed before the third.
const WARM_UP_PART: u64 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Beside {
    Nothing,
    Overwrites,
    OverwritesAndCleaning,
}

#[derive(Serialize)]
pub struct Row {
    beside: Beside,
    reads_per_second: f64,
    mean_us: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
    overwrites_mib_per_second: f64,
    segments_cleaned: u64,
}

pub async fn measure(folder: &Path, run: Duration) -> Result<Vec<Row>> {
    eprintln!("bench: reads beside the cleaner");
    let bed = Bed::make(folder, "reads", SHARD_BYTES, SEGMENT_BYTES, FLUSH_BYTES).await?;
    let segments = u64::from(bed.shard.statistics().segments);
    let blocks = segments * (SEGMENT_BYTES / BLOCK as u64) * PERCENT / 100;
    require_room(fill(&bed.writer, blocks).await?, blocks)?;
    let mut rows = Vec::new();
    for beside in [Beside::Nothing, Beside::Overwrites, Beside::OverwritesAndCleaning] {
        if beside == Beside::OverwritesAndCleaning {
            warm_up(&bed.writer, blocks).await?;
        }
        rows.push(measure_one(&bed, beside, blocks, run).await?);
    }
    bed.close().await?;
    Ok(rows)
}

async fn warm_up(writer: &Writer, blocks: u64) -> Result<()> {
    let content = Content::of_blocks(WRITE_BLOCKS as usize);
    let random = RefCell::new(Random::new(11));
    let left = Cell::new(blocks / WRITE_BLOCKS / WARM_UP_PART);
    let work = async || -> Result<()> {
        while left.get() > 0 {
            left.set(left.get() - 1);
            let at = random.borrow_mut().below(blocks / WRITE_BLOCKS) * WRITE_BLOCKS;
            writer.write(at, &content).await?;
        }
        Ok(())
    };
    join_all((0..READ_DEPTH).map(|_| work())).await.into_iter().collect()
}

async fn measure_one(bed: &Bed, beside: Beside, blocks: u64, run: Duration) -> Result<Row> {
    let cleaned_before = bed.shard.statistics().segments_cleaned;
    let started = Instant::now();
    let end = started + run;
    let write = async || if beside == Beside::Nothing { Ok(0) } else { overwrite(&bed.writer, blocks, end).await };
    let (latencies, written) = join(read(&bed.writer, blocks, end), write()).await;
    let (latencies, written) = (latencies?, written?);
    let took = started.elapsed().as_secs_f64();
    let at = |quantile: f64| latencies.value_at_quantile(quantile) as f64 / 1000.0;
    Ok(Row {
        beside,
        reads_per_second: latencies.len() as f64 / took,
        mean_us: latencies.mean() / 1000.0,
        p50_us: at(0.5),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us: latencies.max() as f64 / 1000.0,
        overwrites_mib_per_second: written as f64 / MIB as f64 / took,
        segments_cleaned: bed.shard.statistics().segments_cleaned - cleaned_before,
    })
}

async fn read(writer: &Writer, blocks: u64, end: Instant) -> Result<Histogram<u64>> {
    let latencies = Rc::new(RefCell::new(histogram()?));
    let task = |index: usize| {
        let (writer, latencies) = (writer.clone(), latencies.clone());
        let mut random = Random::new(index as u64);
        glommio::spawn_local(async move {
            loop {
                let started = Instant::now();
                if started >= end {
                    return Ok(());
                }
                writer.read(random.below(blocks), 1).await?;
                latencies.borrow_mut().saturating_record(started.elapsed().as_nanos() as u64);
            }
        })
    };
    let tasks: Vec<_> = (0..READ_DEPTH).map(task).collect();
    join_all(tasks).await.into_iter().collect::<Result<()>>()?;
    Ok(Rc::into_inner(latencies).expect("the tasks have ended").into_inner())
}

/// At the rate, `WRITE_DEPTH` at once; returns the bytes written. One that is late does not catch up in a burst.
async fn overwrite(writer: &Writer, blocks: u64, end: Instant) -> Result<u64> {
    let write_bytes = WRITE_BLOCKS * BLOCK as u64;
    let pause = Duration::from_nanos(1_000_000_000 * write_bytes * WRITE_DEPTH / WRITE_BYTES_PER_SECOND);
    let content = Content::of_blocks(WRITE_BLOCKS as usize);
    let task = |index: u64| {
        let (writer, content) = (writer.clone(), content.clone());
        let mut random = Random::new(100 + index);
        glommio::spawn_local(async move {
            let mut written = 0;
            while Instant::now() < end {
                let next = Instant::now() + pause;
                let at = random.below(blocks / WRITE_BLOCKS) * WRITE_BLOCKS;
                writer.write(at, &content).await?;
                written += write_bytes;
                glommio::timer::sleep(next.saturating_duration_since(Instant::now())).await;
            }
            Ok(written)
        })
    };
    let tasks: Vec<_> = (0..WRITE_DEPTH).map(task).collect();
    join_all(tasks).await.into_iter().sum()
}

pub fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        let mut cells = vec![format!("{:?}", row.beside), format!("{:.1} k", row.reads_per_second / 1000.0)];
        cells.extend([row.mean_us, row.p50_us, row.p99_us, row.p999_us, row.max_us].map(|us| format!("{us:.0}")));
        cells.push(format!("{:.1}", row.overwrites_mib_per_second));
        cells.push(row.segments_cleaned.to_string());
        cells
    };
    let header = [
        "4 KiB reads, depth 8, beside",
        "per second",
        "mean µs",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "max µs",
        "overwrites MiB/s",
        "segments cleaned",
    ];
    println!("{}", table(&header, rows.iter().map(cells)));
}
