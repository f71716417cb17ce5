//! What an owner does while its lease is not sure (protocol rules 2 and 7). Goal: one that lost its volume notices
//! though nobody uses it, and one that cannot know reads nothing that it cannot prove; nobody waits for a store that is
//! away once all replicas are there. Method: scripts in the simulated cluster; the seeds vary delays.

use bytes::Bytes;
use futures::future::{Either, select};
use std::pin::pin;
use std::time::Duration;
use torus_frontends::device::{Device, Exports, Piece, VolumeError};
use torus_frontends::volume::{AttachedVolume, LeaseTerms, VolumeSettings};
use torus_rpc::metadata::memory::Lost;
use torus_rpc::metadata::{Metadata, Transaction, Write};
use torus_rpc::runtime::simulated::World;
use torus_schema::records::{NameRecord, decode, keys};
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};

const BLOCK: u64 = 4096;
const NAME: &str = "volume";
const TTL: Duration = Duration::from_secs(10);

type Volume = AttachedVolume<Runtime>;

fn script<F: Future<Output = ()> + 'static>(test: impl Fn(World, Cluster) -> F + Clone + 'static) {
    for seed in 0..20 {
        let (world, test) = (World::new(seed), test.clone());
        let here = world.clone();
        world.block_on(async move {
            let cluster = Cluster::start(&here, 2).await;
            cluster.create_volume(NAME, 16 << 20, 2, 1).await;
            test(here, cluster).await;
        });
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

/// Why the session ended by itself, if it did within that time.
async fn ends_within(world: &World, volume: &Volume, limit: Duration) -> Option<String> {
    match select(pin!(volume.ended()), pin!(world.sleep(limit))).await {
        Either::Left((because, _)) => Some(because),
        Either::Right(_) => None,
    }
}

async fn delete_owner_key(cluster: &Cluster) {
    let key = keys::name(NAME);
    let name = cluster.store.get(&key).await.expect("available").expect("the volume is there");
    let name: NameRecord = decode(&key, &name.value).expect("ours");
    let writes = vec![Write::Delete { key: keys::owner(name.volume) }];
    cluster.store.transact(Transaction { writes, ..Transaction::default() }).await.expect("available");
}

async fn attach(client: &Client) -> Volume {
    client.exports.attach(NAME).await.expect("nobody else is there")
}

#[test]
fn an_idle_owner_whose_key_became_anothers_ends_by_itself_and_names_it() {
    script(async |world, cluster| {
        let (old, new) = (cluster.client("w0", false), cluster.client("host-of-w1", false));
        let first = attach(&old).await;
        // As an operator would who knows no better: its lease lives on.
        delete_owner_key(&cluster).await;
        let _second = attach(&new).await;
        let because = ends_within(&world, &first, TTL / 2).await;
        let because = because.unwrap_or_else(|| panic!("seed {}: a silent zombie", world.seed()));
        assert!(because.contains("host-of-w1") || because.contains("epoch"), "seed {}: {because}", world.seed());
    });
}

#[test]
fn an_owner_whose_key_is_gone_takes_it_again_if_nobody_came() {
    script(async |world, cluster| {
        let (old, new) = (cluster.client("w0", false), cluster.client("w1", false));
        let first = attach(&old).await;
        delete_owner_key(&cluster).await;
        world.sleep(TTL / 2).await;
        let refused = new.exports.attach(NAME).await.err();
        assert!(matches!(refused, Some(VolumeError::Attached { .. })), "seed {}: {refused:?}", world.seed());
        write(&first, 1).await.expect("it is the owner");
    });
}

#[test]
fn an_idle_owner_that_cannot_reach_the_store_hears_of_its_successor_from_the_replicas() {
    script(async |world, cluster| {
        let (old, new) = (cluster.client("w0", false), cluster.client("w1", true));
        let first = attach(&old).await;
        write(&first, 1).await.expect("all is well");
        old.store.set_available(false);
        let second = attach(&new).await;
        write(&second, 2).await.expect("attached");
        let because = ends_within(&world, &first, TTL * 2).await;
        assert!(because.is_some_and(|because| because.contains("later")), "seed {}: a silent zombie", world.seed());
    });
}

#[test]
fn a_read_that_too_few_replicas_confirm_waits_and_goes_on_by_itself() {
    script(async |world, cluster| {
        let client = cluster.client("w0", false);
        let volume = attach(&client).await;
        write(&volume, 1).await.expect("all is well");
        client.store.set_available(false);
        world.sleep(TTL * 2).await;
        assert_eq!(read(&volume).await, Ok(1), "seed {}: both confirm", world.seed());
        assert!(client.exports.counters().reads_confirmed.get() > 0, "seed {}", world.seed());
        let node = cluster.nodes[1].process.get().expect("it runs");
        world.cut(client.process, node);
        let waiting = pin!(read(&volume));
        let Either::Right((_, waiting)) = select(waiting, pin!(world.sleep(TTL))).await else {
            panic!("seed {}: one replica of two proves nothing", world.seed());
        };
        world.heal(client.process, node);
        // The store, which would have had to hear that the replica is stale, is still away.
        let Either::Left((read, _)) = select(waiting, pin!(world.sleep(TTL))).await else {
            panic!("seed {}: the replica is back and nobody asks it", world.seed());
        };
        assert_eq!(read, Ok(1), "seed {}", world.seed());
        write(&volume, 2).await.expect("all replicas are there");
        client.store.set_available(true);
        world.sleep(TTL).await;
        assert_eq!(client.exports.counters().replicas_marked_stale.get(), 0, "seed {}: it was back", world.seed());
    });
}

/// Whether the marking took place is not known when the replica comes back and the store is gone.
async fn a_replica_is_back_before_its_marking_is_known(world: World, cluster: Cluster, lost: Lost) {
    let client = cluster.client("w0", false);
    let volume = attach(&client).await;
    write(&volume, 1).await.expect("all is well");
    let node = cluster.nodes[1].process.get().expect("it runs");
    world.cut(client.process, node);
    let counters = client.exports.counters();
    let until_marked = async {
        while counters.status_transactions.get() == 0 {
            // Owner keys are looked at by transactions too.
            client.store.lose_next(lost);
            world.sleep(Duration::from_micros(50)).await;
        }
        world.sleep(Duration::from_millis(20)).await;
        client.store.set_available(false);
        world.heal(client.process, node);
    };
    let writing = pin!(write(&volume, 2));
    let both = futures::future::join(writing, until_marked);
    let Either::Left(((written, ()), _)) = select(pin!(both), pin!(world.sleep(TTL))).await else {
        panic!("seed {}: the replica is back and nobody asks it", world.seed());
    };
    written.unwrap_or_else(|error| panic!("seed {}: {error}", world.seed()));
    volume.flush().await.unwrap_or_else(|error| panic!("seed {}: {error}", world.seed()));
    assert_eq!(read(&volume).await, Ok(2), "seed {}", world.seed());
    // What holds of it is found out, and mended where it was marked; then either replica alone has everything.
    client.store.set_available(true);
    world.sleep(TTL).await;
    cluster.all_in_sync(NAME, TTL * 2).await;
    write(&volume, 3).await.expect("all is well");
    volume.flush().await.expect("all is well");
    cluster.assert_identical(NAME, 0, 1).await;
    cluster.kill_node(0);
    assert_eq!(read(&volume).await, Ok(3), "seed {}", world.seed());
}

#[test]
fn a_replica_that_is_back_before_a_marking_that_took_place_unknown_is_waited_for_no_longer() {
    script(|world, cluster| a_replica_is_back_before_its_marking_is_known(world, cluster, Lost::Answer));
}

#[test]
fn a_replica_that_is_back_before_a_marking_that_did_not_take_place_unknown_is_waited_for_no_longer() {
    script(|world, cluster| a_replica_is_back_before_its_marking_is_known(world, cluster, Lost::Request));
}

#[test]
fn who_is_forced_out_is_waited_for_by_the_terms_of_its_own_lease() {
    script(async |world, cluster| {
        let terms = |seconds| LeaseTerms::new(Duration::from_secs(seconds), Duration::ZERO).expect("in bounds");
        let with = |name, force, seconds| {
            let settings = VolumeSettings { lease: terms(seconds), ..VolumeSettings::default() };
            cluster.client_with(name, force, settings)
        };
        let (old, new) = (with("w0", false, 40), with("w1", true, 2));
        let first = attach(&old).await;
        write(&first, 1).await.expect("all is well");
        let began = world.now();
        let _second = attach(&new).await;
        let waited = world.now().since(began);
        assert!(waited >= Duration::from_secs(40), "seed {}: {waited:?}", world.seed());
    });
}
