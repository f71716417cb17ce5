//! `torus-bench`: what Torus gives on this machine, beside what the disk gives and what others make of it.
//!
//! * `options`     the command line
//! * `rounds`      the comparison, interleaved round by round
//! * `stand`       the systems that are compared
//! * `fio`         the profiles of `fio-profiles/`
//! * `library`     a volume without NBD
//! * `spike`       what our seams cost on the disk
//! * `fill`        the life of a small node, filled to its end
//! * `rejoin`      what it costs that a node was away
//! * `store`       one shard on the disk: log, index, start, cleaning
//! * `count`       system calls and allocations per operation
//! * `random`      offsets that nothing foresees
//! * `processes`   CPU time and memory of others
//! * `statistics`  medians and spreads
//! * `report`      tables and JSON
//! * `machine`     what it was measured on

mod count;
mod error;
mod fill;
mod fio;
mod library;
mod machine;
mod options;
mod processes;
mod random;
mod rejoin;
mod report;
mod rounds;
mod spike;
mod stand;
mod statistics;
mod store;

use clap::Parser;
use options::{Command, CommandLine};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: count::allocator::Counting = count::allocator::Counting;

fn main() -> ExitCode {
    let line = CommandLine::parse();
    let done = match line.command {
        None => rounds::compare(&line.compare),
        Some(Command::Compare(compare)) => rounds::compare(&compare),
        Some(Command::Spike(effort)) => spike::run(&effort),
        Some(Command::Library(effort)) => library::run(&effort),
        Some(Command::Store(options)) => store::run(&options),
        Some(Command::Fill(options)) => fill::run(&options),
        Some(Command::Rejoin(options)) => rejoin::run(&options),
        Some(Command::Count(effort)) => count::run(&effort),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("torus-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
