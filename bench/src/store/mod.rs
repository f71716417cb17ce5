//! The store alone: one shard on one file of a real disk, no network, no replica.
//!
//! * `bed`       the shard, and the writer of its volume
//! * `traffic`   append, append + flush, random read, beside the raw file; group commit
//! * `indexing`  insert and look-up, bytes for each block
//! * `starting`  starts, by what the shard holds
//! * `cleaning`  write amplification, beside what theory says (`analytic`)
//! * `reads`     what a reader feels of the cleaner

mod analytic;
pub mod bed;
mod cleaning;
mod indexing;
mod reads;
mod starting;
mod traffic;

use crate::error::{BenchError, Result};
use crate::machine::Machine;
use crate::options::{StoreOptions, StorePart};
use crate::report::write_json;
use serde::Serialize;
use std::path::{Path, PathBuf};
use torus_rpc::runtime::glommio::run as run_executor;
use torus_tests::process;

/// A p99.9 wants more operations than a round of the others has.
const READ_TIMES: u32 = 5;

#[derive(Default, Serialize)]
struct Outcome {
    machine: Machine,
    traffic: Vec<traffic::Row>,
    index: Vec<indexing::Row>,
    start: Vec<starting::Row>,
    cleaning: Vec<cleaning::Row>,
    reads: Vec<reads::Row>,
}

pub fn run(options: &StoreOptions) -> Result<()> {
    let (rounds, time) = options.rounds_and_time();
    let folder = folder(options)?;
    let place: PathBuf = folder.path().to_path_buf();
    let mut outcome = Outcome { machine: Machine::describe(&place), ..Outcome::default() };
    if options.wants(StorePart::Index) {
        outcome.index = indexing::measure(options.quick)?;
        indexing::print(&outcome.index);
    }
    if options.wants(StorePart::Traffic) {
        outcome.traffic = in_executor(traffic::measure(&place, rounds, time))?;
        traffic::print(&outcome.traffic);
    }
    if options.wants(StorePart::Start) {
        outcome.start = in_executor(starting::measure(&place, rounds, options.quick))?;
        starting::print(&outcome.start);
    }
    if options.wants(StorePart::Reads) {
        outcome.reads = in_executor(reads::measure(&place, READ_TIMES * time))?;
        reads::print(&outcome.reads);
    }
    if options.wants(StorePart::Cleaning) {
        outcome.cleaning = in_executor(cleaning::measure(&place, options.quick))?;
        cleaning::print(&outcome.cleaning);
    }
    let path = write_json("store", &outcome)?;
    eprintln!("bench: written to {}", path.display());
    Ok(())
}

/// Removed with all that is in it when it is dropped.
fn folder(options: &StoreOptions) -> Result<tempfile::TempDir> {
    let Some(dir) = &options.dir else { return Ok(process::temporary_dir("bench-store")) };
    let made = |dir: &Path| tempfile::Builder::new().prefix("bench-store-").tempdir_in(dir);
    made(dir).map_err(BenchError::wrap(format!("a folder in {}", dir.display())))
}

fn in_executor<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    run_executor("bench", None, work).map_err(BenchError::wrap("an executor"))?
}
