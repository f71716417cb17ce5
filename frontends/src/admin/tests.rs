//! Administration in the simulated world: shards that say yes, a node that is down, answers that are lost.

use super::cluster::{InitArguments, init};
use super::peer::{self, PeerCommand, Selection};
use super::volume_create::{NewVolume, create, slices_by_shard};
use super::volume_delete::{Wait, delete};
use super::{AdminError, snapshot};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::message::{Answer, Operation, Reply};
use torus_rpc::metadata::memory::{Lost, MemoryStore};
use torus_rpc::metadata::{self, Entry, LeaseId, Metadata, Range, Revision, Transaction, TransactionResult, Write};
use torus_rpc::runtime::simulated::{Here, SimulatedRuntime, World};
use torus_rpc::runtime::{Clock, NoDisk, Random, Runtime};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{Epoch, NodeId, ShardId, ShardIndex, SliceId, VolumeId};
use torus_schema::limits::GIB;
use torus_schema::records::{
    DeletingRecord, HeartbeatRecord, NodeRecord, OwnerRecord, ShardRecord, VolumeState, decode, encode, keys,
};

type Store = MemoryStore<Here>;
pub(super) type Sim = SimulatedRuntime<NoDisk, Distant>;

pub(super) const DEADLINE: Duration = Duration::from_secs(5);

type Created = (NodeId, ShardIndex, Vec<SliceId>);

/// The store, a random time away, so that two commands meet each other at any point.
#[derive(Clone)]
pub(super) struct Distant {
    store: Store,
    here: Here,
}

impl Distant {
    async fn travel(&self) {
        self.here.sleep(Duration::from_micros(self.here.u64() % 1000)).await;
    }
}

impl Metadata for Distant {
    type Watch = <Store as Metadata>::Watch;

    async fn get(&self, key: &str) -> metadata::Result<Option<Entry>> {
        self.travel().await;
        self.store.get(key).await
    }
    async fn range(&self, prefix: &str) -> metadata::Result<Range> {
        self.travel().await;
        self.store.range(prefix).await
    }
    async fn transact(&self, transaction: Transaction) -> metadata::Result<TransactionResult> {
        self.travel().await;
        self.store.transact(transaction).await
    }
    async fn watch(&self, prefix: &str, from: Revision) -> metadata::Result<Self::Watch> {
        self.travel().await;
        self.store.watch(prefix, from).await
    }
    async fn grant_lease(&self, ttl: Duration) -> metadata::Result<LeaseId> {
        self.store.grant_lease(ttl).await
    }
    async fn keep_alive(&self, lease: LeaseId) -> metadata::Result<()> {
        self.store.keep_alive(lease).await
    }
    async fn revoke_lease(&self, lease: LeaseId) -> metadata::Result<()> {
        self.store.revoke_lease(lease).await
    }
}

/// A cluster of nodes with two shards each, and what their shards were asked to create.
#[derive(Clone)]
pub(super) struct Scene {
    pub(super) world: World,
    pub(super) runtime: Sim,
    created: Rc<RefCell<Vec<Created>>>,
}

pub(super) fn node_id(number: u8) -> NodeId {
    NodeId::from_bytes([number; 16])
}

pub(super) fn scene(seed: u64) -> Scene {
    let world = World::new(seed);
    let process = world.start_process();
    let here = Here { world: world.clone(), process };
    let store = Distant { store: Store::new(here.clone()), here };
    let runtime = Sim::new(&world, process, store);
    Scene { world, runtime, created: Rc::default() }
}

impl Scene {
    pub(super) fn block_on<T: 'static, F: Future<Output = T> + 'static>(&self, task: impl FnOnce(Scene) -> F) -> T {
        self.world.block_on(task(self.clone()))
    }

    pub(super) async fn put(&self, key: String, value: Vec<u8>) {
        let writes = vec![Write::Put { key, value, lease: None }];
        self.runtime.metadata().transact(Transaction { writes, ..Transaction::default() }).await.unwrap();
    }

    pub(super) async fn is_there(&self, key: String) -> bool {
        self.runtime.metadata().get(&key).await.unwrap().is_some()
    }

