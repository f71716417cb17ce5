//! One shard on a simulated disk, and a client of it that numbers its writes as the protocol says.

use crate::disk::simulated::SimulatedDisk;
use crate::shard::{Shard, ShardError, ShardIdentity};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::message::{Answer, Descriptor, Envelope, Opened, Operation, Refusal, Reply, Retention};
use torus_rpc::metadata::{self, Entry, Event, LeaseId, Metadata, Range, Revision, Transaction, TransactionResult};
use torus_rpc::runtime::simulated::{Here, ProcessId, SimulatedRuntime, World};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::*;
use torus_schema::limits::BLOCK_BYTES;
use torus_schema::ring::placement::Placement;

pub type TestRuntime = SimulatedRuntime<SimulatedDisk<Here>, NoMetadata>;
pub type TestShard = Shard<TestRuntime>;

pub const GENERATION: RingGeneration = RingGeneration(7);
pub const WIDTH: u32 = 2;
pub const RING_SLICES: u32 = 4;

/// A shard never asks who is who.
#[derive(Clone)]
pub struct NoMetadata;

impl Metadata for NoMetadata {
    type Watch = NoMetadata;
    async fn get(&self, _key: &str) -> metadata::Result<Option<Entry>> {
        unreachable!("a shard has no use for metadata")
    }
    async fn range(&self, _prefix: &str) -> metadata::Result<Range> {
        unreachable!("a shard has no use for metadata")
    }
    async fn transact(&self, _transaction: Transaction) -> metadata::Result<TransactionResult> {
        unreachable!("a shard has no use for metadata")
    }
    async fn watch(&self, _prefix: &str, _from: Revision) -> metadata::Result<NoMetadata> {
        unreachable!("a shard has no use for metadata")
    }
    async fn grant_lease(&self, _ttl: Duration) -> metadata::Result<LeaseId> {
        unreachable!("a shard has no use for metadata")
    }
    async fn keep_alive(&self, _lease: LeaseId) -> metadata::Result<()> {
        unreachable!("a shard has no use for metadata")
    }
    async fn revoke_lease(&self, _lease: LeaseId) -> metadata::Result<()> {
        unreachable!("a shard has no use for metadata")
    }
}

impl metadata::Watch for NoMetadata {
    async fn next(&mut self) -> metadata::Result<Vec<Event>> {
        unreachable!("a shard has no use for metadata")
    }
}

pub fn identity() -> ShardIdentity {
    identity_of(2)
}

/// Of another node of the same cluster.
pub fn identity_of(node: u8) -> ShardIdentity {
    let (cluster, node) = (ClusterId::from_bytes([1; 16]), NodeId::from_bytes([node; 16]));
    ShardIdentity { cluster, node, shard: ShardIndex(0) }
}

pub fn key() -> ClusterKey {
    ClusterKey::from_hex(&"07".repeat(32)).unwrap()
}

pub fn volume(number: u8) -> VolumeId {
    VolumeId::from_bytes([number; 16])
}

pub fn placement(volume: VolumeId) -> Placement {
    Placement::new(volume, WIDTH, RING_SLICES)
}

/// What a write of that version puts into the block.
pub fn content(block: BlockIndex, version: Version) -> Vec<u8> {
    let mut bytes = vec![(version.sequence ^ block.0) as u8; BLOCK_BYTES as usize];
    bytes[..8].copy_from_slice(&block.0.to_le_bytes());
    bytes[8..16].copy_from_slice(&version.sequence.to_le_bytes());
    bytes[2000..2004].copy_from_slice(&version.epoch.0.to_le_bytes());
    bytes
}

/// A disk, and the shard that runs on it now.
#[derive(Clone)]
pub struct Machine {
    pub world: World,
    pub disk: SimulatedDisk<Here>,
    pub process: Rc<Cell<ProcessId>>,
    identity: ShardIdentity,
    shard: Rc<RefCell<Option<Rc<TestShard>>>>,
}

impl Machine {
    /// Formatted and open.
    pub async fn new(world: &World, segments: u64, segment_blocks: u64) -> Self {
        Self::of(world, identity(), segments, segment_blocks).await
    }

    pub async fn of(world: &World, identity: ShardIdentity, segments: u64, segment_blocks: u64) -> Self {
        let process = world.start_process();
        let here = Here { world: world.clone(), process };
        let segment_bytes = segment_blocks * BLOCK_BYTES;
        let disk = SimulatedDisk::new(here, world.seed(), 16 * BLOCK_BYTES + segments * segment_bytes);
        let (process, shard) = (Rc::new(Cell::new(process)), Rc::default());
        let machine = Self { world: world.clone(), disk, process, identity, shard };
        TestShard::format(&machine.runtime(), &machine.disk, identity, segment_bytes).await.unwrap();
        machine.start().await.unwrap();
        machine
    }

