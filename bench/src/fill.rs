//! The life of a small node through everything there is but NBD: a node's process, its port, the volume library here.
//! Filled until the client is told that there is no space, overwritten at random for many times its size, trimmed,
//! written again, deleted, filled again.
//!
//! What the disk was given is counted by the kernel for the node's process (`/proc/PID/io`): records, headers, footers,
//! copies by the cleaner, everything but the file system's own journal.

use crate::error::{BenchError, Result};
use crate::library::{volume_error, with_volume};
use crate::machine::Machine;
use crate::options::FillOptions;
use crate::processes::Watched;
use crate::random::Random;
use crate::report::{table, write_json};
use bytes::Bytes;
use futures::future::join_all;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::time::Instant;
use torus_frontends::device::{Device, VolumeError};
use torus_schema::limits::{GIB, KIB, MIB};
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::store::StoreKind;
use torus_tests::{process, wait};

const NODE_BYTES: u64 = 2 * GIB;
const NODE_SIZE: &str = "2GiB";
const QUICK_BYTES: u64 = 512 * MIB;
const QUICK_SIZE: &str = "512MiB";
/// Larger than the node, so that it is the node that ends it.
const VOLUME_TIMES: u64 = 2;
const FILL_BYTES: u64 = MIB;
const FILL_DEPTH: usize = 8;
const OVERWRITE_BYTES: u64 = 64 * KIB;
const OVERWRITE_DEPTH: usize = 16;
const TRIM_BYTES: u64 = 4 * MIB;

#[derive(Serialize)]
struct Row {
    phase: String,
    seconds: f64,
    client_bytes: u64,
    disk_bytes: u64,
    amplification: Option<f64>,
    mib_per_second: f64,
    operations: u64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
    /// The client was told that there is no space.
    no_space: bool,
    /// Of the node, as it reports itself, when the phase was over and its report had come.
    used_bytes: u64,
    free_bytes: u64,
}

#[derive(Serialize)]
struct Outcome {
    machine: Machine,
    node_bytes: u64,
    rows: Vec<Row>,
}

/// What a phase does, again and again, until it has done enough or there is no space.
#[derive(Clone, Copy, Debug)]
enum Work {
    Write(u64),
    Trim(u64),
}

impl Work {
    fn bytes(self) -> u64 {
        match self {
            Work::Write(bytes) | Work::Trim(bytes) => bytes,
        }
    }
}

struct Done {
    latencies: Histogram<u64>,
    client_bytes: u64,
    no_space: bool,
}

struct Run {
    cluster: Cluster,
    node: Watched,
    rows: Vec<Row>,
}

pub fn run(options: &FillOptions) -> Result<()> {
    let (node_bytes, size) = if options.quick { (QUICK_BYTES, QUICK_SIZE) } else { (NODE_BYTES, NODE_SIZE) };
    let machine = Machine::describe(&process::programs());
    let store = StoreKind::Embedded;
    let mut cluster = Cluster::start(ClusterOptions { store, size, ..ClusterOptions::new("bench-fill", 1) });
    let node = Watched::new("node", cluster.node(0).pid());
    let mut run = Run { cluster, node, rows: Vec::new() };
    run.all_phases(node_bytes, options.times)?;
    let outcome = Outcome { machine, node_bytes, rows: run.rows };
    print(&outcome);
    let path = write_json("fill", &outcome)?;
    eprintln!("bench: written to {}", path.display());
    Ok(())
}

impl Run {
    fn all_phases(&mut self, node_bytes: u64, times: u64) -> Result<()> {
        let volume_bytes = node_bytes * VOLUME_TIMES;
        self.create("first", volume_bytes)?;
        let filled = self.fill("first", "fill", volume_bytes)?;
        for turn in 1..=times {
            let phase = format!("overwrite, turn {turn} of {times}");
            let (work, count) = (Work::Write(OVERWRITE_BYTES), node_bytes / OVERWRITE_BYTES);
            let random = RefCell::new(Random::new(turn));
            let places = filled / OVERWRITE_BYTES;
            let place = |_| random.borrow_mut().below(places) * OVERWRITE_BYTES;
            self.phase("first", phase, work, OVERWRITE_DEPTH, count, place)?;
        }
        // Every other piece, so that every segment loses half of what it holds.
        let pieces = filled / TRIM_BYTES;
        let trims = pieces.div_ceil(2);
        self.phase("first", "trim every other 4 MiB".into(), Work::Trim(TRIM_BYTES), 1, trims, |at| {
            at * 2 * TRIM_BYTES
        })?;
        let (work, each) = (Work::Write(FILL_BYTES), TRIM_BYTES / FILL_BYTES);
        self.phase("first", "write what was trimmed".into(), work, FILL_DEPTH, trims * each, |at| {
            at / each * 2 * TRIM_BYTES + at % each * FILL_BYTES
        })?;
        self.delete("first")?;
        self.create("second", volume_bytes)?;
        self.fill("second", "fill again", volume_bytes).map(drop)
    }

    fn create(&self, name: &str, bytes: u64) -> Result<()> {
        self.cluster.torusblk(&["volume", "create", name, &bytes.to_string(), "--replicas", "1"]).ok();
        Ok(())
    }

    /// From the volume's start until there is no space; returns the bytes that were taken.
    fn fill(&mut self, volume: &str, phase: &str, volume_bytes: u64) -> Result<u64> {
        let (work, count) = (Work::Write(FILL_BYTES), volume_bytes / FILL_BYTES);
        self.phase(volume, phase.into(), work, FILL_DEPTH, count, |at| at * FILL_BYTES)
    }