    /// `up`: its shards answer and it has a heartbeat.
    pub(super) async fn join(&self, number: u8, up: bool) {
        let id = node_id(number);
        let address = |shard: u16| format!("node-{number}:{shard}");
        let shards = (0..2)
            .map(|index| ShardRecord { index: ShardIndex(index), address: address(index), size_bytes: 10 * GIB })
            .collect();
        let cluster = snapshot::Cluster::read(self.runtime.metadata()).await.unwrap();
        let record = NodeRecord {
            id,
            cluster: cluster.record.id,
            host: format!("host-{number}"),
            zone: String::new(),
            rack: String::new(),
            control: format!("node-{number}:control"),
            shards,
            program: "test".into(),
        };
        self.put(keys::node(id), encode(&record)).await;
        let beat = HeartbeatRecord { node: id, updated_s: super::now_s(), started_s: 0, shards: vec![] };
        self.put(keys::heartbeat(id), encode(&beat)).await;
        if up {
            for index in 0..2 {
                self.listen(id, ShardIndex(index), &address(index), &cluster.record.key);
            }
        }
    }

    fn listen(&self, node: NodeId, shard: ShardIndex, address: &str, key: &str) {
        let key = ClusterKey::from_hex(key).unwrap();
        let created = self.created.clone();
        let process = self.world.start_process();
        self.world.listen(process, address, move |envelope, operation, _| {
            let Operation::CreateInstances { token, slices, .. } = operation else { panic!("{operation:?}") };
            assert!(key.verify(envelope.volume, Epoch(0), "create", &token));
            created.borrow_mut().push((node, shard, slices));
            async { (Reply::of(Answer::Created), vec![]) }
        });
    }

    /// `up` nodes that answer and one that does not, if asked for; all in the ring.
    pub(super) async fn cluster(&self, up: u8, with_one_down: bool) {
        init(&self.runtime, &InitArguments { slices: 256, replicas: 3 }).await.unwrap();
        for number in 1..=up + u8::from(with_one_down) {
            self.join(number, number <= up).await;
        }
        self.peer(PeerCommand::Add(everybody())).await.unwrap();
    }

    pub(super) async fn peer(&self, command: PeerCommand) -> Result<super::Report, AdminError> {
        peer::run(&self.runtime, &command, |_| {}).await
    }
}

fn everybody() -> Selection {
    Selection { nodes: vec![], all_peers: true }
}

fn only(node: &str) -> Selection {
    Selection { nodes: vec![node.to_string()], all_peers: false }
}

pub(super) fn volume(name: &str) -> NewVolume {
    NewVolume {
        name: name.into(),
        size_bytes: GIB,
        replicas: None,
        min_replicas: None,
        width: None,
        write_through: false,
    }
}

#[test]
fn a_second_init_is_refused_and_names_the_cluster_that_is_there() {
    scene(1).block_on(async |scene| {
        let arguments = InitArguments { slices: 64, replicas: 3 };
        init(&scene.runtime, &arguments).await.unwrap();
        let there = snapshot::Cluster::read(scene.runtime.metadata()).await.unwrap().record;
        assert_eq!(there.key.len(), 64);
        let error = init(&scene.runtime, &arguments).await.unwrap_err();
        assert!(error.to_string().contains(&there.id.to_string()), "{error}");
    });
}

#[test]
fn a_volume_is_ready_once_every_shard_of_its_slices_has_its_instances() {
    for seed in 0..20 {
        scene(seed).block_on(async |scene| {
            scene.cluster(4, false).await;
            let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
            assert_eq!((made.state, made.replicas, made.min_replicas), (VolumeState::Ready, 3, 2));
            let cluster = snapshot::Cluster::read(scene.runtime.metadata()).await.unwrap();
            let created = scene.created.take();
            let held = slices_by_shard(&cluster.ring, &made);
            assert_eq!(created.len(), held.len());
            for (node, shard, slices) in created.iter() {
                let number = cluster.ring.node_by_id(*node).unwrap().number;
                assert_eq!(&held[&ShardId { node: number, shard: *shard }], slices);
            }
            let found = snapshot::Found::read(scene.runtime.metadata(), "db").await.unwrap();
            assert_eq!(found.record, made);
        });
    }
}

#[test]
fn a_node_that_cannot_be_reached_is_named_and_the_volume_undone() {
    for seed in 0..20 {
        scene(seed).block_on(async |scene| {
            scene.cluster(2, true).await;
            let error = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap_err().to_string();
            assert!(error.contains("node-3:control") && error.contains("removed again"), "{error}");
            assert!(!scene.is_there(keys::name("db")).await);
            assert!(snapshot::volumes(scene.runtime.metadata()).await.unwrap().is_empty());
            let deleting = scene.runtime.metadata().range(&keys::deletings()).await.unwrap().entries;
            let record: DeletingRecord = decode(&deleting[0].key, &deleting[0].value).unwrap();
            assert_eq!(record.holders.len(), 3);
        });
    }
}

