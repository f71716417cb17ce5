//! Allocations per operation: a client and a whole storage node in this one process, over loopback TCP as ever, under
//! an allocator that counts. This thread is the client; the others are the node's shard and its main thread, which
//! does nothing but send a heartbeat.

use super::allocator;
use crate::client::load::{Work, drive};
use crate::error::{BenchError, Result};
use crate::library;
use crate::report::table;
use crate::stand;
use clap::Parser;
use nix::sys::signal::{Signal, raise};
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};
use torus_engine::config::CommandLine;
use torus_engine::node;
use torus_tests::wait;

#[derive(Serialize)]
struct Row {
    work: Work,
    depth: usize,
    operations: u64,
    client_per_operation: f64,
    node_per_operation: f64,
}

pub fn run(time: Duration, out: Option<&Path>) -> Result<()> {
    let cluster = stand::start_cluster("bench-count", 0);
    let line = [
        "torus-engine".to_string(),
        format!("--metadata={}", cluster.url()),
        format!("--data-dir={}", cluster.data_dir(0).display()),
        format!("--size={}", stand::NODE_SIZE),
    ];
    let line = CommandLine::try_parse_from(line).map_err(BenchError::wrap("the node's settings"))?;
    let arguments = line.node.expect("--metadata and --data-dir are those of a node");
    let node = std::thread::spawn(move || node::run(arguments, &line.serving).map_err(BenchError::wrap("the node")));
    wait::until("the node in this process to join", || {
        assert!(!node.is_finished(), "the node in this process ended before it joined");
        let is_formatted = cluster.data_dir(0).join("torus.json").exists();
        (is_formatted && cluster.heartbeat(0).is_some()).then_some(())
    });
    cluster.torusadm(&["peer", "add", "--all-peers"]).ok();
    stand::create_volume(&cluster, "counted", 1);
    let rows = library::with_volume(&cluster.url(), "counted", async |device| {
        eprintln!("bench: writing the region");
        library::fill(&device).await.map_err(library::volume_error)?;
        let idle = idle(time).await;
        let mut rows = Vec::new();
        for work in [Work::Read, Work::Write, Work::DurableWrite] {
            for depth in [1, 32] {
                let load = library::load(work, depth, time, 1);
                // What grows to its size once is not an operation's cost: what is kept until a flush is 8,192 writes, which
                // one after the other would take longer than there is on a busy machine.
                drive(&device, library::load(work, 32, time, 1)).await?;
                allocator::start();
                let started = Instant::now();
                let operations = drive(&device, load).await?.len();
                let (counted, took) = (allocator::stop(), started.elapsed());
                let per_operation = |count: u64, idle: f64| {
                    (count as f64 - idle * took.as_secs_f64()).max(0.0) / operations.max(1) as f64
                };
                let client_per_operation = per_operation(counted.own, idle.0);
                let node_per_operation = per_operation(counted.others, idle.1);
                rows.push(Row { work, depth, operations, client_per_operation, node_per_operation });
            }
        }
        Ok(rows)
    })?;
    // The node waits for it, as if it were a process of its own.
    raise(Signal::SIGTERM).map_err(BenchError::wrap("SIGTERM to the node in this process"))?;
    node.join().map_err(|_| BenchError::Failed {
        what: "the node in this process".to_string(),
        because: "it panicked; its message is above".to_string(),
    })??;
    print(&rows);
    super::write(&super::results_folder(out), "allocations", &rows)
}

/// A second of doing nothing, of this thread and the others: heartbeats, leases, timers. They come with the time, and on a
/// busy machine an operation takes more of that.
async fn idle(time: Duration) -> (f64, f64) {
    allocator::start();
    let started = Instant::now();
    glommio::timer::sleep(time).await;
    let (counted, took) = (allocator::stop(), started.elapsed().as_secs_f64());
    (counted.own as f64 / took, counted.others as f64 / took)
}

fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        let name = format!("{:?} × {}", row.work, row.depth);
        vec![name, format!("{:.2}", row.client_per_operation), format!("{:.2}", row.node_per_operation)]
    };
    println!("{}", table(&["allocations per 4 KiB", "client", "node"], rows.iter().map(cells)));
}
