//! One system under one load.

use super::loads::Load;
use super::stand::{Driver, System};
use crate::client::remote::Client;
use crate::client::{Answer, Latencies, Order};
use crate::error::{BenchError, Result};
use crate::fio::{self, Measured, Percentiles, Size};
use crate::processes::{children_cpu, cpu_of};
use crate::rounds::sample_of;
use std::time::Duration;

/// In one round.
#[derive(Clone, Debug)]
pub struct Sample {
    pub measured: Measured,
    pub percentiles: Percentiles,
    /// Of each process of the system, the client not among them, per operation.
    pub cpu_us: Vec<(String, f64)>,
}

impl System {
    /// Writes the region in order, and flushes it.
    pub fn fill(&self, bytes: u64, passes: u32) -> Result<()> {
        match &self.driver {
            Driver::Fio(target) | Driver::FioThreads { target, .. } => fio::fill(target, bytes, passes),
            Driver::Library(client) => fill_by(client, bytes, passes),
        }
    }

    pub fn measure(&self, load: &Load, size: Size, seed: u64) -> Result<Sample> {
        let before = cpu_of(&self.processes)?;
        let (measured, percentiles) = match &self.driver {
            Driver::Fio(target) => fio::measure_all(load.fio(target, size), load.name)?,
            Driver::FioThreads { target, start } => {
                let before = children_cpu()?;
                let (command, limit) = (load.fio(target, size), target.limit(size.run));
                let (measured, percentiles) = fio::measure_within(command, load.name, limit)?;
                let spent = children_cpu()?.saturating_sub(before);
                (with_client_cpu(measured, spent.saturating_sub(*start)), percentiles)
            }
            Driver::Library(client) => match client.ask(&Order::Run(load.client(size, seed)))? {
                Answer::Ran { seconds, cpu_us, latencies } => of_library(seconds, cpu_us, latencies),
                other => return Err(unexpected(&other)),
            },
        };
        let sample = sample_of(measured, &self.processes, before)?;
        Ok(Sample { measured, percentiles, cpu_us: sample.cpu_us })
    }
}

pub fn fill_by(client: &Client, bytes: u64, passes: u32) -> Result<()> {
    match client.ask(&Order::Fill { bytes, passes })? {
        Answer::Filled => Ok(()),
        other => Err(unexpected(&other)),
    }
}

pub fn unexpected(answer: &Answer) -> BenchError {
    BenchError::Failed {
        what: "an order to the client process".to_string(),
        because: format!("it answered {answer:?}"),
    }
}

/// fio counts the thread of its job only.
fn with_client_cpu(measured: Measured, spent: Duration) -> Measured {
    let client_cpu_us = spent.as_secs_f64() * 1e6 / measured.operations.max(1) as f64;
    Measured { client_cpu_us, ..measured }
}

fn of_library(seconds: f64, client_cpu_us: f64, latencies: Latencies) -> (Measured, Percentiles) {
    let Latencies { operations, mean_us, percentiles } = latencies;
    let p99 = percentiles.iter().find(|(percent, _)| *percent == 99.0);
    let p99_us = p99.map_or(f64::NAN, |(_, us)| *us);
    (Measured { operations, iops: operations as f64 / seconds, mean_us, p99_us, client_cpu_us }, percentiles)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_threads_of_a_client_took_is_told_per_operation() {
        let measured = Measured { operations: 500, iops: 1.0, mean_us: 2.0, p99_us: 3.0, client_cpu_us: 4.0 };
        let all = with_client_cpu(measured, Duration::from_millis(100));
        assert_eq!((all.client_cpu_us, all.mean_us), (200.0, 2.0));
        assert_eq!(with_client_cpu(Measured { operations: 0, ..measured }, Duration::ZERO).client_cpu_us, 0.0);
    }
}
