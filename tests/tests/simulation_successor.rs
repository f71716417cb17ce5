//! What the process that comes next finds: a volume that its predecessor let go though it was still attaching it, and
//! what it may conclude from the epochs of those before it (protocol rule 3).

use bytes::Bytes;
use futures::future::join;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::device::{Device, Exports, Piece, VolumeError};
use torus_frontends::volume::AttachedVolume;
use torus_rpc::runtime::simulated::World;
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};

const BLOCK: u64 = 4096;
const NAME: &str = "volume";

type Volume = AttachedVolume<Runtime>;

async fn cluster(world: &World, min_replicas: u8) -> Cluster {
    let cluster = Cluster::start(world, 2).await;
    cluster.create_volume(NAME, 16 << 20, 2, min_replicas).await;
    cluster
}

async fn read(volume: &Volume) -> u8 {
    match &volume.read(0, BLOCK).await.expect("attached")[..] {
        [Piece::Data(data)] => data[0],
        _ => 0,
    }
}

/// As soon as the owner before has gone.
async fn attach_in_turn(world: &World, client: &Client) -> Result<Volume, VolumeError> {
    loop {
        match client.exports.attach(NAME).await {
            Err(VolumeError::Attached { .. }) => world.sleep(Duration::from_millis(200)).await,
            other => return other,
        }
    }
}

#[test]
fn a_volume_that_is_being_attached_as_its_server_stops_is_free_when_that_has_stopped() {
    for step in 0..80 {
        let world = World::new(step);
        let here = world.clone();
        world.block_on(async move {
            let cluster = cluster(&here, 1).await;
            if step % 2 == 1 {
                // Its open is waited for, and then it is marked stale.
                cluster.kill_node(1);
            }
            let (stopping, next) = (cluster.client("w0", false), cluster.client("w1", false));
            let stop = async {
                here.sleep(Duration::from_millis(step * step / 4)).await;
                stopping.exports.end().await;
            };
            let (attached, ()) = join(async { stopping.exports.attach(NAME).await.map(drop) }, stop).await;
            let second = next.exports.attach(NAME).await;
            assert!(second.is_ok(), "seed {step}: {:?} after {attached:?}", second.err());
            let late = stopping.exports.attach(NAME).await;
            assert!(matches!(late, Err(VolumeError::SessionEnded { .. })), "seed {step}: it attaches no more");
        });
    }
}

/// Why `torusblk nbd` fails the device of its predecessor if an epoch lies between them, even one in which nobody served:
/// a replica tells whether it has been up since the epoch before, and that one began after the loss.
#[test]
fn an_epoch_in_which_nobody_served_hides_what_was_lost_before_it() {
    let lost = Rc::new(Cell::new(0));
    for seed in 0..10 {
        let world = World::new(seed);
        let (here, lost) = (world.clone(), lost.clone());
        world.block_on(async move {
            let cluster = cluster(&here, 2).await;
            let first = cluster.client("w0", false);
            let volume = first.exports.attach(NAME).await.expect("nobody else is there");
            volume.write(0, Bytes::from(vec![1; BLOCK as usize]), false).await.expect("all is well");
            let epoch = volume.epoch();
            // The process, and with it both replicas' unflushed part; one of them comes back later.
            here.kill(first.process);
            drop(volume);
            cluster.fail_power(0);
            cluster.fail_power(1);
            cluster.start_node(0).await;
            let unable = attach_in_turn(&here, &cluster.client("w1", false)).await;
            assert!(matches!(unable, Err(VolumeError::NotReady { .. })), "seed {seed}: {:?}", unable.err());
            cluster.start_node(1).await;
            let second = attach_in_turn(&here, &cluster.client("w2", false)).await.expect("both are there");
            assert_eq!(second.epoch().0, epoch.0 + 2, "seed {seed}");
            lost.set(lost.get() + u32::from(read(&second).await == 0));
            assert!(second.keeps_all(), "seed {seed}: of the epoch before, in which nothing was answered");
        });
    }
    assert!(lost.get() > 0, "no seed lost what was answered and not flushed");
}

/// The rule where no epoch lies between: then the loss is seen.
#[test]
fn the_next_epoch_sees_what_was_lost_and_what_was_not() {
    for seed in 0..10 {
        for lost in [false, true] {
            let world = World::new(seed);
            let here = world.clone();
            world.block_on(async move {
                let cluster = cluster(&here, 1).await;
                let first = cluster.client("w0", false);
                let volume = first.exports.attach(NAME).await.expect("nobody else is there");
                volume.write(0, Bytes::from(vec![1; BLOCK as usize]), false).await.expect("all is well");
                let epoch = volume.epoch();
                here.kill(first.process);
                drop(volume);
                // One is absent either way, as is a node that is being repaired while `torusblk nbd` starts again.
                cluster.kill_node(1);
                if lost {
                    cluster.fail_power(0);
                    cluster.start_node(0).await;
                }
                let second = attach_in_turn(&here, &cluster.client("w1", false)).await.expect("one is enough");
                assert_eq!((second.epoch().0, second.keeps_all()), (epoch.0 + 1, !lost), "seed {seed}");
                assert!(lost || read(&second).await == 1, "seed {seed}");
            });
        }
    }
}
