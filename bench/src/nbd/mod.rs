//! `nbd`: NBD servers beside each other on one disk, each with a local file or one volume of one replica, over a unix
//! socket and TCP, and what they cost with nothing behind them.
//!
//! * `stand`  the servers
//! * `server` ours, before nothing
//! * `locks`  how often ours wait for one
//! * `table`  what is told of it

mod locks;
mod server;
mod stand;
mod table;

use crate::error::Result;
use crate::fio::{self, Connections, PROFILES, Profile, Size};
use crate::machine::{Machine, load_average};
use crate::options::NbdOptions;
use crate::processes::{Watched, cpu_of};
use crate::report::write_json;
use crate::rounds::{Sample, sample_of};
use crate::stand::REGION_BYTES;
use serde::Serialize;
use stand::Served;
use std::fmt::Write;
use std::time::Duration;
use table::Row;
use torus_tests::process;

pub use server::serve as serve_null;

const NAMES: [&str; 4] = ["randread-qd1", "randread-qd32", "randwrite-qd1", "randwrite-qd32"];
/// Many clients, or one that opens several connections.
const SPREAD: [Connections; 2] = [
    Connections { name: "randread, 4 connections, depth 8 each", is_write: false, connections: 4, depth: 8 },
    Connections { name: "randwrite, 4 connections, depth 8 each", is_write: true, connections: 4, depth: 8 },
];

#[derive(Clone, Copy)]
enum Load {
    Profile(Profile),
    Connections(Connections),
}

impl Load {
    fn name(&self) -> &'static str {
        match self {
            Self::Profile(profile) => profile.name,
            Self::Connections(connections) => connections.name,
        }
    }
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    rounds: usize,
    seconds: f64,
    rows: Vec<Row>,
    locks: Vec<locks::Row>,
}

pub fn run(options: &NbdOptions) -> Result<()> {
    let (rounds, seconds) = options.effort.rounds_and_time();
    let say = |text: &str| eprintln!("bench: {text}");
    let machine = Machine::describe(&process::programs());
    let mut stand = stand::Stand::build(options, &say)?;
    let profiles = PROFILES.into_iter().filter(|profile| NAMES.contains(&profile.name)).map(Load::Profile);
    let loads: Vec<Load> =
        profiles.chain(SPREAD.map(Load::Connections)).filter(|load| options.wants(load.name())).collect();
    let measured = measure(&stand.served, &loads, (rounds, seconds), &say);
    let samples = stand.explain(measured)?;
    let spread = SPREAD.iter().filter(|load| options.wants(load.name));
    let counted = locks::count(&stand.served, spread.copied(), seconds, &say);
    let locks = stand.explain(counted)?;
    let of_load = |(load, samples): (&Load, &Vec<Vec<Sample>>)| table::rows(load.name(), &stand.served, samples);
    let rows = loads.iter().zip(&samples).flat_map(of_load).collect();
    let report = Report { machine, rounds, seconds: seconds.as_secs_f64(), rows, locks };
    table::print(&report.machine, (report.rounds, report.seconds), &report.rows);
    locks::print(&report.locks);
    let path = write_json("nbd", &report)?;
    say(&format!("written to {}", path.display()));
    Ok(())
}

/// By load, server and round.
fn measure(
    servers: &[Served],
    loads: &[Load],
    (rounds, seconds): (usize, Duration),
    say: &dyn Fn(&str),
) -> Result<Vec<Vec<Vec<Sample>>>> {
    let size = Size { bytes: REGION_BYTES, run: seconds };
    let mut samples: Vec<Vec<Vec<Sample>>> = vec![vec![vec![]; servers.len()]; loads.len()];
    for round in 0..rounds {
        // As it ends: whoever must stop this has what was measured until then.
        say(&format!("round {} of {rounds}; load {}", round + 1, load_average()));
        for (load, of_load) in loads.iter().zip(&mut samples) {
            let mut line = format!("{}: IOPS", load.name());
            for (served, of_served) in servers.iter().zip(of_load) {
                let sample = sample(*load, served, size)?;
                let _ = write!(line, " · {}{} {:.0}", served.name, served.transport.suffix(), sample.fio.iops);
                of_served.push(sample);
            }
            say(&line);
        }
    }
    Ok(samples)
}

fn sample(load: Load, served: &Served, size: Size) -> Result<Sample> {
    let processes: &[Watched] = &served.processes;
    let before = cpu_of(processes)?;
    let measured = match load {
        Load::Profile(profile) => fio::run(profile, &served.target, size)?,
        Load::Connections(connections) => fio::run_connections(connections, &served.target, size, &[])?,
    };
    sample_of(measured, processes, before)
}
