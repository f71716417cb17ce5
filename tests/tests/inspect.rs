//! `torus-engine inspect`: what stands on the disks of a node that does not run, told without a byte written.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::loops::LoopDevice;
use torus_tests::process::{self, Outcome, Process};
use torus_tests::tools::qemu_io_ok;

const NEEDED: u64 = (8 << 20) + 4096;

fn inspect(arguments: &[&str]) -> Outcome {
    Outcome::of(process::program("torus-engine").arg("inspect").args(arguments))
}

fn json(arguments: &[&str]) -> serde_json::Value {
    serde_json::from_str(&inspect(arguments).ok()).expect("--output json is JSON")
}

/// A node with a volume: 8 MiB written, of which 1 MiB twice, and then a block, with which the node hears that the
/// others are flushed: until then nothing is superseded for good. Killed.
fn with_killed_node(name: &'static str) -> (Cluster, String) {
    let mut cluster = Cluster::start(ClusterOptions::new(name, 1));
    cluster.torusblk(&["volume", "create", "demo", "64MiB", "--replicas", "1"]).ok();
    let mut server = cluster.serve();
    let commands = ["write -P 85 0 8M", "flush", "write -P 34 0 1M", "flush", "write -P 1 20M 4k", "flush"];
    qemu_io_ok(&server.url("demo"), &commands);
    assert!(server.process.stop().success());
    let dir = cluster.data_dir(0).to_str().unwrap().to_string();
    let refused = inspect(&[&dir]).refused();
    assert!(refused.contains("in use by process"), "{refused}");
    cluster.kill_node(0);
    (cluster, dir)
}

#[test]
fn a_killed_node_is_shown_as_a_start_would_find_it_and_nothing_is_written() {
    let (mut cluster, dir) = with_killed_node("inspect");
    let file = cluster.data_dir(0).join("shard-0.blocks");
    let before = fs::metadata(&file).unwrap();
    let text = inspect(&[&dir, "--verify"]).ok();
    for words in ["1 without a footer", "0 lost", "nothing", "0 damaged", "○·", "unsealed"] {
        assert!(text.contains(words), "expected {words:?} in:\n{text}");
    }
    let found = json(&[&dir, "--verify", "--output", "json"]);
    let shard = &found["shards"][0];
    assert_eq!(found["node"], cluster.node_id(0).to_string());
    assert_eq!((&shard["live_bytes"], &shard["segments_unsealed"]), (&NEEDED.into(), &1.into()), "{shard}");
    assert_eq!((&shard["verified"]["blocks"], &shard["verified"]["damaged_blocks"]), (&2305.into(), &0.into()));
    let after = fs::metadata(&file).unwrap();
    assert_eq!((before.mtime(), before.mtime_nsec()), (after.mtime(), after.mtime_nsec()));
    cluster.start_node(0);
    assert!(cluster.stop_node(0).success());
    let found = json(&[&dir, "--output", "json"]);
    let shard = &found["shards"][0];
    assert_eq!((&shard["live_bytes"], &shard["segments_unsealed"]), (&NEEDED.into(), &0.into()), "{shard}");
}

#[test]
fn all_records_of_a_block_are_shown_and_damage_is_found() {
    let (cluster, dir) = with_killed_node("inspect-block");
    let found = json(&[&dir, "--output", "json"]);
    let volume = found["shards"][0]["volumes"][0].as_str().unwrap().to_string();
    let found = json(&[&dir, "--block", &volume, "7", "--output", "json"]);
    let records = found["shards"][0]["records"].as_array().unwrap();
    assert_eq!(records.len(), 2, "{records:#?}");
    assert_eq!((&records[0]["is_needed"], &records[1]["is_needed"]), (&false.into(), &true.into()));
    let once = json(&[&dir, "--block", &volume, "700", "--output", "json"]);
    assert_eq!(once["shards"][0]["records"].as_array().unwrap().len(), 1);
    let position = records[1]["position"].as_u64().unwrap();
    let file = OpenOptions::new().write(true).open(cluster.data_dir(0).join("shard-0.blocks")).unwrap();
    file.write_all_at(b"rot", position * 4096 + 100).unwrap();
    let verified = inspect(&[&dir, "--verify"]);
    assert_eq!(verified.status.code(), Some(1));
    let text = format!("{}{}", verified.stdout, verified.stderr);
    for words in ["block 7 ", &volume, "needed: checksum", "1 of 2305 blocks are damaged"] {
        assert!(text.contains(words), "expected {words:?} in:\n{text}");
    }
    let wrong = inspect(&[&dir, "--block", "7", &volume]).refused();
    assert!(wrong.contains("expected a volume's id and then"), "{wrong}");
}

#[test]
fn devices_are_inspected_with_and_without_their_data_dir() {
    let cluster = Cluster::start(ClusterOptions::new("inspect-device", 0));
    let Some(device) = LoopDevice::new(cluster.folder(), "disk", 1200 << 20) else { return };
    let dir = cluster.data_dir(0);
    let mut command = process::program("torus-engine");
    command
        .args(["--metadata", &cluster.url(), "--shards", "2", "--device", device.text()])
        .arg("--data-dir")
        .arg(&dir);
    let mut node = Process::spawn("node", &mut command, cluster.folder());
    node.await_line("serving node");
    let refused = inspect(&["--device", device.text()]).refused();
    assert!(refused.contains("in use"), "{refused}");
    assert!(node.stop().success());
    for arguments in [vec![dir.to_str().unwrap()], vec!["--device", device.text()]] {
        let found = json(&[&arguments[..], &["--output", "json"]].concat());
        let shards = found["shards"].as_array().unwrap();
        assert_eq!(shards.len(), 2, "{arguments:?}");
        assert_eq!(shards[1]["superblock"]["shard"], 1);
        assert_eq!(shards[1]["offset_bytes"], shards[0]["superblock"]["size_bytes"]);
    }
    let nothing = inspect(&[]).refused();
    assert!(nothing.contains("--device"), "{nothing}");
}
