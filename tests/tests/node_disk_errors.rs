//! A real node whose disk fails under it (`--fault-file`): the volume goes on with the other replicas, the node stays up,
//! says what is wrong, and takes its disk again by itself when it works.

use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::tools::{qemu_io, qemu_io_ok};
use torus_tests::wait;

/// Three nodes; the first one's disk fails as its file says.
fn cluster(name: &'static str) -> (Cluster, std::path::PathBuf) {
    let mut cluster = Cluster::start(ClusterOptions::new(name, 3));
    let faults = cluster.folder().join("faults");
    cluster.stop_node(0);
    let path = faults.to_str().unwrap().to_string();
    cluster.start_node_with(0, &["--fault-file", &path]);
    cluster.torusblk(&["volume", "create", "demo", "64MiB"]).ok();
    (cluster, faults)
}

fn failed(cluster: &Cluster) -> Option<String> {
    cluster.heartbeat(0)?.shards[0].failed.clone()
}

#[test]
fn a_failed_fdatasync_costs_the_client_nothing_and_the_node_comes_back_by_itself() {
    let (mut cluster, faults) = cluster("sync-fails");
    let server = cluster.serve();
    qemu_io_ok(&server.url("demo"), &["write -P 85 0 4M", "flush"]);
    std::fs::write(&faults, "sync").unwrap();
    qemu_io_ok(&server.url("demo"), &["write -P 86 4M 1M", "flush", "read -P 85 0 4M", "read -P 86 4M 1M"]);
    std::fs::remove_file(&faults).unwrap();
    cluster.node(0).await_line("the disk works again");
    assert!(cluster.torusadm(&["status"]).ok().contains("stale"), "it missed a write");
    wait::until("a heartbeat that says so", || failed(&cluster).is_none().then_some(()));
    qemu_io_ok(&server.url("demo"), &["read -P 85 0 4M", "read -P 86 4M 1M"]);
}

#[test]
fn a_disk_that_vanishes_is_told_and_the_volume_goes_on_without_it() {
    let (mut cluster, faults) = cluster("vanished");
    let server = cluster.serve();
    qemu_io_ok(&server.url("demo"), &["write -P 85 0 4M", "flush"]);
    std::fs::write(&faults, "open read write sync").unwrap();
    qemu_io_ok(&server.url("demo"), &["write -P 86 4M 1M", "flush", "read -P 85 0 4M", "read -P 86 4M 1M"]);
    wait::until("a heartbeat that says so", || failed(&cluster));
    let listed = cluster.torusadm(&["peer", "list"]);
    assert!(listed.stderr.contains("shard 0 answers nothing"), "{}", listed.stderr);
    assert!(cluster.node(0).is_running());
    // New clients attach without it.
    drop(server);
    let server = cluster.serve_with(&["--force"]);
    wait::until("the volume to be free", || {
        qemu_io(&server.url("demo"), &["read -P 85 0 4M"]).status.success().then_some(())
    });
    std::fs::remove_file(&faults).unwrap();
    cluster.node(0).await_line("the disk works again");
    wait::until("a heartbeat without complaint", || failed(&cluster).is_none().then_some(()));
    // Stopped as if nothing had happened.
    assert!(cluster.stop_node(0).success());
}
