//! System calls and context switches of every process while fio runs, by the kernel's tracepoints: `perf stat` counts
//! in the kernel and stops nobody, where strace would slow every call and so change how they batch.

use crate::compare::stand::{Driver, FULL, SMALL, Scale, Stand, System};
use crate::error::{BenchError, Result};
use crate::fio::{self, PROFILES, Profile, Size};
use crate::processes::Watched;
use crate::report::table;
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
/// All calls as one: some hundred tracepoints for each thread take seconds to set up and to take down.
const EVENTS_QUICK: &str = "raw_syscalls:sys_enter,context-switches";

/// The raw file is in it for nothing but that it is always there.
const SYSTEMS: [&str; 3] = ["qemu-nbd, file", "Torus ×3, unix", "torus-engine --nbd ×1, unix"];

#[derive(Serialize)]
struct Row {
    profile: &'static str,
    system: String,
    process: String,
    /// Of few of them the counts are of timers and heartbeats rather than of their path.
    operations: u64,
    /// Per operation.
    calls: BTreeMap<String, f64>,
    calls_all: f64,
    context_switches: f64,
}

pub fn run(time: Duration, is_quick: bool, out: Option<&Path>) -> Result<()> {
    check_perf()?;
    let scale = if is_quick { SMALL } else { FULL };
    let mut stand = Stand::build(scale, &|name| SYSTEMS.contains(&name), None, &|text| eprintln!("bench: {text}"))?;
    let events = if is_quick { EVENTS_QUICK } else { EVENTS };
    let counted = count_all(&stand, scale, time, events);
    let rows = stand.explain(counted)?;
    print(&rows);
    super::write(&super::results_folder(out), "syscalls", &rows)
}

fn count_all(stand: &Stand, scale: Scale, run: Duration, events: &str) -> Result<Vec<Row>> {
    let folder = process::temporary_dir("bench-count");
    let size = Size { bytes: scale.region_bytes, run };
    let mut rows = Vec::new();
    for profile in PROFILES.into_iter().filter(|profile| COUNTED.contains(&profile.name)) {
        for system in stand.systems.iter().filter(|system| !system.processes.is_empty()) {
            let Driver::Fio(target) = &system.driver else { continue };
            eprintln!("bench: {} on {}", profile.name, system.described.name);
            let before = perf(system, events, folder.path());
            let measured = fio::measure(fio::command(profile, target, size, &before), profile.name)?;
            for process in &system.processes {
                rows.push(row(profile, system, process, &output(folder.path(), process), measured.operations)?);
            }
        }
    }
    Ok(rows)
}

pub fn check_perf() -> Result<()> {
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

/// Where perf writes what it counted of that process.
fn output(folder: &Path, process: &Watched) -> PathBuf {
    folder.join(process.pid.to_string())
}

/// One perf for each process, each the parent of the next, the last to be of fio: all count for exactly as long as that runs.
fn perf(system: &System, events: &str, folder: &Path) -> Vec<String> {
    let of_process = |process: &Watched| {
        let (pid, output) = (process.pid.to_string(), output(folder, process).display().to_string());
        ["perf", "stat", "-x", ",", "-e", events, "-p", &pid, "-o", &output, "--"].map(str::to_string)
    };
    system.processes.iter().flat_map(of_process).collect()
}

fn row(profile: Profile, system: &System, process: &Watched, output: &PathBuf, operations: u64) -> Result<Row> {
    let wrap = BenchError::wrap(format!("what perf wrote to {}", output.display()));
    let text = std::fs::read_to_string(output).map_err(wrap)?;
    let mut calls: BTreeMap<String, f64> =
        counts(&text).map(|(event, count)| (event.to_string(), count as f64 / operations as f64)).collect();
    let context_switches = calls.remove("context-switches").unwrap_or(0.0);
    let calls_all = calls.values().sum();
    calls.retain(|_, count| *count >= NOTEWORTHY);
    let (system, process) = (system.described.name.clone(), process.name.clone());
    Ok(Row { profile: profile.name, system, process, operations, calls, calls_all, context_switches })
}

/// All that a file of `perf stat -x,` says was counted.
pub fn counted(output: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(output).map_err(BenchError::wrap(output.display().to_string()))?;
    Ok(counts(&text).map(|(_, count)| count).sum())
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
        let what = format!("{}, {}", row.profile, row.system);
        vec![
            what,
            row.process.clone(),
            names.join(", "),
            format!("{:.2}", row.calls_all),
            format!("{:.2}", row.context_switches),
        ]
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