    fn runtime(&self) -> TestRuntime {
        SimulatedRuntime::new(&self.world, self.process.get(), NoMetadata)
    }

    pub fn shard(&self) -> Rc<TestShard> {
        self.shard.borrow().clone().unwrap()
    }

    pub fn is_up(&self) -> bool {
        self.shard.borrow().is_some()
    }

    pub async fn start(&self) -> Result<(), ShardError> {
        self.process.set(self.world.start_process());
        let shard = TestShard::open(self.runtime(), self.disk.clone(), self.identity, key()).await?;
        *self.shard.borrow_mut() = Some(shard);
        Ok(())
    }

    /// The power fails.
    pub fn crash(&self) {
        self.stop();
        self.disk.crash(self.world.random_u64());
    }

    /// kill -9.
    pub fn kill(&self) {
        self.stop();
        self.disk.kill();
    }

    fn stop(&self) {
        self.world.kill(self.process.get());
        *self.shard.borrow_mut() = None;
    }

    /// The shard that runs now answers what others ask that node.
    pub fn listen_as(&self, node: u8) {
        let shard = self.shard();
        let address = identity_of(node).node.to_string();
        self.world.listen(self.process.get(), &address, move |envelope, operation, payload| {
            let shard = shard.clone();
            async move {
                if matches!(operation, Operation::Ping | Operation::Hello { .. }) {
                    return (Reply::of(Answer::Pong), Vec::new());
                }
                let (reply, chunks) = shard.handle(envelope, operation, payload).await;
                (reply, chunks.iter().flat_map(|chunk| chunk.to_vec()).collect())
            }
        });
    }

    pub async fn crash_and_start(&self) {
        self.crash();
        self.start().await.unwrap();
    }
}

/// The one writer of a volume.
#[derive(Clone)]
pub struct Client {
    pub machine: Machine,
    pub volume: VolumeId,
    pub envelope: Rc<Cell<Envelope>>,
    pub sequence: Rc<Cell<u64>>,
}

impl Client {
    /// Creates all its instances; does not open.
    pub async fn create(machine: &Machine, number: u8) -> Self {
        Self::try_create(machine, number).await.unwrap()
    }

    pub async fn try_create(machine: &Machine, number: u8) -> Result<Self, Refusal> {
        let volume = volume(number);
        let envelope = Envelope { volume, generation: GENERATION, ..Envelope::NONE };
        let client = Self {
            machine: machine.clone(),
            volume,
            envelope: Rc::new(Cell::new(envelope)),
            sequence: Rc::new(Cell::new(0)),
        };
        assert_eq!(client.call(client.creation()).await?, Answer::Created);
        Ok(client)
    }

    pub fn creation(&self) -> Operation {
        let token = key().sign(self.volume, Epoch(0), "create");
        let slices = placement(self.volume).slices().to_vec();
        Operation::CreateInstances { token, placement: self.volume, width: WIDTH, ring_slices: RING_SLICES, slices }
    }

    pub async fn call(&self, operation: Operation) -> Result<Answer, Refusal> {
        self.call_with(operation, Bytes::new()).await.map(|(answer, _)| answer)
    }

    pub async fn call_with(&self, operation: Operation, payload: Bytes) -> Result<(Answer, Vec<u8>), Refusal> {
        let envelope = self.envelope.get();
        let (reply, chunks) = self.machine.shard().handle(envelope, operation, payload).await;
        match reply.answer {
            Answer::Refused(refusal) => Err(refusal),
            answer => {
                let mut bytes = Vec::new();
                chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
                Ok((answer, bytes))
            }
        }
    }

    /// In the next epoch.
    pub async fn open(&self) -> Result<Opened, Refusal> {
        let envelope = self.envelope.get();
        self.open_in(Epoch(envelope.epoch.0 + 1)).await
    }

    pub async fn open_in(&self, epoch: Epoch) -> Result<Opened, Refusal> {
        let opened = self.open_silently(epoch).await?;
        if opened.missing.is_empty() {
            self.retain(Vec::new(), None).await?;
        }
        Ok(opened)
    }

