//! Rot on one node of a running cluster: a scrub finds it, a read meets it, a peer mends it, and `torusadm` shows it.
//!
//! Method: bytes of the node's block file are changed behind its back.

use futures::executor::block_on;
use serde_json::Value;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use torus_rpc::control::ask_damage;
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer};
use torus_tests::tools::qemu_io_ok;
use torus_tests::wait;

const BLOCK: usize = 4096;
/// What the volume is filled with, as qemu-io names it.
const PATTERN: u8 = 85;

fn filled(name: &'static str) -> (Cluster, NbdServer) {
    let node_arguments = vec!["--scrub-rate".to_string(), "1GiB".to_string()];
    let mut cluster = Cluster::start(ClusterOptions { node_arguments, ..ClusterOptions::new(name, 3) });
    cluster.torusblk(&["volume", "create", "demo", "64MiB"]).ok();
    let server = cluster.serve();
    qemu_io_ok(&server.url("demo"), &["write -P 85 0 4M", "write -P 85 20M 1M", "flush"]);
    (cluster, server)
}

/// Changes a byte in the first `count` blocks with the volume's content.
fn rot(cluster: &Cluster, node: usize, count: usize) {
    let path = cluster.data_dir(node).join("shard-0.blocks");
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut window = vec![0; 1 << 20];
    let (mut offset, mut found) = (0, 0);
    while found < count {
        file.read_exact_at(&mut window, offset).expect("the content is somewhere in the file");
        for (number, block) in window.chunks(BLOCK).enumerate() {
            if found < count && block.iter().all(|byte| *byte == PATTERN) {
                file.write_all_at(&[!PATTERN], offset + (number * BLOCK + 77) as u64).unwrap();
                found += 1;
            }
        }
        offset += window.len() as u64;
    }
    file.sync_all().unwrap();
}

/// Of the node's one shard, by `torusadm`.
fn scrub(cluster: &Cluster, arguments: &[&str], node: usize) -> Value {
    let address = cluster.node_record(node).control;
    let output = cluster.torusadm(&[&["--output", "json", "scrub"], arguments, &[&address]].concat()).ok();
    let document: Value = serde_json::from_str(&output).unwrap();
    document["nodes"][0]["shards"][0].clone()
}

/// Starts one and gives its result.
fn pass(cluster: &Cluster, node: usize) -> Value {
    let started = scrub(cluster, &["start"], node);
    let mut newest = started["current"]["started_s"].as_u64();
    wait::until("the pass to end", || {
        let status = scrub(cluster, &["status"], node);
        newest = newest.or(status["last"]["started_s"].as_u64());
        let last = status["last"].clone();
        (status["current"].is_null() && last["started_s"].as_u64() >= newest).then_some(last)
    })
}

fn damaged_now(cluster: &Cluster, node: usize) -> u64 {
    let address = cluster.node_record(node).control;
    let shards = block_on(ask_damage(&address, 100, Duration::from_secs(10))).unwrap();
    shards.iter().map(|shard| shard.damaged).sum()
}

#[test]
fn a_scrub_finds_what_rotted_and_a_peer_mends_it() {
    let (mut cluster, server) = filled("scrub");
    rot(&cluster, 0, 3);
    let first = pass(&cluster, 0);
    assert_eq!((&first["damaged"], &first["conflicts"]), (&3.into(), &0.into()), "{first}");
    let read: u64 = first["blocks_read"].as_str().unwrap().parse().unwrap();
    assert!(read >= 5 * 256, "{first}");
    wait::until("the repairs", || (damaged_now(&cluster, 0) == 0).then_some(()));
    let second = pass(&cluster, 0);
    assert_eq!((&second["damaged"], &second["segments_unread"]), (&0.into(), &0.into()), "{second}");
    assert!(cluster.torusadm(&["scrub", "status", "--damaged"]).ok().contains("0 damaged blocks, 0 conflicts"));
    // The last result is known after a restart.
    cluster.stop_node(0);
    cluster.start_node(0);
    let status = scrub(&cluster, &["status"], 0);
    assert_eq!(status["last"]["started_s"], second["started_s"]);
    qemu_io_ok(&server.url("demo"), &["read -P 85 0 4M", "read -P 85 20M 1M"]);
}

#[test]
fn a_read_that_meets_rot_is_answered_rightly_and_has_it_mended() {
    let (mut cluster, server) = filled("rot-read");
    rot(&cluster, 0, 200);
    // Reads go to any replica: after some rounds each was asked for each block.
    let log_has_repairs = |cluster: &mut Cluster| cluster.node(0).log().matches("repaired a block").count() >= 200;
    wait::until("every rotten block to be read and mended", || {
        qemu_io_ok(&server.url("demo"), &["read -P 85 0 4M", "read -P 85 20M 1M"]);
        log_has_repairs(&mut cluster).then_some(())
    });
    assert_eq!(damaged_now(&cluster, 0), 0);
    assert_eq!(pass(&cluster, 0)["damaged"], 0);
}

#[test]
fn a_pass_is_stopped_and_gone_on_with_by_order() {
    let node_arguments = vec!["--scrub-rate".to_string(), "4KiB".to_string()];
    let mut cluster = Cluster::start(ClusterOptions { node_arguments, ..ClusterOptions::new("scrub-stop", 1) });
    cluster.torusblk(&["volume", "create", "demo", "64MiB", "--replicas", "1"]).ok();
    let server = cluster.serve();
    qemu_io_ok(&server.url("demo"), &["write -P 85 0 4M", "flush"]);
    let running = scrub(&cluster, &["start"], 0);
    assert_eq!(running["last"], Value::Null);
    wait::until("the pass to run", || (scrub(&cluster, &["status"], 0)["running"] == true).then_some(()));
    let stopped = scrub(&cluster, &["stop"], 0);
    assert_eq!((&stopped["running"], &stopped["last"]), (&false.into(), &Value::Null));
    // Not by itself, nor by a restart.
    cluster.stop_node(0);
    cluster.start_node(0);
    let status = scrub(&cluster, &["status"], 0);
    assert_eq!((&status["running"], &status["current"]), (&false.into(), &stopped["current"]));
    let resumed = scrub(&cluster, &["start"], 0);
    assert_eq!(resumed["current"]["started_s"], stopped["current"]["started_s"]);
}
