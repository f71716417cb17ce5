//! etcd restored from an older backup (interleaving 27), for real: a volume whose replicas know better is not attached,
//! however often one tries, and nothing is thrown away because a record is missing.

use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::store::StoreKind;
use torus_tests::tools::qemu_io_ok;
use torus_tests::wait;

/// The operator looks at what each replica knows, and chooses.
fn goes_on_from(cluster: &mut Cluster, node: usize) {
    let id = cluster.node_id(node).to_string();
    let shown = cluster.torusadm(&["volume", "promote", "changed", &id]).ok();
    assert!(
        shown.contains("LOST") && shown.contains("LESS than others") && shown.contains("nothing was changed"),
        "{shown}"
    );
    let shown = cluster.torusadm(&["volume", "promote", "changed", &id, "--output", "json"]).ok();
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("a document");
    let since = shown["lost_since"].as_str().expect("a version");
    cluster.torusadm(&["volume", "promote", "changed", &id, "--yes-lose-writes-since", since]).ok();
    cluster.torusadm(&["volume", "set", "changed", "--min-replicas", "1"]).ok();
    let server = cluster.serve_with(&["--volume", "changed"]);
    qemu_io_ok(&server.url("changed"), &["read -P 2 0 64k", "write -P 4 64k 64k", "flush"]);
    wait::until("the others to be filled", || {
        let shown = cluster.torusadm(&["volume", "show", "changed", "--output", "json"]).ok();
        let shown: serde_json::Value = serde_json::from_str(&shown).ok()?;
        shown["stale"].as_array()?.is_empty().then_some(())
    });
}

#[test]
fn a_volume_that_changed_after_the_backup_is_refused_and_stays_as_it_is() {
    let options = ClusterOptions { store: StoreKind::Etcd, ..ClusterOptions::new("etcd-restored", 3) };
    let mut cluster = Cluster::start(options);
    for volume in ["changed", "untouched"] {
        cluster.torusblk(&["volume", "create", volume, "64MiB"]).ok();
    }
    let mut server = cluster.serve_with(&["--volume", "changed", "--lease-ttl", "2"]);
    qemu_io_ok(&server.url("changed"), &["write -P 1 0 64k", "flush"]);
    cluster.store.back_up("backup");
    // A volume that the backup knows nothing of, and a replica that went stale.
    cluster.torusblk(&["volume", "create", "forgotten", "64MiB"]).ok();
    qemu_io_ok(&server.url("forgotten"), &["write -P 5 0 64k", "flush"]);
    cluster.kill_node(2);
    qemu_io_ok(&server.url("changed"), &["write -P 2 0 64k", "flush"]);
    assert!(server.process.stop().success(), "{}", server.process.log());
    let used = cluster.heartbeat(0).expect("it runs").shards[0].used_bytes;
    cluster.store.kill();
    cluster.store.restore("backup");
    cluster.store.start_again();
    cluster.start_node(2);
    for _ in 0..4 {
        let refused = wait::until("the owner of the backup's time to be gone", || {
            let refused = cluster.torusblk(&["serve", "--listen", "127.0.0.1:0", "--volume", "changed"]).refused();
            (!refused.contains("is attached by")).then_some(refused)
        });
        assert!(refused.contains("restored from a backup") && refused.contains("volume promote"), "{refused}");
    }
    goes_on_from(&mut cluster, 0);
    // Others are served, and what has no record any more is kept.
    let server = cluster.serve();
    qemu_io_ok(&server.url("untouched"), &["write -P 3 0 64k", "read -P 3 0 64k"]);
    wait::until("heartbeats that tell of it", || {
        let shards = cluster.heartbeat(0)?.shards;
        (shards[0].used_bytes >= used + (64 << 10)).then_some(())
    });
}
