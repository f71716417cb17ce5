//! `torus-bench`: what Torus gives on this machine, beside what the disk gives and what others make of it.
//!
//! * `options`     the command line
//! * `compare`     the comparison, interleaved round by round
//! * `page`        what it found, to look at
//! * `client`      the client library, in a process of its own
//! * `rounds`      one system under one load in one round
//! * `stand`       files and clusters to measure
//! * `fio`         the profiles of `fio-profiles/`
//! * `library`     a volume without NBD
//! * `scale`       a node over shards, a volume over executors, by cores
//! * `spike`       what our seams cost on the disk
//! * `fill`        the life of a small node, filled to its end
//! * `rejoin`      what it costs that a node was away
//! * `store`       one shard on the disk: log, index, start, cleaning
//! * `nbd`         NBD servers beside each other
//! * `aoe`         AoE targets beside each other
//! * `null`        a device that answers from memory
//! * `stages`      what it costs to measure a stage of an operation
//! * `count`       allocations, instructions and system calls per operation
//! * `random`      offsets that nothing foresees
//! * `processes`   CPU time and memory of others
//! * `statistics`  medians and spreads
//! * `report`      tables and JSON
//! * `machine`     what it was measured on

mod aoe;
mod client;
mod compare;
mod count;
mod error;
mod fill;
mod fio;
mod library;
mod machine;
mod nbd;
mod null;
mod options;
mod page;
mod processes;
mod random;
mod rejoin;
mod report;
mod rounds;
mod scale;
mod spike;
mod stages;
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
        None => compare::run(&line.compare),
        Some(Command::Compare(compare)) => compare::run(&compare),
        Some(Command::Page { result }) => page::print(&result),
        Some(Command::LibraryClient(options)) => client::run(&options),
        Some(Command::Spike(effort)) => spike::run(&effort),
        Some(Command::Library(effort)) => library::run(&effort),
        Some(Command::Scale(effort)) => scale::run(&effort),
        Some(Command::Store(options)) => store::run(&options),
        Some(Command::Fill(options)) => fill::run(&options),
        Some(Command::Rejoin(options)) => rejoin::run(&options),
        Some(Command::Nbd(options)) => nbd::run(&options),
        Some(Command::NullServer { address, bytes, spin }) => nbd::serve_null(&address, bytes, spin),
        Some(Command::Aoe(options)) => aoe::run(&options),
        Some(Command::NullTarget { interface, shelf, slot, bytes }) => aoe::serve_null(&interface, shelf, slot, bytes),
        Some(Command::Stages) => stages::run(),
        Some(Command::Count(options)) => count::run(&options),
        Some(Command::Pure) => {
            count::perform();
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("torus-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