    /// Does not say what has to be kept.
    pub async fn open_silently(&self, epoch: Epoch) -> Result<Opened, Refusal> {
        let token = key().sign(self.volume, epoch, "writer");
        let slices = placement(self.volume).slices().to_vec();
        self.envelope.set(Envelope { epoch, ..self.envelope.get() });
        let answer = self.call(Operation::Open { token, owner: "writer".to_string(), slices }).await?;
        let Answer::Opened(opened) = answer else { panic!("{answer:?}") };
        let envelope = self.envelope.get();
        self.envelope.set(Envelope { incarnation: opened.incarnation, ..envelope });
        self.sequence.set(0);
        Ok(opened)
    }

    /// As a writer that has these snapshots and no others, and takes none.
    pub async fn retain(&self, pins: Vec<Version>, stale_since: Option<Version>) -> Result<(), Refusal> {
        let horizon = Version::new(self.envelope.get().epoch, torus_schema::limits::SEQUENCE_MAX);
        let answer = self.call(Operation::Retain(Retention { horizon, pins, stale_since, status_changes: 0 })).await?;
        assert_eq!(answer, Answer::Retained);
        Ok(())
    }

    pub fn next_version(&self) -> Version {
        self.sequence.set(self.sequence.get() + 1);
        Version::new(self.envelope.get().epoch, self.sequence.get())
    }

    pub fn last_version(&self) -> Version {
        Version::new(self.envelope.get().epoch, self.sequence.get())
    }

    pub fn write_operation(first: u64, count: u64, version: Version, durable: bool) -> (Operation, Bytes) {
        let blocks: Vec<Vec<u8>> = (first..first + count).map(|block| content(BlockIndex(block), version)).collect();
        let checksums = blocks.iter().map(|block| crc32c::crc32c(block)).collect();
        let first = BlockIndex(first);
        (Operation::Write { first, version, durable, checksums }, blocks.concat().into())
    }

    pub async fn write(&self, first: u64, count: u64) -> Result<Version, Refusal> {
        let version = self.next_version();
        let (operation, payload) = Self::write_operation(first, count, version, false);
        self.call_with(operation, payload).await.map(|_| version)
    }

    /// The blocks of first..end in each slice of the volume.
    pub async fn clear(&self, first: u64, end: u64) -> Result<Version, Refusal> {
        let version = self.next_version();
        for slice in placement(self.volume).slices() {
            let (first, count) = (BlockIndex(first), end - first);
            self.call(Operation::Clear { first, count, slice: *slice, version, durable: false }).await?;
        }
        Ok(version)
    }

    /// F moves to all that was written before.
    pub async fn flush(&self) -> Result<(), Refusal> {
        let flush_point = self.last_version();
        self.call(Operation::Flush).await?;
        let envelope = self.envelope.get();
        self.envelope.set(Envelope { flush_point: flush_point.max(envelope.flush_point), ..envelope });
        Ok(())
    }

    /// Version of each block; checks that the content is what that version wrote, or zeros.
    pub async fn read(&self, first: u64, count: u32) -> Result<Vec<(Version, bool)>, Refusal> {
        let operation = Operation::Read { first: BlockIndex(first), count };
        let (answer, bytes) = self.call_with(operation, Bytes::new()).await?;
        let Answer::Read { runs, checksums } = answer else { panic!("{answer:?}") };
        let found: Vec<_> = runs.iter().flat_map(|run| vec![(run.version, run.data); run.count as usize]).collect();
        assert_eq!(found.len(), count as usize);
        let mut blocks = bytes.chunks(BLOCK_BYTES as usize).zip(&checksums);
        for (block, (version, data)) in (first..).zip(&found) {
            if *data {
                let (bytes, checksum) = blocks.next().unwrap();
                assert!(bytes == content(BlockIndex(block), *version), "block {block} of version {version}");
                assert_eq!(crc32c::crc32c(bytes), *checksum);
            }
        }
        assert!(blocks.next().is_none());
        Ok(found)
    }

    pub async fn describe(&self, above: Version) -> Result<Vec<Descriptor>, Refusal> {
        let (mut all, mut from) = (Vec::new(), Some(BlockIndex(0)));
        while let Some(at) = from {
            let answer = self.call(Operation::Describe { above, from: at, slice: None }).await?;
            let Answer::Described { descriptors, next } = answer else { panic!("{answer:?}") };
            all.extend(descriptors);
            from = next;
        }
        Ok(all)
    }
}

/// Runs a test in a world of that seed.
pub fn simulate<F: Future<Output = ()> + 'static>(seed: u64, test: impl FnOnce(World) -> F) {
    let world = World::new(seed);
    let task = test(world.clone());
    world.block_on(task);
}
