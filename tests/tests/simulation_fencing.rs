//! A writer that lost its volume must not answer from what it knows (interleavings of the replication protocol, as
//! scripts instead of seeds; the seeds only vary delays).

use bytes::Bytes;
use futures::future::{Either, select};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use torus_engine::disk::simulated::Damage;
use torus_frontends::device::{Device, Exports, Piece, VolumeError};
use torus_frontends::volume::AttachedVolume;
use torus_rpc::metadata::{LeaseId, Metadata};
use torus_rpc::runtime::simulated::World;
use torus_schema::records::{OwnerRecord, decode, keys};
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};

const BLOCK: u64 = 4096;
const NAME: &str = "volume";

type Volume = AttachedVolume<Runtime>;

async fn cluster(world: &World, min_replicas: u8) -> Cluster {
    let cluster = Cluster::start(world, 2).await;
    cluster.create_volume(NAME, 16 << 20, 2, min_replicas).await;
    cluster
}

fn simulate<F: Future<Output = ()> + 'static>(test: impl Fn(World) -> F) {
    for seed in 0..20 {
        let world = World::new(seed);
        let scenario = test(world.clone());
        world.block_on(scenario);
    }
}

async fn write(volume: &Volume, value: u8) -> Result<(), VolumeError> {
    volume.write(0, Bytes::from(vec![value; BLOCK as usize]), false).await
}

async fn read(volume: &Volume) -> Result<u8, VolumeError> {
    Ok(match &volume.read(0, BLOCK).await?[..] {
        [Piece::Data(data)] => data[0],
        _ => 0,
    })
}

/// Attaches as soon as the owner before has gone.
async fn attach_in_turn(world: &World, client: &Client) -> Volume {
    loop {
        match client.exports.attach(NAME).await {
            Ok(volume) => return volume,
            Err(VolumeError::Attached { .. }) => world.sleep(Duration::from_millis(200)).await,
            Err(error) => panic!("seed {}: {error}", world.seed()),
        }
    }
}

/// Interleaving 1: W0 is cut off from the metadata store and from node 1. W1 cannot reach node 0, marks it stale, and
/// writes to node 1 alone. W0 still reaches node 0, which never heard of W1.
#[test]
fn a_writer_that_was_fenced_unnoticed_reads_nothing_old() {
    succeeded_unnoticed(false);
}

/// The same by force: W1 must not serve as long as W0 may read by its clock, who does not know that it lost its key.
#[test]
fn a_writer_that_was_forced_out_unnoticed_reads_nothing_old() {
    succeeded_unnoticed(true);
}

fn succeeded_unnoticed(force: bool) {
    simulate(move |world: World| async move {
        let cluster = cluster(&world, 1).await;
        let (old, new) = (cluster.client("w0", false), cluster.client("w1", force));
        let first = old.exports.attach(NAME).await.expect("nobody else is there");
        write(&first, 1).await.expect("all is well");
        first.flush().await.expect("all is well");
        let node = |number: usize| cluster.nodes[number].process.get().expect("it runs");
        old.store.set_available(false);
        world.cut(old.process, node(1));
        world.cut(new.process, node(0));
        let replaced = Rc::new(Cell::new(false));
        let (flag, here) = (replaced.clone(), world.clone());
        let reader = async move {
            loop {
                let late = flag.get();
                let reading = std::pin::pin!(read(&first));
                let patience = std::pin::pin!(here.sleep(Duration::from_millis(500)));
                match select(reading, patience).await {
                    Either::Left((Ok(value), _)) => {
                        assert!(!late || value == 2, "seed {}: {value} after 2 was acknowledged", here.seed());
                    }
                    Either::Left((Err(VolumeError::SessionEnded { .. }), _)) => return,
                    Either::Left((Err(error), _)) => panic!("seed {}: {error}", here.seed()),
                    // It waits for a replica that can confirm its epoch: right.
                    Either::Right(_) => {}
                }
                here.sleep(Duration::from_millis(100)).await;
            }
        };
        let here = world.clone();
        let writer = async {
            let second = attach_in_turn(&here, &new).await;
            write(&second, 2).await.expect("one replica is enough here");
            replaced.set(true);
            here.sleep(Duration::from_secs(30)).await;
            // Now W0 can learn of it, and its session has to end.
            here.heal(old.process, node(1));
            old.store.set_available(true);
            here.sleep(Duration::from_secs(30)).await;
        };
        futures::future::join(reader, writer).await;
    });
}

