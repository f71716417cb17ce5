//! One system under one load in one round.

use crate::error::Result;
use crate::fio::Measured;
use crate::processes::{Watched, cpu_of};
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Sample {
    pub fio: Measured,
    /// Of each process of the system, per operation.
    pub cpu_us: Vec<(String, f64)>,
}

/// What fio measured, with the CPU time that the system took since `before`.
pub fn sample_of(fio: Measured, processes: &[Watched], before: Vec<Duration>) -> Result<Sample> {
    let after = cpu_of(processes)?;
    let per_operation = |process: &Watched, before: Duration, after: Duration| {
        (process.name.clone(), after.saturating_sub(before).as_secs_f64() * 1e6 / fio.operations as f64)
    };
    let times = before.into_iter().zip(after);
    let cpu_us = processes.iter().zip(times).map(|(process, (before, after))| per_operation(process, before, after));
    let cpu_us = cpu_us.collect();
    Ok(Sample { fio, cpu_us })
}
