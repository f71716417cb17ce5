//! What an operator does when a node died, with real processes: look, ask why, replace it, and promote what is left.

use serde_json::Value;
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::tools::{qemu_io, qemu_io_ok};
use torus_tests::wait;

/// So many nodes are up; the first three are in the ring.
fn with_spares(name: &'static str, nodes: usize) -> Cluster {
    let cluster = Cluster::start(ClusterOptions { is_joined: false, ..ClusterOptions::new(name, nodes) });
    let ids: Vec<String> = (0..3).map(|node| cluster.node_id(node).to_string()).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    cluster.torusadm(&[&["peer", "add"][..], &ids].concat()).ok();
    cluster
}

fn first_line(cluster: &Cluster) -> String {
    cluster.torusadm(&["status"]).ok().lines().next().expect("the status says something").to_string()
}

fn json(cluster: &Cluster, arguments: &[&str]) -> Value {
    let text = cluster.torusadm(&[arguments, &["--output", "json"]].concat()).ok();
    serde_json::from_str(&text).expect("a JSON document")
}

fn await_down(cluster: &Cluster, nodes: &[usize]) {
    for node in nodes {
        wait::until("the heartbeat to end", || cluster.heartbeat(*node).is_none().then_some(()));
    }
}

#[test]
fn a_node_that_died_is_replaced_and_every_volume_filled_attached_or_not() {
    let mut cluster = with_spares("replaced", 4);
    for name in ["demo", "idle"] {
        cluster.torusblk(&["volume", "create", name, "64MiB"]).ok();
    }
    let server = cluster.serve();
    qemu_io_ok(&server.url("idle"), &["write -P 9 0 1M", "flush"]);
    qemu_io_ok(&server.url("demo"), &["write -P 1 0 8M", "flush"]);
    wait::until("nobody to have it", || (json(&cluster, &["volume", "show", "idle"])["owner"].is_null()).then_some(()));
    assert_eq!(first_line(&cluster), "HEALTHY");
    let (old, new) = (cluster.node_id(2).to_string(), cluster.node_id(3).to_string());
    let lives = cluster.torusadm(&["peer", "replace", &old, &new]).refused();
    assert!(lives.contains("stop it first"), "{lives}");

    cluster.stop_node(2);
    // A volume that is written notices at once; one that nobody has does not.
    qemu_io_ok(&server.url("demo"), &["write -P 2 1M 1M", "flush"]);
    let degraded = cluster.torusadm(&["status"]).ok();
    assert!(degraded.starts_with("DEGRADED: 1 volumes have stale replicas; 1 nodes are down"), "{degraded}");
    assert!(degraded.contains("degraded: demo") && degraded.contains("its node is down"), "{degraded}");
    let why = json(&cluster, &["why", "demo", "1MiB"]);
    let states: Vec<&str> = why["replicas"].as_array().unwrap().iter().filter_map(|r| r["state"].as_str()).collect();
    assert!(states.iter().filter(|state| **state == "in sync").count() == 2, "{why}");
    assert!(states.iter().any(|state| state.starts_with("stale since") && state.ends_with("unreachable")), "{why}");

    // Returns when all of both is in sync on the new node: one by its writer, the other by a storage node.
    let replaced = cluster.torusadm(&["peer", "replace", &old, &new]);
    assert!(replaced.stderr.contains("still to be filled"), "{replaced:?}");
    assert!(replaced.ok().contains("in sync: all"));
    assert_eq!(first_line(&cluster), "HEALTHY");
    let why = cluster.torusadm(&["why", "demo", "1MiB"]).ok();
    assert!(why.contains(&new) && why.contains("the 3 replicas in sync that answered agree"), "{why}");

    cluster.kill_node(0);
    qemu_io_ok(&server.url("demo"), &["read -P 1 0 1M", "read -P 2 1M 1M", "read -P 1 2M 6M"]);
    qemu_io_ok(&server.url("idle"), &["read -P 9 0 1M"]);
    // The old node comes back: what it kept is listed, and nothing of it is freed or used.
    cluster.start_node(2);
    let status = json(&cluster, &["status"]);
    let orphans = status["orphans"].as_array().unwrap();
    assert!(orphans.iter().any(|orphan| orphan["node"] == old && orphan["of"] == "demo"), "{status}");
}

#[test]
fn a_stale_replica_is_promoted_when_the_others_are_lost_for_good() {
    let mut cluster = with_spares("promoted", 5);
    cluster.torusblk(&["volume", "create", "demo", "64MiB"]).ok();
    let mut server = cluster.serve();
    qemu_io_ok(&server.url("demo"), &["write -P 1 0 4M", "flush"]);
    cluster.stop_node(2);
    qemu_io_ok(&server.url("demo"), &["write -P 2 1M 1M", "flush"]);
    server.process.kill();
    (0..2).for_each(|node| cluster.kill_node(node));
    await_down(&cluster, &[0, 1]);
    cluster.start_node(2);
    let id = cluster.node_id(2).to_string();
    assert!(first_line(&cluster).starts_with("UNAVAILABLE: 1 volumes cannot be written"));
    wait::until("nobody to have it", || (json(&cluster, &["volume", "show", "demo"])["owner"].is_null()).then_some(()));

    let shown = cluster.torusadm(&["volume", "promote", "demo", &id]).ok();
    assert!(shown.contains("LOST: ") && shown.contains("nothing was changed"), "{shown}");
    let since = json(&cluster, &["volume", "promote", "demo", &id])["lost_since"].as_str().unwrap().to_string();
    let other = cluster.torusadm(&["volume", "promote", "demo", &id, "--yes-lose-writes-since", "7.7"]).refused();
    assert!(other.contains(&since), "{other}");
    cluster.torusadm(&["volume", "promote", "demo", &id, "--yes-lose-writes-since", &since]).ok();
    cluster.torusadm(&["volume", "set", "demo", "--min-replicas", "1"]).ok();

    let server = cluster.serve();
    wait::until("the volume to be served", || {
        qemu_io(&server.url("demo"), &["read 0 4k"]).status.success().then_some(())
    });
    qemu_io_ok(&server.url("demo"), &["read -P 1 0 4M", "write -P 3 3M 1M", "flush"]);
    for (old, new) in [(0, 3), (1, 4)] {
        let (old, new) = (cluster.node_id(old).to_string(), cluster.node_id(new).to_string());
        assert!(cluster.torusadm(&["peer", "replace", &old, &new]).ok().contains("in sync: all"));
    }
    assert_eq!(first_line(&cluster), "HEALTHY");
    cluster.kill_node(2);
    qemu_io_ok(&server.url("demo"), &["read -P 1 0 3M", "read -P 3 3M 1M"]);
}

/// `--deadline` bounds it whatever the nodes do; one that does not answer is listed.
#[test]
fn a_node_that_hangs_does_not_hold_up_the_status() {
    let mut cluster = with_spares("hanging", 3);
    cluster.node(1).signal(nix::sys::signal::Signal::SIGSTOP);
    let begun = std::time::Instant::now();
    let status = cluster.torusadm(&["--deadline", "4s", "status"]).ok();
    assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(status.starts_with("DEGRADED: 1 nodes do not answer") && status.contains("silent: "), "{status}");
    cluster.node(1).signal(nix::sys::signal::Signal::SIGCONT);
}
