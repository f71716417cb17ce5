//! `scale`: one node over its shards, and one volume over the executors of an NBD server, on 1, 2, 4 … cores up to all
//! that there are. Volumes of one replica on this machine's disk; 4 KiB at random over several connections, with as many
//! requests in flight on each core count.
//!
//! The servers are pinned to the cores that they are measured on; fio is not, and competes with them for these.

use crate::error::Result;
use crate::fio::{self, Connections, Size, Target};
use crate::machine::Machine;
use crate::options::Effort;
use crate::processes::{Watched, cpu_of};
use crate::report::{table, write_json};
use crate::rounds::{Sample, sample_of};
use crate::stand::{NODE_SIZE, REGION_BYTES, create_volume};
use crate::statistics::{Spread, ratio};
use serde::Serialize;
use std::path::Path;
use tempfile::TempDir;
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer};
use torus_tests::process;

const PASSES: u32 = 2;
const LOADS: [Connections; 2] = [
    Connections { name: "randread, 4 connections, depth 16 each", is_write: false, connections: 4, depth: 16 },
    Connections { name: "randwrite, 4 connections, depth 16 each", is_write: true, connections: 4, depth: 16 },
];

/// What is spread over cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum What {
    /// `torus-engine --nbd` with a shard for each core: shards serve the connections too.
    Shards,
    /// `torusblk serve` with an executor for each core, before a node of one shard on the last core of all: with all cores
    /// it is an executor's too.
    Executors,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Shards => "torus-engine --nbd, shards",
            Self::Executors => "torusblk serve, executors of one volume",
        }
    }
}

/// One kind on so many cores. The processes live as long as it does.
struct Served {
    what: What,
    cores: usize,
    target: Target,
    processes: Vec<Watched>,
    _cluster: Cluster,
    _server: Option<NbdServer>,
    _folder: TempDir,
}

#[derive(Serialize)]
struct Row {
    load: &'static str,
    what: What,
    cores: usize,
    iops: Spread,
    /// By those of the same on one core in the same round.
    ratio_to_one_core: Spread,
    /// Of the servers, per operation.
    server_cpu_us: Spread,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    rounds: usize,
    seconds: f64,
    rows: Vec<Row>,
}

pub fn run(effort: &Effort) -> Result<()> {
    let (rounds, time) = effort.rounds_and_time();
    let machine = Machine::describe(&process::programs());
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = core_counts(all);
    let kinds = [What::Shards, What::Executors];
    let served = kinds.into_iter().flat_map(|what| cores.iter().map(move |cores| (what, *cores)));
    let served = served.map(|(what, cores)| start(what, cores, all)).collect::<Result<Vec<Served>>>()?;
    let size = Size { bytes: REGION_BYTES, run: time };
    let mut rows = Vec::new();
    for load in LOADS {
        let mut samples: Vec<Vec<Sample>> = vec![vec![]; served.len()];
        for round in 0..rounds {
            eprintln!("bench: {}, round {} of {rounds}", load.name, round + 1);
            for index in (0..served.len()).map(|index| (index + round) % served.len()) {
                let before = cpu_of(&served[index].processes)?;
                let measured = fio::run_connections(load, &served[index].target, size, &[])?;
                samples[index].push(sample_of(measured, &served[index].processes, before)?);
            }
        }
        rows.extend(rows_of(load.name, &served, &samples));
    }
    print(&rows);
    let path = write_json("scale", &Report { machine, rounds, seconds: time.as_secs_f64(), rows })?;
    eprintln!("bench: written to {}", path.display());
    Ok(())
}

/// 1, 2, 4 … and all.
fn core_counts(all: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = (0..).map(|power| 1 << power).take_while(|count| *count < all).collect();
    counts.push(all);
    counts
}

fn start(what: What, cores: usize, all: usize) -> Result<Served> {
    eprintln!("bench: starting {} on {cores} cores, and writing its region", what.name());
    let cpus = format!("0-{}", cores - 1);
    let folder = process::temporary_dir("bench-scale");
    let socket = folder.path().join("nbd.sock");
    let listen = format!("unix:{}", socket.display());
    let (shards, last) = (cores.to_string(), (all - 1).to_string());
    let arguments = match what {
        What::Shards => vec!["--shards", &*shards, "--cpus", &cpus, "--nbd", &listen, "--export", "scale"],
        What::Executors => vec!["--shards", "1", "--cpus", &last],
    };
    let node_arguments = arguments.into_iter().map(str::to_string).collect();
    let options = ClusterOptions { size: NODE_SIZE, ..ClusterOptions::new("bench-scale", 1) };
    let mut cluster = Cluster::start(ClusterOptions { node_arguments, ..options });
    create_volume(&cluster, "scale", 1);
    let server = match what {
        What::Shards => {
            cluster.node(0).await_line("attached volume");
            None
        }
        What::Executors => Some(cluster.serve_with(&["--listen", &listen, "--volume", "scale", "--cpus", &cpus])),
    };
    let mut processes = vec![Watched::new("engine", cluster.node(0).pid())];
    processes.extend(server.as_ref().map(|server| Watched::new("torusblk", server.process.pid())));
    let target = Target::unix(Path::new(&socket), "scale");
    fio::fill(&target, REGION_BYTES, PASSES)?;
    Ok(Served { what, cores, target, processes, _cluster: cluster, _server: server, _folder: folder })
}

fn rows_of(load: &'static str, served: &[Served], samples: &[Vec<Sample>]) -> Vec<Row> {
    let iops = |samples: &[Sample]| -> Vec<f64> { samples.iter().map(|sample| sample.fio.iops).collect() };
    let row = |(served_here, own): (&Served, &Vec<Sample>)| {
        let is_base = |served: &Served| served.what == served_here.what && served.cores == 1;
        let base = &samples[served.iter().position(is_base)?];
        let cpu = own.iter().map(|sample| sample.cpu_us.iter().map(|(_, us)| us).sum()).collect();
        Some(Row {
            load,
            what: served_here.what,
            cores: served_here.cores,
            iops: Spread::of(iops(own))?,
            ratio_to_one_core: ratio(&iops(own), &iops(base))?,
            server_cpu_us: Spread::of(cpu)?,
        })
    };
    served.iter().zip(samples).filter_map(row).collect()
}

fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        vec![
            format!("{}: {}", row.what.name(), row.load),
            row.cores.to_string(),
            row.iops.thousands(),
            row.ratio_to_one_core.with_range(2),
            format!("{:.1}", row.server_cpu_us.median),
        ]
    };
    println!("{}", table(&["4 KiB", "cores", "IOPS", "× one core", "servers CPU µs/op"], rows.iter().map(cells)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_doubled_until_there_are_no_more() {
        assert_eq!(core_counts(1), [1]);
        assert_eq!(core_counts(2), [1, 2]);
        assert_eq!(core_counts(6), [1, 2, 4, 6]);
        assert_eq!(core_counts(8), [1, 2, 4, 8]);
    }
}
