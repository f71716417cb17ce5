//! Replicas that were away, restarted in between or lost everything come back by themselves (protocol rule 11): each
//! interleaving that breaks without one of its steps is a script here, run from several seeds, which vary delays.
//!
//! `SIMULATION_SEEDS=first..last` for other seeds.

use bytes::Bytes;
use futures::future::{Either, join, join_all, select};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::device::{Device, Exports, Piece, VolumeError};
use torus_frontends::volume::AttachedVolume;
use torus_rpc::runtime::simulated::{Faults, World};
use torus_schema::limits::RESYNC_SOURCE_DEADLINE;
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};
use torus_tests::simulation::scenario::{AREA_BLOCKS, AREAS, Run, VOLUME, simulate};

const BLOCK: u64 = 4096;
/// A resync is tried again every ten seconds; a dead owner's lease takes as long.
const PATIENCE: Duration = Duration::from_secs(60);

type Volume = AttachedVolume<Runtime>;

fn seeds(default: Range<u64>) -> Range<u64> {
    let Ok(text) = std::env::var("SIMULATION_SEEDS") else { return default };
    let bounds = text.split_once("..").and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    let (first, last) = bounds.expect("SIMULATION_SEEDS=first..last");
    first..last
}

/// So many nodes, a volume on all of them, which one alone may serve.
fn script<F: Future<Output = ()> + 'static>(nodes: usize, test: impl Fn(Script) -> F + Clone + 'static) {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().without_time().try_init();
    for seed in seeds(0..20) {
        let world = World::new(seed);
        let (here, test) = (world.clone(), test.clone());
        world.block_on(async move {
            let cluster = Cluster::start(&here, nodes).await;
            cluster.create_volume(VOLUME, 16 << 20, nodes as u8, 1).await;
            test(Script { world: here, cluster }).await;
        });
    }
}

#[derive(Clone)]
struct Script {
    world: World,
    cluster: Cluster,
}

impl Script {
    async fn attach(&self, client: &Client) -> Volume {
        loop {
            match client.exports.attach(VOLUME).await {
                Ok(volume) => return volume,
                Err(VolumeError::Attached { .. }) => self.world.sleep(Duration::from_millis(200)).await,
                Err(error) => panic!("seed {}: {error}", self.world.seed()),
            }
        }
    }

    async fn whole(&self) {
        self.cluster.all_in_sync(VOLUME, PATIENCE).await;
    }

    /// Until the writer has opened it: the resync is about to begin.
    async fn resync_begins(&self, node: usize) {
        let shard = self.cluster.nodes[node].shard.borrow().clone().expect("it runs");
        while shard.health().statistics.bytes_appended == 0 {
            self.world.sleep(Duration::from_millis(1)).await;
        }
    }

    async fn pause(&self, most_ms: u64) {
        self.world.sleep(Duration::from_micros(self.world.random_below(most_ms * 1000))).await;
    }

    /// From now on only that node is left to read from.
    fn leave_only(&self, node: usize) {
        for other in (0..self.cluster.nodes.len()).filter(|other| *other != node) {
            self.cluster.kill_node(other);
        }
    }

    fn process(&self, node: usize) -> torus_rpc::runtime::simulated::ProcessId {
        self.cluster.nodes[node].process.get().expect("it runs")
    }

    /// Nobody has it any more, and everything that was not durable is gone.
    async fn lose_power(&self, client: &Client) {
        self.world.kill(client.process);
        for node in (0..self.cluster.nodes.len()).filter(|node| self.cluster.is_running(*node)) {
            self.cluster.fail_power(node);
            self.cluster.start_node(node).await;
        }
    }
}

async fn write(volume: &Volume, block: u64, value: u8) {
    volume.write(block * BLOCK, Bytes::from(vec![value; BLOCK as usize]), false).await.expect("one replica is enough");
}

async fn write_many(volume: &Volume, first: u64, count: u64, value: u8) {
    for at in (first..first + count).step_by(32) {
        let blocks = 32.min(first + count - at);
        let data = Bytes::from(vec![value; (blocks * BLOCK) as usize]);
        volume.write(at * BLOCK, data, false).await.expect("one replica is enough");
    }
}

async fn clear(volume: &Volume, first: u64, count: u64) {
    volume.clear(first * BLOCK, count * BLOCK, false, false).await.expect("one replica is enough");
}

async fn read(volume: &Volume, block: u64) -> u8 {
    match &volume.read(block * BLOCK, BLOCK).await.expect("it can be read")[..] {
        [Piece::Data(data)] => {
            assert!(data.iter().all(|byte| *byte == data[0]));
            data[0]
        }
        _ => 0,
    }
}

