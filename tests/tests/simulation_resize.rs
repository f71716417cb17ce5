//! Volumes that grow while they are used and shrink while they are not: scripts over seeds, which vary delays.
//! `SIMULATION_SEEDS=first..last` for others.

use bytes::Bytes;
use std::ops::Range;
use std::time::Duration;
use torus_frontends::admin::volume_resize::{ResizeArguments, resize};
use torus_frontends::admin::{AdminError, Report};
use torus_frontends::device::{Device, Exports, Piece, VolumeError};
use torus_frontends::volume::AttachedVolume;
use torus_rpc::runtime::simulated::World;
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};

const NAME: &str = "volume";
const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const BLOCK: u64 = 4096;

fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("SIMULATION_SEEDS") else { return 0..12 };
    let bounds = text.split_once("..").and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    let (first, last) = bounds.expect("SIMULATION_SEEDS=first..last");
    first..last
}

/// Three nodes, a volume on all of them, and an operator.
fn script<F: Future<Output = ()> + 'static>(test: impl Fn(World, Cluster, Client) -> F + Clone + 'static) {
    for seed in seeds() {
        let world = World::new(seed);
        let (here, test) = (world.clone(), test.clone());
        world.block_on(async move {
            let cluster = Cluster::start_with_spares(&here, 3, 0).await;
            cluster.create_volume(NAME, SIZE, 3, 1).await;
            let operator = cluster.client("operator", false);
            test(here, cluster, operator).await;
        });
    }
}

async fn resized(operator: &Client, size: u64, allow_shrink: bool) -> Result<Report, AdminError> {
    resize(&operator.runtime, &ResizeArguments { name: NAME.to_string(), size, allow_shrink }).await
}

async fn attached(world: &World, client: &Client) -> AttachedVolume<Runtime> {
    loop {
        match client.exports.attach(NAME).await {
            Ok(volume) => return volume,
            Err(VolumeError::Attached { .. }) => world.sleep(Duration::from_millis(200)).await,
            Err(error) => panic!("seed {}: {error}", world.seed()),
        }
    }
}

async fn write(volume: &AttachedVolume<Runtime>, offset: u64, byte: u8) -> Result<(), VolumeError> {
    volume.write(offset, Bytes::from(vec![byte; BLOCK as usize]), false).await
}

/// The byte that a block is full of.
async fn content(volume: &AttachedVolume<Runtime>, offset: u64) -> u8 {
    match &volume.read(offset, BLOCK).await.expect("a replica is there")[..] {
        [Piece::Zeros(BLOCK)] => 0,
        [Piece::Data(data)] => {
            assert!(data.iter().all(|byte| *byte == data[0]));
            data[0]
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_attached_volume_grows_and_what_is_written_there_outlives_it() {
    script(async |world, cluster, operator| {
        let client = cluster.client("w0", false);
        let volume = attached(&world, &client).await;
        assert!(matches!(write(&volume, SIZE, 1).await, Err(VolumeError::OutOfRange { .. })));
        resized(&operator, 2 * SIZE, false).await.expect("a good size");
        while volume.size_bytes() == SIZE {
            world.sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(content(&volume, SIZE).await, 0);
        write(&volume, 2 * SIZE - BLOCK, 7).await.expect("within the volume");
        drop(volume);
        client.exports.release_all().await;
        let volume = attached(&world, &cluster.client("w1", false)).await;
        assert_eq!((volume.size_bytes(), content(&volume, 2 * SIZE - BLOCK).await), (2 * SIZE, 7));
    });
}

#[test]
fn a_volume_that_grew_still_does_without_a_node_that_dies() {
    script(async |world, cluster, operator| {
        let volume = attached(&world, &cluster.client("w0", false)).await;
        // Whether the writer has heard of it or not.
        resized(&operator, 2 * SIZE, false).await.expect("a good size");
        cluster.kill_node(1);
        write(&volume, 0, 3).await.expect("two are enough");
        volume.flush().await.expect("two are enough");
        while volume.size_bytes() == SIZE {
            world.sleep(Duration::from_millis(1)).await;
        }
        write(&volume, SIZE, 4).await.expect("within the volume");
        assert_eq!((content(&volume, 0).await, content(&volume, SIZE).await), (3, 4));
    });
}

#[test]
fn a_volume_shrinks_only_when_that_is_said_and_nobody_has_it() {
    script(async |world, cluster, operator| {
        let client = cluster.client("w0", false);
        let volume = attached(&world, &client).await;
        write(&volume, 0, 1).await.expect("within the volume");
        write(&volume, SIZE / 2, 2).await.expect("within the volume");
        let refused = resized(&operator, SIZE / 2, false).await.unwrap_err().to_string();
        assert!(refused.contains("--allow-shrink"), "{refused}");
        let refused = resized(&operator, SIZE / 2, true).await.unwrap_err().to_string();
        assert!(refused.contains("attached by w0"), "{refused}");
        assert_eq!(content(&volume, SIZE / 2).await, 2);
        drop(volume);
        client.exports.release_all().await;
        resized(&operator, SIZE / 2, true).await.expect("nobody has it");
        let volume = attached(&world, &client).await;
        assert_eq!((volume.size_bytes(), content(&volume, 0).await), (SIZE / 2, 1));
        assert!(matches!(write(&volume, SIZE / 2, 1).await, Err(VolumeError::OutOfRange { .. })));
        resized(&operator, SIZE, false).await.expect("a good size");
        while volume.size_bytes() != SIZE {
            world.sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(content(&volume, SIZE / 2).await, 0, "what was given up does not come back");
    });
}

#[test]
fn sizes_that_no_volume_has_are_refused() {
    script(async |_, _, operator| {
        for size in [0, 4097, u64::MAX] {
            assert!(resized(&operator, size, true).await.is_err(), "{size}");
        }
    });
}
