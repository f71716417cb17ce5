//! 4 KiB at random on a shard, round by round beside the raw file by fio's io_uring engine, and what group commit makes
//! of it: blocks for each batch, bytes on the disk for each byte of the client, syncs for each flush.
//!
//! The raw side of append + flush is as many clients as the depth, each of which calls fdatasync behind its own write:
//! one fio job with more in flight would not wait for the write it syncs.

use super::bed::{BLOCK, Bed, Content, Counters, Writer, fill, require_room};
use crate::error::{BenchError, Result};
use crate::fio::{self, Plain, Size};
use crate::processes::own_cpu;
use crate::random::Random;
use crate::report::table;
use crate::stand::{REGION_BYTES, written_file};
use crate::statistics::{Spread, ratio};
use futures::future::join_all;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};
use torus_schema::limits::{GIB, REPLAY_BYTES_PER_VOLUME_MAX, SEGMENT_BYTES};

/// A quarter of it is live, so that cleaning is cheap but not absent.
const SHARD_BYTES: u64 = 4 * GIB;
const REGION_BLOCKS: u64 = REGION_BYTES / BLOCK as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Work {
    Append,
    AppendAndFlush,
    Read,
}

const DEPTHS: [usize; 3] = [1, 8, 32];
const WORKS: [Work; 3] = [Work::Append, Work::AppendAndFlush, Work::Read];

struct Sample {
    raw: fio::Measured,
    per_second: f64,
    latencies: Histogram<u64>,
    cpu_us: f64,
    before: Counters,
    after: Counters,
}

#[derive(Serialize)]
pub struct Row {
    work: Work,
    depth: usize,
    raw_per_second: Spread,
    per_second: Spread,
    ratio_to_raw: Spread,
    raw_mean_us: Spread,
    mean_us: Spread,
    raw_p99_us: Spread,
    p99_us: Spread,
    cpu_us: Spread,
    /// `None` of reads.
    commit: Option<Commit>,
}

/// Group commit, over all rounds together.
#[derive(Serialize)]
struct Commit {
    blocks_per_batch: f64,
    /// What the log grew by.
    log_bytes_per_byte: f64,
    /// All that was written, cleaning, footers and openings too.
    disk_bytes_per_byte: f64,
    syncs: u64,
    /// `None` where nobody flushed but the writer for himself, now and then.
    syncs_per_flush: Option<f64>,
}

pub async fn measure(folder: &Path, rounds: usize, run: Duration) -> Result<Vec<Row>> {
    eprintln!("bench: writing the raw file and the shard");
    let raw = written_file(folder, "raw")?;
    let bed = Bed::make(folder, "traffic", SHARD_BYTES, SEGMENT_BYTES, REPLAY_BYTES_PER_VOLUME_MAX).await?;
    require_room(fill(&bed.writer, REGION_BLOCKS).await?, REGION_BLOCKS)?;
    let cases: Vec<(Work, usize)> = WORKS.iter().flat_map(|work| DEPTHS.map(|depth| (*work, depth))).collect();
    let mut samples: Vec<Vec<Sample>> = cases.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        eprintln!("bench: traffic, round {} of {rounds}", round + 1);
        for ((work, depth), samples) in cases.iter().zip(&mut samples) {
            samples.push(sample(&bed, &raw, *work, *depth, run, round as u64).await?);
        }
    }
    bed.close().await?;
    std::fs::remove_file(&raw).map_err(BenchError::wrap("removal of the raw file"))?;
    Ok(cases.into_iter().zip(&samples).filter_map(|(case, samples)| row(case, samples)).collect())
}

async fn sample(bed: &Bed, raw: &Path, work: Work, depth: usize, run: Duration, seed: u64) -> Result<Sample> {
    let flushes = work == Work::AppendAndFlush;
    let (clients, depth_each) = if flushes { (depth, 1) } else { (1, depth) };
    let size = Size { bytes: REGION_BYTES, run };
    let plain = Plain { is_write: work != Work::Read, clients, depth: depth_each, flushes, size };
    // Nothing else is to run meanwhile, so this executor may stand still for it.
    let raw = fio::run_plain(plain, raw)?;
    let (before, cpu, started) = (Counters::now(&bed.shard)?, own_cpu()?, Instant::now());
    let latencies = drive(&bed.writer, work, depth, run, seed).await?;
    let (took, used) = (started.elapsed(), own_cpu()?.saturating_sub(cpu));
    let after = Counters::now(&bed.shard)?;
    if latencies.is_empty() {
        let because = format!("no operation completed within {took:?}");
        return Err(BenchError::Failed { what: format!("{work:?} at depth {depth}"), because });
    }
    let operations = latencies.len() as f64;
    let (per_second, cpu_us) = (operations / took.as_secs_f64(), used.as_secs_f64() * 1e6 / operations);
    Ok(Sample { raw, per_second, latencies, cpu_us, before, after })
}

