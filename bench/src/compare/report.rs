//! What a comparison found: what is written as JSON, and what `page` draws.

use super::against::Against;
use super::loads::Load;
use super::measure::Sample;
use super::stand::{Described, RAW, Transport};
use crate::machine::Machine;
use crate::processes::Idle;
use crate::statistics::{Spread, ratio};
use serde::{Deserialize, Serialize};

/// Of the JSON; `page` reads this one only.
pub const VERSION: u32 = 1;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub version: u32,
    pub machine: Machine,
    pub load_average_after: String,
    /// Of these so many are in the figures; less than were asked for, if the run was stopped.
    pub rounds: usize,
    pub seconds: f64,
    /// Of the loads that are only in the curves over the depth.
    pub sweep_seconds: f64,
    pub region_bytes: u64,
    pub systems: Vec<Described>,
    pub rows: Vec<Row>,
    pub rated: Vec<RatedRow>,
    pub idle_seconds: f64,
    pub idle: Vec<Idle>,
    /// Empty where Ceph was not measured.
    #[serde(default)]
    pub against_ceph: Vec<Against>,
    pub notes: Vec<String>,
}

/// One system under one load, all rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub load: String,
    pub kind: String,
    pub depth: usize,
    pub bytes: u64,
    pub is_sweep: bool,
    pub system: String,
    pub iops: Spread,
    /// IOPS divided by those of the raw file in the same round.
    pub ratio_to_raw: Option<Spread>,
    pub mean_us: Spread,
    /// Mean latency divided by that of the raw file in the same round.
    pub latency_to_raw: Option<Spread>,
    /// Percent and µs, those that every round can tell.
    pub percentiles: Vec<(f64, Spread)>,
    /// Of each process of the system, the client not among them, per operation.
    pub cpu_us: Vec<(String, Spread)>,
    pub cpu_us_all: Spread,
    /// Of fio (of all its threads where it is a library's client), or of our client process.
    pub client_cpu_us: Spread,
    /// Operations for a second of CPU of the system's processes and, where the client is a library, of it.
    pub iops_per_core: Option<Spread>,
}

/// The client library at a fixed rate, latencies from when each operation was to be started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RatedRow {
    pub system: String,
    pub work: String,
    /// What it reached with 32 in flight, and what was asked of it here.
    pub full_per_second: f64,
    pub asked_per_second: f64,
    pub reached_per_second: Spread,
    pub mean_us: Spread,
    pub corrected: Vec<(f64, Spread)>,
    /// From when each was really started: what a client sees that waits for itself.
    pub uncorrected: Vec<(f64, Spread)>,
    pub client_cpu_us: Spread,
    pub servers_cpu_us: Spread,
    /// In all rounds; where it is not 0 the figures are too good.
    pub never_started: u64,
}

/// Percentiles that every round tells.
pub fn percentiles(rounds: &[&[(f64, f64)]]) -> Vec<(f64, Spread)> {
    let Some((first, _)) = rounds.split_first() else { return vec![] };
    let at = |percent: f64| -> Option<Spread> {
        let of_round = |round: &&[(f64, f64)]| round.iter().find(|(found, _)| *found == percent).map(|(_, us)| *us);
        Spread::of(rounds.iter().map(of_round).collect::<Option<Vec<f64>>>()?)
    };
    first.iter().filter_map(|(percent, _)| Some((*percent, at(*percent)?))).collect()
}

impl Row {
    /// `None` without rounds.
    pub fn of(load: &Load, system: &Described, samples: &[Sample], raw: &[Sample]) -> Option<Self> {
        let all = |of: &dyn Fn(&Sample) -> f64| samples.iter().map(of).collect::<Vec<f64>>();
        let of_raw = |of: &dyn Fn(&Sample) -> f64| raw.iter().map(of).collect::<Vec<f64>>();
        // Not `sum`: of nothing that is -0.
        let of_servers = |sample: &Sample| sample.cpu_us.iter().fold(0.0, |sum, (_, us)| sum + us);
        let is_library = system.transport == Transport::Library;
        let ours = |sample: &Sample| of_servers(sample) + if is_library { sample.measured.client_cpu_us } else { 0.0 };
        let processes = samples.first()?.cpu_us.iter().enumerate();
        let cpu_us = processes
            .filter_map(|(index, (name, _))| Some((name.clone(), Spread::of(all(&|sample| sample.cpu_us[index].1))?)))
            .collect();
        let per_core = samples.iter().map(ours).filter(|us| *us > 0.0).map(|us| 1e6 / us).collect();
        let of_rounds: Vec<&[(f64, f64)]> = samples.iter().map(|sample| &sample.percentiles[..]).collect();
        let (iops, mean_us) = (all(&|sample| sample.measured.iops), all(&|sample| sample.measured.mean_us));
        Some(Self {
            load: load.name.to_string(),
            kind: load.kind.to_string(),
            depth: load.depth,
            bytes: load.bytes,
            is_sweep: load.is_sweep,
            system: system.name.clone(),
            ratio_to_raw: ratio(&iops, &of_raw(&|sample| sample.measured.iops)),
            latency_to_raw: ratio(&mean_us, &of_raw(&|sample| sample.measured.mean_us)),
            iops: Spread::of(iops)?,
            mean_us: Spread::of(mean_us)?,
            percentiles: percentiles(&of_rounds),
            cpu_us,
            cpu_us_all: Spread::of(all(&of_servers))?,
            client_cpu_us: Spread::of(all(&|sample| sample.measured.client_cpu_us))?,
            iops_per_core: Spread::of(per_core),
        })
    }

