//! Replicas that restart under a live client (protocol rule 9, interleavings 5 and 12): it keeps every record above the
//! flush point and replays it, so that nothing acknowledged is lost and no request fails.
//!
//! Seeds of load while all replicas restart, one by one or at once, by kill or power failure; and scripts of the cases
//! where replay is not possible. `SIMULATION_SEEDS=first..last` for other seeds. Half of the seeds have bounds so small
//! that volumes flush by themselves and writes wait for room.

use bytes::Bytes;
use futures::future::{Either, join, join_all, select};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::device::{Device, Exports, Piece, VolumeError};
use torus_frontends::volume::{AttachedVolume, VolumeSettings};
use torus_rpc::metadata::Metadata;
use torus_rpc::runtime::simulated::{Faults, World};
use torus_schema::records::{StatusRecord, decode, keys};
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};
use torus_tests::simulation::scenario::{AREA_BLOCKS, AREAS, Run, simulate};

const NAME: &str = "volume";
const BLOCK: u64 = 4096;
/// Longer than all restarts of a run take together.
const PATIENCE: Duration = Duration::from_secs(300);

type Volume = AttachedVolume<Runtime>;

fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("SIMULATION_SEEDS") else { return 0..40 };
    let bounds = text.split_once("..").and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    let (first, last) = bounds.expect("SIMULATION_SEEDS=first..last");
    first..last
}

#[derive(Clone, Copy)]
struct Restarts {
    at_once: bool,
    power: bool,
}

fn run(restarts: Restarts) {
    for seed in seeds() {
        // With 3 none may be done without; with fewer, those that were away are stale and the rest has to come back.
        simulate(seed, 1 + (seed / 2 % 3) as u8, move |run| load_while(run, restarts));
    }
}

async fn load_while(run: Rc<Run>, restarts: Restarts) {
    if !run.world.one_in(4) {
        run.world.set_faults(Faults { slow: 30, very_late: 400, answer_lost: 200, carried_out_twice: 20 });
    }
    let client = run.cluster.client("host-a", false);
    let device = run.attach(&client).await.expect("all nodes run");
    let seed = run.world.seed();
    let workers = AREAS.map(|first| {
        let work = run.workload.work(&device, first, AREA_BLOCKS, 120);
        async move { work.await.unwrap_or_else(|error| panic!("seed {seed}: a live client got an error: {error}")) }
    });
    let load = async {
        let all = pin!(join_all(workers));
        let patience = pin!(run.world.sleep(PATIENCE));
        assert!(matches!(select(all, patience).await, Either::Left(_)), "seed {seed}: requests hang");
    };
    join(load, restart_all(&run, restarts)).await;
    run.world.set_faults(Faults::NONE);
    // Once more with nothing under way, so that what was answered and never flushed has to be replayed for a read.
    restart_all(&run, restarts).await;
    read_everything(&run, &device).await;
    run.workload.flush(&device).await.expect("all nodes run");
    run.world.kill(client.process);
    run.workload.history.borrow_mut().power_lost();
    (0..3).for_each(|node| run.cluster.fail_power(node));
    for node in 0..3 {
        run.cluster.start_node(node).await;
    }
    run.read_all(&run.cluster.client("host-z", false)).await;
}

async fn read_everything(run: &Run, device: &Volume) {
    for first in AREAS {
        let read = run.workload.read(device, first * BLOCK, AREA_BLOCKS * BLOCK).await;
        read.unwrap_or_else(|error| panic!("seed {}: {error}", run.world.seed()));
    }
}

async fn restart_all(run: &Run, restarts: Restarts) {
    let pause = |most: u64| run.world.sleep(Duration::from_millis(run.world.random_below(most)));
    let stop = |node| match restarts.power {
        true => run.cluster.fail_power(node),
        false => run.cluster.kill_node(node),
    };
    pause(200).await;
    if restarts.at_once {
        (0..3).for_each(stop);
    }
    for node in 0..3 {
        if !restarts.at_once {
            stop(node);
        }
        pause(2000).await;
        run.cluster.start_node(node).await;
        pause(300).await;
    }
}

#[test]
fn replicas_killed_one_by_one_lose_nothing_and_cost_no_error() {
    run(Restarts { at_once: false, power: false });
}

#[test]
fn replicas_killed_at_once_lose_nothing_and_cost_no_error() {
    run(Restarts { at_once: true, power: false });
}

#[test]
fn replicas_without_power_one_by_one_get_back_what_was_acknowledged() {
    run(Restarts { at_once: false, power: true });
}

#[test]
fn all_replicas_without_power_at_once_get_back_what_was_acknowledged() {
    run(Restarts { at_once: true, power: true });
}

/// Two nodes and a volume on both, in twenty worlds that differ in delays.
fn script<F: Future<Output = ()> + 'static>(min_replicas: u8, test: impl Fn(World, Cluster) -> F + Clone + 'static) {
    for seed in 0..20 {
        let world = World::new(seed);
        let (here, test) = (world.clone(), test.clone());
        world.block_on(async move {
            let cluster = Cluster::start(&here, 2).await;
            cluster.create_volume(NAME, 16 << 20, 2, min_replicas).await;
            test(here, cluster).await;
        });
    }
}

async fn attach(client: &Client) -> Volume {
    client.exports.attach(NAME).await.expect("nobody else is there")
}