#[test]
fn a_replica_that_was_away_gets_what_it_missed_and_serves_it() {
    script(3, async |script| {
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write_many(&volume, 0, 40, 1).await;
        volume.flush().await.expect("all is well");
        script.cluster.kill_node(0);
        write(&volume, 3, 2).await;
        write_many(&volume, 1500, 100, 3).await;
        clear(&volume, 10, 5).await;
        script.cluster.start_node(0).await;
        script.whole().await;
        script.cluster.assert_identical(VOLUME, 0, 40).await;
        script.cluster.assert_identical(VOLUME, 1500, 100).await;
        script.leave_only(0);
        for (block, value) in [(0, 1), (3, 2), (10, 0), (14, 0), (15, 1), (1500, 3), (1599, 3), (1600, 0)] {
            assert_eq!(read(&volume, block).await, value, "seed {}: block {block}", script.world.seed());
        }
    });
}

/// Interleaving 2: what a replica got by a resync is durable everywhere before it is in sync, so that going stale again
/// it cannot have, below its mark, what the others have lost since.
#[test]
fn what_a_resync_brought_is_not_lost_by_its_source_alone() {
    script(2, async |script| {
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write(&volume, 0, 1).await;
        volume.flush().await.expect("all is well");
        script.cluster.kill_node(0);
        write(&volume, 0, 2).await;
        script.cluster.start_node(0).await;
        script.whole().await;
        // Stale again, and nobody has flushed since the write but the resync.
        script.cluster.kill_node(0);
        write(&volume, 9, 9).await;
        script.world.kill(client.process);
        script.cluster.fail_power(1);
        script.cluster.start_node(1).await;
        let volume = script.attach(&script.cluster.client("w1", false)).await;
        let value = read(&volume, 0).await;
        script.cluster.start_node(0).await;
        script.whole().await;
        for _ in 0..8 {
            assert_eq!(read(&volume, 0).await, value, "seed {}: reads alternate", script.world.seed());
        }
        script.cluster.assert_identical(VOLUME, 0, 10).await;
        assert_eq!(value, 2, "seed {}", script.world.seed());
    });
}

/// Interleaving 3: a write that only the replica that went away ever got must not come back with it, however it comes
/// back.
#[test]
fn a_write_that_only_the_stale_replica_got_is_taken_back() {
    script(2, async |script| {
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write_many(&volume, 0, 4, 1).await;
        clear(&volume, 2, 1).await;
        volume.flush().await.expect("all is well");
        client.store.set_available(false);
        script.world.cut(client.process, script.process(1));
        // Three ghosts: above data, above a clear, and a clear above data; and above the first another one.
        for attempt in 0..4 {
            let ghost = async {
                match attempt {
                    0 | 3 => write(&volume, 0, 7 + attempt).await,
                    1 => write(&volume, 2, 7).await,
                    _ => clear(&volume, 1, 1).await,
                }
            };
            let patience = pin!(script.world.sleep(Duration::from_millis(300)));
            assert!(matches!(select(pin!(ghost), patience).await, Either::Right(_)));
        }
        script.world.kill(client.process);
        script.cluster.kill_node(0);
        let client = script.cluster.client("w1", false);
        let volume = script.attach(&client).await;
        let values = [(0, 1), (1, 1), (2, 0), (3, 1)];
        for (block, value) in values {
            assert_eq!(read(&volume, block).await, value);
        }
        script.cluster.start_node(0).await;
        // Each tells F, which would free what the replica has to know for a while longer.
        let beside = async {
            while !script.cluster.status(VOLUME).await.stale.is_empty() {
                write(&volume, 9, 9).await;
            }
        };
        join(script.whole(), beside).await;
        script.cluster.assert_identical(VOLUME, 0, 4).await;
        script.lose_power(&client).await;
        script.cluster.kill_node(1);
        let volume = script.attach(&script.cluster.client("w2", false)).await;
        for (block, value) in values {
            assert_eq!(read(&volume, block).await, value, "seed {}: block {block}", script.world.seed());
        }
    });
}

