//! System calls and context switches of every process while fio runs, by the kernel's tracepoints: `perf stat` counts
//! in the kernel and stops nobody, where strace would slow every call and so change how they batch.

use crate::error::{BenchError, Result};
use crate::fio::{self, PROFILES, Profile, Size};
use crate::processes::Watched;
use crate::report::{table, write_json};
use crate::stand::{REGION_BYTES, Stand, System};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use torus_tests::process;

/// Fewer than this per operation are not of its path (timers, heartbeats).
const NOTEWORTHY: f64 = 0.005;
const COUNTED: [&str; 5] = ["randread-qd1", "randread-qd32", "randwrite-qd1", "randwrite-qd32", "write-fsync"];
const EVENTS: &str = "syscalls:sys_enter_*,context-switches";

#[derive(Serialize)]
struct Row {
    profile: &'static str,
    system: &'static str,
    process: String,
    /// Per operation.
    calls: BTreeMap<String, f64>,
    context_switches: f64,
}

pub fn run(time: Duration) -> Result<()> {
    check_perf()?;
    let mut stand = Stand::build(false, &|text| eprintln!("bench: {text}"))?;
    let counted = count_all(&stand, time);
    let rows = stand.explain(counted)?;
    print(&rows);
    write_json("syscalls", &rows).map(drop)
}

fn count_all(stand: &Stand, time: Duration) -> Result<Vec<Row>> {
    let folder = process::temporary_dir("bench-count");
    let mut rows = Vec::new();
    for profile in PROFILES.into_iter().filter(|profile| COUNTED.contains(&profile.name)) {
        for system in stand.systems.iter().filter(|system| !system.processes.is_empty()) {
            eprintln!("bench: {} on {}", profile.name, system.name);
            rows.extend(count(profile, system, time, folder.path())?);
        }
    }
    Ok(rows)
}

fn check_perf() -> Result<()> {
    let tried =
        Command::new("perf").args(["stat", "-e", "syscalls:sys_enter_read", "true"]).stdin(Stdio::null()).output();
    let output = tried.map_err(|because| BenchError::Missing { program: "perf", package: "linux-perf", because })?;
    if output.status.success() {
        return Ok(());
    }
    let because = String::from_utf8_lossy(&output.stderr).trim().to_string();
    let what = "perf cannot count system calls (it needs root, and tracefs at /sys/kernel/tracing)".to_string();
    Err(BenchError::Failed { what, because })
}

/// One perf for each process, each the parent of the next, the last of fio: all count for exactly as long as fio runs.
fn count(profile: Profile, system: &System, run: Duration, folder: &Path) -> Result<Vec<Row>> {
    let output = |process: &Watched| folder.join(process.pid.to_string());
    let mut before = Vec::new();
    for process in &system.processes {
        before.extend(["perf", "stat", "-x", ",", "-e", EVENTS, "-p"].map(str::to_string));
        before.extend([
            process.pid.to_string(),
            "-o".to_string(),
            output(process).display().to_string(),
            "--".to_string(),
        ]);
    }
    let size = Size { bytes: REGION_BYTES, run };
    let measured = fio::measure(fio::command(profile, &system.target, size, &before), profile.name)?;
    let rows =
        system.processes.iter().map(|process| row(profile, system, process, &output(process), measured.operations));
    rows.collect()
}

fn row(profile: Profile, system: &System, process: &Watched, output: &PathBuf, operations: u64) -> Result<Row> {
    let wrap = BenchError::wrap(format!("what perf wrote to {}", output.display()));
    let text = std::fs::read_to_string(output).map_err(wrap)?;
    let mut calls: BTreeMap<String, f64> =
        counts(&text).map(|(event, count)| (event.to_string(), count as f64 / operations as f64)).collect();
    let context_switches = calls.remove("context-switches").unwrap_or(0.0);
    calls.retain(|_, count| *count >= NOTEWORTHY);
    Ok(Row { profile: profile.name, system: system.name, process: process.name.clone(), calls, context_switches })
}

/// Lines of `perf stat -x,`: count, unit, event, …
fn counts(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(',');
        let count = fields.next()?.parse().ok()?;
        let event = fields.nth(1)?;
        Some((event.strip_prefix("syscalls:sys_enter_").unwrap_or(event), count))
    })
}

fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        let mut calls: Vec<(&String, &f64)> = row.calls.iter().collect();
        calls.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        let names: Vec<String> = calls.iter().map(|(name, count)| format!("{name} {count:.2}")).collect();
        let sum: f64 = row.calls.values().sum();
        let what = format!("{}, {}", row.profile, row.system);
        vec![what, row.process.clone(), names.join(", "), format!("{sum:.2}"), format!("{:.2}", row.context_switches)]
    };
    let rows = rows.iter().filter(|row| !row.calls.is_empty());
    println!("{}", table(&["per operation", "process", "system calls", "all", "switches"], rows.map(cells)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perf_lines_are_counts_of_events_and_the_rest_is_passed_over() {
        let text = "# started on Sat\n\n30,,syscalls:sys_enter_mmap,1221099,100.00,,\n\
                    7,,context-switches,1221099,100.00,,\n<not counted>,,syscalls:sys_enter_read,0,100.00,,\n";
        assert_eq!(counts(text).collect::<Vec<_>>(), [("mmap", 30), ("context-switches", 7)]);
    }
}
