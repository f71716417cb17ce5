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
use torus_tests::simulation::cluster::{Client, Cluster, Runtime, Shape};

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

/// Reads that each node's disks served.
fn reads_at(cluster: &Cluster, node: usize) -> u64 {
    cluster.nodes[node].shard.borrow().as_ref().expect("it runs").health().statistics.reads
}

/// How many of eight reads that are asked at once each node serves.
async fn served_of_eight(cluster: &Cluster, volume: &Volume) -> [u64; 3] {
    let before = [0, 1, 2].map(|node| reads_at(cluster, node));
    let reads = (0..8).map(|read| volume.read(read * BLOCK, BLOCK));
    for read in futures::future::join_all(reads).await {
        read.expect("all are there");
    }
    [0, 1, 2].map(|node| reads_at(cluster, node) - before[node])
}

#[test]
fn reads_that_are_asked_at_once_go_to_one_replica_each_time_to_another() {
    let world = World::new(3);
    let here = world.clone();
    world.block_on(async move {
        let (cluster, _client, volume) = attached(&here, VolumeSettings::default()).await;
        let mut together = [0; 3];
        for _ in 0..200 {
            let served = served_of_eight(&cluster, &volume).await;
            let all = served.iter().position(|reads| *reads == 8);
            all.inspect(|node| together[*node] += 1);
        }
        assert!(together.iter().sum::<u32>() > 150 && together.iter().all(|times| *times > 20), "{together:?}");
    });
}

#[test]
fn reads_that_are_asked_at_once_do_not_all_go_to_a_slow_replica() {
    let world = World::new(4);
    let here = world.clone();
    world.block_on(async move {
        let (cluster, _client, volume) = attached(&here, VolumeSettings::default()).await;
        here.slow_down(process(&cluster, 1), 1, Duration::from_millis(2));
        for read in 0..400 {
            volume.read(read % BLOCKS * BLOCK, BLOCK).await.expect("all are there");
        }
        for _ in 0..200 {
            let served = served_of_eight(&cluster, &volume).await;
            assert!(served[1] < 7, "{served:?}: of those that joined one that was asked of it to learn how slow it is");
        }
    });
}

#[test]
fn a_client_reads_from_the_replica_on_its_own_host_and_from_others_once_that_one_is_slow() {
    for seed in 0..4 {
        let world = World::new(seed);
        let here = world.clone();
        world.block_on(async move {
            let cluster = Cluster::start(&here, 3).await;
            cluster.create_volume(NAME, 16 << 20, 3, 2).await;
            let client = cluster.client_with("node-1", false, VolumeSettings::default());
            let volume = client.exports.attach(NAME).await.expect("nobody else is there");
            let read_all = async || {
                for read in 0..400 {
                    volume.read(read % BLOCKS * BLOCK, BLOCK).await.expect("all are there");
                }
            };
            for block in 0..BLOCKS {
                write(&volume, block).await;
            }
            let counts = || [0, 1, 2].map(|node| reads_at(&cluster, node));
            let before = counts();
            read_all().await;
            let local = counts()[1] - before[1];
            assert!(local >= 360, "seed {seed}: {local} of 400 reads were local");
            here.slow_down(process(&cluster, 1), 1, Duration::from_millis(40));
            read_all().await;
            let before = counts();
            read_all().await;
            let local = counts()[1] - before[1];
            assert!(local < 100, "seed {seed}: {local} of 400 reads went to the slow one");
        });
    }
}

/// The longest of writes and reads, one after the other for so long.
async fn longest_io(world: &World, volume: &Volume, during: Duration) -> Duration {
    let (end, mut longest) = (world.now().after(during), Duration::ZERO);
    let mut block = 0;
    while world.now() < end {
        let began = world.now();
        write(volume, block).await;
        volume.read(block % BLOCKS * BLOCK, BLOCK).await.expect("all are there");
        longest = longest.max(world.now().since(began));
        world.sleep(Duration::from_millis(20)).await;
        block += 1;
    }
    longest
}

