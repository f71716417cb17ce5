//! The client library at half the rate that it reaches: what a request waits for on a machine that is not full.

use super::loads::{RATED, full_speed, rated};
use super::measure::unexpected;
use super::report::{RatedRow, percentiles};
use super::stand::{Driver, Stand, System};
use crate::client::load::Work;
use crate::client::remote::Client;
use crate::client::{Answer, Latencies, Order};
use crate::error::Result;
use crate::fio::Size;
use crate::processes::{Watched, cpu_of};
use crate::statistics::Spread;
use std::time::Duration;

const SHARE: f64 = 0.5;

/// One volume, one kind of work.
struct Case<'a> {
    system: &'a System,
    client: &'a Client,
    name: &'static str,
    work: Work,
    full_per_second: f64,
    samples: Vec<Sample>,
}

struct Sample {
    per_second: f64,
    client_cpu_us: f64,
    servers_cpu_us: f64,
    corrected: Latencies,
    uncorrected: Latencies,
    never_started: u64,
}

pub fn measure(stand: &Stand, size: Size, rounds: usize, say: &dyn Fn(&str)) -> Result<Vec<RatedRow>> {
    let mut cases = Vec::new();
    for system in &stand.systems {
        let Driver::Library(client) = &system.driver else { continue };
        for (name, work) in RATED {
            let full_per_second = full_rate(client, work, size)?;
            say(&format!("{}, {name}: {full_per_second:.0} a second with 32 in flight", system.described.name));
            cases.push(Case { system, client, name, work, full_per_second, samples: vec![] });
        }
    }
    for round in 0..rounds {
        say(&format!("at half of these, round {} of {rounds}", round + 1));
        for case in &mut cases {
            let sample = case.measure(size, round as u64)?;
            case.samples.push(sample);
        }
    }
    Ok(cases.iter().filter_map(Case::row).collect())
}

fn full_rate(client: &Client, work: Work, size: Size) -> Result<f64> {
    match client.ask(&Order::Run(full_speed(work, size, 0)))? {
        Answer::Ran { seconds, latencies, .. } => Ok(latencies.operations as f64 / seconds),
        other => Err(unexpected(&other)),
    }
}

fn spent(processes: &[Watched], before: &[Duration]) -> Result<Duration> {
    let after = cpu_of(processes)?;
    Ok(before.iter().zip(after).map(|(before, after)| after.saturating_sub(*before)).sum())
}

impl Case<'_> {
    fn measure(&self, size: Size, seed: u64) -> Result<Sample> {
        let before = cpu_of(&self.system.processes)?;
        let order = Order::RunAtRate { load: rated(self.work, size, seed), per_second: self.full_per_second * SHARE };
        match self.client.ask(&order)? {
            Answer::RanAtRate { seconds, cpu_us, corrected, uncorrected, never_started } => {
                let operations = corrected.operations.max(1) as f64;
                let servers = spent(&self.system.processes, &before)?;
                Ok(Sample {
                    per_second: corrected.operations as f64 / seconds,
                    client_cpu_us: cpu_us,
                    servers_cpu_us: servers.as_secs_f64() * 1e6 / operations,
                    corrected,
                    uncorrected,
                    never_started,
                })
            }
            other => Err(unexpected(&other)),
        }
    }

    /// `None` without rounds.
    fn row(&self) -> Option<RatedRow> {
        let all = |of: &dyn Fn(&Sample) -> f64| Spread::of(self.samples.iter().map(of).collect());
        let told = |of: &dyn Fn(&Sample) -> &Latencies| {
            let rounds: Vec<&[(f64, f64)]> = self.samples.iter().map(|sample| &of(sample).percentiles[..]).collect();
            percentiles(&rounds)
        };
        Some(RatedRow {
            system: self.system.described.name.clone(),
            work: self.name.to_string(),
            full_per_second: self.full_per_second,
            asked_per_second: self.full_per_second * SHARE,
            reached_per_second: all(&|sample| sample.per_second)?,
            mean_us: all(&|sample| sample.corrected.mean_us)?,
            corrected: told(&|sample| &sample.corrected),
            uncorrected: told(&|sample| &sample.uncorrected),
            client_cpu_us: all(&|sample| sample.client_cpu_us)?,
            servers_cpu_us: all(&|sample| sample.servers_cpu_us)?,
            never_started: self.samples.iter().map(|sample| sample.never_started).sum(),
        })
    }
}
