//! Nodes, clients and the metadata store of one simulated cluster.

use super::metadata::DistantStore;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use torus_engine::disk::simulated::SimulatedDisk;
use torus_engine::shard::supervisor::{Media, Supervisor};
use torus_engine::shard::{PeerTable, Shard, ShardIdentity};
use torus_frontends::volume::{Attacher, RepairOwner, ReplayLimits, VolumeExports, VolumeSettings};
use torus_rpc::message::{Answer, Envelope, Operation, Reply};
use torus_rpc::metadata::memory::MemoryStore;
use torus_rpc::metadata::{Metadata, Transaction, Write};
use torus_rpc::runtime::simulated::{Here, ProcessId, SimulatedRuntime, World};
use torus_rpc::runtime::{Connect, Link, Peer};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{ClusterId, Epoch, NodeId, RingGeneration, ShardId, ShardIndex, SliceId, VolumeId};
use torus_schema::limits::{HEARTBEAT_INTERVAL, HEARTBEAT_LEASE_TTL};
use torus_schema::records::{
    ClusterRecord, FORMAT_VERSION, HeartbeatRecord, NameRecord, NodeRecord, ShardRecord, VolumeRecord, VolumeState,
    encode, keys,
};
use torus_schema::ring::placement::Placement;
use torus_schema::ring::planner;
use torus_schema::ring::record::{RingRecord, RingShard};
use torus_schema::ring::table::Ring;

pub type Disk = SimulatedDisk<Here>;
pub type Runtime = SimulatedRuntime<Disk, DistantStore>;
pub type SimulatedShard = Rc<Supervisor<Runtime, Plugged>>;

/// The node's disk: the same one each time it is opened.
pub struct Plugged(Disk);

impl Media<Runtime> for Plugged {
    async fn open(&self) -> Result<Disk, String> {
        Ok(self.0.clone())
    }
}

/// Small, so that segments fill, are cleaned and used again within a run.
pub const SEGMENT_BYTES: u64 = 256 * 1024;
pub const SHARD_BYTES: u64 = 64 * SEGMENT_BYTES;
pub(super) const SLICES: u32 = 16;
pub(in crate::simulation) const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// Derefs to its first shard: in most scripts a node has one.
pub struct Node {
    pub id: NodeId,
    pub host: String,
    pub process: Cell<Option<ProcessId>>,
    /// Its way to the metadata store, as long as it runs.
    pub store: RefCell<Option<MemoryStore<Here>>>,
    pub shards: Vec<ShardPlace>,
}

/// Where a shard of a node is.
pub struct ShardPlace {
    pub index: ShardIndex,
    pub address: String,
    pub disk: RefCell<Disk>,
    pub shard: RefCell<Option<SimulatedShard>>,
}

impl std::ops::Deref for Node {
    type Target = ShardPlace;
    fn deref(&self) -> &ShardPlace {
        &self.shards[0]
    }
}

/// How a cluster is built.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Nodes of the ring.
    pub members: usize,
    /// Nodes that run and are not in the ring.
    pub spares: usize,
    /// Of each node.
    pub shards: usize,
    /// Of each shard.
    pub shard_bytes: u64,
    /// Clocks of processes are wrong by up to so many millionths.
    pub drift_millionths: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { members: 3, spares: 0, shards: 1, shard_bytes: SHARD_BYTES, drift_millionths: 0 }
    }
}

#[derive(Clone)]
pub struct Cluster {
    inner: Rc<Inner>,
}

pub struct Inner {
    pub world: World,
    pub id: ClusterId,
    pub nodes: Vec<Node>,
    pub store: MemoryStore<Here>,
    pub shape: Shape,
    /// How much longer the way to the metadata store takes now.
    pub store_slower_by: Rc<Cell<Duration>>,
}

impl std::ops::Deref for Cluster {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.inner
    }
}

/// A client host's process.
pub struct Client {
    pub process: ProcessId,
    pub exports: VolumeExports<Runtime>,
    pub store: MemoryStore<Here>,
    pub runtime: Runtime,
}

fn seeded_uuid(world: &World) -> [u8; 16] {
    (u128::from(world.random_u64()) << 64 | u128::from(world.random_u64())).to_be_bytes()
}

impl Cluster {
    /// Nodes started, in the ring, no volume yet.
    pub async fn start(world: &World, nodes: usize) -> Self {
        Self::start_with_spares(world, nodes, 0).await
    }