/// A resync that loses its source between taking a write back and looking for what it hid goes on later, and finds
/// nothing to take back any more. What was hidden, older than anything the resync then asks for, is still there only
/// since the replica heard of no F above it.
#[test]
fn what_a_write_hid_that_is_taken_back_outlives_a_source_that_fails() {
    script(2, async |script| {
        let blocks = || (0..16).map(|at| at * 200);
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        // The second flush tells how far the first got: the replica is stale since then.
        for _ in 0..2 {
            join_all(blocks().map(|block| write(&volume, block, 1))).await;
            volume.flush().await.expect("all is well");
        }
        client.store.set_available(false);
        script.world.cut(client.process, script.process(1));
        let ghosts = join_all(blocks().map(|block| write(&volume, block, 7)));
        let patience = pin!(script.world.sleep(Duration::from_millis(300)));
        assert!(matches!(select(ghosts, patience).await, Either::Right(_)));
        script.world.kill(client.process);
        script.cluster.kill_node(0);
        let client = script.cluster.client("w1", false);
        let volume = script.attach(&client).await;
        script.cluster.start_node(0).await;
        let between = async {
            script.resync_begins(0).await;
            let (target, source) = (script.process(0), script.process(1));
            // The replica has time to hear of F before it can compare anything.
            script.world.cut(target, source);
            script.world.sleep(RESYNC_SOURCE_DEADLINE / 2).await;
            script.world.heal(target, source);
            script.pause(40).await;
            script.world.cut(target, source);
            script.world.sleep(2 * RESYNC_SOURCE_DEADLINE).await;
            script.world.heal(target, source);
        };
        let beside = async {
            while !script.cluster.status(VOLUME).await.stale.is_empty() {
                write(&volume, 1, 2).await;
                script.pause(20).await;
            }
        };
        join(between, beside).await;
        script.whole().await;
        script.leave_only(0);
        for block in blocks() {
            assert_eq!(read(&volume, block).await, 1, "seed {}: block {block} was flushed", script.world.seed());
        }
    });
}

/// Interleaving 6: in sync means durable. The power fails everywhere in the very moment the replica is in sync, and the
/// writer, which could replay what is missing, dies with it.
#[test]
fn a_replica_is_in_sync_only_when_it_has_everything_on_its_disk() {
    script(2, async |script| {
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write_many(&volume, 0, 64, 1).await;
        volume.flush().await.expect("all is well");
        script.cluster.kill_node(0);
        write_many(&volume, 0, 64, 2).await;
        volume.flush().await.expect("one is enough");
        script.cluster.start_node(0).await;
        script.whole().await;
        script.lose_power(&client).await;
        script.cluster.kill_node(1);
        let volume = script.attach(&script.cluster.client("w1", false)).await;
        for block in 0..64 {
            assert_eq!(read(&volume, block).await, 2, "seed {}: block {block} was flushed", script.world.seed());
        }
    });
}

/// Interleaving 7: what is written while it syncs has to be there too.
#[test]
fn what_is_written_during_a_resync_is_on_the_replica_too() {
    script(2, async |script| {
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        script.cluster.kill_node(0);
        write_many(&volume, 1024, 512, 1).await;
        script.cluster.start_node(0).await;
        let mut written = Vec::new();
        while !script.cluster.status(VOLUME).await.stale.is_empty() {
            if written.len() == 511 {
                script.world.sleep(Duration::from_millis(1)).await;
                continue;
            }
            // In front of what is being pulled and behind it, each block once: what is missed is not made up for.
            let number = written.len() as u64;
            let block = 1024 + number * 37 % 512;
            write(&volume, block, 2 + number as u8 % 200).await;
            written.push((block, 2 + number as u8 % 200));
        }
        assert!((4..512).contains(&written.len()), "seed {}: {} beside it", script.world.seed(), written.len());
        script.cluster.kill_node(1);
        for (block, value) in written {
            assert_eq!(read(&volume, block).await, value, "seed {}: block {block}", script.world.seed());
        }
    });
}

/// Interleaving 17: a block is cleared while a replica is away; data and clear are then cleaned away where they can be.
#[test]
fn what_was_cleared_while_a_replica_was_away_does_not_come_back_with_it() {
    for replaced in [false, true] {
        script(2, move |script| async move {
            let client = script.cluster.client("w0", false);
            let volume = script.attach(&client).await;
            write_many(&volume, 0, 64, 1).await;
            volume.flush().await.expect("all is well");
            script.cluster.kill_node(0);
            if replaced {
                script.cluster.replace_disk(0).await;
            }
            clear(&volume, 0, 32).await;
            // Through every segment more than once, with time for what the shards are told to keep.
            for round in 0..12u8 {
                write_many(&volume, 2048, 512, 10 + round).await;
                volume.flush().await.expect("one is enough");
                script.world.sleep(Duration::from_secs(6)).await;
            }
            script.cluster.start_node(0).await;
            script.whole().await;
            script.cluster.assert_identical(VOLUME, 0, 64).await;
            script.lose_power(&client).await;
            script.cluster.kill_node(1);
            let volume = script.attach(&script.cluster.client("w1", false)).await;
            for (block, value) in [(0, 0), (31, 0), (32, 1), (63, 1), (2048, 21), (2559, 21)] {
                assert_eq!(read(&volume, block).await, value, "seed {}: block {block}", script.world.seed());
            }
        });
    }
}

