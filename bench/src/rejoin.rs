//! What it costs that a node was away: killed, missed for a while in which the volume is written at a given rate, and
//! started again. Measured from its start until every replica is in sync, on volumes of different sizes that hold the
//! same amount of data, scattered over all of their length.

use crate::error::{BenchError, Result};
use crate::machine::Machine;
use crate::options::RejoinOptions;
use crate::processes::Watched;
use crate::report::{table, write_json};
use serde::Serialize;
use std::time::{Duration, Instant};
use torus_schema::limits::{BLOCK_BYTES, MIB};
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer};
use torus_tests::{Outcome, process};

const SIZES_GIB: [u64; 3] = [1, 10, 100];
const NODE_SIZE: &str = "3GiB";
/// In each volume before the node goes.
const FILLED: &str = "512M";
const QUICK_FILLED: &str = "64M";
const IN_SYNC_WITHIN: Duration = Duration::from_secs(600);

/// What the volume's owner says of a replica just before it is in sync.
const END_OF_RESYNC: &str = "the replica has everything";
const LINES_SHOWN: usize = 20;

#[derive(Serialize)]
struct Row {
    volume_gib: u64,
    away_s: u64,
    writes_s: u64,
    /// Sent by the client while the node was away; some blocks more than once.
    written_bytes: u64,
    /// From the start of the node's process until every replica was in sync.
    seconds: f64,
    /// From the first request of the resync to its end, as the volume's owner logs it.
    resync_seconds: f64,
    examined_blocks: u64,
    pulled_bytes: u64,
    revoked: u64,
    /// Written by the node's process meanwhile.
    disk_bytes: u64,
}

pub fn run(options: &RejoinOptions) -> Result<()> {
    let sizes = if options.quick { &SIZES_GIB[..2] } else { &SIZES_GIB[..] };
    let rows = sizes.iter().map(|gib| measure(*gib, options)).collect::<Result<Vec<Row>>>()?;
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / MIB as f64);
    let cells = |row: &Row| {
        vec![
            format!("{} GiB", row.volume_gib),
            mib(row.written_bytes),
            format!("{:.2}", row.seconds),
            format!("{:.2}", row.resync_seconds),
            row.examined_blocks.to_string(),
            mib(row.pulled_bytes),
            row.revoked.to_string(),
            mib(row.disk_bytes),
        ]
    };
    let header = [
        "volume",
        "written meanwhile MiB",
        "s",
        "of it resync s",
        "blocks compared",
        "moved MiB",
        "taken back",
        "disk MiB",
    ];
    println!("{}", table(&header, rows.iter().map(cells)));
    let path = write_json("rejoin", &(Machine::describe(&process::programs()), &rows))?;
    eprintln!("bench: written to {}", path.display());
    Ok(())
}

fn measure(volume_gib: u64, options: &RejoinOptions) -> Result<Row> {
    eprintln!("bench: a volume of {volume_gib} GiB");
    let mut cluster = Cluster::start(ClusterOptions { size: NODE_SIZE, ..ClusterOptions::new("bench-rejoin", 3) });
    cluster.torusblk(&["volume", "create", "demo", &format!("{volume_gib}GiB")]).ok();
    // Attached throughout: who repairs a volume that nobody has attached is a storage node, which says nothing here.
    let server = cluster.serve_with(&["--volume", "demo"]);
    let filled = if options.quick { QUICK_FILLED } else { FILLED };
    write(&server, volume_gib, &["--bs=64k", "--iodepth=16", &format!("--io_size={filled}"), "--randseed=1"]);
    cluster.kill_node(0);
    let (rate, away) = (format!("--rate_iops={}", options.writes), format!("--runtime={}", options.seconds));
    write(&server, volume_gib, &["--bs=4k", "--iodepth=16", "--time_based", &rate, &away, "--randseed=2"]);
    let started = Instant::now();
    cluster.start_node(0);
    if !cluster.await_in_sync(IN_SYNC_WITHIN) {
        let because = format!("not in sync within {IN_SYNC_WITHIN:?}; the server said:\n{}", server.process.log());
        return Err(BenchError::Failed { what: "the rejoin".to_string(), because });
    }
    let seconds = started.elapsed().as_secs_f64();
    let node = Watched::new("node", cluster.node(0).pid());
    let log = plain(&server.process.log());
    let field = |name: &str| field(&log, name);
    Ok(Row {
        volume_gib,
        away_s: options.seconds,
        writes_s: options.writes,
        written_bytes: options.seconds * options.writes * BLOCK_BYTES,
        seconds,
        resync_seconds: field("seconds")?,
        examined_blocks: field("examined")? as u64,
        pulled_bytes: field("pulled")? as u64 * BLOCK_BYTES,
        revoked: field("revoked")? as u64,
        disk_bytes: node.written_bytes()?,
    })
}

/// Of the last resync that the log tells of.
fn field(log: &str, name: &str) -> Result<f64> {
    let line = log.lines().rev().find(|line| line.contains(END_OF_RESYNC)).unwrap_or_default();
    let value = line.split_whitespace().find_map(|word| word.strip_prefix(&format!("{name}=")));
    value.and_then(|value| value.parse().ok()).ok_or_else(|| {
        let last: Vec<&str> = log.lines().rev().take(LINES_SHOWN).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        let because = format!(
            "{name}= is expected in its last line with {END_OF_RESYNC:?} and found is {line:?}; has frontends/src/volume/\
             resync.rs other words for it now, or did a storage node repair the volume? The log ends with:\n{}",
            last.join("\n")
        );
        BenchError::Failed { what: "how long the resync took, from the NBD server's log".to_string(), because }
    })
}

/// At random places anywhere in the volume, with a flush at the end.
fn write(server: &NbdServer, volume_gib: u64, extra: &[&str]) {
    let mut fio = process::tool("fio");
    fio.args(["--name=scattered", "--ioengine=nbd", "--rw=randwrite", "--norandommap", "--end_fsync=1"]);
    fio.args(["--output-format=terse", &format!("--size={volume_gib}G")]).args(extra);
    Outcome::of(fio.arg(format!("--uri={}", server.url("demo")))).ok();
}

/// Without the escapes that colour a terminal.
fn plain(line: &str) -> String {
    let mut text = String::new();
    let mut parts = line.split('\u{1b}');
    text.extend(parts.next());
    parts.for_each(|part| text.extend(part.split_once('m').map(|(_, rest)| rest)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_resync_took_is_in_its_last_line_and_where_it_is_not_the_log_is_shown() {
        let log = format!("a\n{END_OF_RESYNC} pulled=1 seconds=0.5\n{END_OF_RESYNC} pulled=7 seconds=1.5\nz");
        assert_eq!(field(&log, "pulled").unwrap(), 7.0);
        assert_eq!(field(&log, "seconds").unwrap(), 1.5);
        let missing = field("a\nonly this", "pulled").unwrap_err().to_string();
        assert!(missing.contains(END_OF_RESYNC) && missing.ends_with("a\nonly this"), "{missing}");
    }

    #[test]
    fn colours_are_taken_out_of_a_line() {
        assert_eq!(plain("\u{1b}[2mat\u{1b}[0m \u{1b}[3mpulled\u{1b}[0m\u{1b}[2m=\u{1b}[0m7"), "at pulled=7");
    }
}
