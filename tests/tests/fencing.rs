//! One writer per volume: a second one is refused, or fences the first; a dead one is succeeded.

use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::tools::{qemu_io, qemu_io_ok};
use torus_tests::wait;

fn with_volume(name: &'static str) -> Cluster {
    let cluster = Cluster::start(ClusterOptions::new(name, 3));
    cluster.torusblk(&["volume", "create", "demo", "64MiB"]).ok();
    cluster
}

#[test]
fn a_second_writer_is_refused_and_told_who_owns_the_volume() {
    let mut cluster = with_volume("second-refused");
    let first = cluster.serve_with(&["--volume", "demo"]);
    qemu_io_ok(&first.url("demo"), &["write -P 1 0 64k"]);
    let refused = cluster.torusblk(&["serve", "--listen", "127.0.0.1:0", "--volume", "demo"]).refused();
    assert!(refused.contains("demo") && refused.contains(&first.process.pid().to_string()), "{refused}");
    qemu_io_ok(&first.url("demo"), &["read -P 1 0 64k"]);
}

#[test]
fn a_forced_second_writer_fences_the_first() {
    let mut cluster = with_volume("fences");
    let first = cluster.serve_with(&["--volume", "demo"]);
    qemu_io_ok(&first.url("demo"), &["write -P 1 0 64k"]);
    let second = cluster.serve_with(&["--force", "--volume", "demo"]);
    qemu_io_ok(&second.url("demo"), &["read -P 1 0 64k", "write -P 2 0 64k", "flush"]);
    // The first may attach no more and write no more; what it answers is an error, never old data.
    let stale = qemu_io(&first.url("demo"), &["write -P 3 0 64k"]);
    assert!(!stale.status.success() || stale.stdout.contains("failed"), "{stale:#?}");
    qemu_io_ok(&second.url("demo"), &["read -P 2 0 64k"]);
}

#[test]
fn a_killed_writer_is_succeeded_when_its_lease_has_ended() {
    let mut cluster = with_volume("succeeded");
    let mut first = cluster.serve_with(&["--volume", "demo"]);
    qemu_io_ok(&first.url("demo"), &["write -P 1 0 1M", "flush", "write -P 2 1M 1M"]);
    first.process.kill();
    let second = cluster.serve();
    wait::until("the volume to be free", || {
        qemu_io(&second.url("demo"), &["read 0 4k"]).status.success().then_some(())
    });
    // Acknowledged on all replicas, none of which was lost.
    qemu_io_ok(&second.url("demo"), &["read -P 1 0 1M", "read -P 2 1M 1M", "write -P 3 0 64k", "read -P 3 0 64k"]);
}
