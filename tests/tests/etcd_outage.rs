//! etcd is asked when somebody comes, goes or fails: while it is away, I/O goes on.

use std::time::Duration;
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::store::StoreKind;
use torus_tests::tools::{fio_verified, spawn_fio};
use torus_tests::wait;

/// Twice the time after which leases end.
const OUTAGE: Duration = Duration::from_secs(20);

#[test]
fn io_goes_on_while_etcd_is_away_and_nothing_is_lost() {
    let options = ClusterOptions { store: StoreKind::Etcd, size: "1GiB", ..ClusterOptions::new("etcd-outage", 3) };
    let mut cluster = Cluster::start(options);
    cluster.torusblk(&["volume", "create", "demo", "128MiB"]).ok();
    let server = cluster.serve();
    // Writes for longer than the outage, then reads everything back.
    let mut command = fio_verified(&server.url("demo"), "128M", &["--rate=4m"]);
    let mut fio = spawn_fio(&mut command, cluster.folder());
    wait::until("data on a node", || (cluster.heartbeat(0)?.shards[0].used_bytes > 1 << 20).then_some(()));
    cluster.store.kill();
    assert_eq!(fio.ends_within(OUTAGE), None, "fio ended while etcd was away:\n{}", fio.log());
    cluster.store.start_again();
    assert!(fio.await_end().success(), "{}", fio.log());
    (0..3).for_each(|node| assert!(cluster.node(node).is_running()));
    wait::until("the heartbeats", || (0..3).all(|node| cluster.heartbeat(node).is_some()).then_some(()));
}