/// Interleaving 14, and back: an empty disk under the old name is filled from nothing.
#[test]
fn a_replica_with_an_empty_disk_is_filled_and_serves() {
    script(2, async |script| {
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write_many(&volume, 0, 100, 1).await;
        write_many(&volume, 3000, 100, 2).await;
        volume.flush().await.expect("all is well");
        script.cluster.kill_node(0);
        script.cluster.replace_disk(0).await;
        write(&volume, 0, 3).await;
        script.cluster.start_node(0).await;
        script.whole().await;
        script.cluster.kill_node(1);
        for (block, value) in [(0, 3), (1, 1), (99, 1), (100, 0), (3000, 2), (3099, 2)] {
            assert_eq!(read(&volume, block).await, value, "seed {}: block {block}", script.world.seed());
        }
    });
}

/// The disk is replaced in the middle of the resync that filled it: the mark has to go down to zero again.
#[test]
fn a_disk_that_is_replaced_during_its_resync_is_filled_from_nothing() {
    script(2, async |script| {
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write_many(&volume, 0, 256, 1).await;
        volume.flush().await.expect("all is well");
        script.cluster.kill_node(0);
        write_many(&volume, 1024, 512, 2).await;
        script.cluster.start_node(0).await;
        script.resync_begins(0).await;
        script.pause(40).await;
        script.cluster.kill_node(0);
        script.cluster.replace_disk(0).await;
        write(&volume, 5, 3).await;
        script.cluster.start_node(0).await;
        script.whole().await;
        script.cluster.kill_node(1);
        for (block, value) in [(0, 1), (5, 3), (255, 1), (1024, 2), (1535, 2)] {
            assert_eq!(read(&volume, block).await, value, "seed {}: block {block}", script.world.seed());
        }
    });
}

/// The metadata store is away when it is to be told that the replica is in sync, and the replica's power fails before
/// it is back: whether it was told or not, nothing that was acknowledged meanwhile may be missing there.
#[test]
fn a_replica_whose_end_of_resync_is_unknown_is_not_done_without() {
    script(2, async |script| {
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        script.cluster.kill_node(0);
        write_many(&volume, 0, 64, 1).await;
        script.cluster.start_node(0).await;
        script.resync_begins(0).await;
        script.pause(60).await;
        client.store.set_available(false);
        script.pause(60).await;
        let world = script.world.clone();
        let trouble = async {
            script.pause(500).await;
            script.cluster.fail_power(0);
            script.pause(500).await;
            client.store.set_available(true);
            script.pause(3000).await;
            script.cluster.start_node(0).await;
        };
        let load = async {
            for value in 2..30 {
                write(&volume, 0, value).await;
                world.sleep(Duration::from_millis(50)).await;
            }
        };
        join(trouble, load).await;
        script.whole().await;
        script.cluster.kill_node(1);
        assert_eq!(read(&volume, 0).await, 29, "seed {}", script.world.seed());
        assert_eq!(read(&volume, 63).await, 1, "seed {}", script.world.seed());
    });
}

/// What goes wrong in the middle of a resync.
#[derive(Clone, Copy, Debug)]
enum Disturbance {
    Nothing,
    TargetRestarts {
        power: bool,
    },
    SourceRestarts {
        power: bool,
    },
    TargetCutFromWriter,
    TargetCutFromSource,
    SourceCutFromWriter,
    WriterDies,
    WriterIsReplaced,
    MetadataAway,
    /// Two are stale at once, and the second is away while the first comes back.
    TwoStale,
}

const DISTURBANCES: [Disturbance; 12] = [
    Disturbance::Nothing,
    Disturbance::TargetRestarts { power: false },
    Disturbance::TargetRestarts { power: true },
    Disturbance::SourceRestarts { power: false },
    Disturbance::SourceRestarts { power: true },
    Disturbance::TargetCutFromWriter,
    Disturbance::TargetCutFromSource,
    Disturbance::SourceCutFromWriter,
    Disturbance::WriterDies,
    Disturbance::WriterIsReplaced,
    Disturbance::MetadataAway,
    Disturbance::TwoStale,
];

