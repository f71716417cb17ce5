//! One run: load, something that goes wrong meanwhile, more load by another client, and a last look at everything.

use super::cluster::{Client, Cluster};
use super::workload::Workload;
use futures::future::{Either, join, join_all, select};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::device::{Device, Exports, VolumeError};
use torus_frontends::volume::AttachedVolume;
use torus_rpc::runtime::simulated::{Faults, World};
use torus_schema::limits::BLOCKS_PER_EXTENT;

pub const VOLUME: &str = "volume";
const VOLUME_BYTES: u64 = 64 << 20;
/// First blocks of the areas that are worked on, one worker each: extents of different slices.
pub const AREAS: [u64; 4] = [0, 3 * BLOCKS_PER_EXTENT - 8, 7 * BLOCKS_PER_EXTENT, 11 * BLOCKS_PER_EXTENT + 1000];
pub const AREA_BLOCKS: u64 = 16;
/// A disk that vanished is looked for every minute, and a resync begins within ten seconds of that.
const WHOLE_AGAIN: Duration = Duration::from_secs(150);
/// No operation waits longer for what never comes; the world has healed by then.
const PATIENCE: Duration = Duration::from_secs(120);

/// What goes wrong beside the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    None,
    /// Nodes are killed and started again, one after the other.
    Kills,
    /// The same, and what was not synced is lost or torn.
    PowerFailures,
    /// The client and a node, or the client and the metadata store, cannot reach each other for a while.
    Cuts,
    /// Writes, syncs or reads of a node's disk fail, or the disk vanishes for a while.
    Disks,
    /// Anything of the above.
    Mixed,
}

pub struct Run {
    pub world: World,
    pub cluster: Cluster,
    pub workload: Workload,
    /// Nodes whose power failed. As many as have to be in sync may be all that are (the others were marked stale
    /// before), and take with them what was answered and not flushed.
    powerless: RefCell<BTreeSet<usize>>,
    min_replicas: usize,
}

/// RUST_LOG=debug tells the story of a seed; several tests in one process share the subscriber.
pub(super) fn tell_by_environment() {
    if std::env::var_os("RUST_LOG").is_none() {
        return;
    }
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().without_time().try_init();
}

/// Builds the world of `seed`, runs `scenario` in it and reports what the checker found.
pub fn simulate<F: Future<Output = ()> + 'static>(
    seed: u64,
    min_replicas: u8,
    scenario: impl FnOnce(Rc<Run>) -> F + 'static,
) {
    tell_by_environment();
    let world = World::new(seed);
    let here = world.clone();
    world.block_on(async move {
        let cluster = Cluster::start(&here, 3).await;
        cluster.create_volume(VOLUME, VOLUME_BYTES, 3, min_replicas).await;
        let run = Rc::new(Run {
            workload: Workload::new(&here),
            world: here,
            cluster,
            powerless: RefCell::default(),
            min_replicas: usize::from(min_replicas),
        });
        scenario(run.clone()).await;
        run.workload.verdict();
        assert!(run.workload.history.borrow().reads_checked > 0, "seed {seed}: nothing was read");
    });
    world.close();
}

/// With one worker, which flushes after nearly every write.
pub async fn journal_with(run: Rc<Run>, trouble: Trouble) {
    run.workload.flushes_each.set(true);
    load_with(run, trouble).await;
}

/// The whole story of one seed with one kind of trouble.
pub async fn load_with(run: Rc<Run>, trouble: Trouble) {
    if !run.world.one_in(4) {
        run.world.set_faults(Faults { slow: 30, very_late: 400, answer_lost: 200, carried_out_twice: 20 });
    }
    let mut client = run.cluster.client("host-a", false);
    for session in 0..3 {
        let load = run.load(&client, 40);
        let nemesis = run.nemesis(&client, trouble);
        join(load, nemesis).await;
        if run.workload.failed.borrow().is_some() {
            return;
        }
        client = match run.world.random_below(3) {
            // The process dies; its lease runs out.
            0 => {
                run.world.kill(client.process);
                run.cluster.client(&format!("host-b{session}"), false)
            }
            // It lives on and is fenced.
            1 => run.cluster.client(&format!("host-c{session}"), true),
            _ => client,
        };
    }
    run.heal(&client).await;
    run.world.set_faults(Faults::NONE);
    let last = run.cluster.client("host-z", true);
    run.read_all(&last).await;
    run.become_whole(&last).await;
}

impl Run {
    /// Attaches and works until the operations are done or the session ends.
    pub async fn load(&self, client: &Client, operations: u64) {
        let Ok(device) = self.attach(client).await else { return };
        let areas = if self.workload.flushes_each.get() { &AREAS[..1] } else { &AREAS };
        let workers = areas.iter().map(|first| {
            let work = Box::pin(self.workload.work(&device, *first, AREA_BLOCKS, operations));
            let watch = Box::pin(self.workload.watch(&device, *first, AREA_BLOCKS));
            async move {
                let _ = select(work, watch).await;
            }
        });
        let workers = Box::pin(join_all(workers));
        // Errors end the load: what was not answered may or may not have happened, and the history knows.
        let _ = select(workers, Box::pin(self.world.sleep(PATIENCE))).await;
    }