/// Answers within a third of the lease's time: nobody notices. Slower ones: reads have to be confirmed, and no more.
#[test]
fn a_slow_metadata_store_slows_no_io_and_fences_nobody() {
    for seed in 0..6 {
        let world = World::new(seed);
        let here = world.clone();
        world.block_on(async move {
            let (cluster, client, volume) = attached(&here, VolumeSettings::default()).await;
            let counters = client.exports.counters();
            cluster.store_slower_by.set(Duration::from_millis(1500));
            let longest = longest_io(&here, &volume, Duration::from_secs(60)).await;
            assert!(longest < Duration::from_millis(200), "seed {seed}: {longest:?}");
            assert_eq!(counters.reads_confirmed.get(), 0, "seed {seed}: the lease held all the time");
            cluster.store_slower_by.set(Duration::from_secs(8));
            let longest = longest_io(&here, &volume, Duration::from_secs(60)).await;
            assert!(longest < Duration::from_millis(400), "seed {seed}: {longest:?}");
            assert!(counters.reads_confirmed.get() > 0, "seed {seed}: no lease can be valid all the time");
            cluster.store_slower_by.set(Duration::ZERO);
            here.sleep(Duration::from_secs(20)).await;
            let confirmed = counters.reads_confirmed.get();
            longest_io(&here, &volume, Duration::from_secs(5)).await;
            assert_eq!(counters.reads_confirmed.get(), confirmed, "seed {seed}: the lease is valid again");
            assert_eq!((counters.sessions_ended.get(), counters.replicas_marked_stale.get()), (0, 0), "seed {seed}");
        });
    }
}

/// Only the mark of the dead replica has to be waited for.
#[test]
fn a_node_that_dies_while_the_metadata_store_is_slow_is_done_without_as_soon_as_that_answers() {
    for seed in 0..6 {
        let world = World::new(seed);
        let here = world.clone();
        world.block_on(async move {
            let (cluster, client, volume) = attached(&here, VolumeSettings::default()).await;
            let one_way = Duration::from_millis(1500);
            cluster.store_slower_by.set(one_way);
            here.cut(client.process, process(&cluster, 2));
            let began = here.now();
            write(&volume, 1).await;
            let stalled = here.now().since(began);
            // Noticed after 2 s, looked up, marked: each a way there and back.
            assert!(stalled < Duration::from_secs(3) + one_way * 4, "seed {seed}: {stalled:?}");
            let longest = longest_io(&here, &volume, Duration::from_secs(20)).await;
            assert!(longest < Duration::from_millis(200), "seed {seed}: {longest:?}");
            assert_eq!(client.exports.counters().sessions_ended.get(), 0, "seed {seed}");
        });
    }
}

/// One transaction for a volume, however many shards of the dead node hold it (interleaving 26).
#[test]
fn a_node_with_two_shards_that_dies_costs_one_transaction_per_volume() {
    let mut both = 0;
    for seed in 0..10 {
        let world = World::new(seed);
        let here = world.clone();
        let marked = world.block_on(async move {
            let shape = Shape { shards: 2, ..Shape::default() };
            let cluster = Cluster::start_shaped(&here, shape).await;
            cluster.create_volume(NAME, 64 << 20, 3, 2).await;
            let client = cluster.client_with("w0", false, VolumeSettings::default());
            let volume = client.exports.attach(NAME).await.expect("nobody else is there");
            let spread = || (0..16).map(|slot| write_at(&volume, slot * (4 << 20)));
            futures::future::join_all(spread()).await;
            here.cut(client.process, process(&cluster, 2));
            // One shard is written to at once, the others as it comes.
            for slot in 0..16 {
                let began = here.now();
                write_at(&volume, slot * (4 << 20)).await;
                assert!(here.now().since(began) < Duration::from_secs(3), "seed {seed}");
            }
            futures::future::join_all(spread()).await;
            let counters = client.exports.counters();
            let (marked, sent) = (counters.replicas_marked_stale.get(), counters.status_transactions.get());
            assert_eq!(sent, 1, "seed {seed}: {marked} shards, in one transaction");
            marked
        });
        both += u64::from(marked == 2);
    }
    assert!(both > 3, "volumes with slices on both shards: {both}");
}

async fn write_at(volume: &Volume, offset: u64) {
    let data = Bytes::from(vec![7; BLOCK as usize]);
    volume.write(offset, data, false).await.expect("enough replicas are there");
}