#[test]
fn an_answer_lost_while_a_volume_becomes_ready_is_looked_up() {
    for lost in [Lost::Answer, Lost::Request] {
        scene(3).block_on(async move |scene| {
            scene.cluster(3, false).await;
            let here = scene.clone();
            let watcher = scene.world.start_process();
            scene.world.spawn(watcher, async move {
                while here.created.borrow().len() < 6 {
                    here.runtime.clock().sleep(Duration::from_micros(1)).await;
                }
                here.runtime.metadata().store.lose_next(lost);
            });
            let result = create(&scene.runtime, &volume("db"), DEADLINE).await;
            match lost {
                Lost::Answer => assert_eq!(result.unwrap().state, VolumeState::Ready),
                Lost::Request => assert!(matches!(result, Err(AdminError::Unfinished { .. })), "{result:?}"),
            }
        });
    }
}

#[test]
fn what_a_cluster_cannot_hold_is_refused_before_anything_is_written() {
    scene(1).block_on(async |scene| {
        scene.cluster(3, false).await;
        create(&scene.runtime, &volume("taken"), DEADLINE).await.unwrap();
        let cases: [(NewVolume, &str); 9] = [
            (volume("taken"), "is taken by volume"),
            (volume(".hidden"), "begins with . or -"),
            (volume("a/b"), "other characters"),
            (NewVolume { size_bytes: 0, ..volume("v") }, "0 bytes"),
            (NewVolume { size_bytes: 5000, ..volume("v") }, "4096 and 8192"),
            (NewVolume { size_bytes: u64::MAX, ..volume("v") }, "at most 1024 TiB"),
            (NewVolume { replicas: Some(4), ..volume("v") }, "4 replicas need 4 nodes in the ring, there are 3"),
            (NewVolume { min_replicas: Some(4), ..volume("v") }, "expected 1 to 3"),
            (NewVolume { width: Some(48), ..volume("v") }, "power of two up to 256"),
        ];
        for (new, expected) in cases {
            let error = create(&scene.runtime, &new, DEADLINE).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} should contain {expected:?}");
        }
        assert_eq!(snapshot::volumes(scene.runtime.metadata()).await.unwrap().len(), 1);
    });
}

#[test]
fn a_volume_that_is_attached_is_not_deleted_and_its_owner_is_named() {
    scene(1).block_on(async |scene| {
        scene.cluster(3, false).await;
        let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
        let owner = OwnerRecord {
            host: "far-away".into(),
            process: "torusblk serve".into(),
            pid: 77,
            epoch: Epoch(1),
            lease: "1".into(),
            repair: false,
            attached_s: super::now_s() - 5,
            lease_ttl_ms: 10_000,
            clock_drift_ms: 500,
        };
        scene.put(keys::owner(made.id), encode(&owner)).await;
        let error = delete(&scene.runtime, "db", Wait::No, |_| {}).await.unwrap_err().to_string();
        assert!(error.contains("far-away") && error.contains("pid 77") && error.contains("for 5 s"), "{error}");
        assert!(scene.is_there(keys::volume(made.id)).await);
    });
}