    /// Tries for as long as a dead owner's lease may last.
    pub async fn attach(&self, client: &Client) -> Result<AttachedVolume<super::cluster::Runtime>, VolumeError> {
        let mut attempts = 0;
        loop {
            let attaching = Box::pin(client.exports.attach(VOLUME));
            let result = match select(attaching, Box::pin(self.world.sleep(PATIENCE))).await {
                Either::Left((result, _)) => result,
                Either::Right(_) => Err(VolumeError::NotReady { because: "no answer".to_string() }),
            };
            attempts += 1;
            if result.is_ok() || attempts > 30 {
                return result;
            }
            self.world.sleep(Duration::from_secs(1)).await;
        }
    }

    async fn nemesis(&self, client: &Client, trouble: Trouble) {
        let events = self.world.random_below(3);
        for _ in 0..events {
            self.world.sleep(Duration::from_millis(self.world.random_below(400))).await;
            let event = match trouble {
                Trouble::None => return,
                Trouble::Kills => 0,
                Trouble::PowerFailures => 1,
                Trouble::Cuts => 2 + self.world.random_below(2),
                Trouble::Disks => 4,
                Trouble::Mixed => self.world.random_below(5),
            };
            let node = self.world.random_below(3) as usize;
            match event {
                0 => self.kill(node, false).await,
                1 => self.kill(node, true).await,
                2 => self.cut(client, node).await,
                3 => self.metadata_outage(client).await,
                _ => self.fail_disk(node).await,
            }
        }
    }

    async fn kill(&self, node: usize, power: bool) {
        tracing::info!(now = ?self.world.now().0, node, power, "killing");
        match power {
            true => {
                self.cluster.fail_power(node);
                self.powerless.borrow_mut().insert(node);
                if self.powerless.borrow().len() >= self.min_replicas {
                    self.workload.history.borrow_mut().power_lost();
                }
            }
            false => self.cluster.kill_node(node),
        }
        self.world.sleep(Duration::from_millis(self.world.random_below(8000))).await;
        tracing::info!(now = ?self.world.now().0, node, "starting");
        self.cluster.start_node(node).await;
    }

    async fn cut(&self, client: &Client, node: usize) {
        let Some(process) = self.cluster.nodes[node].process.get() else { return };
        self.world.cut(client.process, process);
        self.world.sleep(Duration::from_millis(self.world.random_below(12_000))).await;
        self.world.heal(client.process, process);
    }

    /// The node lives on; its shard is opened anew by itself.
    async fn fail_disk(&self, node: usize) {
        let disk = self.cluster.nodes[node].disk.borrow().clone();
        let kind = self.world.random_below(4);
        tracing::info!(now = ?self.world.now().0, node, kind, "the disk fails");
        match kind {
            0 => disk.fail_writes(1 + self.world.random_below(4)),
            1 => disk.fail_syncs(1),
            2 => disk.fail_reads(1 + self.world.random_below(8)),
            _ => {
                disk.vanish();
                self.world.sleep(Duration::from_millis(self.world.random_below(20_000))).await;
                disk.reappear();
            }
        }
        self.world.sleep(Duration::from_millis(self.world.random_below(1000))).await;
        // What did not come up yet shall not come up while another trouble is on.
        disk.fail_writes(0);
        disk.fail_syncs(0);
        disk.fail_reads(0);
    }

    async fn metadata_outage(&self, client: &Client) {
        client.store.set_available(false);
        self.world.sleep(Duration::from_millis(self.world.random_below(25_000))).await;
        client.store.set_available(true);
    }

    async fn heal(&self, client: &Client) {
        client.store.set_available(true);
        for node in 0..self.cluster.nodes.len() {
            if !self.cluster.is_running(node) {
                self.cluster.start_node(node).await;
            }
        }
    }

    /// Nothing is wrong any more: every replica is in sync soon, by itself, and then all have the same.
    pub async fn become_whole(&self, client: &Client) {
        let device = self.attach(client).await.expect("it was attached a moment ago");
        self.cluster.all_in_sync(VOLUME, WHOLE_AGAIN).await;
        device.flush().await.expect("nothing is wrong any more");
        for first in AREAS {
            self.cluster.assert_identical(VOLUME, first, AREA_BLOCKS).await;
        }
        drop(device);
        self.read_all(client).await;
    }

    /// Everything there ever was, several times: each replica gets its turn.
    pub async fn read_all(&self, client: &Client) {
        let device = match self.attach(client).await {
            Ok(device) => device,
            Err(error) => panic!("seed {}: nobody can attach at the end: {error}", self.world.seed()),
        };
        for _ in 0..6 {
            for first in AREAS {
                let read = self.workload.read(&device, first * 4096, AREA_BLOCKS * 4096).await;
                if let Err(error) = read {
                    panic!("seed {}: cannot read at the end: {error}", self.world.seed());
                }
            }
        }
        device.flush().await.expect("nothing is wrong any more");
    }
}
