//! `aoe`: AoE targets beside each other on virtual Ethernet, in memory, on the disk, and with three replicas: frames of 1 KiB
//! on links of 1500 bytes and of 8 KiB on links of 9000, one and sixteen of them unanswered.
//!
//! * `load`   the initiator
//! * `null`   our target before nothing
//! * `stand`  the targets

mod load;
mod null;
mod stand;

use crate::error::Result;
use crate::machine::Machine;
use crate::options::AoeOptions;
use crate::processes::cpu_of;
use crate::report::{table, write_json};
use crate::rounds::{Sample, sample_of};
use crate::statistics::{Spread, ratio};
use load::{Initiator, Load};
use serde::Serialize;
use stand::{Kind, Stand, Target};
use std::time::Duration;
use torus_tests::process;

pub use null::serve as serve_null;

const MTUS: [(u32, u8); 2] = [(1500, 2), (9000, 16)];
/// Of a written volume, which is filled first: what was never written needs no disk.
const WORKED_ON_BYTES: u64 = 128 << 20;

/// One target under one load, all rounds.
#[derive(Serialize)]
struct Row {
    load: String,
    target: &'static str,
    frames_per_s: Spread,
    /// To vblade, in memory or on the disk as this one, in the same round.
    ratio_to_vblade: Option<Spread>,
    mean_us: Spread,
    p99_us: Spread,
    /// Of all its processes, for each frame.
    cpu_us: Spread,
    cpu_to_vblade: Option<Spread>,
    client_cpu_us: Spread,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    rounds: usize,
    seconds: f64,
    rows: Vec<Row>,
}

fn loads(sectors: u8) -> Vec<Load> {
    let load = |(name, is_write, outstanding)| Load { name, is_write, sectors, outstanding };
    [("read", false, 1), ("read", false, 16), ("write", true, 1), ("write", true, 16)].map(load).to_vec()
}

pub fn run(options: &AoeOptions) -> Result<()> {
    let (rounds, seconds) = options.effort.rounds_and_time();
    let say = |text: &str| eprintln!("bench: {text}");
    let machine = Machine::describe(&process::programs());
    let mut rows = Vec::new();
    for (mtu, sectors) in MTUS {
        say(&format!("links of {mtu} bytes"));
        let Some(stand) = Stand::build(mtu, options.null, &say)? else { return Ok(()) };
        rows.extend(measure(&stand, sectors, (rounds, seconds), &say)?);
    }
    let report = Report { machine, rounds, seconds: seconds.as_secs_f64(), rows };
    print(&report);
    let path = write_json("aoe", &report)?;
    say(&format!("written to {}", path.display()));
    Ok(())
}

fn measure(stand: &Stand, sectors: u8, (rounds, seconds): (usize, Duration), say: &dyn Fn(&str)) -> Result<Vec<Row>> {
    let mut initiator = Initiator::open("eth0")?;
    let mut found = Vec::new();
    for target in &stand.targets {
        let to = initiator.find(target.address)?;
        // Every place is there before it is measured.
        say(&format!("filling {}", target.name));
        let fill = Load { name: "fill", is_write: true, sectors, outstanding: 16 };
        initiator.fill(to, target.address, fill, worked_on(target))?;
        found.push(to);
    }
    let loads = loads(sectors);
    let mut samples: Vec<Vec<Vec<Sample>>> = vec![vec![vec![]; stand.targets.len()]; loads.len()];
    for round in 0..rounds {
        say(&format!("round {} of {rounds}", round + 1));
        for (load, of_load) in loads.iter().zip(&mut samples) {
            for ((target, to), of_target) in stand.targets.iter().zip(&found).zip(of_load) {
                let before = cpu_of(&target.processes)?;
                let measured = initiator.run(*to, target.address, *load, worked_on(target), seconds)?;
                of_target.push(sample_of(measured, &target.processes, before)?);
            }
        }
    }
    Ok(loads.iter().zip(&samples).flat_map(|(load, samples)| rows(load, &stand.targets, samples)).collect())
}

fn worked_on(target: &Target) -> u64 {
    WORKED_ON_BYTES.min(target.bytes)
}

fn rows(load: &Load, targets: &[Target], samples: &[Vec<Sample>]) -> Vec<Row> {
    let name = format!("{} of {} B, {} unanswered", load.name, usize::from(load.sectors) * 512, load.outstanding);
    let rates = |samples: &[Sample]| samples.iter().map(|sample| sample.fio.iops).collect::<Vec<f64>>();
    let cpu = |sample: &Sample| sample.cpu_us.iter().map(|(_, us)| us).sum::<f64>();
    let cpus = |samples: &[Sample]| samples.iter().map(cpu).collect::<Vec<f64>>();
    let peer = |kind: Kind| {
        let at = targets.iter().position(|target| target.is_peer && target.kind == kind);
        at.map(|at| &samples[at])
    };
    let row = |(target, of_target): (&Target, &Vec<Sample>)| {
        let all = |of: &dyn Fn(&Sample) -> f64| Spread::of(of_target.iter().map(of).collect());
        Some(Row {
            load: name.clone(),
            target: target.name,
            frames_per_s: Spread::of(rates(of_target))?,
            ratio_to_vblade: peer(target.kind).and_then(|peer| ratio(&rates(of_target), &rates(peer))),
            mean_us: all(&|sample| sample.fio.mean_us)?,
            p99_us: all(&|sample| sample.fio.p99_us)?,
            cpu_us: Spread::of(cpus(of_target))?,
            cpu_to_vblade: peer(target.kind).and_then(|peer| ratio(&cpus(of_target), &cpus(peer))),
            client_cpu_us: all(&|sample| sample.fio.client_cpu_us)?,
        })
    };
    targets.iter().zip(samples).filter_map(row).collect()
}

fn print(report: &Report) {
    let machine = &report.machine;
    println!("{}, {} cores, Linux {}, {}", machine.processor, machine.cores, machine.kernel, machine.file_system);
    println!(
        "{} rounds of {} s, medians (lowest–highest); commit {}; load before: {}",
        report.rounds, report.seconds, machine.commit, machine.load_average
    );
    let header = ["target", "frames/s", "× vblade", "mean µs", "p99 µs", "CPU µs/frame", "× vblade", "client µs"];
    let mut loads: Vec<&str> = report.rows.iter().map(|row| row.load.as_str()).collect();
    loads.dedup();
    for load in loads {
        let ratio = |ratio: &Option<Spread>| ratio.as_ref().map_or(String::new(), |ratio| ratio.with_range(2));
        let cells = |row: &Row| {
            vec![
                row.target.to_string(),
                row.frames_per_s.thousands(),
                ratio(&row.ratio_to_vblade),
                format!("{:.0}", row.mean_us.median),
                format!("{:.0}", row.p99_us.median),
                format!("{:.1}", row.cpu_us.median),
                ratio(&row.cpu_to_vblade),
                format!("{:.1}", row.client_cpu_us.median),
            ]
        };
        let of_load = report.rows.iter().filter(|row| row.load == load);
        println!("\n{load}\n{}", table(&header, of_load.map(cells)));
    }
}