/// Interleaving 13: W0 marks node 1 stale, writes, flushes and is gone while W1 attaches. What W1 knows of the replicas
/// has to be as it is when W1 owns the volume. W0 does not let go: it would write the flush point beside the epoch,
/// and W1 would begin again whatever it had read before.
#[test]
fn who_attaches_knows_the_replicas_as_the_last_writer_left_them() {
    let alone = gone_after_a_mark(None);
    for step in 0..60 {
        // W1 begins at some time in the third of a second that ends when W0 is gone.
        gone_after_a_mark(Some(alone.saturating_sub(Duration::from_millis(5 * step))));
    }
}

/// After how long W0 is gone. W1 begins to attach after `begin`.
fn gone_after_a_mark(begin: Option<Duration>) -> Duration {
    let world = World::new(1);
    let here = world.clone();
    world.block_on(async move {
        let cluster = Cluster::start(&here, 2).await;
        let volume = cluster.create_volume(NAME, 16 << 20, 2, 1).await;
        let (old, new) = (cluster.client("w0", false), cluster.client("w1", false));
        let first = old.exports.attach(NAME).await.expect("nobody else is there");
        write(&first, 1).await.expect("all is well");
        first.flush().await.expect("all is well");
        let key = keys::owner(volume);
        let owner = cluster.store.get(&key).await.expect("it is up").expect("W0 owns it");
        let owner: OwnerRecord = decode(&key, &owner.value).expect("W0 wrote it");
        let began = here.now();
        here.cut(old.process, cluster.nodes[1].process.get().expect("it runs"));
        let last = async {
            // The second flush tells node 0 how far the first got, which is what W1 takes for durable everywhere.
            for _ in 0..2 {
                write(&first, 2).await.expect("one replica is enough here");
                first.flush().await.expect("one replica is enough here");
            }
            here.kill(old.process);
            cluster.store.revoke_lease(LeaseId(owner.lease.parse().expect("a number"))).await.expect("it is up");
            here.now().since(began)
        };
        let next = async {
            let Some(begin) = begin else { return };
            here.sleep(begin).await;
            let second = attach_in_turn(&here, &new).await;
            for _ in 0..20 {
                assert_eq!(read(&second).await.expect("attached"), 2, "W1 began after {begin:?}");
            }
        };
        futures::future::join(last, next).await.0
    })
}

/// Rule 2: a takeover by force ends the old session, which may neither write nor read on, and nothing is lost.
#[test]
fn a_writer_that_was_taken_over_ends_and_what_it_wrote_is_there() {
    simulate(async |world| {
        let cluster = cluster(&world, 1).await;
        let (old, new) = (cluster.client("w0", false), cluster.client("w1", true));
        let first = old.exports.attach(NAME).await.expect("nobody else is there");
        write(&first, 1).await.expect("all is well");
        let second = new.exports.attach(NAME).await.expect("force takes it");
        assert_eq!(read(&second).await.expect("attached"), 1, "seed {}", world.seed());
        write(&second, 2).await.expect("attached");
        let written = write(&first, 3).await;
        assert!(matches!(written, Err(VolumeError::SessionEnded { .. })), "seed {}: {written:?}", world.seed());
        assert!(first.flush().await.is_err(), "seed {}: a flush of a fenced writer says OK", world.seed());
        assert_eq!(read(&second).await.expect("attached"), 2, "seed {}", world.seed());
    });
}

/// A live owner is named, and stays the owner.
#[test]
fn a_volume_that_is_attached_elsewhere_is_refused_and_the_owner_named() {
    simulate(async |world| {
        let cluster = cluster(&world, 1).await;
        let (old, new) = (cluster.client("host-of-w0", false), cluster.client("w1", false));
        let first = old.exports.attach(NAME).await.expect("nobody else is there");
        world.sleep(Duration::from_secs(30)).await;
        let refused = new.exports.attach(NAME).await.err().expect("it is attached");
        assert!(refused.to_string().contains("host-of-w0"), "{refused}");
        write(&first, 1).await.expect("it is still the owner");
    });
}

/// The lease runs out while the metadata store is away from its owner only; nobody else came. It owns the volume again
/// by itself, and nothing ends.
#[test]
fn an_owner_whose_lease_ran_out_goes_on_if_nobody_came() {
    simulate(async |world| {
        let cluster = cluster(&world, 1).await;
        let client = cluster.client("w0", false);
        let volume = client.exports.attach(NAME).await.expect("nobody else is there");
        write(&volume, 1).await.expect("all is well");
        client.store.set_available(false);
        world.sleep(Duration::from_secs(30)).await;
        cluster.store.expire_leases();
        assert_eq!(read(&volume).await.expect("both replicas confirm the epoch"), 1);
        write(&volume, 2).await.expect("a write needs no lease");
        client.store.set_available(true);
        world.sleep(Duration::from_secs(10)).await;
        write(&volume, 3).await.expect("owned again");
        let other = cluster.client("w1", false);
        let refused = other.exports.attach(NAME).await.err();
        assert!(matches!(refused, Some(VolumeError::Attached { .. })), "seed {}: {refused:?}", world.seed());
    });
}