    /// The last `spares` of them started and not in the ring.
    pub async fn start_with_spares(world: &World, members: usize, spares: usize) -> Self {
        Self::start_shaped(world, Shape { members, spares, ..Shape::default() }).await
    }

    pub async fn start_shaped(world: &World, shape: Shape) -> Self {
        let operator = Here { world: world.clone(), process: world.start_process() };
        world.name(operator.process, "the operator");
        let place = |host: &str, index: usize| ShardPlace {
            index: ShardIndex(index as u16),
            address: if index == 0 { host.to_string() } else { format!("{host}-{index}") },
            disk: RefCell::new(SimulatedDisk::new(operator.clone(), world.random_u64(), shape.shard_bytes)),
            shard: RefCell::default(),
        };
        let node = |number: usize| {
            let host = format!("node-{number}");
            let shards = (0..shape.shards).map(|index| place(&host, index)).collect();
            let id = NodeId::from_bytes(seeded_uuid(world));
            Node { id, host, process: Cell::default(), store: RefCell::default(), shards }
        };
        let inner = Inner {
            id: ClusterId::from_bytes(seeded_uuid(world)),
            nodes: (0..shape.members + shape.spares).map(node).collect(),
            store: MemoryStore::new(operator.clone()),
            world: world.clone(),
            shape,
            store_slower_by: Rc::default(),
        };
        let cluster = Self { inner: Rc::new(inner) };
        cluster.write_records(shape.members).await;
        for number in 0..cluster.nodes.len() {
            cluster.format(number).await;
            cluster.start_node(number).await;
        }
        cluster
    }

    async fn format(&self, number: usize) {
        let runtime = self.runtime(self.world.start_process());
        for place in &self.nodes[number].shards {
            let disk = place.disk.borrow().clone();
            Shard::format(&runtime, &disk, self.identity(number, place), SEGMENT_BYTES).await.expect("an empty disk");
        }
    }

    /// A stopped node gets empty disks under its old identity.
    pub async fn replace_disk(&self, number: usize) {
        let clock = Here { world: self.world.clone(), process: self.world.start_process() };
        for place in &self.nodes[number].shards {
            let bytes = self.shape.shard_bytes;
            *place.disk.borrow_mut() = SimulatedDisk::new(clock.clone(), self.world.random_u64(), bytes);
        }
        self.format(number).await;
    }

    fn identity(&self, node: usize, place: &ShardPlace) -> ShardIdentity {
        ShardIdentity { cluster: self.id, node: self.nodes[node].id, shard: place.index }
    }

    /// A process of its own, with a clock as good as the shape says.
    fn start_process(&self, name: &str) -> ProcessId {
        let process = self.world.start_process();
        self.world.name(process, name);
        let most = self.shape.drift_millionths;
        if most > 0 {
            self.world.set_drift(process, self.world.random_below(2 * most + 1) as i64 - most as i64);
        }
        process
    }

    /// The store keeps its own time, whoever asks it.
    fn store_of(&self, process: ProcessId) -> DistantStore {
        let here = Here { world: self.world.clone(), process };
        let store = self.store.another_client_here();
        DistantStore { store, here, slower_by: self.store_slower_by.clone() }
    }

    pub fn runtime(&self, process: ProcessId) -> Runtime {
        SimulatedRuntime::new(&self.world, process, self.store_of(process))
    }

    /// Of a node that runs: with its way to the metadata store, and what is wrong with that.
    pub fn runtime_of(&self, number: usize) -> Runtime {
        let node = &self.nodes[number];
        let process = node.process.get().expect("it runs");
        let mut metadata = self.store_of(process);
        metadata.store = node.store.borrow().clone().expect("it runs");
        SimulatedRuntime::new(&self.world, process, metadata)
    }

    async fn write_records(&self, members: usize) {
        let record = ClusterRecord {
            id: self.id,
            format_version: FORMAT_VERSION,
            slices: SLICES,
            replicas: 3,
            key: KEY.to_string(),
            created_s: 0,
        };
        let mut writes = vec![put(keys::cluster(), encode(&record))];
        for node in &self.nodes {
            let record = self.node_record(node);
            writes.push(put(keys::node(record.id), encode(&record)));
        }
        let planned: Vec<_> = self.nodes[..members].iter().map(plan_node).collect();
        let ring = planner::plan(&Ring::empty(SLICES), &planned);
        writes.push(put(keys::ring(), encode::<RingRecord>(&ring)));
        let result = self.store.transact(Transaction { writes, ..Transaction::default() }).await;
        assert!(result.expect("the store is available").applied);
    }

