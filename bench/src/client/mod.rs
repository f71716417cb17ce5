//! The client library as one more system: a process of its own with a volume attached, so that its CPU and memory are
//! counted like everybody's. It takes orders on stdin and answers on stdout, a line of JSON each, until stdin ends.
//!
//! * `load`    what it does to the volume
//! * `remote`  how the comparison speaks to it

pub mod load;
pub mod remote;

use crate::error::{BenchError, Result};
use crate::fio::{Percentiles, is_told};
use crate::library::{fill_region, volume_error, with_volume_on};
use crate::options::ClientOptions;
use crate::processes::own_cpu;
use futures::StreamExt;
use futures::channel::mpsc;
use hdrhistogram::Histogram;
use load::{Load, drive, drive_at_rate};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::time::Instant;
use torus_frontends::device::Device;
use torus_rpc::runtime::glommio::Thread;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Order {
    /// Write the region, from its start on, so many times, and flush.
    Fill {
        bytes: u64,
        passes: u32,
    },
    Run(Load),
    RunAtRate {
        load: Load,
        per_second: f64,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// The volume is attached.
    Ready,
    Filled,
    Ran {
        /// Of the run, and what it took: the last operations end after its time is up.
        seconds: f64,
        /// Of this process, per operation.
        cpu_us: f64,
        latencies: Latencies,
    },
    RanAtRate {
        seconds: f64,
        cpu_us: f64,
        corrected: Latencies,
        uncorrected: Latencies,
        never_started: u64,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    pub operations: u64,
    pub mean_us: f64,
    /// Those of [`PERCENTS`] that can be told.
    pub percentiles: Percentiles,
}

/// Those that fio is asked for, and some between, as a curve needs them.
pub const PERCENTS: [f64; 9] = [50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99];

impl Latencies {
    fn of(histogram: &Histogram<u64>) -> Self {
        let us = |percent: f64| histogram.value_at_percentile(percent) as f64 / 1000.0;
        let told = PERCENTS.into_iter().filter(|percent| is_told(*percent, histogram.len()));
        Self {
            operations: histogram.len(),
            mean_us: histogram.mean() / 1000.0,
            percentiles: told.map(|percent| (percent, us(percent))).collect(),
        }
    }
}

/// Until stdin ends: the volume is released then.
pub fn run(options: &ClientOptions) -> Result<()> {
    let (orders, mut received) = mpsc::unbounded();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            let order = line.map_err(BenchError::wrap("stdin")).and_then(|line| {
                serde_json::from_str::<Order>(&line).map_err(BenchError::wrap(format!("the order {line:?}")))
            });
            // Who gives orders waits for each answer, so nothing is lost when the other side has ended.
            if orders.unbounded_send(order).is_err() {
                return;
            }
        }
    });
    let thread = Thread { cpu: None, spin: options.spin.0 };
    with_volume_on(thread, &options.metadata, &options.volume, async |device| {
        say(&Answer::Ready)?;
        while let Some(order) = received.next().await {
            say(&carry_out(&device, order?).await?)?;
        }
        Ok(())
    })
}

fn say(answer: &Answer) -> Result<()> {
    let wrap = |error: std::io::Error| BenchError::Failed { what: "an answer".to_string(), because: error.to_string() };
    let mut line = serde_json::to_vec(answer).map_err(BenchError::wrap("an answer"))?;
    line.push(b'\n');
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&line).and_then(|()| stdout.flush()).map_err(wrap)
}

async fn carry_out<D: Device>(device: &D, order: Order) -> Result<Answer> {
    let (before, started) = (own_cpu()?, Instant::now());
    // The histograms are read after the clocks: that work is nobody's operation.
    let cost = |operations: u64| -> Result<(f64, f64)> {
        let cpu = own_cpu()?.saturating_sub(before);
        Ok((started.elapsed().as_secs_f64(), cpu.as_secs_f64() * 1e6 / operations.max(1) as f64))
    };
    match order {
        Order::Fill { bytes, passes } => {
            for _ in 0..passes {
                fill_region(device, bytes).await.map_err(volume_error)?;
            }
            Ok(Answer::Filled)
        }
        Order::Run(load) => {
            let latencies = drive(device, load).await?;
            let (seconds, cpu_us) = cost(latencies.len())?;
            Ok(Answer::Ran { seconds, cpu_us, latencies: Latencies::of(&latencies) })
        }
        Order::RunAtRate { load, per_second } => {
            let paced = drive_at_rate(device, load, per_second).await?;
            let (seconds, cpu_us) = cost(paced.corrected.len())?;
            let [corrected, uncorrected] = [&paced.corrected, &paced.uncorrected].map(Latencies::of);
            Ok(Answer::RanAtRate { seconds, cpu_us, corrected, uncorrected, never_started: paced.never_started })
        }
    }
}