    /// Returns the bytes it wrote or trimmed.
    fn phase(
        &mut self,
        volume: &str,
        phase: String,
        work: Work,
        depth: usize,
        count: u64,
        place: impl Fn(u64) -> u64,
    ) -> Result<u64> {
        eprintln!("bench: {phase}");
        let (before, started) = (self.node.written_bytes()?, Instant::now());
        let done = with_volume(&self.cluster.url(), volume, async |device| {
            let done = drive(&device, work, depth, count, &place).await?;
            device.flush().await.map_err(volume_error)?;
            Ok(done)
        })?;
        let (seconds, disk_bytes) = (started.elapsed().as_secs_f64(), self.node.written_bytes()? - before);
        self.push(phase, seconds, disk_bytes, matches!(work, Work::Write(_)), &done)?;
        Ok(done.client_bytes)
    }

    /// Over when the node reports that it holds nothing.
    fn delete(&mut self, volume: &str) -> Result<()> {
        eprintln!("bench: delete");
        let (before, started) = (self.node.written_bytes()?, Instant::now());
        self.cluster.torusblk(&["volume", "delete", volume]).ok();
        wait::until("the node to have given back the volume", || {
            let heartbeat = self.cluster.heartbeat(0)?;
            heartbeat.shards.iter().all(|shard| shard.used_bytes == 0).then_some(())
        });
        let (seconds, disk_bytes) = (started.elapsed().as_secs_f64(), self.node.written_bytes()? - before);
        let done = Done { latencies: histogram()?, client_bytes: 0, no_space: false };
        self.push("delete the volume".to_string(), seconds, disk_bytes, false, &done)
    }

    fn push(&mut self, phase: String, seconds: f64, disk_bytes: u64, is_write: bool, done: &Done) -> Result<()> {
        let (used_bytes, free_bytes) = self.next_report();
        let at = |quantile: f64| done.latencies.value_at_quantile(quantile) as f64 / 1000.0;
        let written = is_write && done.client_bytes > 0;
        self.rows.push(Row {
            phase,
            seconds,
            client_bytes: done.client_bytes,
            disk_bytes,
            amplification: written.then(|| disk_bytes as f64 / done.client_bytes as f64),
            mib_per_second: done.client_bytes as f64 / MIB as f64 / seconds,
            operations: done.latencies.len(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: done.latencies.max() as f64 / 1000.0,
            no_space: done.no_space,
            used_bytes,
            free_bytes,
        });
        Ok(())
    }

    /// Used and free bytes by a heartbeat that was made after now.
    fn next_report(&self) -> (u64, u64) {
        let now = self.cluster.heartbeat(0).map_or(0, |heartbeat| heartbeat.updated_s);
        // Two, since the next may have been under way.
        let report = wait::until("two heartbeats of the node", || {
            self.cluster.heartbeat(0).filter(|heartbeat| heartbeat.updated_s > now + 3)
        });
        let sum = |of: &dyn Fn(&torus_schema::records::ShardUsage) -> u64| report.shards.iter().map(of).sum();
        (sum(&|shard| shard.used_bytes), sum(&|shard| shard.free_bytes))
    }
}

fn histogram() -> Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).map_err(BenchError::wrap("a histogram"))
}

/// `depth` at once; the number of each says its place. Ends early when there is no space.
async fn drive<D: Device>(
    device: &D,
    work: Work,
    depth: usize,
    count: u64,
    place: impl Fn(u64) -> u64,
) -> Result<Done> {
    let content = Bytes::from(vec![0x3c; work.bytes() as usize]);
    let (next, done, no_space) = (Cell::new(0), Cell::new(0), Cell::new(false));
    let latencies = RefCell::new(histogram()?);
    let worker = async || -> Result<()> {
        while next.get() < count && !no_space.get() {
            let number = next.replace(next.get() + 1);
            let (offset, started) = (place(number), Instant::now());
            let result = match work {
                Work::Write(_) => device.write(offset, content.clone(), false).await,
                Work::Trim(bytes) => device.clear(offset, bytes, false, true).await,
            };
            match result {
                Ok(()) => done.set(done.get() + work.bytes()),
                Err(VolumeError::NoSpace { .. }) => no_space.set(true),
                Err(error) => return Err(volume_error(error)),
            }
            latencies.borrow_mut().saturating_record(started.elapsed().as_nanos() as u64);
        }
        Ok(())
    };
    join_all((0..depth).map(|_| worker())).await.into_iter().collect::<Result<()>>()?;
    Ok(Done { latencies: latencies.into_inner(), client_bytes: done.get(), no_space: no_space.get() })
}

fn print(outcome: &Outcome) {
    let mib = |bytes: u64| format!("{}", bytes / MIB);
    let cells = |row: &Row| {
        let mut cells = vec![row.phase.clone(), format!("{:.1}", row.seconds), mib(row.client_bytes)];
        cells.push(mib(row.disk_bytes));
        cells.push(row.amplification.map_or(String::new(), |times| format!("{times:.2}")));
        cells.push(format!("{:.0}", row.mib_per_second));
        cells.extend([row.p50_us, row.p99_us, row.p999_us, row.max_us].map(|us| format!("{us:.0}")));
        cells.extend([row.used_bytes, row.free_bytes].map(mib));
        cells.push(if row.no_space { "no space".to_string() } else { String::new() });
        cells
    };
    let node = format!("a node of {} MiB", outcome.node_bytes / MIB);
    let header = [
        node.as_str(),
        "s",
        "client MiB",
        "disk MiB",
        "amplification",
        "MiB/s",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "max µs",
        "then used MiB",
        "free MiB",
        "",
    ];
    println!("{}", table(&header, outcome.rows.iter().map(cells)));
}
