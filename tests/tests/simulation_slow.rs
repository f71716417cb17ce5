//! Nodes that are slow, not dead. Goal: reads do not wait for them, writes wait for a bounded time, and nothing piles
//! up. Method: the simulated cluster with one node whose messages take longer.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::device::{Device, Exports};
use torus_frontends::volume::{AttachedVolume, VolumeSettings};
use torus_rpc::runtime::simulated::World;
use torus_schema::limits::VOLUME_OPERATIONS_MAX;
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};

const BLOCK: u64 = 4096;
const NAME: &str = "volume";
const BLOCKS: u64 = 64;

type Volume = AttachedVolume<Runtime>;

async fn attached(world: &World, settings: VolumeSettings) -> (Cluster, Client, Volume) {
    let cluster = Cluster::start(world, 3).await;
    cluster.create_volume(NAME, 16 << 20, 3, 2).await;
    let client = cluster.client_with("w0", false, settings);
    let volume = client.exports.attach(NAME).await.expect("nobody else is there");
    for block in 0..BLOCKS {
        write(&volume, block).await;
        // Also, so that each replica is connected to for reads.
        volume.read(block * BLOCK, BLOCK).await.expect("all are there");
    }
    (cluster, client, volume)
}

async fn write(volume: &Volume, block: u64) {
    let data = Bytes::from(vec![7; BLOCK as usize]);
    volume.write(block % BLOCKS * BLOCK, data, false).await.expect("enough replicas are there");
}

fn process(cluster: &Cluster, node: usize) -> torus_rpc::runtime::simulated::ProcessId {
    cluster.nodes[node].process.get().expect("it runs")
}

/// The 99th percentile of many reads, one after the other, while one message in ten to and from a node takes 80 ms.
async fn p99_beside_a_slow_node(world: World, never_hedge: bool) -> (Duration, u64, u64) {
    let settings = VolumeSettings { never_hedge, ..VolumeSettings::default() };
    let (cluster, client, volume) = attached(&world, settings).await;
    world.slow_down(process(&cluster, 1), 10, Duration::from_millis(80));
    let mut took = Vec::new();
    for read in 0..4000 {
        let began = world.now();
        volume.read(read % BLOCKS * BLOCK, BLOCK).await.expect("all are there");
        took.push(world.now().since(began));
    }
    took.sort();
    let counters = client.exports.counters();
    (took[took.len() * 99 / 100], counters.reads_hedged.get(), counters.reads_hedged_won.get())
}

#[test]
fn a_read_from_a_slow_node_is_answered_by_another() {
    for seed in 0..4 {
        let measure = |never_hedge| {
            let world = World::new(seed);
            let here = world.clone();
            world.block_on(p99_beside_a_slow_node(here, never_hedge))
        };
        let (without, none, _) = measure(true);
        let (with, hedged, won) = measure(false);
        println!("seed {seed}: p99 {with:?} with {hedged} of 4000 reads hedged, {won} won; {without:?} without");
        assert_eq!(none, 0);
        assert!(with * 2 < without, "seed {seed}: {with:?} with, {without:?} without");
        assert!(won > 0 && hedged <= 4000 / 20 + 16, "seed {seed}: {hedged} hedged, {won} won");
    }
}

#[test]
fn a_replica_that_answers_nothing_for_too_long_goes_stale_and_writes_go_on() {
    for seed in 0..10 {
        let world = World::new(seed);
        let here = world.clone();
        world.block_on(async move {
            let (cluster, client, volume) = attached(&here, VolumeSettings::default()).await;
            here.slow_down(process(&cluster, 1), 1, Duration::from_secs(7));
            let began = here.now();
            write(&volume, 1).await;
            let stalled = here.now().since(began);
            assert!(stalled < Duration::from_secs(6), "seed {seed}: {stalled:?}");
            assert_eq!(client.exports.counters().replicas_marked_stale.get(), 1, "seed {seed}");
            let began = here.now();
            write(&volume, 2).await;
            assert!(here.now().since(began) < Duration::from_millis(100), "seed {seed}: it is waited for still");
        });
    }
}

#[test]
fn what_waits_for_a_slow_replica_is_bounded_and_reads_do_not_wait_with_it() {
    for seed in 0..4 {
        let world = World::new(seed);
        let here = world.clone();
        world.block_on(async move {
            let (cluster, client, volume) = attached(&here, VolumeSettings::default()).await;
            // Every answer comes, each a second late: nothing makes the replica stale.
            here.slow_down(process(&cluster, 1), 1, Duration::from_millis(500));
            let count = 3 * VOLUME_OPERATIONS_MAX as u64;
            let most = Rc::new(Cell::new(0u64));
            let writes: FuturesUnordered<_> = (0..count).map(|block| write(&volume, block)).collect();
            let writes = writes.for_each(|()| {
                most.set(most.get() + 1);
                futures::future::ready(())
            });
            let reads = async {
                let mut longest = Duration::ZERO;
                here.sleep(Duration::from_millis(5)).await;
                for block in 0..50 {
                    let began = here.now();
                    // Blocks that nobody writes: a read waits for what is being written there.
                    volume.read((BLOCKS + block) * BLOCK, BLOCK).await.expect("all are there");
                    longest = longest.max(here.now().since(began));
                }
                longest
            };
            let ((), longest) = futures::future::join(writes, reads).await;
            assert_eq!(most.get(), count, "seed {seed}");
            assert!(longest < Duration::from_millis(1100), "seed {seed}: a read took {longest:?}");
            let counters = client.exports.counters();
            let queued = counters.requests_queued.get();
            assert!(queued >= count - VOLUME_OPERATIONS_MAX as u64, "seed {seed}: {queued} queued of {count}");
            assert_eq!(counters.replicas_marked_stale.get(), 0, "seed {seed}");
        });
    }
}