/// Interleaving 5: the only other replica restarts between an acknowledgement and the flush. The flush must not be
/// answered by its new incarnation, which has lost the write.
#[test]
fn a_flush_is_not_answered_by_a_replica_that_forgot_the_write() {
    simulate(async |world| {
        let cluster = cluster(&world, 1).await;
        let client = cluster.client("w0", false);
        let volume = client.exports.attach(NAME).await.expect("nobody else is there");
        write(&volume, 1).await.expect("all is well");
        cluster.fail_power(1);
        cluster.start_node(1).await;
        volume.flush().await.expect("one replica is enough here");
        // What was flushed must survive the power failing everywhere.
        world.kill(client.process);
        for node in 0..2 {
            cluster.fail_power(node);
            cluster.start_node(node).await;
        }
        let volume = attach_in_turn(&world, &cluster.client("w1", false)).await;
        assert_eq!(read(&volume).await.expect("attached"), 1, "seed {}", world.seed());
    });
}

/// Interleaving 10: what a new writer adopts from an old one's unflushed writes is durable on every replica before it
/// serves; a flush right after the attach has nothing of its own to sync. Here node 1 gets it only by adoption, and is
/// the only one left afterwards.
#[test]
fn what_a_new_writer_adopted_survives_its_flush_and_the_power_failing() {
    simulate(async |world| {
        let cluster = cluster(&world, 1).await;
        let node = |number: usize| cluster.nodes[number].process.get().expect("it runs");
        let client = cluster.client("w0", false);
        let volume = client.exports.attach(NAME).await.expect("nobody else is there");
        // Cut off from node 1, and from the store in which it would have to be marked stale.
        client.store.set_available(false);
        world.cut(client.process, node(1));
        let unanswered = std::pin::pin!(write(&volume, 1));
        let patience = std::pin::pin!(world.sleep(Duration::from_millis(500)));
        assert!(matches!(select(unanswered, patience).await, Either::Right(_)), "seed {}", world.seed());
        world.kill(client.process);
        let client = cluster.client("w1", false);
        let volume = attach_in_turn(&world, &client).await;
        assert_eq!(read(&volume).await.expect("attached"), 1, "seed {}: node 0 has it", world.seed());
        volume.flush().await.expect("all is well");
        world.kill(client.process);
        cluster.fail_power(1);
        cluster.start_node(1).await;
        cluster.kill_node(0);
        let volume = attach_in_turn(&world, &cluster.client("w2", false)).await;
        assert_eq!(read(&volume).await.expect("attached"), 1, "seed {}: it was read, then flushed", world.seed());
    });
}

/// Of what W0 left unflushed only node 0 still has two blocks, one of them damaged. Before node 0 goes stale for that one,
/// the other is brought to node 1 and 2.
#[test]
fn what_is_whole_is_brought_to_the_others_before_one_with_a_damaged_block_goes() {
    let mut alone = 0;
    for seed in 0..40 {
        let world = World::new(seed);
        let here = world.clone();
        alone += world.block_on(async move {
            let cluster = Cluster::start(&here, 3).await;
            cluster.create_volume(NAME, 16 << 20, 3, 1).await;
            let (old, new) = (cluster.client("w0", false), cluster.client("w1", false));
            let write = async |volume: &Volume, block: u64, value: u8| {
                volume
                    .write(block * BLOCK, Bytes::from(vec![value; BLOCK as usize]), false)
                    .await
                    .expect("all is well");
            };
            let first = old.exports.attach(NAME).await.expect("nobody else is there");
            write(&first, 0, 1).await;
            write(&first, 1, 1).await;
            first.flush().await.expect("all is well");
            write(&first, 0, 7).await;
            write(&first, 1, 8).await;
            here.kill(old.process);
            for node in [1, 2] {
                cluster.fail_power(node);
                cluster.start_node(node).await;
            }
            let disk = cluster.nodes[0].shards[0].disk.borrow().clone();
            let page =
                (0..).map(|page| page * BLOCK).find(|page| disk.peek(*page, BLOCK as usize) == [7; BLOCK as usize]);
            assert!(disk.damage_at(Damage::Rot, page.expect("node 0 has it")));
            let second = attach_in_turn(&here, &new).await;
            let value = async |block: u64| match &second.read(block * BLOCK, BLOCK).await.expect("attached")[..] {
                [Piece::Data(data)] => data[0],
                _ => 0,
            };
            for _ in 0..10 {
                assert_eq!(value(1).await, 8, "seed {seed}: it was answered, and node 0 had it whole");
            }
            usize::from(value(0).await == 1)
        });
    }
    assert!(alone > 0, "node 0 never was the only one that had the damaged block: nothing was shown");
}
