//! The comparison: every load on every system, round by round, so that what disturbs the machine disturbs all.
//!
//! * `stand`   the systems that are compared
//! * `ceph`    one of them
//! * `guard`   who cleans up behind it
//! * `loads`   what each of them is asked
//! * `measure` one system under one load
//! * `rated`   the client library at a fixed rate
//! * `report`  what was found
//! * `against` that, ours divided by Ceph's
//! * `tables`  that, for a terminal; `page` is for everybody else

pub mod against;
pub mod ceph;
mod guard;
pub mod loads;
mod measure;
mod rated;
pub mod report;
pub mod stand;
mod tables;

use crate::error::{BenchError, Result};
use crate::fio::Size;
use crate::machine::{Machine, load_average};
use crate::options::{Compare, Peer};
use crate::page;
use crate::processes::idle;
use loads::Load;
use measure::Sample;
use report::{Report, Row};
use stand::{Driver, Stand};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use torus_tests::process;

const IDLE_WINDOW: Duration = Duration::from_secs(10);
/// Starting and ending of a client, for each measurement.
const AROUND: Duration = Duration::from_millis(500);
const IDLE_WINDOW_QUICK: Duration = Duration::from_secs(2);

/// By load, system and round.
type Samples = Vec<Vec<Vec<Sample>>>;

struct Run<'a> {
    options: &'a Compare,
    loads: Vec<Load>,
    machine: Machine,
    say: &'a dyn Fn(&str),
}

/// Sets everything up, measures, prints and writes JSON and page.
pub fn run(options: &Compare) -> Result<()> {
    if let Some(Peer::Ceph) = options.peers {
        ceph::check()?;
    }
    options.profile.as_deref().map_or(Ok(()), loads::check)?;
    options.systems.iter().try_for_each(|text| stand::check(text, options.peers))?;
    let say = |text: &str| eprintln!("bench: {text}");
    let wanted = |load: &Load| options.wants(load.name) && !(load.is_sweep && options.no_sweep);
    let loads = loads::all().into_iter().filter(wanted).collect();
    let run = Run { options, loads, machine: Machine::describe(&process::programs()), say: &say };
    let scale = if options.quick { stand::SMALL } else { stand::FULL };
    let mut stand = Stand::build(scale, &|system| options.wants_system(system), options.peers, &say)?;
    say(&run.estimate(&stand));
    let measured = run.measure(&stand, scale.region_bytes);
    let report = stand.explain(measured)?;
    tables::print(&report);
    let [json, html] = run.write(&report)?;
    say(&format!("written to {} and {}", json.display(), html.display()));
    Ok(())
}

