//! Nodes, clients and the metadata store of one simulated cluster.

use super::metadata::DistantStore;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use torus_engine::disk::simulated::SimulatedDisk;
use torus_engine::shard::supervisor::{Media, Supervisor};
use torus_engine::shard::{PeerTable, Shard, ShardIdentity};
use torus_frontends::volume::{Attacher, ReplayLimits, VolumeExports, VolumeSettings};
use torus_rpc::message::{Answer, Envelope, Operation, Reply};
use torus_rpc::metadata::memory::MemoryStore;
use torus_rpc::metadata::{Metadata, Transaction, Write};
use torus_rpc::runtime::simulated::{Here, ProcessId, SimulatedRuntime, World};
use torus_rpc::runtime::{Connect, Link, Peer};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{ClusterId, Epoch, NodeId, NodeNumber, RingGeneration, ShardIndex, SliceId, VolumeId};
use torus_schema::records::{
    ClusterRecord, FORMAT_VERSION, NameRecord, NodeRecord, ShardRecord, VolumeRecord, VolumeState, encode, keys,
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
const SLICES: u32 = 16;
const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

pub struct Node {
    pub id: NodeId,
    pub address: String,
    pub disk: RefCell<Disk>,
    pub process: Cell<Option<ProcessId>>,
    pub shard: RefCell<Option<SimulatedShard>>,
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
        let operator = Here { world: world.clone(), process: world.start_process() };
        let node = |number: usize| Node {
            id: NodeId::from_bytes(seeded_uuid(world)),
            address: format!("node-{number}"),
            disk: RefCell::new(SimulatedDisk::new(operator.clone(), world.random_u64(), SHARD_BYTES)),
            process: Cell::default(),
            shard: RefCell::default(),
        };
        let inner = Inner {
            id: ClusterId::from_bytes(seeded_uuid(world)),
            nodes: (0..nodes).map(node).collect(),
            store: MemoryStore::new(operator),
            world: world.clone(),
        };
        let cluster = Self { inner: Rc::new(inner) };
        cluster.write_records().await;
        for number in 0..nodes {
            cluster.format(number).await;
            cluster.start_node(number).await;
        }
        cluster
    }

    async fn format(&self, number: usize) {
        let runtime = self.runtime(self.world.start_process());
        let disk = self.nodes[number].disk.borrow().clone();
        Shard::format(&runtime, &disk, self.identity(number), SEGMENT_BYTES).await.expect("an empty disk");
    }

    /// A stopped node gets an empty disk under its old identity.
    pub async fn replace_disk(&self, number: usize) {
        let clock = Here { world: self.world.clone(), process: self.world.start_process() };
        *self.nodes[number].disk.borrow_mut() = SimulatedDisk::new(clock, self.world.random_u64(), SHARD_BYTES);
        self.format(number).await;
    }

    fn identity(&self, node: usize) -> ShardIdentity {
        ShardIdentity { cluster: self.id, node: self.nodes[node].id, shard: ShardIndex(0) }
    }

    fn runtime(&self, process: ProcessId) -> Runtime {
        let here = Here { world: self.world.clone(), process };
        let store = self.store.another_client(here.clone());
        SimulatedRuntime::new(&self.world, process, DistantStore { store, here })
    }

    async fn write_records(&self) {
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
        let planned: Vec<_> = self.nodes.iter().map(plan_node).collect();
        let ring = planner::plan(&Ring::empty(SLICES), &planned);
        writes.push(put(keys::ring(), encode::<RingRecord>(&ring)));
        let result = self.store.transact(Transaction { writes, ..Transaction::default() }).await;
        assert!(result.expect("the store is available").applied);
    }

    fn node_record(&self, node: &Node) -> NodeRecord {
        let size_bytes = SHARD_BYTES;
        NodeRecord {
            id: node.id,
            cluster: self.id,
            host: node.address.clone(),
            zone: String::new(),
            rack: String::new(),
            control: String::new(),
            shards: vec![ShardRecord { index: ShardIndex(0), address: node.address.clone(), size_bytes }],
            program: "simulation".to_string(),
        }
    }

    pub async fn start_node(&self, number: usize) {
        let node = &self.nodes[number];
        assert!(node.process.get().is_none(), "node {number} runs already");
        let process = self.world.start_process();
        let key = ClusterKey::from_hex(KEY).expect("32 bytes");
        let runtime = self.runtime(process);
        let disk = node.disk.borrow().clone();
        let opened = Supervisor::start(runtime, Plugged(disk), self.identity(number), key).await;
        let shard = opened.expect("a shard opens after any crash");
        shard.set_peers(self.peers().await);
        let serving = shard.clone();
        self.world.listen(process, &node.address, move |envelope, operation, payload| {
            let shard = serving.clone();
            async move {
                if matches!(operation, Operation::Ping | Operation::Hello { .. }) {
                    return (Reply { full: false, answer: Answer::Pong }, Vec::new());
                }
                let (reply, chunks) = shard.handle(envelope, operation, payload).await;
                (reply, chunks.iter().flat_map(|chunk| chunk.to_vec()).collect())
            }
        });
        node.process.set(Some(process));
        *node.shard.borrow_mut() = Some(shard);
    }

    /// As a node reads it from the metadata store.
    async fn peers(&self) -> Arc<PeerTable> {
        let records = self.nodes.iter().map(|node| (node.id, self.node_record(node))).collect();
        Arc::new(PeerTable::from_ring(self.id, &self.ring().await, &records))
    }

    async fn ring(&self) -> Ring {
        let ring = self.store.get(&keys::ring()).await.expect("available").expect("written at start");
        let ring: RingRecord = torus_schema::records::decode("ring", &ring.value).expect("ours");
        Ring::from_record(ring).expect("ours")
    }

    /// kill -9: the machine and what it was told to write live on.
    pub fn kill_node(&self, number: usize) {
        self.stop_process(number);
        self.nodes[number].disk.borrow().kill();
    }

    /// The power fails: what was not synced is lost, kept or torn.
    pub fn fail_power(&self, number: usize) {
        self.stop_process(number);
        self.nodes[number].disk.borrow().crash(self.world.random_u64());
    }

    fn stop_process(&self, number: usize) {
        let node = &self.nodes[number];
        if let Some(process) = node.process.take() {
            self.world.kill(process);
        }
        node.shard.borrow_mut().take();
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
        let process = self.world.start_process();
        let here = Here { world: self.world.clone(), process };
        let store = self.store.another_client(here.clone());
        let distant = DistantStore { store: store.clone(), here };
        let runtime = SimulatedRuntime::new(&self.world, process, distant);
        let attacher =
            Attacher { host: name.to_string(), process: "simulation".to_string(), pid: 1, force, repair: false };
        let exports = VolumeExports::with_settings(runtime.clone(), attacher, settings);
        Client { process, exports, store, runtime }
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
        for node in ring.nodes() {
            let slices: Vec<SliceId> = placement
                .slices()
                .iter()
                .copied()
                .filter(|slice| holds(ring, *slice, record.replicas, node.number))
                .collect();
            let peer = Peer {
                cluster: self.id,
                node: node.id,
                shard: ShardIndex(0),
                address: self.nodes.iter().find(|other| other.id == node.id).expect("of the ring").address.clone(),
            };
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

fn plan_node(node: &Node) -> planner::PlanNode {
    planner::PlanNode {
        id: node.id,
        host: node.address.clone(),
        zone: String::new(),
        rack: String::new(),
        shards: vec![RingShard { index: ShardIndex(0), weight_bytes: SHARD_BYTES }],
    }
}

fn holds(ring: &Ring, slice: SliceId, replicas: u8, node: NodeNumber) -> bool {
    ring.replicas(slice, replicas).iter().any(|shard| shard.node == node)
}

fn put(key: String, value: Vec<u8>) -> Write {
    Write::Put { key, value, lease: None }
}
