//! What it costs to measure a stage of an operation: time and allocations, on one thread and without anything beside it.

use crate::count::allocator;
use crate::error::Result;
use crate::report::{table, write_json};
use serde::Serialize;
use std::hint::black_box;
use std::time::{Duration, Instant};
use torus_rpc::runtime::glommio::now;
use torus_schema::latency::{OperationKind, Stage, Stages};

const TIMES: u64 = 4_000_000;
const ROUNDS: usize = 5;

#[derive(Serialize)]
struct Row {
    what: &'static str,
    ns: f64,
    allocations: u64,
}

pub fn run() -> Result<()> {
    let stages = Stages::default();
    // As scattered as times are: a xorshift, whose own cost is the first row.
    let mut state = 88_172_645_463_325_252u64;
    let mut took = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Duration::from_nanos(state >> (34 + state % 16))
    };
    let rows = [
        measure("drawing a time (in the next row too)", || _ = black_box(took())),
        measure("recording a stage", || stages.record(OperationKind::Write, Stage::Disk, took())),
        measure("reading the clock", || _ = black_box(now())),
        measure("a stage: reading the clock and recording", || {
            stages.record(OperationKind::Read, Stage::Disk, black_box(now()).since(black_box(Default::default())));
        }),
    ];
    let cells = |row: &Row| vec![row.what.to_string(), format!("{:.1}", row.ns), row.allocations.to_string()];
    println!("{}", table(&["per stage", "ns", "allocations"], rows.iter().map(cells)));
    write_json("stages", &rows).map(drop)
}

/// The best of some rounds: what others do on this machine only adds to it.
fn measure(what: &'static str, mut work: impl FnMut()) -> Row {
    let (mut ns, mut allocations) = (f64::MAX, 0);
    for _ in 0..ROUNDS {
        allocator::start();
        let began = Instant::now();
        (0..TIMES).for_each(|_| work());
        let took = began.elapsed();
        allocations += allocator::stop().own;
        ns = ns.min(took.as_nanos() as f64 / TIMES as f64);
    }
    Row { what, ns, allocations }
}
