//! `--size` larger at a restart: the node grows, in steps of which each may be the last before a crash.

use std::fs;
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::process::Process;
use torus_tests::tools::qemu_io_ok;
use torus_tests::wait;

const GROWN: u64 = 1 << 30;

fn one_node(name: &'static str) -> Cluster {
    let cluster = Cluster::start(ClusterOptions::new(name, 1));
    cluster.torusblk(&["volume", "create", "demo", "64MiB", "--replicas", "1"]).ok();
    cluster
}

fn with_data(name: &'static str) -> Cluster {
    let mut cluster = one_node(name);
    let mut server = cluster.serve();
    qemu_io_ok(&server.url("demo"), &["write -P 85 0 8M", "flush"]);
    assert!(server.process.stop().success());
    assert!(cluster.stop_node(0).success());
    cluster
}

fn start_with_size(cluster: &Cluster, size: &str) -> Process {
    let mut command = cluster.node_command(0);
    Process::spawn("grown", command.args(["--size", size]), cluster.folder())
}

fn check_data(cluster: &mut Cluster) {
    let server = cluster.serve();
    wait::until("the volume to be free", || {
        torus_tests::tools::qemu_io(&server.url("demo"), &["read 0 4k"]).status.success().then_some(())
    });
    qemu_io_ok(&server.url("demo"), &["read -P 85 0 8M", "read -P 0 8M 8M"]);
}

fn length(cluster: &Cluster) -> u64 {
    fs::metadata(cluster.data_dir(0).join("shard-0.blocks")).unwrap().len()
}

#[test]
fn a_larger_size_at_a_restart_grows_the_node_and_keeps_its_data() {
    let mut cluster = with_data("growth");
    let mut grown = start_with_size(&cluster, "1GiB");
    grown.await_line("serving node");
    assert_eq!(cluster.node_record(0).size_bytes(), GROWN);
    let heartbeat = cluster.heartbeat(0).unwrap();
    assert!(heartbeat.shards[0].free_bytes > 800 << 20, "{heartbeat:?}");
    check_data(&mut cluster);
    assert!(grown.stop().success());
    // Without --size, and with the size it has now.
    cluster.start_node(0);
    assert_eq!(cluster.node_record(0).size_bytes(), GROWN);
    assert!(cluster.stop_node(0).success());
    let mut smaller = start_with_size(&cluster, "512MiB");
    assert!(!smaller.await_end().success());
    assert!(smaller.log().contains("1073741824") && smaller.log().contains("536870912"), "{}", smaller.log());
}

#[test]
fn growth_that_finds_too_little_space_is_refused_and_the_node_starts_as_it_was() {
    let mut cluster = with_data("growth-too-large");
    let mut refused = start_with_size(&cluster, "15TiB");
    assert!(!refused.await_end().success());
    assert!(refused.log().contains("disk too small"), "{}", refused.log());
    cluster.start_node(0);
    check_data(&mut cluster);
}

/// The state of its disk in which a node is killed.
type Moment = fn(&Cluster) -> bool;

/// The states that kill -9 or a power cut can leave: `datadir::growth` lists them.
#[test]
fn growth_killed_at_any_moment_ends_in_one_of_the_two_sizes() {
    let mut cluster = with_data("growth-killed");
    let old = fs::read_to_string(cluster.data_dir(0).join("torus.json")).unwrap();
    let killed_when: [(&str, Moment); 3] = [
        ("intent", |cluster| cluster.identity(0).growing.is_some()),
        ("extended", |cluster| length(cluster) > 512 << 20),
        ("finished", |cluster| cluster.identity(0).shard_bytes == GROWN),
    ];
    for (moment, reached) in killed_when {
        // Each round begins with the old size or goes on from what the last one left.
        let mut growing = start_with_size(&cluster, "1GiB");
        // On a quick disk all of it takes less than two looks: what is over cannot be waited for.
        let is_over = || cluster.identity(0).shard_bytes == GROWN;
        wait::until(moment, || (reached(&cluster) || is_over()).then_some(()));
        growing.kill();
    }
    cluster.start_node(0);
    assert_eq!(cluster.node_record(0).size_bytes(), GROWN);
    check_data(&mut cluster);
    cluster.kill_node(0);
    // Cut off between the superblock and `torus.json`, which then still has the intent.
    let growing = "\"growing\": {\n    \"shard_bytes\": \"1073741824\",\n    \"size\": \"1073741824\"\n  }";
    let intent = old.replace("\"size\": \"536870912\"", &format!("\"size\": \"536870912\",\n  {growing}"));
    assert!(intent.contains("growing"), "{old}");
    fs::write(cluster.data_dir(0).join("torus.json"), intent).unwrap();
    cluster.start_node(0);
    assert!(cluster.node(0).log().contains("taken up again"), "{}", cluster.node(0).log());
    assert_eq!((cluster.identity(0).shard_bytes, cluster.identity(0).growing.is_none()), (GROWN, true));
    check_data(&mut cluster);
}