    fn node_record(&self, node: &Node) -> NodeRecord {
        let size_bytes = self.shape.shard_bytes;
        let shard = |place: &ShardPlace| ShardRecord { index: place.index, address: place.address.clone(), size_bytes };
        NodeRecord {
            id: node.id,
            cluster: self.id,
            host: node.host.clone(),
            zone: String::new(),
            rack: String::new(),
            control: String::new(),
            shards: node.shards.iter().map(shard).collect(),
            program: "simulation".to_string(),
        }
    }

    pub async fn start_node(&self, number: usize) {
        let node = &self.nodes[number];
        assert!(node.process.get().is_none(), "node {number} runs already");
        let process = self.start_process(&node.host);
        let metadata = self.store_of(process);
        *node.store.borrow_mut() = Some(metadata.store.clone());
        let runtime: Runtime = SimulatedRuntime::new(&self.world, process, metadata);
        node.process.set(Some(process));
        for place in &node.shards {
            self.start_shard(number, place, runtime.clone(), process).await;
        }
    }

    async fn start_shard(&self, number: usize, place: &ShardPlace, runtime: Runtime, process: ProcessId) {
        let key = ClusterKey::from_hex(KEY).expect("32 bytes");
        let disk = place.disk.borrow().clone();
        let opened = Supervisor::start(runtime, Plugged(disk), self.identity(number, place), key).await;
        let shard = opened.expect("a shard opens after any crash");
        shard.set_peers(self.peers().await);
        let serving = shard.clone();
        self.world.listen(process, &place.address, move |envelope, operation, payload| {
            let shard = serving.clone();
            async move {
                if matches!(operation, Operation::Ping | Operation::Hello { .. }) {
                    return (Reply::of(Answer::Pong), Vec::new());
                }
                let (reply, chunks) = shard.handle(envelope, operation, payload).await;
                (reply, joined(&chunks))
            }
        });
        *place.shard.borrow_mut() = Some(shard);
    }

    /// The node's heartbeat, until it stops; its lease then ends by itself.
    pub async fn beat(&self, number: usize) {
        let node = &self.nodes[number];
        let process = node.process.get().expect("it runs");
        let store = self.store_of(process).store;
        let lease = store.grant_lease(HEARTBEAT_LEASE_TTL).await.expect("available");
        let beat = HeartbeatRecord { node: node.id, updated_s: 0, started_s: 0, shards: vec![] };
        let write = Write::Put { key: keys::heartbeat(node.id), value: encode(&beat), lease: Some(lease) };
        store.transact(Transaction { writes: vec![write], ..Transaction::default() }).await.expect("available");
        let world = self.world.clone();
        self.world.spawn(process, async move {
            loop {
                world.sleep(HEARTBEAT_INTERVAL).await;
                let _ = store.keep_alive(lease).await;
            }
        });
    }

    /// It also repairs what nobody has attached, until it stops.
    pub fn repair_on(&self, number: usize) -> RepairOwner<Runtime> {
        let node = &self.nodes[number];
        let process = node.process.get().expect("it runs");
        let owner = RepairOwner::new(self.runtime(process), node.id, node.host.clone());
        let running = owner.clone();
        self.world.spawn(process, async move { running.run().await });
        owner
    }

    /// As a node reads it from the metadata store.
    async fn peers(&self) -> Arc<PeerTable> {
        let records = self.nodes.iter().map(|node| (node.id, self.node_record(node))).collect();
        Arc::new(PeerTable::from_ring(self.id, &self.ring().await, &records))
    }

    pub async fn ring(&self) -> Ring {
        let ring = self.store.get(&keys::ring()).await.expect("available").expect("written at start");
        let ring: RingRecord = torus_schema::records::decode("ring", &ring.value).expect("ours");
        Ring::from_record(ring).expect("ours")
    }

    /// kill -9: the machine and what it was told to write live on.
    pub fn kill_node(&self, number: usize) {
        self.stop_process(number);
        self.nodes[number].shards.iter().for_each(|place| place.disk.borrow().kill());
    }

    /// The power fails: what was not synced is lost, kept or torn.
    pub fn fail_power(&self, number: usize) {
        self.stop_process(number);
        self.nodes[number].shards.iter().for_each(|place| place.disk.borrow().crash(self.world.random_u64()));
    }

    fn stop_process(&self, number: usize) {
        let node = &self.nodes[number];
        if let Some(process) = node.process.take() {
            self.world.kill(process);
        }
        node.store.borrow_mut().take();
        node.shards.iter().for_each(|place| drop(place.shard.borrow_mut().take()));
    }

