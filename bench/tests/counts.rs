//! An operation must not cost more than it did: allocations, instructions and system calls are counted and held against
//! `bench/bounds.txt`. Never time, which says more about the machine than about the change.
//!
//! What was saved is kept by lowering the bound; what is worth its price raises it, with the reason in the commit.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

/// Fewer in the time that is counted say nothing of an operation.
const OPERATIONS_MIN: f64 = 300.0;
/// Of a count that a busy machine adds to.
const ATTEMPTS: u32 = 3;
const BOUNDS: &str = include_str!("../bounds.txt");

/// `name = bound`, comments and empty lines aside.
fn bounds() -> BTreeMap<&'static str, f64> {
    let lines = BOUNDS.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let bound = |line: &'static str| {
        let (name, value) = line.rsplit_once('=').unwrap_or_else(|| panic!("{line:?} in bounds.txt has no ="));
        (name.trim(), value.trim().parse().unwrap_or_else(|error| panic!("{line:?} in bounds.txt: {error}")))
    };
    lines.map(bound).collect()
}

/// Runs `torus-bench count` for that part and gives the rows it wrote.
fn count(part: &str) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_torus-bench"));
    command.args(["count", "--quick", "--part", part, "--out"]).arg(folder.path()).stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    let text = std::fs::read_to_string(folder.path().join(part).with_extension("json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn is_installed(program: &str, arguments: &[&str]) -> bool {
    let tried = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let works = tried.is_ok_and(|output| output.status.success());
    if !works {
        eprintln!("SKIPPED: {program} is missing or may not be used here (`make setup`, as root)");
    }
    works
}

fn text<'a>(row: &'a Value, field: &str) -> &'a str {
    row[field].as_str().unwrap_or_else(|| panic!("no {field} in {row}"))
}

fn number(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or_else(|| panic!("no {field} in {row}"))
}

/// A machine that does few operations within the time is too busy to tell what one of them takes.
fn is_told(row: &Value) -> bool {
    let is_told = number(row, "operations") >= OPERATIONS_MIN;
    if !is_told {
        eprintln!("SKIPPED: only {} operations within the time: {row}", row["operations"]);
    }
    is_told
}

/// What is above its bound.
fn wrong(tolerance: &impl Fn(&str) -> f64, counted: &BTreeMap<String, f64>) -> Vec<String> {
    let bounds = bounds();
    let wrong = |(name, found): (&String, &f64)| match bounds.get(name.as_str()) {
        None => Some(format!("{name} = {found:.2} has no bound")),
        Some(bound) if *found > bound * (1.0 + tolerance(name)) => {
            Some(format!("{name}: {found:.2}, at most {bound} (and {:.0} %)", tolerance(name) * 100.0))
        }
        Some(_) => None,
    };
    counted.iter().filter_map(wrong).collect()
}

/// Every count has a bound and is within `tolerance` of it. What else the machine does adds to a count and never takes from
/// it, so the least of some attempts counts; what costs more now is above in all of them.
fn check(tolerance: impl Fn(&str) -> f64, attempts: u32, count: impl Fn() -> BTreeMap<String, f64>) {
    let mut least: BTreeMap<String, f64> = BTreeMap::new();
    for _ in 0..attempts {
        for (name, found) in count() {
            let known = least.entry(name).or_insert(found);
            *known = known.min(found);
        }
        if wrong(&tolerance, &least).is_empty() {
            least.iter().for_each(|(name, found)| println!("{name}: {found:.2} of {}", bounds()[name.as_str()]));
            return;
        }
    }
    panic!("of bench/bounds.txt, in {attempts} attempts:\n  {}", wrong(&tolerance, &least).join("\n  "));
}

#[test]
fn an_operation_allocates_no_more_than_it_did() {
    // One operation at a time: how often an executor sleeps depends on what else runs, and a sleep allocates.
    let tolerance = |name: &str| if name.contains("depth 1,") { 0.1 } else { 0.0 };
    check(tolerance, ATTEMPTS, || {
        let rows = count("allocations");
        let sides = |row: &Value| {
            ["client", "node"].map(|side| {
                let name = format!("allocations: {} at depth {}, {side}", text(row, "work"), row["depth"]);
                (name, number(row, &format!("{side}_per_operation")))
            })
        };
        rows.iter().filter(|row| is_told(row)).flat_map(sides).collect()
    });
}

#[test]
fn what_needs_no_io_takes_no_more_instructions_than_it_did() {
    if !is_installed("valgrind", &["--version"]) {
        return;
    }
    // Other versions of the compiler differ by a little.
    check(
        |_| 0.05,
        1,
        || {
            let rows = count("instructions");
            let name = |row: &Value| format!("instructions: {}", text(row, "part"));
            rows.iter().map(|row| (name(row), number(row, "instructions_per_operation"))).collect()
        },
    );
}

#[test]
fn an_operation_makes_no_more_system_calls_than_it_did() {
    let events = ["stat", "-e", "syscalls:sys_enter_read", "true"];
    if !is_installed("perf", &events) || !is_installed("fio", &["--version"]) {
        return;
    }
    let is_judged = |row: &&Value| {
        // The peer is only there to be looked at; metadata's calls come with the time, not with operations, and those of
        // write-fsync with what the disk makes of it.
        let is_on_path = !text(row, "process").starts_with("metadata") && text(row, "profile") != "write-fsync";
        is_on_path && !text(row, "system").starts_with("qemu")
    };
    // How often an executor finds something to do before it sleeps depends on what else runs.
    check(
        |_| 0.3,
        ATTEMPTS,
        || {
            let mut counted: BTreeMap<String, f64> = BTreeMap::new();
            for row in count("syscalls").iter().filter(is_judged).filter(|row| is_told(row)) {
                let name = format!("syscalls: {}, {}", text(row, "profile"), text(row, "system"));
                *counted.entry(name).or_default() += number(row, "calls_all");
            }
            counted
        },
    );
}

#[test]
fn the_bounds_can_be_read_and_are_named_once() {
    let lines = BOUNDS.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).count();
    assert_eq!(bounds().len(), lines);
    assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join("bounds.txt").exists());
}
