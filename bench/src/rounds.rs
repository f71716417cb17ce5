//! The comparison: every profile on every system, round by round, so that what disturbs the machine disturbs all.

use crate::error::Result;
use crate::fio::{self, Measured, PROFILES, Profile, Size};
use crate::machine::Machine;
use crate::options::Compare;
use crate::processes::{Idle, Watched, cpu_of, idle};
use crate::report::{self, Report, Row};
use crate::stand::{REGION_BYTES, Stand, System};
use std::time::Duration;
use torus_tests::process;

const IDLE_WINDOW: Duration = Duration::from_secs(3);

/// One system under one profile in one round.
#[derive(Clone, Debug)]
pub struct Sample {
    pub fio: Measured,
    /// Of each process of the system, per operation.
    pub cpu_us: Vec<(String, f64)>,
}

/// Sets everything up, measures, prints and writes the report.
pub fn compare(options: &Compare) -> Result<()> {
    let (rounds, seconds) = options.effort();
    let profiles: Vec<Profile> = PROFILES.into_iter().filter(|profile| options.wants(profile.name)).collect();
    let say = |text: &str| eprintln!("bench: {text}");
    let machine = Machine::describe(&process::programs());
    let mut stand = Stand::build(options.tcp, &say)?;
    let measured = measure(&stand, &profiles, rounds, seconds, &say);
    let samples = stand.explain(measured)?;
    say(&format!("idle for {IDLE_WINDOW:?}"));
    let idle: Vec<Idle> = idle(&stand.processes, IDLE_WINDOW)?;
    let rows =
        profiles.iter().zip(&samples).flat_map(|(profile, of_profile)| rows(profile, &stand.systems, of_profile));
    let report = Report { machine, rounds, seconds: seconds.as_secs_f64(), rows: rows.collect(), idle };
    report.print();
    let path = report::write_json("compare", &report)?;
    say(&format!("written to {}", path.display()));
    Ok(())
}

/// By profile, system and round.
fn measure(
    stand: &Stand,
    profiles: &[Profile],
    rounds: usize,
    run: Duration,
    say: &dyn Fn(&str),
) -> Result<Vec<Vec<Vec<Sample>>>> {
    let size = Size { bytes: REGION_BYTES, run };
    let mut samples: Vec<Vec<Vec<Sample>>> = vec![vec![vec![]; stand.systems.len()]; profiles.len()];
    for round in 0..rounds {
        say(&format!("round {} of {rounds}", round + 1));
        for (profile, of_profile) in profiles.iter().zip(&mut samples) {
            for (system, of_system) in stand.systems.iter().zip(of_profile) {
                of_system.push(sample(*profile, system, size)?);
            }
        }
    }
    Ok(samples)
}

fn sample(profile: Profile, system: &System, size: Size) -> Result<Sample> {
    let before = cpu_of(&system.processes)?;
    let fio = fio::run(profile, &system.target, size)?;
    let after = cpu_of(&system.processes)?;
    let per_operation = |process: &Watched, before: Duration, after: Duration| {
        (process.name.clone(), after.saturating_sub(before).as_secs_f64() * 1e6 / fio.operations as f64)
    };
    let times = before.into_iter().zip(after);
    let cpu_us =
        system.processes.iter().zip(times).map(|(process, (before, after))| per_operation(process, before, after));
    let cpu_us = cpu_us.collect();
    Ok(Sample { fio, cpu_us })
}

/// The first system is what the others are divided by.
fn rows<'a>(profile: &Profile, systems: &'a [System], samples: &'a [Vec<Sample>]) -> impl Iterator<Item = Row> + 'a {
    let profile = profile.name;
    let raw = &samples[0];
    systems.iter().zip(samples).filter_map(move |(system, of_system)| Row::of(profile, system.name, of_system, raw))
}
