//! What our seams cost on the disk: the same 4 KiB O_DIRECT requests by bare io_uring, by glommio as it is, and through
//! the `Disk` trait that shards use. The trait may cost nothing that can be measured: more than 5 % CPU is a bug.

mod bare;
mod executor;
mod send;

use crate::error::{BenchError, Result};
use crate::machine::Machine;
use crate::options::Effort;
use crate::processes::own_cpu;
use crate::random::Random;
use crate::report::{table, write_json};
use crate::stand::{REGION_BYTES, written_file};
use crate::statistics::{Spread, ratio};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use torus_schema::limits::BLOCK_BYTES;
use torus_tests::process;

pub const BLOCK: usize = BLOCK_BYTES as usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Way {
    BareUring,
    RawGlommio,
    DiskTrait,
}

/// The trait last: it is compared with the one before.
const WAYS: [(Way, &str); 3] = [
    (Way::BareUring, "bare io_uring"),
    (Way::RawGlommio, "raw glommio DmaFile"),
    (Way::DiskTrait, "Disk trait, DirectDisk"),
];

/// What is done to the file, and until when.
#[derive(Clone, Debug)]
pub struct Load {
    pub file: PathBuf,
    pub is_write: bool,
    pub depth: usize,
    pub run: Duration,
    /// All ways run on the same core, one after the other.
    pub cpu: usize,
    pub seed: u64,
}

/// Offsets of blocks within the region.
pub struct Offsets(Random);

impl Offsets {
    pub fn new(seed: u64) -> Self {
        Self(Random::new(seed))
    }

    pub fn next(&mut self) -> u64 {
        self.0.below(REGION_BYTES / BLOCK_BYTES) * BLOCK_BYTES
    }
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    per_second: f64,
    cpu_us: f64,
}

#[derive(Serialize)]
struct Row {
    way: &'static str,
    is_write: bool,
    depth: usize,
    per_second: Spread,
    cpu_us: Spread,
    /// CPU per operation divided by that of raw glommio in the same round.
    cpu_to_glommio: Spread,
}

#[derive(Serialize)]
struct Outcome {
    machine: Machine,
    rows: Vec<Row>,
    sends: Vec<send::Row>,
}

pub fn run(effort: &Effort) -> Result<()> {
    let (rounds, time) = effort.rounds_and_time();
    let machine = Machine::describe(&process::programs());
    let folder = process::temporary_dir("bench-spike");
    eprintln!("bench: writing the file");
    let file = written_file(folder.path(), "spike")?;
    let mut rows = Vec::new();
    for is_write in [false, true] {
        for depth in [1, 32] {
            eprintln!("bench: {} at depth {depth}", if is_write { "writes" } else { "reads" });
            rows.extend(measure(&file, is_write, depth, rounds, time)?);
        }
    }
    let sends = send::measure(rounds, time)?;
    let outcome = Outcome { machine, rows, sends };
    print(&outcome);
    send::print(&outcome.sends);
    let path = write_json("spike", &outcome)?;
    eprintln!("bench: written to {}", path.display());
    Ok(())
}

fn measure(file: &Path, is_write: bool, depth: usize, rounds: usize, run: Duration) -> Result<Vec<Row>> {
    let cpu = std::thread::available_parallelism().map_or(0, |cores| cores.get() - 1);
    let mut samples: [Vec<Sample>; WAYS.len()] = Default::default();
    for round in 0..rounds {
        let load = Load { file: file.to_path_buf(), is_write, depth, run, cpu, seed: round as u64 };
        for ((way, _), samples) in WAYS.into_iter().zip(&mut samples) {
            samples.push(sample(way, load.clone())?);
        }
    }
    let cpu = |samples: &[Sample]| samples.iter().map(|sample| sample.cpu_us).collect::<Vec<f64>>();
    let glommio = cpu(&samples[1]);
    let row = |((_, way), samples): ((Way, &'static str), &Vec<Sample>)| {
        Some(Row {
            way,
            is_write,
            depth,
            per_second: Spread::of(samples.iter().map(|sample| sample.per_second).collect())?,
            cpu_us: Spread::of(cpu(samples))?,
            cpu_to_glommio: ratio(&cpu(samples), &glommio)?,
        })
    };
    Ok(WAYS.into_iter().zip(&samples).filter_map(row).collect())
}

/// On a thread of its own, so that nothing of one way is left for the next. Nothing else runs in this process.
fn sample(way: Way, load: Load) -> Result<Sample> {
    let (before, started) = (own_cpu()?, Instant::now());
    let work = move || match way {
        Way::BareUring => bare::run(&load),
        Way::RawGlommio => executor::run_raw(load),
        Way::DiskTrait => executor::run_trait(load),
    };
    let operations = std::thread::spawn(work).join().map_err(|_| BenchError::Failed {
        what: format!("the thread of {way:?}"),
        because: "it panicked; its message is above".to_string(),
    })??;
    let (took, used) = (started.elapsed(), own_cpu()?.saturating_sub(before));
    if operations == 0 {
        let because = format!("no operation completed within {took:?}");
        return Err(BenchError::Failed { what: format!("{way:?}"), because });
    }
    let operations = operations as f64;
    Ok(Sample { per_second: operations / took.as_secs_f64(), cpu_us: used.as_secs_f64() * 1e6 / operations })
}

fn print(outcome: &Outcome) {
    let cells = |row: &Row| {
        vec![
            row.way.to_string(),
            format!("{} × {}", if row.is_write { "write" } else { "read" }, row.depth),
            row.per_second.thousands(),
            row.cpu_us.with_range(2),
            row.cpu_to_glommio.with_range(3),
        ]
    };
    let header = ["4 KiB on one file", "what × depth", "per second", "CPU µs/op", "CPU ÷ raw glommio"];
    println!("{}", table(&header, outcome.rows.iter().map(cells)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_blocks_inside_the_region_and_differ() {
        let mut offsets = Offsets::new(1);
        let seen: std::collections::BTreeSet<u64> = (0..1000).map(|_| offsets.next()).collect();
        assert!(seen.len() > 990);
        assert!(seen.iter().all(|offset| offset % BLOCK_BYTES == 0 && *offset < REGION_BYTES));
    }
}
