//! Where a slow request was slow. Goal: the stage that is slow is the one that is told, and all stages together are as
//! long as the user waited. Method: the simulated cluster, in which only one thing is slow, and exactly known.

use bytes::Bytes;
use std::time::Duration;
use torus_engine::disk::simulated::Faults;
use torus_frontends::device::{Device, Exports};
use torus_frontends::volume::AttachedVolume;
use torus_rpc::runtime::simulated::World;
use torus_schema::latency::{OperationKind, Stage, StageCounts};
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};

const BLOCK: u64 = 4096;
const NAME: &str = "volume";
const WRITES: u64 = 50;

struct Scene {
    cluster: Cluster,
    client: Client,
    volume: AttachedVolume<Runtime>,
}

impl Scene {
    async fn start(world: &World) -> Self {
        let cluster = Cluster::start(world, 3).await;
        cluster.create_volume(NAME, 16 << 20, 3, 2).await;
        let client = cluster.client("w0", false);
        let volume = client.exports.attach(NAME).await.expect("nobody else is there");
        let scene = Self { cluster, client, volume };
        // Every connection is made.
        scene.write(0).await;
        scene.volume.read(0, BLOCK).await.expect("all are there");
        scene
    }

    async fn write(&self, block: u64) {
        let data = Bytes::from(vec![7; BLOCK as usize]);
        self.volume.write(block * BLOCK, data, false).await.expect("all are there");
    }

    /// What was told of so many writes, one after the other.
    async fn writes(&self) -> StageCounts {
        let before = self.client.exports.counters().stages();
        for block in 1..=WRITES {
            self.write(block).await;
        }
        self.client.exports.counters().stages().since(&before)
    }
}

fn in_worlds<F: Future<Output = ()> + 'static>(test: impl Fn(World, u64) -> F) {
    for seed in 0..8 {
        let world = World::new(seed);
        let here = world.clone();
        world.block_on(test(here, seed));
    }
}

fn sum(stages: &StageCounts, kind: OperationKind, stage: Stage) -> Duration {
    stages.get(kind, stage).sum()
}

/// Of the time that users waited.
fn share(stages: &StageCounts, kind: OperationKind, stage: Stage) -> f64 {
    sum(stages, kind, stage).as_secs_f64() / sum(stages, kind, Stage::Whole).as_secs_f64()
}

fn assert_whole(stages: &StageCounts, kind: OperationKind, seed: u64) {
    let parts = [Stage::ClientQueue, Stage::Wire, Stage::ShardQueue, Stage::Disk];
    let parts: Duration = parts.into_iter().map(|stage| sum(stages, kind, stage)).sum();
    assert_eq!(parts, sum(stages, kind, Stage::Whole), "seed {seed}: {kind:?}");
}

#[test]
fn a_slow_network_is_told_as_the_wire() {
    in_worlds(|world, seed| async move {
        let scene = Scene::start(&world).await;
        let slow = scene.cluster.nodes[1].process.get().expect("it runs");
        world.slow_down(slow, 1, Duration::from_millis(50));
        let told = scene.writes().await;
        assert_eq!(told.get(OperationKind::Write, Stage::Whole).count(), WRITES, "seed {seed}");
        assert_whole(&told, OperationKind::Write, seed);
        let wire = share(&told, OperationKind::Write, Stage::Wire);
        assert!(wire > 0.95, "seed {seed}: {wire}");
    });
}

#[test]
fn a_slow_disk_is_told_as_the_disk_by_its_shard_and_by_who_waits_for_it() {
    in_worlds(|world, seed| async move {
        let scene = Scene::start(&world).await;
        scene.cluster.nodes[1].disk.borrow().set_faults(Faults { slow_one_in: 1, ..Faults::default() });
        let told = scene.writes().await;
        assert_whole(&told, OperationKind::Write, seed);
        let disk = share(&told, OperationKind::Write, Stage::Disk);
        assert!(disk > 0.8, "seed {seed}: {disk}");
        let medians: Vec<u64> = scene.cluster.nodes.iter().map(disk_median_us).collect();
        assert!(medians[1] > 10 * medians[0].max(medians[2]), "seed {seed}: {medians:?}");
    });
}

