//! A thousand volumes in one client process, and one of their nodes loses its power (interleaving 26). Goal: I/O stalls
//! for 3 s at most, detection included; the metadata store gets one transaction per volume; reads go on meanwhile; a
//! node that is merely started anew costs nothing. Method: the simulated cluster, light sessions.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, FuturesUnordered};
use std::time::Duration;
use torus_frontends::device::{Device, Exports};
use torus_frontends::volume::{AttachedVolume, VolumeSettings};
use torus_rpc::runtime::simulated::World;
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};

const BLOCK: u64 = 4096;
const VOLUMES: usize = 1000;
const STALL_MAX: Duration = Duration::from_secs(3);

type Volume = AttachedVolume<Runtime>;

async fn attached(world: &World) -> (Cluster, Client, Vec<Volume>) {
    let cluster = Cluster::start(world, 3).await;
    for number in 0..VOLUMES {
        cluster.create_volume(&format!("v{number}"), 16 << 20, 3, 2).await;
    }
    let client = cluster.client_with("w0", false, VolumeSettings::default());
    let before = resident_kib();
    let volumes: Vec<_> = stream::iter(0..VOLUMES)
        .map(|number| {
            let exports = client.exports.clone();
            async move { exports.attach(&format!("v{number}")).await.expect("nobody else is there") }
        })
        .buffer_unordered(16)
        .collect()
        .await;
    println!("{} KiB of memory for each attached volume, simulated shards included", (resident_kib() - before) / 1000);
    (cluster, client, volumes)
}

fn resident_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = text.split_whitespace().nth(1).and_then(|field| field.parse().ok()).expect("the second field");
    pages * 4
}

async fn write(volume: &Volume) {
    let data = Bytes::from(vec![7; BLOCK as usize]);
    volume.write(0, data, false).await.expect("two replicas are enough");
}

/// The longest of one write to each.
async fn write_all(world: &World, volumes: &[Volume]) -> Duration {
    let writes: FuturesUnordered<_> = volumes
        .iter()
        .map(|volume| async {
            let began = world.now();
            write(volume).await;
            world.now().since(began)
        })
        .collect();
    writes.fold(Duration::ZERO, |longest, took| std::future::ready(longest.max(took))).await
}

#[test]
fn a_thousand_volumes_stall_for_three_seconds_at_most_when_a_node_loses_its_power() {
    let world = World::new(1);
    let here = world.clone();
    world.block_on(async move {
        let (cluster, client, volumes) = attached(&here).await;
        write_all(&here, &volumes).await;
        // Nothing more is heard of it, and no connection is refused.
        here.cut(client.process, cluster.nodes[2].process.get().expect("it runs"));
        let reads = async {
            let mut longest = Duration::ZERO;
            for volume in volumes.iter().step_by(10) {
                let began = here.now();
                volume.read(8 * BLOCK, BLOCK).await.expect("two replicas are enough");
                longest = longest.max(here.now().since(began));
            }
            longest
        };
        let (stalled, read) = futures::future::join(write_all(&here, &volumes), reads).await;
        let counters = client.exports.counters();
        let (marked, transactions) = (counters.replicas_marked_stale.get(), counters.status_transactions.get());
        println!("{VOLUMES} volumes stalled for {stalled:?} at most, reads {read:?}; {transactions} transactions");
        assert!(stalled <= STALL_MAX, "{stalled:?}");
        assert!(read <= STALL_MAX, "{read:?}");
        assert_eq!((marked, transactions), (VOLUMES as u64, VOLUMES as u64));
        let after = write_all(&here, &volumes).await;
        assert!(after < Duration::from_millis(100), "{after:?}: somebody waits still");
        assert_eq!(counters.status_transactions.get(), VOLUMES as u64);
    });
}

#[test]
fn a_node_that_is_started_anew_within_a_second_is_stale_for_nobody() {
    let world = World::new(2);
    let here = world.clone();
    world.block_on(async move {
        let (cluster, client, volumes) = attached(&here).await;
        write_all(&here, &volumes).await;
        cluster.kill_node(2);
        let restart = async {
            here.sleep(Duration::from_secs(1)).await;
            cluster.start_node(2).await;
        };
        let (stalled, ()) = futures::future::join(write_all(&here, &volumes), restart).await;
        println!("{VOLUMES} volumes stalled for {stalled:?} at most over a restart of one second");
        let counters = client.exports.counters();
        assert_eq!((counters.replicas_marked_stale.get(), counters.status_transactions.get()), (0, 0));
        assert!(stalled <= STALL_MAX, "{stalled:?}");
    });
}

#[test]
fn a_node_that_was_killed_and_stays_away_stalls_a_thousand_volumes_for_three_seconds_at_most() {
    let world = World::new(3);
    let here = world.clone();
    world.block_on(async move {
        let (cluster, client, volumes) = attached(&here).await;
        write_all(&here, &volumes).await;
        cluster.kill_node(2);
        let stalled = write_all(&here, &volumes).await;
        println!("{VOLUMES} volumes stalled for {stalled:?} at most after kill -9");
        assert!(stalled <= STALL_MAX, "{stalled:?}");
        assert_eq!(client.exports.counters().status_transactions.get(), VOLUMES as u64);
    });
}
