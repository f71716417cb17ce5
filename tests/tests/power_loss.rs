//! The whole cluster loses power under load: nodes, metadata store and NBD server are killed at once, started again, and
//! what was flushed has to be there, and the same on every replica.
//!
//! (kill -9 leaves what the kernel has; that disks lose and tear what was not flushed is for the simulation.)
//!
//! `TORUS_POWER_ROUNDS=50` makes it as long as one likes.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::Duration;
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::nbd::connect;
use torus_tests::store::StoreKind;
use torus_tests::wait;
use torus_tests::witness::{Promise, Witness};

const BYTES: u64 = 16 << 20;

fn rounds() -> u64 {
    let asked = std::env::var("TORUS_POWER_ROUNDS").ok();
    asked.map_or(3, |text| text.parse().expect("TORUS_POWER_ROUNDS is a number"))
}

/// All of them as nearly at once as one thread can.
fn cut_power_after(pids: Vec<u32>, delay: Duration) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        // The moment of a power cut, not a wait for something: any will do.
        let _ = wait::within(delay, || None::<()>);
        for pid in pids {
            kill(Pid::from_raw(i32::try_from(pid).expect("a pid is an i32")), Signal::SIGKILL).expect("it runs");
        }
    })
}

#[test]
fn what_was_flushed_outlives_a_power_loss_of_everything_and_is_the_same_on_all_replicas() {
    let options = ClusterOptions { store: StoreKind::Etcd, ..ClusterOptions::new("power-loss", 3) };
    let mut cluster = Cluster::start(options);
    cluster.torusblk(&["volume", "create", "demo", "16MiB"]).ok();
    let mut witness = Witness::new(BYTES, 1);
    let mut acknowledged = 0;
    for round in 0..rounds() {
        let mut server = cluster.serve();
        let mut client = connect(server.address, "demo");
        witness.verify(&mut client, Promise::Flushed).unwrap().unwrap();
        let mut pids: Vec<u32> = (0..3).map(|node| cluster.node(node).pid()).collect();
        pids.extend([cluster.store.pid(), server.process.pid()]);
        let cut = cut_power_after(pids, Duration::from_millis(100 + round * 97 % 900));
        let flush_every = 20 + (round as usize * 37) % 200;
        let end = witness.load(&mut client, usize::MAX, flush_every).expect_err("all were killed");
        acknowledged += end.0;
        cut.join().unwrap();
        drop(client);
        server.process.kill();
        (0..3).for_each(|node| cluster.kill_node(node));
        cluster.store.kill();
        cluster.store.start_again();
        cluster.start_nodes(&[0, 1, 2]);
        cluster.free_volumes();
        println!("round {round}: {} writes acknowledged, then {}", end.0, end.1);
    }
    let server = cluster.serve();
    witness.verify(&mut connect(server.address, "demo"), Promise::Flushed).unwrap().unwrap();
    assert!(cluster.await_in_sync(Duration::from_secs(60)), "{}", server.process.log());
    let compared = cluster.torusadm(&["volume", "compare", "demo"]).ok();
    assert!(compared.contains("0 differ"), "{compared}");
    println!("{} power losses, {acknowledged} writes acknowledged, nothing flushed lost; {compared}", rounds());
}