async fn write(volume: &Volume, value: u8) -> Result<(), VolumeError> {
    volume.write(0, Bytes::from(vec![value; BLOCK as usize]), false).await
}

async fn read(volume: &Volume) -> u8 {
    match &volume.read(0, BLOCK).await.expect("it can be read")[..] {
        [Piece::Data(data)] => data[0],
        _ => 0,
    }
}

fn both(cluster: &Cluster, stop: impl Fn(&Cluster, usize)) {
    (0..2).for_each(|node| stop(cluster, node));
}

async fn start_both(cluster: &Cluster) {
    for node in 0..2 {
        cluster.start_node(node).await;
    }
}

/// Interleaving 12: everything unflushed is gone everywhere, cleared ranges too, and only the writer has it.
#[test]
fn what_all_replicas_forgot_is_there_again_and_its_flush_is_true() {
    script(2, async |world, cluster| {
        let client = cluster.client("w0", false);
        let volume = attach(&client).await;
        write(&volume, 1).await.expect("all is well");
        volume.flush().await.expect("all is well");
        write(&volume, 2).await.expect("all is well");
        volume.clear(BLOCK, BLOCK, false, false).await.expect("all is well");
        both(&cluster, Cluster::fail_power);
        start_both(&cluster).await;
        assert_eq!(read(&volume).await, 2, "seed {}", world.seed());
        both(&cluster, Cluster::fail_power);
        start_both(&cluster).await;
        volume.flush().await.expect("it is replayed first");
        world.kill(client.process);
        both(&cluster, Cluster::fail_power);
        start_both(&cluster).await;
        world.sleep(Duration::from_secs(15)).await;
        let volume = attach(&cluster.client("w1", false)).await;
        assert_eq!(read(&volume).await, 2, "seed {}: it was flushed", world.seed());
    });
}

/// A replica comes back with an empty disk: there is nothing to replay to, and what it had flushed is gone with it.
#[test]
fn a_replica_that_lost_its_instances_is_stale_since_zero() {
    script(1, async |world, cluster| {
        let client = cluster.client("w0", false);
        let volume = attach(&client).await;
        write(&volume, 1).await.expect("all is well");
        volume.flush().await.expect("all is well");
        cluster.kill_node(0);
        cluster.replace_disk(0).await;
        cluster.start_node(0).await;
        write(&volume, 2).await.expect("the other one is enough");
        assert_eq!(read(&volume).await, 2, "seed {}", world.seed());
        let status = status(&cluster).await;
        assert!(!status.stale.is_empty(), "seed {}", world.seed());
        for stale in &status.stale {
            assert_eq!((stale.since.epoch.0, stale.since.sequence), (0, 0), "seed {}: {status:?}", world.seed());
        }
    });
}

async fn status(cluster: &Cluster) -> StatusRecord {
    let name = cluster.store.get(&keys::name(NAME)).await.expect("available").expect("the volume is there");
    let name: torus_schema::records::NameRecord = decode("name", &name.value).expect("ours");
    let key = keys::status(name.volume);
    let entry = cluster.store.get(&key).await.expect("available").expect("something was marked");
    decode(&key, &entry.value).expect("ours")
}

#[test]
fn where_replay_is_impossible_and_the_replica_needed_everything_fails_until_the_next_attach() {
    script(2, async |world, cluster| {
        let client = cluster.client("w0", false);
        let volume = attach(&client).await;
        write(&volume, 1).await.expect("all is well");
        cluster.kill_node(0);
        cluster.replace_disk(0).await;
        cluster.start_node(0).await;
        let ended = |result| matches!(result, Err(VolumeError::SessionEnded { .. }));
        assert!(ended(write(&volume, 2).await), "seed {}", world.seed());
        assert!(ended(volume.flush().await), "seed {}", world.seed());
        assert!(ended(volume.read(0, BLOCK).await.map(|_| ())), "seed {}", world.seed());
    });
}

#[test]
fn a_request_waits_as_long_as_the_io_timeout_and_the_volume_goes_on_by_itself() {
    script(2, async |world, cluster| {
        let io_timeout = Some(Duration::from_secs(30));
        let client = cluster.client_with("w0", false, VolumeSettings { io_timeout, ..VolumeSettings::default() });
        let volume = attach(&client).await;
        write(&volume, 1).await.expect("all is well");
        cluster.kill_node(1);
        let before = world.now();
        let timed_out = Err(VolumeError::TimedOut { waited_ms: 30_000 });
        assert_eq!(write(&volume, 2).await, timed_out, "seed {}", world.seed());
        assert!(world.now().since(before) >= Duration::from_secs(30));
        let counters = client.exports.counters();
        let waiting = || (counters.volumes_waiting.get(), counters.waits.get());
        assert_eq!((waiting(), counters.io_timeouts.get()), ((1, 1), 1), "seed {}", world.seed());
        // Behind the first one, whose lock it waits for: it has not begun, and never will.
        assert_eq!(write(&volume, 3).await, timed_out, "seed {}", world.seed());
        cluster.start_node(1).await;
        volume.flush().await.expect("both are there");
        assert_eq!(read(&volume).await, 2, "seed {}: it had begun", world.seed());
        assert_eq!(waiting(), (0, 1), "seed {}", world.seed());
        write(&volume, 4).await.expect("both are there");
        assert_eq!(read(&volume).await, 4, "seed {}", world.seed());
    });
}
