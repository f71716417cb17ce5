//! A comparison as tables on stdout.

use super::against::{self, Against};
use super::ceph;
use super::report::{RatedRow, Report, Row, is_raw};
use crate::processes::Idle;
use crate::report::table;
use crate::statistics::Spread;

fn median(spread: Option<&Spread>, digits: usize) -> String {
    spread.map_or("–".to_string(), |spread| format!("{:.digits$}", spread.median))
}

impl Row {
    /// `38.1 = 12.0 + 13.1 + 13.0`, nothing where there is no server.
    fn servers_cpu(&self) -> String {
        let parts: Vec<String> = self.cpu_us.iter().map(|(_, spread)| format!("{:.1}", spread.median)).collect();
        match parts.len() {
            0 => String::new(),
            1 => parts[0].clone(),
            _ => format!("{:.1} = {}", self.cpu_us_all.median, parts.join(" + ")),
        }
    }

    fn cells(&self) -> Vec<String> {
        let range = |spread: &Option<Spread>| spread.as_ref().map_or("–".to_string(), |spread| spread.with_range(2));
        let ratios = if is_raw(self) {
            [String::new(), String::new()]
        } else {
            [&self.ratio_to_raw, &self.latency_to_raw].map(range)
        };
        let [rate, latency] = ratios;
        vec![
            self.system.clone(),
            self.rate(),
            rate,
            format!("{:.0}", self.mean_us.median),
            latency,
            median(self.percentile(99.0), 0),
            median(self.percentile(99.9), 0),
            self.servers_cpu(),
            format!("{:.1}", self.client_cpu_us.median),
            self.iops_per_core.as_ref().map_or(String::new(), |spread| format!("{:.1} k", spread.median / 1000.0)),
        ]
    }
}

const HEADER: [&str; 10] = [
    "system",
    "IOPS or MiB/s",
    "× raw",
    "mean µs",
    "× raw",
    "p99 µs",
    "p99.9 µs",
    "servers CPU µs/op",
    "client CPU µs/op",
    "IOPS per core",
];

pub fn print(report: &Report) {
    report.setting().iter().for_each(|sentence| println!("{sentence}"));
    for load in report.loads(false) {
        println!("\n{load}\n{}", table(&HEADER, report.of_load(load).map(Row::cells)));
    }
    for (whose, is_ceph) in [("Torus", false), ("Ceph", true)] {
        let rows = report.rows.iter().filter(|row| (row.system == ceph::NAME) == is_ceph && row.cpu_us.len() > 1);
        if let Some(row) = rows.max_by_key(|row| row.cpu_us.len()) {
            let names: Vec<&str> = row.cpu_us.iter().map(|(name, _)| name.as_str()).collect();
            println!("\nservers of {whose} = {}, as far as they take part", names.join(" + "));
        }
    }
    if !report.against_ceph.is_empty() {
        println!("\n{}", table(&against::HEADER, report.against_ceph.iter().map(Against::cells)));
    }
    for kind in [super::loads::READS, super::loads::WRITES] {
        print_depths(report, kind);
    }
    if !report.rated.is_empty() {
        println!("\n{}", table(&RATED_HEADER, report.rated.iter().map(RatedRow::cells)));
    }
    let cells = |idle: &Idle| {
        let mib = idle.resident_bytes as f64 / f64::from(1 << 20);
        vec![idle.process.clone(), format!("{:.2} %", idle.percent_of_a_core), format!("{mib:.0} MiB")]
    };
    let rows = report.idle.iter().map(cells);
    println!("\nidle for {} s\n{}", report.idle_seconds, table(&["process", "of a core", "memory"], rows));
    report.notes.iter().for_each(|note| println!("* {note}"));
}

/// Thousands of operations a second, a column for each depth.
fn print_depths(report: &Report, kind: &str) {
    let mut depths: Vec<usize> = report.rows.iter().filter(|row| row.kind == kind).map(|row| row.depth).collect();
    depths.sort_unstable();
    depths.dedup();
    if depths.len() < 3 {
        return;
    }
    let mut header = vec![format!("{kind}, k IOPS at depth")];
    header.extend(depths.iter().map(usize::to_string));
    let cells = |system: &str| {
        let at = |depth: &usize| {
            report.rows.iter().find(|row| row.kind == kind && row.system == system && row.depth == *depth)
        };
        let rate = |row: Option<&Row>| row.map_or("–".to_string(), |row| format!("{:.1}", row.iops.median / 1000.0));
        let mut cells = vec![system.to_string()];
        cells.extend(depths.iter().map(|depth| rate(at(depth))));
        cells
    };
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    println!("\n{}", table(&header, report.systems.iter().map(|system| cells(&system.name))));
}

const RATED_HEADER: [&str; 9] = [
    "at half the rate of depth 32, from the intended start",
    "asked k/s",
    "reached k/s",
    "mean µs",
    "p50",
    "p99",
    "p99.9",
    "p99.9 uncorrected",
    "never started",
];

impl RatedRow {
    fn cells(&self) -> Vec<String> {
        let at = |list: &[(f64, Spread)], percent: f64| {
            median(list.iter().find(|(found, _)| *found == percent).map(|(_, spread)| spread), 0)
        };
        vec![
            format!("{}, {}", self.work, self.system),
            format!("{:.1}", self.asked_per_second / 1000.0),
            format!("{:.1}", self.reached_per_second.median / 1000.0),
            format!("{:.0}", self.mean_us.median),
            at(&self.corrected, 50.0),
            at(&self.corrected, 99.0),
            at(&self.corrected, 99.9),
            at(&self.uncorrected, 99.9),
            self.never_started.to_string(),
        ]
    }
}
