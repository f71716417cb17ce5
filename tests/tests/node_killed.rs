//! kill -9 of storage nodes: one of three costs no error and no acknowledged write; all of them cost nothing that was
//! flushed, and a client that lives on notices nothing but a pause.

use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::tools::{fio_verified, qemu_io, qemu_io_ok, spawn_fio};
use torus_tests::wait;

fn with_volume(name: &'static str) -> Cluster {
    let cluster = Cluster::start(ClusterOptions { size: "1GiB", ..ClusterOptions::new(name, 3) });
    cluster.torusblk(&["volume", "create", "demo", "64MiB"]).ok();
    cluster
}

fn await_data_on(cluster: &Cluster, node: usize) {
    wait::until("data on the node", || {
        let heartbeat = cluster.heartbeat(node)?;
        (heartbeat.shards.iter().map(|shard| shard.used_bytes).sum::<u64>() > 1 << 20).then_some(())
    });
}

#[test]
fn a_node_killed_under_load_costs_no_error_and_no_acknowledged_write() {
    let mut cluster = with_volume("one-killed");
    let server = cluster.serve();
    // Slow enough that the kill falls into it on any machine.
    let mut command = fio_verified(&server.url("demo"), "64M", &["--rate=6m"]);
    let mut fio = spawn_fio(&mut command, cluster.folder());
    await_data_on(&cluster, 1);
    assert!(fio.is_running(), "fio was done before the kill:\n{}", fio.log());
    cluster.kill_node(1);
    assert!(fio.await_end().success(), "{}", fio.log());
    // The survivors alone hold everything.
    drop(server);
    let server = cluster.serve_with(&["--force"]);
    let again = fio_verified(&server.url("demo"), "64M", &["--verify_only"]).current_dir(cluster.folder()).status();
    assert!(again.unwrap().success());
}

#[test]
fn all_nodes_killed_after_a_flush_keep_everything_flushed() {
    let mut cluster = with_volume("all-killed");
    let mut server = cluster.serve();
    qemu_io_ok(&server.url("demo"), &["write -P 85 0 8M", "write -P 102 20M 1M", "flush"]);
    (0..3).for_each(|node| cluster.kill_node(node));
    server.process.kill();
    cluster.start_nodes(&[0, 1, 2]);
    let server = cluster.serve();
    // The killed server owns the volume until its lease has ended.
    wait::until("the volume to be free", || {
        qemu_io(&server.url("demo"), &["read 0 4k"]).status.success().then_some(())
    });
    qemu_io_ok(&server.url("demo"), &["read -P 85 0 8M", "read -P 102 20M 1M", "read -P 0 8M 12M"]);
}

/// The client keeps what is not flushed and replays it to each node that comes back (protocol rule 9). All three are
/// required, so that none of them is merely done without; each comes back on another port.
#[test]
fn nodes_killed_one_by_one_and_all_at_once_and_started_again_cost_a_live_client_no_error() {
    let mut cluster = Cluster::start(ClusterOptions { size: "1GiB", ..ClusterOptions::new("restarted", 3) });
    cluster.torusblk(&["volume", "create", "demo", "64MiB", "--min-replicas", "3"]).ok();
    let server = cluster.serve();
    let mut command = fio_verified(&server.url("demo"), "64M", &["--rate=4m"]);
    let mut fio = spawn_fio(&mut command, cluster.folder());
    await_data_on(&cluster, 1);
    let await_replays = |count| {
        let replayed = || server.process.log().lines().filter(|line| line.contains("replayed")).count();
        wait::until("the replay", || (replayed() >= count).then_some(()));
    };
    for node in 0..3 {
        cluster.kill_node(node);
        cluster.start_node(node);
        await_replays(node + 1);
    }
    assert!(fio.is_running(), "fio was done before all nodes were killed:\n{}", fio.log());
    (0..3).for_each(|node| cluster.kill_node(node));
    cluster.start_nodes(&[0, 1, 2]);
    assert!(fio.await_end().success(), "{}\n{}", fio.log(), server.process.log());
    // All of it is in all three, by another client's attach.
    drop(server);
    let server = cluster.serve_with(&["--force"]);
    let again = fio_verified(&server.url("demo"), "64M", &["--verify_only"]).current_dir(cluster.folder()).status();
    assert!(again.unwrap().success());
}
