//! A shard whose disk fails under it comes back by itself, as another incarnation, with all that was durable.

use super::harness::*;
use crate::disk::simulated::SimulatedDisk;
use crate::shard::supervisor::{Media, Supervisor};
use bytes::Bytes;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::message::{Answer, Envelope, Operation, Refusal};
use torus_rpc::runtime::simulated::{Here, SimulatedRuntime, World};
use torus_schema::ids::*;
use torus_schema::limits::DISK_REOPEN_PAUSE_MAX;

type Disk = SimulatedDisk<Here>;
type Supervised = Supervisor<TestRuntime, Plugged>;

struct Plugged(Disk);

impl Media<TestRuntime> for Plugged {
    async fn open(&self) -> Result<Disk, String> {
        Ok(self.0.clone())
    }
}

struct Setup {
    world: World,
    disk: Disk,
    supervisor: Rc<Supervised>,
    envelope: Envelope,
}

impl Setup {
    /// A volume with one block, flushed, left open.
    async fn new(world: &World) -> Self {
        let machine = Machine::new(world, 8, 64).await;
        let client = Client::create(&machine, 1).await;
        client.open().await.unwrap();
        client.write(3, 1).await.unwrap();
        client.flush().await.unwrap();
        machine.kill();
        let runtime = SimulatedRuntime::new(world, world.start_process(), NoMetadata);
        let media = Plugged(machine.disk.clone());
        let supervisor = Supervised::start(runtime, media, identity(), key()).await.unwrap();
        let mut setup =
            Self { world: world.clone(), disk: machine.disk.clone(), supervisor, envelope: client.envelope.get() };
        setup.open().await.unwrap();
        setup
    }

    async fn call(&self, operation: Operation, payload: Bytes) -> Result<Answer, Refusal> {
        let (reply, _) = self.supervisor.handle(self.envelope, operation, payload).await;
        match reply.answer {
            Answer::Refused(refusal) => Err(refusal),
            answer => Ok(answer),
        }
    }

    async fn open(&mut self) -> Result<Incarnation, Refusal> {
        self.envelope.epoch.0 += 1;
        let (volume, epoch) = (self.envelope.volume, self.envelope.epoch);
        let token = key().sign(volume, epoch, "writer");
        let slices = placement(volume).slices().to_vec();
        let answer = self.call(Operation::Open { token, owner: "writer".to_string(), slices }, Bytes::new()).await?;
        let Answer::Opened(opened) = answer else { panic!("{answer:?}") };
        self.envelope.incarnation = opened.incarnation;
        Ok(opened.incarnation)
    }

    async fn write(&self, block: u64, sequence: u64) -> Result<Answer, Refusal> {
        let version = Version::new(self.envelope.epoch, sequence);
        let (operation, payload) = Client::write_operation(block, 1, version, true);
        self.call(operation, payload).await
    }

    async fn read(&self, block: u64) -> Result<Answer, Refusal> {
        self.call(Operation::Read { first: BlockIndex(block), count: 1 }, Bytes::new()).await
    }

    /// Until the shard is open, and not the one that failed.
    async fn recovered(&self) {
        while self.supervisor.health().failed.is_some() {
            self.world.sleep(Duration::from_millis(20)).await;
        }
    }
}

#[test]
fn after_a_failed_write_or_sync_the_shard_comes_back_as_another_incarnation_with_all_that_was_durable() {
    for seed in 0..20 {
        simulate(seed, move |world| async move {
            let mut setup = Setup::new(&world).await;
            for round in 1..4 {
                let before = setup.envelope.incarnation;
                setup.write(round, 1).await.unwrap();
                match seed % 2 {
                    0 => setup.disk.fail_writes(1),
                    _ => setup.disk.fail_syncs(1),
                }
                assert!(matches!(setup.write(9, 2).await, Err(Refusal::Disk { .. })), "seed {seed}");
                assert!(
                    matches!(setup.read(3).await, Err(Refusal::Disk { .. })),
                    "seed {seed}: nothing until reopened"
                );
                setup.recovered().await;
                assert_eq!(setup.read(3).await, Err(Refusal::OtherIncarnation), "seed {seed}");
                assert_ne!(setup.open().await.unwrap(), before);
                for block in [1, 3] {
                    assert!(setup.read(block).await.is_ok(), "seed {seed}: block {block}");
                }
            }
            let health = setup.supervisor.health();
            assert_eq!((health.failures, health.failed), (3, None));
            setup.supervisor.close().await;
        });
    }
}

#[test]
fn a_disk_that_vanishes_is_looked_for_ever_less_often_and_used_when_it_is_back() {
    simulate(1, |world| async move {
        let mut setup = Setup::new(&world).await;
        setup.disk.vanish();
        assert!(setup.write(9, 2).await.is_err());
        world.sleep(DISK_REOPEN_PAUSE_MAX * 20).await;
        let health = setup.supervisor.health();
        assert!(health.failed.unwrap().contains("disk"), "it says why");
        assert_eq!(health.failures, 1);
        assert!(health.statistics.failed && health.statistics.live_bytes > 0, "the last known numbers");
        assert!(matches!(setup.read(3).await, Err(Refusal::Disk { .. })));
        assert!(setup.supervisor.drop_volume(setup.envelope.volume).await.is_err(), "its disk does not know");
        let tries = setup.disk.counts().reads;
        world.sleep(DISK_REOPEN_PAUSE_MAX * 10).await;
        // Each try reads both copies of the superblock, and each once more.
        assert!(setup.disk.counts().reads - tries <= 60);
        setup.disk.reappear();
        world.sleep(DISK_REOPEN_PAUSE_MAX * 2).await;
        setup.open().await.unwrap();
        assert!(setup.read(3).await.is_ok());
    });
}

#[test]
fn a_node_stops_while_its_disk_is_away() {
    simulate(1, |world| async move {
        let setup = Setup::new(&world).await;
        setup.disk.vanish();
        assert!(setup.write(9, 2).await.is_err());
        world.sleep(Duration::from_secs(10)).await;
        setup.supervisor.close().await;
    });
}
