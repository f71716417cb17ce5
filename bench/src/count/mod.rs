//! What an operation costs that can be counted: system calls, context switches, allocations, instructions. Unlike times,
//! counts are (nearly) the same on a busy machine, so `bench/tests/counts.rs` holds them against `bench/bounds.txt`.
//! README.md explains each figure.

mod allocations;
pub mod allocator;
mod pure;
pub mod syscalls;

use crate::error::{BenchError, Result};
use crate::options::{CountOptions, CountPart};
use serde::Serialize;
use std::path::{Path, PathBuf};

pub use pure::perform;

pub fn run(options: &CountOptions) -> Result<()> {
    let (_, time) = options.effort.rounds_and_time();
    let out = options.out.as_deref();
    // First, before this process has threads that could allocate beside those that are counted.
    if options.wants(CountPart::Allocations) {
        allocations::run(time, out)?;
    }
    if options.wants(CountPart::Instructions) {
        pure::run(out)?;
    }
    if options.wants(CountPart::Syscalls) {
        syscalls::run(time, options.effort.quick, out)?;
    }
    Ok(())
}

fn results_folder(out: Option<&Path>) -> PathBuf {
    out.map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("out"), Path::to_path_buf)
}

fn write(folder: &Path, name: &str, rows: &impl Serialize) -> Result<()> {
    let path = folder.join(format!("{name}.json"));
    let wrap = || BenchError::wrap(format!("results to {}", path.display()));
    std::fs::create_dir_all(folder).map_err(wrap())?;
    let text = serde_json::to_string_pretty(rows).map_err(BenchError::wrap("results as JSON"))?;
    std::fs::write(&path, text + "\n").map_err(wrap())
}