fn disk_median_us(node: &torus_tests::simulation::cluster::Node) -> u64 {
    let shard = node.shard.borrow();
    let told = shard.as_ref().expect("it runs").measured().counts(None);
    told.get(OperationKind::Write, Stage::Disk).quantile_us(0.5)
}

/// That were asked of the shards, and the disks' operations.
fn asked(scene: &Scene) -> (u64, u64) {
    let nodes = &scene.cluster.nodes;
    let flushes = nodes.iter().map(|node| {
        let shard = node.shard.borrow();
        let told = shard.as_ref().expect("it runs").measured().counts(None);
        told.get(OperationKind::Flush, Stage::Disk).count()
    });
    (flushes.sum(), nodes.iter().map(|node| node.disk.borrow().counts().syncs).sum())
}

#[test]
fn after_four_flushes_of_one_write_each_the_next_write_is_durable_and_its_flush_asks_nobody() {
    in_worlds(|world, seed| async move {
        let scene = Scene::start(&world).await;
        for pair in 1..10 {
            let before = asked(&scene);
            if pair > 1 {
                scene.write(pair).await;
            }
            let written = asked(&scene);
            scene.volume.flush().await.expect("all are there");
            let flushed = asked(&scene);
            let (writing, flushing) = (written.1 - before.1, flushed.0 - written.0);
            match pair {
                ..=4 => assert_eq!((writing, flushing), (0, 3), "seed {seed}, pair {pair}"),
                _ => assert_eq!((writing, flushing), (3, 0), "seed {seed}, pair {pair}"),
            }
        }
    });
}

#[test]
fn who_waits_for_another_write_of_the_same_block_waits_in_the_client() {
    in_worlds(|world, seed| async move {
        let scene = Scene::start(&world).await;
        let slow = scene.cluster.nodes[1].process.get().expect("it runs");
        world.slow_down(slow, 1, Duration::from_millis(50));
        let before = scene.client.exports.counters().stages();
        futures::future::join_all((0..10).map(|_| scene.write(7))).await;
        let told = scene.client.exports.counters().stages().since(&before);
        assert_whole(&told, OperationKind::Write, seed);
        // The first waits for one round trip, the last for ten: nine of eleven parts are waiting for others.
        let client = share(&told, OperationKind::Write, Stage::ClientQueue);
        assert!((0.7..0.9).contains(&client), "seed {seed}: {client}");
    });
}

#[test]
fn reads_and_flushes_are_told_too_and_whoever_asked_of_a_volume_has_it_apart() {
    in_worlds(|world, seed| async move {
        let scene = Scene::start(&world).await;
        scene.writes().await;
        let before = scene.client.exports.counters().stages();
        scene.volume.flush().await.expect("all are there");
        for block in 0..WRITES {
            scene.volume.read(block * BLOCK, BLOCK).await.expect("all are there");
        }
        let told = scene.client.exports.counters().stages().since(&before);
        for (kind, count) in [(OperationKind::Read, WRITES), (OperationKind::Flush, 1)] {
            assert_eq!(told.get(kind, Stage::Whole).count(), count, "seed {seed}: {kind:?}");
            assert_whole(&told, kind, seed);
            assert!(sum(&told, kind, Stage::Disk) > Duration::ZERO, "seed {seed}: {kind:?}");
        }
        let of = |only| {
            let count = |node: &torus_tests::simulation::cluster::Node| {
                let shard = node.shard.borrow();
                let told = shard.as_ref().expect("it runs").measured().counts(only);
                told.get(OperationKind::Read, Stage::Disk).count()
            };
            scene.cluster.nodes.iter().map(count).sum::<u64>()
        };
        let volume = torus_frontends::volume::find(&scene.cluster.runtime_of(0), NAME).await.expect("it is there");
        assert_eq!(of(Some(volume)), of(None), "seed {seed}");
        assert!(of(None) >= WRITES, "seed {seed}");
    });
}
