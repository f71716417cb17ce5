//! A metadata store that is restored from an older backup (interleaving 27): its epochs and its list of stale replicas
//! are those of then. Goal: no volume is served by what the backup says where the replicas know better, however often
//! one tries, and nothing answered is lost. Method: scripted in the simulated cluster, and load with the checker.

use bytes::Bytes;
use futures::future::{Either, select};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::admin::volume_promote::{PromoteArguments, promote};
use torus_frontends::admin::{AdminError, Report};
use torus_frontends::device::{Device, Exports, Piece, VolumeError};
use torus_frontends::volume::AttachedVolume;
use torus_rpc::runtime::simulated::World;
use torus_schema::limits::OWNER_LEASE_TTL;
use torus_schema::records::keys;
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};
use torus_tests::simulation::scenario::{Run, simulate};

const BLOCK: u64 = 4096;
const NAME: &str = "volume";
/// More than the epochs that any of these tests goes back.
const ATTEMPTS: usize = 6;

type Volume = AttachedVolume<Runtime>;

fn script<F: Future<Output = ()> + 'static>(test: impl Fn(World, Cluster) -> F + Clone + 'static) {
    for seed in 0..20 {
        let (world, test) = (World::new(seed), test.clone());
        let here = world.clone();
        world.block_on(async move {
            let cluster = Cluster::start(&here, 3).await;
            cluster.create_volume(NAME, 16 << 20, 3, 1).await;
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

/// When the last owner's lease has ended.
async fn attach_in_turn(world: &World, client: &Client) -> Result<Volume, VolumeError> {
    loop {
        match client.exports.attach(NAME).await {
            Err(VolumeError::Attached { .. }) => world.sleep(Duration::from_millis(200)).await,
            other => return other,
        }
    }
}

/// Each by another process, since who tries once may try again.
async fn is_refused_for_good(world: &World, cluster: &Cluster) {
    for attempt in 0..ATTEMPTS {
        let client = cluster.client(&format!("later-{attempt}"), false);
        let refused = attach_in_turn(world, &client).await.err();
        let refused = refused.unwrap_or_else(|| panic!("seed {}: attached at attempt {attempt}", world.seed()));
        let says = refused.to_string();
        let expected = says.contains("restored from a backup") && says.contains("volume promote");
        assert!(expected, "seed {}, attempt {attempt}: {says}", world.seed());
        client.exports.release_all().await;
    }
}

#[test]
fn epochs_that_went_back_are_found_out_and_trying_again_does_not_help() {
    script(async |world, cluster| {
        let backup = cluster.store.backup();
        for value in 1..4 {
            let client = cluster.client(&format!("w{value}"), false);
            let volume = attach_in_turn(&world, &client).await.expect("the one before let go");
            write(&volume, value).await.expect("all is well");
            volume.flush().await.expect("all is well");
            drop(volume);
            client.exports.release_all().await;
        }
        cluster.store.restore(backup);
        is_refused_for_good(&world, &cluster).await;
    });
}

#[test]
fn a_replica_that_went_stale_after_the_backup_is_not_taken_for_one_in_sync() {
    script(async |world, cluster| {
        let client = cluster.client("w0", false);
        let volume = client.exports.attach(NAME).await.expect("nobody else is there");
        write(&volume, 1).await.expect("all is well");
        volume.flush().await.expect("all is well");
        // The epoch is the same after it: only what the status says goes back.
        let backup = cluster.store.backup();
        cluster.kill_node(2);
        write(&volume, 2).await.expect("two are enough");
        world.kill(client.process);
        cluster.start_node(2).await;
        cluster.store.restore(backup);
        is_refused_for_good(&world, &cluster).await;
    });
}

#[test]
fn a_live_writer_goes_on_over_a_restored_store_and_acknowledges_nothing_by_it() {
    script(async |world, cluster| {
        let client = cluster.client("w0", false);
        let volume = client.exports.attach(NAME).await.expect("nobody else is there");
        write(&volume, 1).await.expect("all is well");
        let backup = cluster.store.backup();
        cluster.kill_node(2);
        write(&volume, 2).await.expect("two are enough");
        cluster.store.restore(backup);
        write(&volume, 3).await.expect("nothing has to be said to the store");
        assert_eq!(read(&volume).await, Ok(3), "seed {}", world.seed());
        // Now something has: the store does not hold what we last wrote there.
        cluster.kill_node(1);
        let late = write(&volume, 4).await;
        assert!(matches!(late, Err(VolumeError::SessionEnded { .. })), "seed {}: {late:?}", world.seed());
        drop(volume);
        client.exports.release_all().await;
        cluster.start_node(1).await;
        cluster.start_node(2).await;
        is_refused_for_good(&world, &cluster).await;
    });
}

/// Nobody looks at the owner key of a volume that is only being attached, but the attach itself.
#[test]
fn an_attach_under_way_as_the_store_goes_back_ends() {
    script(async |world, cluster| {
        let backup = cluster.store.backup();
        // Waited for, and then to be marked, which the restored store refuses: it knows no owner.
        cluster.kill_node(2);
        let client = cluster.client("w0", false);
        let owned = async {
            while cluster.store.backup().keys.keys().all(|key| !key.starts_with(&keys::owners())) {
                world.sleep(Duration::from_millis(10)).await;
            }
            cluster.store.restore(backup);
            world.sleep(Duration::from_secs(60)).await;
        };
        let attach = client.exports.attach(NAME);
        match select(pin!(attach), pin!(owned)).await {
            Either::Left((Err(error), _)) => {
                let says = error.to_string();
                assert!(says.contains("restored from an older backup") || says.contains("epoch is gone"), "{says}");
            }
            Either::Left((Ok(_), _)) => panic!("seed {}: attached by a store that knows nothing of it", world.seed()),
            Either::Right(_) => panic!("seed {}: still attaching after a minute", world.seed()),
        }
    });
}

async fn promoted(cluster: &Cluster, nodes: &[usize], confirmed: Option<&str>) -> Result<Report, AdminError> {
    let operator = cluster.client("operator", false);
    let mut named = nodes.iter().map(|node| cluster.nodes[*node].id.to_string());
    let arguments = PromoteArguments {
        name: NAME.to_string(),
        node: named.next().expect("one at least"),
        others: named.collect(),
        yes_lose_writes_since: confirmed.map(str::to_string),
    };
    let told = cluster.told(cluster.volume_id(NAME).await);
    promote(&operator.runtime, &arguments, &told, Duration::from_secs(5)).await
}

/// Looks, is told what is lost, and says that it may be.
async fn goes_on_from(cluster: &Cluster, nodes: &[usize]) {
    let before = cluster.status(NAME).await;
    let shown = promoted(cluster, nodes, None).await.expect("it may be looked at");
    assert_eq!(cluster.status(NAME).await, before, "nothing was asked for yet");
    let said = shown.summary.join("\n");
    assert!(said.contains("LOST") && said.contains("restored from a backup"), "{said}");
    let since = shown.json["lost_since"].as_str().expect("a version").to_string();
    let refused = promoted(cluster, nodes, Some("99.99")).await.unwrap_err().to_string();
    assert!(refused.contains(&since), "{refused}");
    promoted(cluster, nodes, Some(&since)).await.expect("it was said");
}

#[test]
fn an_operator_chooses_the_replica_to_go_on_from_and_the_others_become_as_it_is() {
    script(async |world, cluster| {
        let client = cluster.client("w0", false);
        let volume = client.exports.attach(NAME).await.expect("nobody else is there");
        write(&volume, 1).await.expect("all is well");
        volume.flush().await.expect("all is well");
        let backup = cluster.store.backup();
        cluster.kill_node(2);
        write(&volume, 2).await.expect("two are enough");
        volume.flush().await.expect("two are enough");
        world.kill(client.process);
        cluster.start_node(2).await;
        cluster.store.restore(backup);
        is_refused_for_good(&world, &cluster).await;
        // Which is the right one the operator sees by what each knows.
        let shown = promoted(&cluster, &[2], None).await.expect("it may be looked at");
        let changes = |node: usize| {
            let replicas = shown.json["replicas"].as_array().expect("a list");
            let id = serde_json::to_value(cluster.nodes[node].id).expect("text");
            replicas.iter().find(|replica| replica["node"] == id).expect("it answered")["status_changes"].as_u64()
        };
        assert!(changes(0) > changes(2), "seed {}: {:?}", world.seed(), shown.summary);
        goes_on_from(&cluster, &[0]).await;
        let client = cluster.client("after", false);
        let volume = attach_in_turn(&world, &client).await.unwrap_or_else(|error| panic!("{}: {error}", world.seed()));
        assert_eq!(read(&volume).await, Ok(2), "seed {}", world.seed());
        write(&volume, 3).await.expect("it is in sync");
        cluster.all_in_sync(NAME, Duration::from_secs(60)).await;
        volume.flush().await.expect("all is well");
        cluster.assert_identical(NAME, 0, 4).await;
        drop(volume);
        client.exports.release_all().await;
        let again =
            attach_in_turn(&world, &cluster.client("again", false)).await.expect("nothing contradicts the store");
        assert_eq!(read(&again).await, Ok(3), "seed {}", world.seed());
    });
}

/// One that was not asked knows later epochs and has newer data under them, and more changes of the status.
#[test]
fn a_replica_that_was_down_when_another_was_chosen_is_taken_back_to_that_one() {
    script(async |world, cluster| {
        let backup = cluster.store.backup();
        for value in 1..4 {
            let client = cluster.client(&format!("w{value}"), false);
            let volume = attach_in_turn(&world, &client).await.expect("the one before let go");
            write(&volume, value).await.expect("all is well");
            volume.flush().await.expect("all is well");
            if value == 2 {
                cluster.kill_node(0);
            }
            drop(volume);
            client.exports.release_all().await;
        }
        cluster.kill_node(1);
        cluster.kill_node(2);
        cluster.store.restore(backup);
        cluster.start_node(0).await;
        is_refused_for_good(&world, &cluster).await;
        goes_on_from(&cluster, &[0]).await;
        let began = world.now();
        let client = cluster.client("after", false);
        let volume = attach_in_turn(&world, &client).await.unwrap_or_else(|error| panic!("{}: {error}", world.seed()));
        assert!(world.now().since(began) >= OWNER_LEASE_TTL, "a lease of before the restore is waited for");
        assert_eq!(read(&volume).await, Ok(2), "seed {}", world.seed());
        cluster.start_node(1).await;
        cluster.start_node(2).await;
        cluster.all_in_sync(NAME, Duration::from_secs(60)).await;
        volume.flush().await.expect("all is well");
        cluster.assert_identical(NAME, 0, 4).await;
        assert_eq!(read(&volume).await, Ok(2), "seed {}", world.seed());
        drop(volume);
        client.exports.release_all().await;
        attach_in_turn(&world, &cluster.client("again", false)).await.expect("nothing contradicts the store");
    });
}

/// The number of a lease comes again, and with it the name of the owner and the epoch.
#[test]
fn the_same_process_under_the_same_lease_number_is_not_the_same_writer() {
    script(async |world, cluster| {
        let backup = cluster.store.backup();
        let client = cluster.client("w0", false);
        let volume = client.exports.attach(NAME).await.expect("nobody else is there");
        write(&volume, 1).await.expect("all is well");
        cluster.store.restore(backup);
        let because = volume.ended().await;
        assert!(because.contains("epoch"), "seed {}: {because}", world.seed());
        drop(volume);
        let again = client.exports.attach(NAME).await.err();
        assert!(again.is_some(), "seed {}", world.seed());
        is_refused_for_good(&world, &cluster).await;
    });
}

#[test]
fn what_a_restored_store_lets_anybody_read_is_never_older_than_what_was_answered() {
    for seed in 0..30 {
        simulate(seed, 1, restored_under_load);
    }
}

async fn restored_under_load(run: Rc<Run>) {
    let world = run.world.clone();
    let client = run.cluster.client("host-a", false);
    if world.one_in(2) {
        run.load(&client, 20).await;
    }
    let backup = run.cluster.store.backup();
    let node = world.random_below(3) as usize;
    let trouble = async {
        world.sleep(Duration::from_millis(world.random_below(300))).await;
        if world.one_in(2) {
            run.cluster.kill_node(node);
        }
    };
    futures::future::join(run.load(&client, 40), trouble).await;
    if !run.cluster.is_running(node) {
        run.cluster.start_node(node).await;
    }
    world.kill(client.process);
    run.cluster.store.restore(backup);
    for attempt in 0..ATTEMPTS {
        let client = run.cluster.client(&format!("later-{attempt}"), true);
        // Right where the replicas know no more than the backup; wrong if anything older is read.
        let Ok(volume) = client.exports.attach(torus_tests::simulation::scenario::VOLUME).await else { continue };
        drop(volume);
        run.read_all(&client).await;
        return;
    }
}
