//! kill -9 of nodes, again and again, under load that knows what it was promised (`witness`).
//!
//! There are two loops (what a node is worth that was brought up to date shows in `rejoin`). In the first a volume has one replica, and its
//! node is killed each round: what was flushed is there after every restart of the same log, which grows older with
//! each. In the second each round has a volume of its own with three replicas, of which one is killed: what was
//! acknowledged is there, without an error to anybody; and the killed node has to serve the next round's volume.
//!
//! `TORUS_KILL_ROUNDS=200` makes it as long as one likes.

use std::time::Duration;
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::nbd::connect;
use torus_tests::wait;
use torus_tests::witness::{Promise, Witness};

const VOLUME_MIB: u64 = 16;
const BYTES: u64 = VOLUME_MIB << 20;

fn rounds() -> usize {
    let asked = std::env::var("TORUS_KILL_ROUNDS").ok();
    asked.map_or(5, |text| text.parse().expect("TORUS_KILL_ROUNDS is a number"))
}

fn create(cluster: &Cluster, volume: &str, replicas: &str) {
    cluster.torusblk(&["volume", "create", volume, &format!("{VOLUME_MIB}MiB"), "--replicas", replicas]).ok();
}

fn kill_after<const COUNT: usize>(pids: [u32; COUNT], delay: Duration) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        // The moment of a kill, not a wait for something: any will do.
        let _ = wait::within(delay, || None::<()>);
        for pid in pids {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid is an i32"));
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it runs");
        }
    })
}

/// Of the round, so that the kill falls into writes, flushes, footers and cleaning alike.
fn delay(round: usize) -> Duration {
    Duration::from_millis(100 + (round as u64 * 97) % 700)
}

#[test]
fn what_was_flushed_to_a_single_replica_is_there_after_every_kill() {
    let mut cluster = Cluster::start(ClusterOptions::new("kill-loop-one", 1));
    create(&cluster, "demo", "1");
    let mut witness = Witness::new(BYTES, 1);
    let mut acknowledged = 0;
    for round in 0..rounds() {
        let mut server = cluster.serve();
        let mut client = connect(server.address, "demo");
        witness.verify(&mut client, Promise::Flushed).unwrap().unwrap();
        // The server after it, since it would wait for its only replica to come back.
        let killer = kill_after([cluster.node(0).pid(), server.process.pid()], delay(round));
        let end = witness.load(&mut client, usize::MAX, 40 + round % 300).expect_err("all were killed");
        acknowledged += end.0;
        killer.join().unwrap();
        drop(client);
        server.process.kill();
        cluster.kill_node(0);
        cluster.free_volumes();
        cluster.start_node(0);
        println!("round {round}: {} writes acknowledged before {:?}", end.0, end.1);
    }
    let server = cluster.serve();
    witness.verify(&mut connect(server.address, "demo"), Promise::Flushed).unwrap().unwrap();
    println!("{} kills, {acknowledged} writes acknowledged, nothing flushed lost", rounds());
}

#[test]
fn what_was_acknowledged_by_three_replicas_outlives_every_kill_of_one() {
    const KEPT: usize = 5;
    let mut cluster = Cluster::start(ClusterOptions { size: "1GiB", ..ClusterOptions::new("kill-loop-three", 3) });
    let mut server = cluster.serve();
    let mut volumes: Vec<(String, Witness)> = Vec::new();
    let mut acknowledged = 0;
    for round in 0..rounds() {
        let volume = format!("round-{round}");
        create(&cluster, &volume, "3");
        let mut witness = Witness::new(BYTES, round as u64);
        let mut client = connect(server.address, &volume);
        let victim = round % 3;
        let killer = kill_after([cluster.node(victim).pid()], delay(round));
        let mut killed = false;
        // Until some time after the kill: the survivors go on.
        for _ in 0..1000 {
            let writes = witness.load(&mut client, 200, 40 + round % 100);
            acknowledged += writes.unwrap_or_else(|error| panic!("round {round}: a write failed: {error:?}"));
            if killed {
                break;
            }
            killed = !cluster.node(victim).is_running();
        }
        assert!(killed, "the load was over before the kill");
        killer.join().unwrap();
        witness.verify(&mut client, Promise::Acknowledged).unwrap().unwrap();
        drop(client);
        cluster.kill_node(victim);
        cluster.start_node(victim);
        println!("round {round}: node {victim} killed, {acknowledged} writes acknowledged so far");
        volumes.push((volume, witness));
        if volumes.len() > KEPT {
            let (old, mut witness) = volumes.remove(0);
            witness.verify(&mut connect(server.address, &old), Promise::Acknowledged).unwrap().unwrap();
            wait::until("the volume to be free", || {
                cluster.torusblk(&["volume", "delete", &old]).status.success().then_some(())
            });
        }
    }
    // At the end all of them: what was flushed is there, and a stale replica is not asked.
    (0..3).for_each(|node| cluster.kill_node(node));
    server.process.kill();
    cluster.start_nodes(&[0, 1, 2]);
    server = cluster.serve_with(&["--force"]);
    for (volume, witness) in &mut volumes {
        witness.verify(&mut connect(server.address, volume), Promise::Flushed).unwrap().unwrap();
    }
    println!("{} kills, {acknowledged} writes acknowledged, none lost", rounds());
}
