//! How often our servers wait for a lock while several connections are busy: calls of futex, by the kernel's tracepoint. A
//! lock that nobody holds is taken without one.

use super::stand::{Kind, Served};
use crate::count::syscalls;
use crate::error::Result;
use crate::fio::{self, Connections, Size};
use crate::report::table;
use crate::stand::REGION_BYTES;
use serde::Serialize;
use std::time::Duration;
use torus_tests::process;

#[derive(Serialize)]
pub struct Row {
    load: &'static str,
    server: String,
    operations: u64,
    futex_calls: u64,
}

/// Of ours; nothing where the kernel's tracepoints cannot be counted, which is said.
pub fn count(
    servers: &[Served],
    loads: impl Iterator<Item = Connections> + Clone,
    run: Duration,
    say: &dyn Fn(&str),
) -> Result<Vec<Row>> {
    if let Err(error) = syscalls::check_perf() {
        say(&format!("waits for locks are not counted: {error}"));
        return Ok(vec![]);
    }
    let folder = process::temporary_dir("bench-nbd-locks");
    let mut rows = Vec::new();
    for served in servers.iter().filter(|served| matches!(served.kind, Kind::Ours | Kind::OurNull)) {
        for load in loads.clone() {
            let output = |pid: u32| folder.path().join(pid.to_string());
            let perf = |pid: u32| {
                let output = output(pid).display().to_string();
                let words = ["perf", "stat", "-x", ",", "-e", "syscalls:sys_enter_futex", "-p"].map(str::to_string);
                words.into_iter().chain([pid.to_string(), "-o".to_string(), output, "--".to_string()])
            };
            let before: Vec<String> = served.processes.iter().flat_map(|process| perf(process.pid)).collect();
            let size = Size { bytes: REGION_BYTES, run };
            let measured = fio::run_connections(load, &served.target, size, &before)?;
            let mut futex_calls = 0;
            for process in &served.processes {
                futex_calls += syscalls::counted(&output(process.pid))?;
            }
            let server = format!("{}{}", served.name, served.transport.suffix());
            rows.push(Row { load: load.name, server, operations: measured.operations, futex_calls });
        }
    }
    Ok(rows)
}

pub fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        let each = row.futex_calls as f64 / row.operations.max(1) as f64;
        let counts = [row.operations, row.futex_calls].map(|count| count.to_string());
        [vec![row.load.to_string(), row.server.clone()], counts.to_vec(), vec![format!("{each:.4}")]].concat()
    };
    if !rows.is_empty() {
        let header = ["waits for locks", "server", "operations", "futex calls", "per operation"];
        println!("\n{}", table(&header, rows.iter().map(cells)));
    }
}
