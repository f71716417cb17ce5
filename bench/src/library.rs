//! A volume through the client library, in this process: what is there without NBD between.

use crate::client::load::{Load, Work, drive};
use crate::error::{BenchError, Result};
use crate::machine::Machine;
use crate::options::Effort;
use crate::processes::{Watched, cpu_of, own_cpu};
use crate::report::{table, write_json};
use crate::stand::{self, REGION_BYTES};
use crate::statistics::Spread;
use bytes::Bytes;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::{Duration, Instant};
use torus_frontends::device::{Device, Exports, VolumeError};
use torus_frontends::volume::{Attacher, VolumeExports};
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::runtime::glommio::{GlommioRuntime, Thread, run_on};
use torus_schema::limits::{BLOCK_BYTES, MIB};
use torus_tests::process;

const CASES: [(Work, usize); 6] = [
    (Work::Read, 1),
    (Work::Read, 32),
    (Work::Write, 1),
    (Work::Write, 32),
    (Work::DurableWrite, 1),
    (Work::DurableWrite, 32),
];

/// Requests in flight while the region is written for the first time, each of 1 MiB.
const FILL_DEPTH: u64 = 8;

struct Sample {
    per_second: f64,
    latencies: Histogram<u64>,
    client_cpu_us: f64,
    servers_cpu_us: f64,
}

#[derive(Serialize)]
struct Row {
    work: Work,
    depth: usize,
    per_second: Spread,
    mean_us: Spread,
    p50_us: Spread,
    p99_us: Spread,
    p999_us: Spread,
    client_cpu_us: Spread,
    servers_cpu_us: Spread,
}

#[derive(Serialize)]
struct Outcome {
    machine: Machine,
    rows: Vec<Row>,
}

pub fn run(effort: &Effort) -> Result<()> {
    let (rounds, time) = effort.rounds_and_time();
    let machine = Machine::describe(&process::programs());
    let mut cluster = stand::start_cluster("bench-library", stand::NODES);
    stand::create_volume(&cluster, "library", 3);
    let servers = stand::watch(&mut cluster, None);
    let samples = with_volume(&cluster.url(), "library", async |device| {
        eprintln!("bench: writing the region");
        fill(&device).await.map_err(volume_error)?;
        let mut samples: [Vec<Sample>; CASES.len()] = Default::default();
        for round in 0..rounds {
            eprintln!("bench: round {} of {rounds}", round + 1);
            for ((work, depth), samples) in CASES.into_iter().zip(&mut samples) {
                let load = load(work, depth, time, round as u64);
                samples.push(sample(&device, load, &servers).await?);
            }
        }
        Ok(samples)
    })?;
    let rows = CASES.into_iter().zip(&samples).filter_map(|(case, samples)| row(case, samples)).collect();
    let outcome = Outcome { machine, rows };
    print(&outcome);
    let path = write_json("library", &outcome)?;
    eprintln!("bench: written to {}", path.display());
    Ok(())
}

/// 4 KiB at random.
pub fn load(work: Work, depth: usize, run: Duration, seed: u64) -> Load {
    Load { work, depth, bytes: BLOCK_BYTES, is_sequential: false, region_bytes: REGION_BYTES, run, seed }
}

/// Attached as a server attaches it, released at the end, by an executor that does not spin.
pub fn with_volume<T>(
    url: &str,
    name: &str,
    work: impl AsyncFnOnce(<VolumeExports<GlommioRuntime<AnyMetadata>> as Exports>::Device) -> Result<T>,
) -> Result<T> {
    with_volume_on(Thread::default(), url, name, work)
}