    pub fn percentile(&self, percent: f64) -> Option<&Spread> {
        self.percentiles.iter().find(|(found, _)| *found == percent).map(|(_, spread)| spread)
    }

    /// MiB/s where an operation is as large as that, thousands a second otherwise.
    pub fn rate(&self) -> String {
        let is_large = self.bytes >= 1 << 20;
        if is_large { format!("{} MiB/s", self.iops.with_range(0)) } else { self.iops.thousands() }
    }
}

impl Report {
    pub fn of_load<'a>(&'a self, load: &str) -> impl Iterator<Item = &'a Row> {
        self.rows.iter().filter(move |row| row.load == load)
    }

    /// Names, in the order in which they were measured.
    pub fn loads(&self, is_sweep: bool) -> Vec<&str> {
        let mut loads: Vec<&str> = Vec::new();
        for row in self.rows.iter().filter(|row| row.is_sweep == is_sweep) {
            if !loads.contains(&row.load.as_str()) {
                loads.push(&row.load);
            }
        }
        loads
    }

    pub fn system(&self, name: &str) -> Option<&Described> {
        self.systems.iter().find(|system| system.name == name)
    }

    /// What the figures were taken on, in two sentences.
    pub fn setting(&self) -> [String; 2] {
        let machine = &self.machine;
        let gib = machine.memory_bytes as f64 / f64::from(1 << 30);
        [
            format!(
                "{}, {} cores, {gib:.0} GiB, Linux {}, {}; {}; commit {}, {} build.",
                machine.processor,
                machine.cores,
                machine.kernel,
                machine.file_system,
                machine.fio,
                machine.commit,
                machine.build
            ),
            format!(
                "{} rounds of {} s ({} s for depths between profiles), medians (lowest–highest). Load before: {}, after: {}.",
                self.rounds,
                self.seconds,
                self.sweep_seconds,
                averages(&machine.load_average),
                averages(&self.load_average_after)
            ),
        ]
    }
}

/// Of what the kernel says of its load, the averages over 1, 5 and 15 minutes.
fn averages(load: &str) -> String {
    load.split_whitespace().take(3).collect::<Vec<&str>>().join(" ")
}

/// Said with every result, whatever it shows.
pub fn notes() -> Vec<String> {
    [
        "Nothing is pinned, for any system: with so few cores pinning would choose a winner. Client, servers, nodes and metadata share all cores.",
        "Systems are measured one after the other within a round, each round beginning with another one; ratios are made inside a round.",
        "CPU is user and system time of each process; what the kernel does in threads of its own is in nobody's account. IOPS per core is 1 s divided by the CPU time that the system's own processes (with the library: its client too) need for one operation; fio is not among them.",
        "nbdkit's file plugin has no O_DIRECT: it reads from and writes to the page cache, so its rates are memory's.",
        "In write-fsync an operation is a write and the flush behind it; over NBD and on the file its percentiles are sums of both, so upper bounds.",
        "At a fixed rate a latency counts from when its operation was to be started (coordinated omission is corrected), and the client's own waking up is in it.",
        "Not measured: machines with more cores, more than one disk or NVMe passed through; a real network (all nodes are on this machine, and reached by unix sockets); many clients or volumes at once; hours of load. How rates scale with cores is therefore an extrapolation from CPU per operation, not a measurement.",
    ]
    .map(str::to_string)
    .to_vec()
}

/// Those that the raw file's own row is not compared by.
pub fn is_raw(row: &Row) -> bool {
    row.system == RAW
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_that_one_round_cannot_tell_is_left_out() {
        let long: &[(f64, f64)] = &[(50.0, 10.0), (99.9, 90.0)];
        let short: &[(f64, f64)] = &[(50.0, 12.0)];
        let told = percentiles(&[long, short]);
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].0, told[0].1.median), (50.0, 11.0));
        assert!(percentiles(&[]).is_empty());
    }
}