/// Node 0 is away for a while, comes back, and is disturbed; writes, clears, flushes and reads of every block go on and
/// are checked. In the end every replica is in sync by itself, all have the same, and node 0 alone serves all of it.
async fn disturbed(run: Rc<Run>, disturbance: Disturbance) {
    let script = Script { world: run.world.clone(), cluster: run.cluster.clone() };
    let mut client = run.cluster.client("w0", false);
    let device = run.attach(&client).await.expect("all nodes run");
    work(&run, &device, 10).await;
    let power = run.world.one_in(2);
    stop(&run, 0, power);
    if let Disturbance::TwoStale = disturbance {
        work(&run, &device, 5).await;
        stop(&run, 1, false);
    }
    work(&run, &device, 20).await;
    // Enough to be in the middle of.
    write_many(&device, 2048, 512, 1).await;
    if run.world.one_in(4) {
        script.world.sleep(Duration::from_secs(1)).await;
        if !run.cluster.is_running(0) && run.world.one_in(2) {
            run.cluster.replace_disk(0).await;
        }
    }
    run.cluster.start_node(0).await;
    // Not before: an answer that is lost makes another replica stale, and then node 0 could not be done without.
    if !run.world.one_in(4) {
        run.world.set_faults(Faults { slow: 30, very_late: 400, answer_lost: 200, carried_out_twice: 20 });
    }
    let load = async {
        let all = pin!(work(&run, &device, 60));
        let patience = pin!(run.world.sleep(Duration::from_secs(120)));
        let _ = select(all, patience).await;
    };
    let process = client.process;
    join(load, disturb(&run, &script, process, disturbance, &client)).await;
    drop(device);
    if matches!(disturbance, Disturbance::WriterDies | Disturbance::WriterIsReplaced) {
        client = run.cluster.client("w1", matches!(disturbance, Disturbance::WriterIsReplaced));
    }
    run.world.set_faults(Faults::NONE);
    run.read_all(&client).await;
    run.become_whole(&client).await;
    script.cluster.assert_identical(VOLUME, 2048, 512).await;
    script.leave_only(0);
    run.read_all(&client).await;
}

fn stop(run: &Run, node: usize, power: bool) {
    match power {
        true => run.cluster.fail_power(node),
        false => run.cluster.kill_node(node),
    }
}

/// On all areas; ends with the session.
async fn work(run: &Run, device: &Volume, operations: u64) {
    let workers = AREAS.map(|first| run.workload.work(device, first, AREA_BLOCKS, operations));
    let _ = join_all(workers).await;
}

async fn disturb(
    run: &Run,
    script: &Script,
    client: torus_rpc::runtime::simulated::ProcessId,
    disturbance: Disturbance,
    of: &Client,
) {
    let begun = pin!(script.resync_begins(0));
    let _ = select(begun, pin!(run.world.sleep(Duration::from_secs(30)))).await;
    script.pause(120).await;
    tracing::info!(?disturbance, now = ?run.world.now().0, "now");
    let (target, source) = (script.process(0), run.world.random_below(2) as usize + 1);
    let restart = async |node: usize, power: bool| {
        stop(run, node, power);
        script.pause(3000).await;
        run.cluster.start_node(node).await;
    };
    let cut = async |a, b| {
        run.world.cut(a, b);
        script.pause(8000).await;
        run.world.heal(a, b);
    };
    match disturbance {
        Disturbance::Nothing => {}
        Disturbance::TargetRestarts { power } => restart(0, power).await,
        Disturbance::SourceRestarts { power } => restart(source, power).await,
        Disturbance::TargetCutFromWriter => cut(client, target).await,
        Disturbance::TargetCutFromSource => cut(script.process(source), target).await,
        Disturbance::SourceCutFromWriter => cut(client, script.process(source)).await,
        Disturbance::WriterDies => run.world.kill(client),
        Disturbance::WriterIsReplaced => {
            let _ = run.attach(&run.cluster.client("thief", true)).await;
        }
        Disturbance::MetadataAway => {
            of.store.set_available(false);
            script.pause(8000).await;
            of.store.set_available(true);
        }
        Disturbance::TwoStale => {
            script.pause(3000).await;
            run.cluster.start_node(1).await;
        }
    }
}

#[test]
fn whatever_happens_during_a_resync_it_ends_well() {
    for seed in seeds(0..60) {
        let disturbance = DISTURBANCES[(seed % DISTURBANCES.len() as u64) as usize];
        simulate(seed, 1, move |run| disturbed(run, disturbance));
    }
}