pub fn with_volume_on<T>(
    thread: Thread,
    url: &str,
    name: &str,
    work: impl AsyncFnOnce(<VolumeExports<GlommioRuntime<AnyMetadata>> as Exports>::Device) -> Result<T>,
) -> Result<T> {
    let metadata = AnyMetadata::connect(url, Duration::from_secs(5)).map_err(BenchError::wrap(url.to_string()))?;
    let task = async {
        let host = nix::unistd::gethostname().map_or_else(|_| "?".into(), |name| name.to_string_lossy().into_owned());
        let attacher =
            Attacher { host, process: "torus-bench".to_string(), pid: std::process::id(), force: false, repair: false };
        let exports = VolumeExports::new(GlommioRuntime::<_>::new(metadata), attacher);
        let device = exports.attach(name).await.map_err(volume_error)?;
        let result = work(device).await;
        exports.release_all().await;
        result
    };
    run_on("bench", thread, task).map_err(BenchError::wrap("an executor"))?
}

pub fn volume_error(error: VolumeError) -> BenchError {
    BenchError::Failed { what: "an operation on the volume".to_string(), because: error.to_string() }
}

pub async fn fill<D: Device>(device: &D) -> std::result::Result<(), VolumeError> {
    fill_region(device, REGION_BYTES).await
}

pub async fn fill_region<D: Device>(device: &D, bytes: u64) -> std::result::Result<(), VolumeError> {
    let content = Bytes::from(vec![0x5a; MIB as usize]);
    let all: Vec<u64> = (0..bytes / MIB).collect();
    for together in all.chunks(FILL_DEPTH as usize) {
        let writes = together.iter().map(|index| device.write(index * MIB, content.clone(), false));
        futures::future::try_join_all(writes).await?;
    }
    device.flush().await
}

async fn sample<D: Device>(device: &D, load: Load, servers: &[Watched]) -> Result<Sample> {
    let (own_before, before, started) = (own_cpu()?, cpu_of(servers)?, Instant::now());
    let latencies = drive(device, load).await?;
    let (took, after) = (started.elapsed(), cpu_of(servers)?);
    let own = own_cpu()?.saturating_sub(own_before);
    let of_servers: Duration = before.iter().zip(after).map(|(before, after)| after.saturating_sub(*before)).sum();
    if latencies.is_empty() {
        let because = format!("no operation completed within {took:?}");
        return Err(BenchError::Failed { what: format!("{load:?}"), because });
    }
    let operations = latencies.len() as f64;
    let per_operation = |cpu: Duration| cpu.as_secs_f64() * 1e6 / operations;
    Ok(Sample {
        per_second: operations / took.as_secs_f64(),
        client_cpu_us: per_operation(own),
        servers_cpu_us: per_operation(of_servers),
        latencies,
    })
}

fn row((work, depth): (Work, usize), samples: &[Sample]) -> Option<Row> {
    let all = |of: &dyn Fn(&Sample) -> f64| Spread::of(samples.iter().map(of).collect());
    let quantile = |at: f64| all(&move |sample| sample.latencies.value_at_quantile(at) as f64 / 1000.0);
    Some(Row {
        work,
        depth,
        per_second: all(&|sample| sample.per_second)?,
        mean_us: all(&|sample| sample.latencies.mean() / 1000.0)?,
        p50_us: quantile(0.5)?,
        p99_us: quantile(0.99)?,
        p999_us: quantile(0.999)?,
        client_cpu_us: all(&|sample| sample.client_cpu_us)?,
        servers_cpu_us: all(&|sample| sample.servers_cpu_us)?,
    })
}

fn print(outcome: &Outcome) {
    let cells = |row: &Row| {
        let mut cells = vec![format!("{:?} × {}", row.work, row.depth), row.per_second.thousands()];
        cells.extend([&row.mean_us, &row.p50_us, &row.p99_us, &row.p999_us].map(|us| format!("{:.0}", us.median)));
        cells.extend([&row.client_cpu_us, &row.servers_cpu_us].map(|us| us.with_range(1)));
        cells
    };
    let header = [
        "4 KiB, 3 replicas, library",
        "per second",
        "mean µs",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "client CPU µs/op",
        "servers CPU µs/op",
    ];
    println!("{}", table(&header, outcome.rows.iter().map(cells)));
}