pub fn histogram() -> Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).map_err(BenchError::wrap("a histogram"))
}

/// Keeps `depth` operations in flight for `run`; latencies in nanoseconds.
pub async fn drive(writer: &Writer, work: Work, depth: usize, run: Duration, seed: u64) -> Result<Histogram<u64>> {
    let latencies = Rc::new(RefCell::new(histogram()?));
    let content = Content::of_blocks(1);
    let end = Instant::now() + run;
    let task = |index: usize| {
        let (writer, content, latencies) = (writer.clone(), content.clone(), latencies.clone());
        let mut random = Random::new((seed << 32) + ((index as u64) << 16));
        glommio::spawn_local(async move {
            loop {
                let started = Instant::now();
                if started >= end {
                    return Ok(());
                }
                let block = random.below(REGION_BLOCKS);
                match work {
                    Work::Read => writer.read(block, 1).await?,
                    Work::Append => writer.write(block, &content).await?,
                    Work::AppendAndFlush => {
                        writer.write(block, &content).await?;
                        writer.flush().await?;
                    }
                }
                latencies.borrow_mut().saturating_record(started.elapsed().as_nanos() as u64);
            }
        })
    };
    let tasks: Vec<_> = (0..depth).map(task).collect();
    join_all(tasks).await.into_iter().collect::<Result<()>>()?;
    Ok(Rc::into_inner(latencies).expect("the tasks have ended").into_inner())
}

fn row((work, depth): (Work, usize), samples: &[Sample]) -> Option<Row> {
    let list = |of: &dyn Fn(&Sample) -> f64| samples.iter().map(of).collect::<Vec<f64>>();
    let all = |of: &dyn Fn(&Sample) -> f64| Spread::of(list(of));
    Some(Row {
        work,
        depth,
        ratio_to_raw: ratio(&list(&|sample| sample.per_second), &list(&|sample| sample.raw.iops))?,
        raw_per_second: all(&|sample| sample.raw.iops)?,
        per_second: all(&|sample| sample.per_second)?,
        raw_mean_us: all(&|sample| sample.raw.mean_us)?,
        mean_us: all(&|sample| sample.latencies.mean() / 1000.0)?,
        raw_p99_us: all(&|sample| sample.raw.p99_us)?,
        p99_us: all(&|sample| sample.latencies.value_at_quantile(0.99) as f64 / 1000.0)?,
        cpu_us: all(&|sample| sample.cpu_us)?,
        commit: (work != Work::Read).then(|| commit(work, samples)),
    })
}

fn commit(work: Work, samples: &[Sample]) -> Commit {
    let sum = |of: &dyn Fn(&Counters) -> u64| {
        samples.iter().map(|sample| of(&sample.after) - of(&sample.before)).sum::<u64>() as f64
    };
    let blocks: f64 = samples.iter().map(|sample| sample.latencies.len() as f64).sum();
    let bytes = blocks * BLOCK as f64;
    let syncs = sum(&|counters| counters.shard.syncs);
    Commit {
        blocks_per_batch: blocks / sum(&|counters| counters.shard.batches),
        log_bytes_per_byte: sum(&|counters| counters.shard.bytes_appended) / bytes,
        disk_bytes_per_byte: sum(&|counters| counters.disk_bytes) / bytes,
        syncs: syncs as u64,
        syncs_per_flush: (work == Work::AppendAndFlush).then(|| syncs / sum(&|counters| counters.shard.flushes)),
    }
}

pub fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        let pair = |raw: &Spread, own: &Spread| format!("{:.0} · {:.0}", raw.median, own.median);
        vec![
            format!("{:?} × {}", row.work, row.depth),
            row.raw_per_second.thousands(),
            row.per_second.thousands(),
            row.ratio_to_raw.with_range(2),
            pair(&row.raw_mean_us, &row.mean_us),
            pair(&row.raw_p99_us, &row.p99_us),
            row.cpu_us.with_range(1),
        ]
    };
    let header = [
        "4 KiB on one shard",
        "raw /s",
        "shard /s",
        "× raw",
        "mean µs: raw · shard",
        "p99 µs: raw · shard",
        "CPU µs/op",
    ];
    println!("{}", table(&header, rows.iter().map(cells)));
    let cells = |row: &Row| {
        let commit = row.commit.as_ref()?;
        Some(vec![
            format!("{:?} × {}", row.work, row.depth),
            format!("{:.2}", commit.blocks_per_batch),
            format!("{:.3}", commit.log_bytes_per_byte),
            format!("{:.3}", commit.disk_bytes_per_byte),
            commit.syncs_per_flush.map_or(String::new(), |syncs| format!("{syncs:.3}")),
        ])
    };
    let header = ["group commit", "blocks/batch", "log bytes/byte", "disk bytes/byte", "syncs/flush"];
    println!("{}", table(&header, rows.iter().filter_map(cells)));
}
