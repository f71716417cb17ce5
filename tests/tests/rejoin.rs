//! A node that was away comes back and is a whole replica again, without anybody doing anything: after kill -9, and with
//! a disk that knows nothing of the volume. Shown by what is left when the other nodes are killed.

use std::time::Instant;
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::nbd::NbdClient;
use torus_tests::process::{self, Outcome};
use torus_tests::wait;
use torus_tests::witness::{Promise, Witness};

const VOLUME_MIB: u64 = 64;
const NODE: usize = 1;

/// Three nodes and a volume on all of them, of which any one may serve it.
fn with_volume(cluster: &Cluster) -> Witness {
    let size = format!("{VOLUME_MIB}MiB");
    cluster.torusblk(&["volume", "create", "demo", &size, "--replicas", "3", "--min-replicas", "1"]).ok();
    Witness::new(VOLUME_MIB << 20, 7)
}

fn is_stale(cluster: &Cluster) -> bool {
    let shown = cluster.torusadm(&["volume", "show", "demo", "--output", "json"]).ok();
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON was asked for");
    let stale = shown["stale"].as_array().unwrap_or_else(|| panic!("what is stale is listed: {shown}"));
    !stale.is_empty()
}

fn await_stale(cluster: &Cluster) {
    wait::until("the node to be missed", || is_stale(cluster).then_some(()));
}

fn await_in_sync(cluster: &Cluster) {
    let started = Instant::now();
    wait::until("every replica to be in sync", || (!is_stale(cluster)).then_some(()));
    println!("in sync again {:?} after the node's start", started.elapsed());
}

/// Everything that was acknowledged is on the node that was away.
fn verify_on_it_alone(cluster: &mut Cluster, client: &mut NbdClient, witness: &mut Witness) {
    (0..3).filter(|node| *node != NODE).for_each(|node| cluster.kill_node(node));
    witness.verify(client, Promise::Acknowledged).unwrap().unwrap();
}

#[test]
fn a_node_that_was_killed_is_brought_up_to_date_under_load_and_serves_alone() {
    let mut cluster = Cluster::start(ClusterOptions { size: "1GiB", ..ClusterOptions::new("rejoin", 3) });
    let mut witness = with_volume(&cluster);
    let server = cluster.serve();
    let mut client = NbdClient::connect(server.address, "demo").unwrap();
    witness.load(&mut client, 4000, 500).unwrap();
    cluster.kill_node(NODE);
    witness.load(&mut client, 4000, 500).unwrap();
    await_stale(&cluster);
    cluster.start_node(NODE);
    witness.load(&mut client, 4000, 500).unwrap();
    await_in_sync(&cluster);
    witness.load(&mut client, 500, 100).unwrap();
    verify_on_it_alone(&mut cluster, &mut client, &mut witness);
    assert!(server.process.log().contains("replica in sync"), "{}", server.process.log());
}

/// The block file is one that was copied when the node was new: it is the node's, and empty.
#[test]
fn a_node_whose_disk_knows_nothing_is_filled_and_serves_alone() {
    let mut cluster = Cluster::start(ClusterOptions { size: "1GiB", ..ClusterOptions::new("refill", 3) });
    assert!(cluster.stop_node(NODE).success());
    let (blocks, copy) = (cluster.data_dir(NODE).join("shard-0.blocks"), cluster.folder().join("copy.blocks"));
    let put = |from: &std::path::Path, to: &std::path::Path| {
        Outcome::of(process::tool("cp").arg("--sparse=always").arg(from).arg(to)).ok();
    };
    put(&blocks, &copy);
    cluster.start_node(NODE);
    let mut witness = with_volume(&cluster);
    let server = cluster.serve();
    let mut client = NbdClient::connect(server.address, "demo").unwrap();
    witness.load(&mut client, 4000, 500).unwrap();
    cluster.kill_node(NODE);
    put(&copy, &blocks);
    witness.load(&mut client, 1000, 500).unwrap();
    await_stale(&cluster);
    cluster.start_node(NODE);
    await_in_sync(&cluster);
    verify_on_it_alone(&mut cluster, &mut client, &mut witness);
    assert!(server.process.log().contains("has no instances"), "{}", server.process.log());
}