impl Run<'_> {
    /// How long it will take from here on.
    fn estimate(&self, stand: &Stand) -> String {
        let (systems, rounds) = (stand.systems.len(), self.options.rounds());
        let libraries = stand.systems.iter().filter(|system| matches!(system.driver, Driver::Library(_))).count();
        let rates = if self.options.no_rates { 0 } else { libraries * loads::RATED.len() };
        let seconds: Vec<Duration> = self.loads.iter().map(|load| self.options.seconds(load.is_sweep)).collect();
        let time = duration_of(&seconds, systems, rounds, (rates, self.options.seconds(false)));
        let minutes = (time + self.idle_window()).as_secs().div_ceil(60);
        format!("{systems} systems, {} loads, {rounds} rounds: about {minutes} min from here on", self.loads.len())
    }

    fn idle_window(&self) -> Duration {
        if self.options.quick { IDLE_WINDOW_QUICK } else { IDLE_WINDOW }
    }

    fn measure(&self, stand: &Stand, region_bytes: u64) -> Result<Report> {
        let rounds = self.options.rounds();
        let mut samples: Samples = vec![vec![vec![]; stand.systems.len()]; self.loads.len()];
        let mut report = self.report(stand, region_bytes);
        for round in 0..rounds {
            // As it ends: whoever must stop this has what was measured until then.
            (self.say)(&format!("round {} of {rounds}; load {}", round + 1, load_average()));
            for (load, of_load) in self.loads.iter().zip(&mut samples) {
                self.measure_load(load, stand, (round, region_bytes), of_load)?;
            }
            report.rounds = round + 1;
            report.rows = self.rows(stand, &samples);
            report.against_ceph = against::against(&report);
            report.load_average_after = load_average();
            self.write(&report)?;
        }
        let size = Size { bytes: region_bytes, run: self.options.seconds(false) };
        if !self.options.no_rates {
            report.rated = rated::measure(stand, size, rounds, self.say)?;
        }
        report.load_average_after = load_average();
        let window = self.idle_window();
        (self.say)(&format!("idle for {window:?}"));
        report.idle_seconds = window.as_secs_f64();
        report.idle = idle(&stand.processes, window)?;
        Ok(report)
    }

    /// One load on all systems, each round beginning with another, so that nobody always comes after the same one.
    fn measure_load(
        &self,
        load: &Load,
        stand: &Stand,
        (round, bytes): (usize, u64),
        of_load: &mut [Vec<Sample>],
    ) -> Result<()> {
        let size = Size { bytes, run: self.options.seconds(load.is_sweep) };
        let mut line = format!("{}: IOPS", load.name);
        let count = stand.systems.len();
        let order = (0..count).map(|index| (index + round) % count);
        if load.is_filled_before {
            // All of them before the first is measured, so that each waits as long.
            order.clone().try_for_each(|index| stand.systems[index].fill(bytes, 1))?;
        }
        for index in order {
            let system = &stand.systems[index];
            let sample = system.measure(load, size, round as u64)?;
            let _ = write!(line, " · {} {:.0}", system.described.name, sample.measured.iops);
            of_load[index].push(sample);
        }
        (self.say)(&line);
        Ok(())
    }

    fn report(&self, stand: &Stand, region_bytes: u64) -> Report {
        Report {
            version: report::VERSION,
            machine: self.machine.clone(),
            load_average_after: String::new(),
            rounds: 0,
            seconds: self.options.seconds(false).as_secs_f64(),
            sweep_seconds: self.options.seconds(true).as_secs_f64(),
            region_bytes,
            systems: stand.systems.iter().map(|system| system.described.clone()).collect(),
            rows: vec![],
            rated: vec![],
            idle_seconds: 0.0,
            idle: vec![],
            against_ceph: vec![],
            notes: report::notes().into_iter().chain(stand.notes()).collect(),
        }
    }

    /// The first system is what the others are divided by.
    fn rows(&self, stand: &Stand, samples: &Samples) -> Vec<Row> {
        let of_load = |(load, samples): (&Load, &Vec<Vec<Sample>>)| {
            let rows = stand.systems.iter().zip(samples);
            let rows = rows.filter_map(|(system, own)| Row::of(load, &system.described, own, &samples[0]));
            rows.collect::<Vec<Row>>()
        };
        self.loads.iter().zip(samples).flat_map(of_load).collect()
    }

    /// compare.json and compare.html.
    fn write(&self, report: &Report) -> Result<[PathBuf; 2]> {
        let folder = self.options.out.clone().unwrap_or_else(|| {
            // What is committed is a whole run, nothing else.
            let name = if self.options.is_whole() { "results" } else { "out" };
            Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
        });
        let [json, html] = ["compare.json", "compare.html"].map(|name| folder.join(name));
        let wrap = || BenchError::wrap(format!("results to {}", folder.display()));
        std::fs::create_dir_all(&folder).map_err(wrap())?;
        let text = serde_json::to_string_pretty(report).map_err(BenchError::wrap("results as JSON"))?;
        std::fs::write(&json, text + "\n").map_err(wrap())?;
        std::fs::write(&html, page::render(report)).map_err(wrap())?;
        Ok([json, html])
    }
}

/// Of all rounds: `loads` on each system, and then `rates` measurements at fixed rates, which have one before all rounds.
fn duration_of(loads: &[Duration], systems: usize, rounds: usize, (rates, of_rate): (usize, Duration)) -> Duration {
    let of_system: Duration = loads.iter().map(|seconds| *seconds + AROUND).sum();
    of_system * (systems * rounds) as u32 + (of_rate + AROUND) * (rates * (rounds + 1)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_system_takes_its_share_of_every_round() {
        let loads = [Duration::from_millis(2500), Duration::from_millis(500)];
        let with = |systems| duration_of(&loads, systems, 5, (6, Duration::from_millis(1500)));
        assert_eq!(with(10), Duration::from_secs(4 * 10 * 5 + 2 * 6 * 6));
        assert_eq!(with(11) - with(10), Duration::from_secs(4 * 5));
    }
}