/// Takes nodes off the list, as they do themselves.
pub(super) async fn confirm(scene: &Scene, volume: VolumeId, nodes: &[NodeId]) {
    let key = keys::deleting(volume);
    while !scene.is_there(key.clone()).await {
        scene.runtime.clock().sleep(Duration::from_millis(1)).await;
    }
    for node in nodes {
        let entry = scene.runtime.metadata().get(&key).await.unwrap().unwrap();
        let mut record: DeletingRecord = decode(&key, &entry.value).unwrap();
        record.holders.retain(|holder| holder != node);
        let write = match record.holders.is_empty() {
            true => Write::Delete { key: key.clone() },
            false => Write::Put { key: key.clone(), value: encode(&record), lease: None },
        };
        let transaction = Transaction { writes: vec![write], ..Transaction::default() };
        scene.runtime.metadata().transact(transaction).await.unwrap();
        scene.runtime.clock().sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn a_delete_frees_the_name_at_once_and_waits_until_all_nodes_have_confirmed() {
    for seed in 0..20 {
        scene(seed).block_on(async |scene| {
            scene.cluster(3, false).await;
            let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
            let nodes = scene.clone();
            scene.world.spawn(scene.world.start_process(), async move {
                confirm(&nodes, made.id, &[node_id(2), node_id(1), node_id(3)]).await;
            });
            let mut awaited = Vec::new();
            let wait = Wait::AtMost(DEADLINE);
            let deleted = delete(&scene.runtime, "db", wait, |left| awaited.push(left.len())).await.unwrap();
            assert_eq!((deleted.volume, deleted.awaited), (made.clone(), vec![]));
            assert_eq!(awaited.first(), Some(&3));
            for key in [keys::name("db"), keys::volume(made.id), keys::deleting(made.id)] {
                assert!(!scene.is_there(key.clone()).await, "{key}");
            }
            create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
        });
    }
}

#[test]
fn a_delete_says_which_nodes_it_still_waits_for() {
    scene(1).block_on(async |scene| {
        scene.cluster(3, false).await;
        let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
        let nodes = scene.clone();
        scene.world.spawn(scene.world.start_process(), async move {
            confirm(&nodes, made.id, &[node_id(1), node_id(3)]).await;
        });
        let deleted = delete(&scene.runtime, "db", Wait::AtMost(Duration::from_secs(1)), |_| {}).await.unwrap();
        assert_eq!(deleted.awaited, [format!("node-2:control ({})", node_id(2))]);
    });
}

#[test]
fn the_ring_changes_at_once_without_volumes_and_not_under_data() {
    scene(1).block_on(async |scene| {
        scene.cluster(4, false).await;
        scene.peer(PeerCommand::Remove(only("node-4:control"))).await.unwrap();
        let cluster = snapshot::Cluster::read(scene.runtime.metadata()).await.unwrap();
        assert_eq!((cluster.ring.nodes().len(), cluster.ring.generation().0), (3, 3));
        create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
        for command in [PeerCommand::Add(everybody()), PeerCommand::Remove(only(&node_id(1).to_string()))] {
            let error = scene.peer(command).await.unwrap_err().to_string();
            assert!(error.contains("1 of 1 volumes (db)"), "{error}");
        }
        let now = snapshot::Cluster::read(scene.runtime.metadata()).await.unwrap();
        assert_eq!(now.ring, cluster.ring);
    });
}

#[test]
fn a_volume_made_while_the_ring_is_planned_stops_the_change() {
    // Whichever comes first in the store: never both a moved slice and a ready volume placed by the old ring.
    let mut changes = 0;
    for seed in 0..60 {
        changes += scene(seed).block_on(async |scene| {
            scene.cluster(3, false).await;
            scene.join(4, true).await;
            let other = scene.clone();
            let (change, made) = futures::join!(scene.peer(PeerCommand::Add(only("node-4:control"))), async {
                // The change reads more than a creation does before it writes.
                other.runtime.clock().sleep(Duration::from_micros(other.runtime.random().u64() % 4000)).await;
                create(&other.runtime, &volume("db"), DEADLINE).await
            });
            let made = made.unwrap();
            let ring = snapshot::Cluster::read(scene.runtime.metadata()).await.unwrap().ring;
            assert_eq!(change.is_ok(), ring.nodes().len() == 4);
            assert_eq!(made.generation, ring.generation());
            u32::from(change.is_ok())
        });
    }
    assert!((1..60).contains(&changes), "{changes} of 60 changes came first: the race was none");
}

#[test]
fn peers_are_ok_available_or_down() {
    scene(1).block_on(async |scene| {
        scene.cluster(2, false).await;
        scene.join(3, true).await;
        let delete = vec![Write::Delete { key: keys::heartbeat(node_id(1)) }];
        scene.runtime.metadata().transact(Transaction { writes: delete, ..Transaction::default() }).await.unwrap();
        let report = scene.peer(PeerCommand::List).await.unwrap();
        let members: Vec<&str> = report.rows.iter().map(|row| row[4].as_str()).collect();
        assert_eq!(members, ["DOWN", "OK", "Avail"]);
        assert_eq!(report.summary, ["Balanced: true Usage: 0.00%"]);
        let cases = [
            (only("nobody:1"), "no node in this cluster is \"nobody:1\""),
            (only("node-2:control"), "in the ring already"),
            (Selection { nodes: vec![], all_peers: false }, "--all-peers"),
        ];
        for (selection, expected) in cases {
            let error = scene.peer(PeerCommand::Add(selection)).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    });
}

#[test]
fn without_a_cluster_every_command_says_how_to_make_one() {
    scene(1).block_on(async |scene| {
        let error = scene.peer(PeerCommand::List).await.unwrap_err().to_string();
        assert!(error.contains("torusadm init"), "{error}");
        let error = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap_err().to_string();
        assert!(error.contains("torusadm init"), "{error}");
    });
}
