//! A read beside a burst of writes at queue depth 256 does not wait for the burst: it has connections and shares of its
//! own all the way. One that did wait would take as long as a write of that burst, so the two are compared within one
//! run; how long either takes is printed, and is the machine's.

use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::process::{self, Outcome};
use torus_tests::tools::{qemu_io_ok, spawn_fio};

/// The median read by the median write of the burst, at most: behind the burst it would be 1. Two cores that nodes, client
/// and load share gave 0.37 (4 KiB).
const READ_SHARE_MAX: f64 = 0.6;

fn fio(url: &str, arguments: &[&str]) -> std::process::Command {
    let mut command = process::tool("fio");
    command.args(["--ioengine=nbd", "--time_based", "--output-format=terse", "--terse-version=3"]);
    command.arg(format!("--uri={url}")).args(arguments);
    command
}

/// Where terse output lists the percentiles of each direction.
#[derive(Clone, Copy)]
enum Direction {
    Read = 0,
    Write = 1,
}

/// Percentiles of the completion latency, in microseconds, as terse output lists them (`99.000000%=1234`).
fn percentile_us(terse: &str, direction: Direction, percent: &str) -> u64 {
    let line = terse.lines().find(|line| line.starts_with("3;")).unwrap_or_else(|| panic!("not terse: {terse}"));
    let mut values = line.split(';').filter_map(|field| field.strip_prefix(percent));
    let value = values.nth(direction as usize).unwrap_or_else(|| panic!("no {percent}: {line}"));
    value.trim_start_matches('=').parse().expect("microseconds")
}

#[test]
fn a_read_does_not_wait_for_a_burst_of_writes() {
    let mut cluster = Cluster::start(ClusterOptions { size: "4GiB", ..ClusterOptions::new("read-behind-writes", 3) });
    cluster.torusblk(&["volume", "create", "demo", "1GiB"]).ok();
    let server = cluster.serve();
    let url = server.url("demo");
    qemu_io_ok(&url, &["write -P 1 512M 32M", "flush"]);
    let range = ["--offset=512M", "--size=32M"];
    for (block, depth) in [("4k", "256"), ("128k", "256")] {
        let read = ["--name=read", "--rw=randread", "--bs=4k", "--iodepth=1", "--runtime=5"];
        let alone = Outcome::of(&mut fio(&url, &[&read[..], &range[..]].concat())).ok();
        let burst = ["--name=burst", "--rw=randwrite", "--size=256M", "--runtime=9"];
        let (bs, depth) = (format!("--bs={block}"), format!("--iodepth={depth}"));
        let mut burst =
            spawn_fio(&mut fio(&url, &[&burst[..], &[bs.as_str(), depth.as_str()]].concat()), cluster.folder());
        let beside = Outcome::of(&mut fio(&url, &[&read[..], &range[..]].concat())).ok();
        assert!(burst.await_end().success(), "{}", burst.log());
        let before = percentile_us(&alone, Direction::Read, "99.000000%");
        let p50 = percentile_us(&beside, Direction::Read, "50.000000%");
        let p99 = percentile_us(&beside, Direction::Read, "99.000000%");
        let write = percentile_us(&burst.log(), Direction::Write, "50.000000%");
        println!(
            "reads beside {block} writes at depth 256: p50 {p50} us, p99 {p99} us, a write {write} us; alone p99 {before} us"
        );
        assert!(p50 as f64 <= write as f64 * READ_SHARE_MAX, "a read takes {p50} us, a write of {block} {write} us");
    }
}