    pub fn is_running(&self, number: usize) -> bool {
        self.nodes[number].process.get().is_some()
    }

    pub fn client(&self, name: &str, force: bool) -> Client {
        // Half of the seeds make volumes flush by themselves and writes wait for room.
        let (volume_bytes, process_bytes) = (64 * 1024, 96 * 1024);
        let replay = match self.world.seed() % 2 {
            0 => ReplayLimits::default(),
            _ => ReplayLimits { volume_bytes, process_bytes },
        };
        self.client_with(name, force, VolumeSettings { replay, ..VolumeSettings::default() })
    }

    pub fn client_with(&self, name: &str, force: bool, settings: VolumeSettings) -> Client {
        let process = self.start_process(name);
        let distant = self.store_of(process);
        let store = distant.store.clone();
        let runtime = SimulatedRuntime::new(&self.world, process, distant);
        let attacher =
            Attacher { host: name.to_string(), process: "simulation".to_string(), pid: 1, force, repair: false };
        let exports = VolumeExports::with_settings(runtime.clone(), attacher, settings);
        Client { process, exports, store, runtime }
    }

    pub fn place(&self, node: NodeId, shard: ShardIndex) -> &ShardPlace {
        let node = self.nodes.iter().find(|other| other.id == node).expect("of the cluster");
        node.shards.iter().find(|place| place.index == shard).expect("of the node")
    }

    /// A volume with its instances on every replica.
    pub async fn create_volume(&self, name: &str, size_bytes: u64, replicas: u8, min_replicas: u8) -> VolumeId {
        let id = VolumeId::from_bytes(seeded_uuid(&self.world));
        let ring = self.ring().await;
        let record = VolumeRecord {
            id,
            name: name.to_string(),
            size_bytes,
            replicas,
            min_replicas,
            width: SLICES / 4,
            placement: id,
            generation: ring.generation(),
            state: VolumeState::Ready,
            write_through: false,
            created_s: 0,
        };
        self.create_instances(&record, &ring).await;
        let writes =
            vec![put(keys::volume(id), encode(&record)), put(keys::name(name), encode(&NameRecord { volume: id }))];
        self.store.transact(Transaction { writes, ..Transaction::default() }).await.expect("available");
        id
    }

    async fn create_instances(&self, record: &VolumeRecord, ring: &Ring) {
        let client = self.client("operator", false);
        let placement = Placement::new(record.placement, record.width, SLICES);
        let key = ClusterKey::from_hex(KEY).expect("32 bytes");
        let shards = ring.nodes().iter().flat_map(|node| node.shards.iter().map(move |shard| (node, shard.index)));
        for (node, index) in shards {
            let id = ShardId { node: node.number, shard: index };
            let placed = placement.slices().iter().copied();
            let slices: Vec<SliceId> =
                placed.filter(|slice| ring.replicas(*slice, record.replicas).contains(&id)).collect();
            if slices.is_empty() {
                continue;
            }
            let address = self.place(node.id, index).address.clone();
            let peer = Peer { cluster: self.id, node: node.id, shard: index, address };
            use torus_rpc::runtime::Runtime as _;
            let link = client.runtime.connect().connect(&peer).await.expect("it runs");
            let operation = Operation::CreateInstances {
                token: key.sign(record.id, Epoch(0), "create"),
                placement: record.placement,
                width: record.width,
                ring_slices: SLICES,
                slices,
            };
            let envelope =
                Envelope { volume: record.id, generation: RingGeneration(record.generation.0), ..Envelope::NONE };
            let answer = link.call(&envelope, &operation, &Default::default()).await.expect("it runs").0.answer;
            assert_eq!(answer, Answer::Created);
        }
    }
}

/// As one buffer, which is what a message carries.
pub(in crate::simulation) fn joined(chunks: &[impl std::ops::Deref<Target = [u8]>]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(chunks.iter().map(|chunk| chunk.len()).sum());
    chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
    bytes
}

fn plan_node(node: &Node) -> planner::PlanNode {
    planner::PlanNode {
        id: node.id,
        host: node.host.clone(),
        zone: String::new(),
        rack: String::new(),
        shards: node.shards.iter().map(|place| RingShard { index: place.index, weight_bytes: SHARD_BYTES }).collect(),
    }
}

fn put(key: String, value: Vec<u8>) -> Write {
    Write::Put { key, value, lease: None }
}
