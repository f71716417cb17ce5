//! Nodes that are replaced, volumes that are repaired while nobody has them attached, and replicas that are promoted
//! because nothing else is left: scripts over seeds, which vary delays. `SIMULATION_SEEDS=first..last` for others.

use bytes::Bytes;
use std::ops::Range;
use std::time::Duration;
use torus_frontends::admin::peer_replace::{self, ReplaceArguments, Replaced};
use torus_frontends::admin::volume_promote::{PromoteArguments, promote};
use torus_frontends::admin::volume_set::{self, SetArguments};
use torus_frontends::admin::{AdminError, Report};
use torus_frontends::device::{Device, Exports, Piece, VolumeError};
use torus_frontends::volume::AttachedVolume;
use torus_rpc::metadata::Metadata;
use torus_rpc::runtime::simulated::World;
use torus_schema::ids::VolumeId;
use torus_schema::records::{OwnerRecord, StatusRecord, decode, keys};
use torus_tests::simulation::cluster::{Client, Cluster, Runtime};

const NAME: &str = "volume";
const BLOCK: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(120);

type Volume = AttachedVolume<Runtime>;

fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("SIMULATION_SEEDS") else { return 0..12 };
    let bounds = text.split_once("..").and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    let (first, last) = bounds.expect("SIMULATION_SEEDS=first..last");
    first..last
}

/// A volume on all members, of which one replica alone may serve.
fn script<F: Future<Output = ()> + 'static>(
    (members, spares): (usize, usize),
    test: impl Fn(Script) -> F + Clone + 'static,
) {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().without_time().try_init();
    for seed in seeds() {
        let world = World::new(seed);
        let (here, test) = (world.clone(), test.clone());
        world.block_on(async move {
            let cluster = Cluster::start_with_spares(&here, members, spares).await;
            let volume = cluster.create_volume(NAME, 16 << 20, members as u8, 1).await;
            let operator = cluster.client("operator", false);
            test(Script { world: here, cluster, volume, operator: std::rc::Rc::new(operator) }).await;
        });
    }
}

#[derive(Clone)]
struct Script {
    world: World,
    cluster: Cluster,
    volume: VolumeId,
    operator: std::rc::Rc<Client>,
}

impl Script {
    async fn attach(&self, client: &Client) -> Volume {
        loop {
            match client.exports.attach(NAME).await {
                Ok(volume) => return volume,
                Err(VolumeError::Attached { .. }) => self.world.sleep(Duration::from_millis(200)).await,
                Err(error) => panic!("seed {}: {error}", self.world.seed()),
            }
        }
    }

    async fn replace(&self, old: usize, new: usize, force: bool) -> Result<Replaced, AdminError> {
        let id = |node: usize| self.cluster.nodes[node].id.to_string();
        let arguments = ReplaceArguments { old: id(old), new: id(new), force, no_wait: true };
        use torus_rpc::runtime::Runtime as _;
        peer_replace::replace(self.operator.runtime.metadata(), &arguments).await
    }

    async fn promote(&self, node: usize, confirmed: Option<&str>) -> Result<Report, AdminError> {
        let arguments = PromoteArguments {
            name: NAME.to_string(),
            node: self.cluster.nodes[node].id.to_string(),
            others: Vec::new(),
            yes_lose_writes_since: confirmed.map(str::to_string),
        };
        let told = self.cluster.told(self.volume);
        promote(&self.operator.runtime, &arguments, &told, Duration::from_secs(5)).await
    }

    async fn status(&self) -> StatusRecord {
        let key = keys::status(self.volume);
        let entry = self.cluster.store.get(&key).await.expect("available");
        entry.map(|entry| decode(&key, &entry.value).expect("ours")).unwrap_or_default()
    }

    async fn owner(&self) -> Option<OwnerRecord> {
        let key = keys::owner(self.volume);
        let entry = self.cluster.store.get(&key).await.expect("available");
        entry.map(|entry| decode(&key, &entry.value).expect("ours"))
    }

    /// The last heartbeats of nodes that were killed have ended.
    async fn leases_end(&self) {
        self.world.sleep(Duration::from_secs(12)).await;
    }

    /// Down for good from now on.
    fn lose(&self, nodes: impl IntoIterator<Item = usize>) {
        nodes.into_iter().for_each(|node| self.cluster.kill_node(node));
    }

    async fn whole(&self) {
        self.cluster.all_in_sync(NAME, PATIENCE).await;
    }

    async fn expect(&self, volume: &Volume, blocks: Range<u64>, value: u8) {
        for block in blocks {
            let found = match &volume.read(block * BLOCK, BLOCK).await.expect("it can be read")[..] {
                [Piece::Data(data)] => data[0],
                _ => 0,
            };
            assert_eq!(found, value, "seed {}: block {block}", self.world.seed());
        }
    }
}

async fn write(volume: &Volume, first: u64, count: u64, value: u8) {
    let data = Bytes::from(vec![value; (count * BLOCK) as usize]);
    volume.write(first * BLOCK, data, false).await.expect("one replica is enough");
}

#[test]
fn a_node_that_died_is_replaced_under_a_live_client_and_the_new_one_filled() {
    script((3, 1), async |script| {
        script.cluster.beat(3).await;
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write(&volume, 0, 40, 1).await;
        volume.flush().await.expect("all is well");
        script.lose([2]);
        write(&volume, 10, 5, 2).await;
        script.replace(2, 3, false).await.expect("the others have everything");
        write(&volume, 20, 5, 3).await;
        script.whole().await;
        // Only the new one is left.
        script.lose([0, 1]);
        script.expect(&volume, 0..10, 1).await;
        script.expect(&volume, 10..15, 2).await;
        script.expect(&volume, 20..25, 3).await;
    });
}

/// The old node is cut off from the metadata store alone: the client still writes to it when it is replaced.
#[test]
fn a_node_that_lives_unnoticed_is_done_without_once_it_is_replaced() {
    script((2, 1), async |script| {
        script.cluster.beat(2).await;
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write(&volume, 0, 8, 1).await;
        let old = script.cluster.nodes[1].id;
        script.replace(1, 2, false).await.expect("it has no heartbeat");
        write(&volume, 4, 8, 2).await;
        while script.status().await.stale.is_empty() {
            script.world.sleep(Duration::from_micros(200)).await;
        }
        script.whole().await;
        let told = script.cluster.told(script.volume);
        let blocks = |node| told[&node][0].volumes[0].blocks;
        assert_eq!(blocks(script.cluster.nodes[2].id), 12, "seed {}", script.world.seed());
        assert!(blocks(old) >= 8);
        script.lose([0, 1]);
        script.expect(&volume, 0..4, 1).await;
        script.expect(&volume, 4..12, 2).await;
    });
}

/// Interleaving 16: what a node kept of an earlier stay is not what it should hold now.
#[test]
fn a_node_that_gets_its_place_back_is_not_taken_for_current() {
    script((2, 1), async |script| {
        script.cluster.beat(2).await;
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write(&volume, 0, 16, 1).await;
        volume.flush().await.expect("all is well");
        script.lose([1]);
        script.replace(1, 2, false).await.expect("node 0 has everything");
        write(&volume, 0, 8, 2).await;
        script.whole().await;
        volume.flush().await.expect("all is well");
        script.world.kill(client.process);
        script.lose([2]);
        script.leases_end().await;
        script.cluster.start_node(1).await;
        script.cluster.beat(1).await;
        script.replace(2, 1, false).await.expect("node 0 has everything");
        assert!(script.status().await.stale.is_empty(), "nothing says that it is behind");
        let client = script.cluster.client("w1", false);
        let volume = script.attach(&client).await;
        for _ in 0..6 {
            script.expect(&volume, 0..8, 2).await;
        }
        script.whole().await;
        script.lose([0]);
        script.expect(&volume, 0..8, 2).await;
        script.expect(&volume, 8..16, 1).await;
    });
}

/// All three nodes beat and repair; node 2 was away while a client wrote, and nobody has the volume attached.
async fn behind_and_unowned(script: &Script) {
    let client = script.cluster.client("w0", false);
    let volume = script.attach(&client).await;
    write(&volume, 0, 32, 1).await;
    volume.flush().await.expect("all is well");
    script.lose([2]);
    write(&volume, 0, 16, 2).await;
    client.exports.release_all().await;
    assert_eq!(script.owner().await, None);
    script.cluster.start_node(2).await;
    for node in 0..3 {
        script.cluster.beat(node).await;
    }
}

async fn repair_begins(script: &Script) -> OwnerRecord {
    let mut waited = 0;
    loop {
        match script.owner().await {
            Some(owner) => {
                assert!(owner.repair, "{owner:?}");
                return owner;
            }
            None => script.world.sleep(Duration::from_millis(100)).await,
        }
        waited += 1;
        assert!(waited < 600, "seed {}: nobody repairs", script.world.seed());
    }
}

#[test]
fn a_volume_that_nobody_has_attached_is_repaired_by_a_storage_node() {
    script((3, 0), async |script| {
        behind_and_unowned(&script).await;
        let owners: Vec<_> = (0..3).map(|node| script.cluster.repair_on(node)).collect();
        let begun = script.world.now();
        script.whole().await;
        let took = script.world.now().since(begun);
        assert!(took < Duration::from_secs(30), "seed {}: {took:?}", script.world.seed());
        while script.owner().await.is_some() {
            script.world.sleep(Duration::from_millis(10)).await;
        }
        script.world.sleep(Duration::from_secs(1)).await;
        assert_eq!(owners.iter().map(|owner| owner.repairing()).sum::<usize>(), 0);
        let client = script.cluster.client("w1", false);
        let volume = script.attach(&client).await;
        script.lose([0, 1]);
        script.expect(&volume, 0..16, 2).await;
        script.expect(&volume, 16..32, 1).await;
    });
}

#[test]
fn a_repair_lets_go_at_once_when_a_client_wants_the_volume() {
    script((3, 0), async |script| {
        behind_and_unowned(&script).await;
        // The target reaches no source, so that the repair lasts.
        let process = |node: usize| script.cluster.nodes[node].process.get().expect("it runs");
        (0..2).for_each(|node| script.world.cut(process(2), process(node)));
        for node in 0..3 {
            script.cluster.repair_on(node);
        }
        repair_begins(&script).await;
        let (begun, client) = (script.world.now(), script.cluster.client("w1", false));
        let volume = client.exports.attach(NAME).await.expect("a repair is no owner");
        let took = script.world.now().since(begun);
        assert!(took < Duration::from_secs(4), "seed {}: {took:?}", script.world.seed());
        script.expect(&volume, 0..16, 2).await;
        (0..2).for_each(|node| script.world.heal(process(2), process(node)));
        script.whole().await;
        let owner = script.owner().await.expect("it is attached");
        assert!(!owner.repair, "{owner:?}");
        assert!(script.cluster.store.get(&keys::wanted(script.volume)).await.expect("available").is_none());
    });
}

#[test]
fn a_repair_owner_that_dies_is_waited_for_no_longer_than_its_lease() {
    script((3, 0), async |script| {
        behind_and_unowned(&script).await;
        let process = |node: usize| script.cluster.nodes[node].process.get().expect("it runs");
        (0..2).for_each(|node| script.world.cut(process(2), process(node)));
        for node in 0..3 {
            script.cluster.repair_on(node);
        }
        let owner = repair_begins(&script).await;
        let dead = script.cluster.nodes.iter().position(|node| node.address == owner.host).expect("a node");
        script.cluster.kill_node(dead);
        let (begun, client) = (script.world.now(), script.cluster.client("w1", false));
        client.exports.attach(NAME).await.expect("its lease ends");
        // The lease, and two seconds for the replica that does not answer either.
        let took = script.world.now().since(begun);
        assert!(took < Duration::from_secs(14), "seed {}: {took:?}", script.world.seed());
    });
}

/// Two of three are lost for good, and the third missed what was written last.
async fn only_a_stale_one_is_left(script: &Script) {
    let client = script.cluster.client("w0", false);
    let volume = script.attach(&client).await;
    write(&volume, 0, 32, 1).await;
    volume.flush().await.expect("all is well");
    script.lose([2]);
    write(&volume, 0, 16, 2).await;
    volume.flush().await.expect("two are enough");
    script.world.kill(client.process);
    script.lose([0, 1]);
    script.leases_end().await;
    script.cluster.start_node(2).await;
    script.cluster.beat(2).await;
    let refused = script.cluster.client("w1", false).exports.attach(NAME).await.err();
    assert!(matches!(refused, Some(VolumeError::NotReady { .. })), "{refused:?}");
}

/// Says what is lost, is told that it may be, and does it.
async fn promoted(script: &Script, node: usize) {
    let before = script.status().await;
    let shown = script.promote(node, None).await.expect("there is nothing else");
    assert_eq!(script.status().await, before, "nothing was asked for yet");
    let since = shown.json["lost_since"].as_str().expect("a version").to_string();
    let said = shown.summary.join("\n");
    assert!(said.contains("LOST") && said.contains(&since) && said.contains("overwritten"), "{said}");
    let refused = script.promote(node, Some("99.99")).await.unwrap_err().to_string();
    assert!(refused.contains(&since), "{refused}");
    script.promote(node, Some(&since)).await.expect("it was said");
}

#[test]
fn a_stale_replica_is_promoted_where_the_others_are_lost_and_fills_new_nodes() {
    script((3, 2), async |script| {
        only_a_stale_one_is_left(&script).await;
        promoted(&script, 2).await;
        let client = script.cluster.client("w1", false);
        let volume = script.attach(&client).await;
        script.expect(&volume, 0..32, 1).await;
        write(&volume, 8, 16, 3).await;
        for (old, new) in [(0, 3), (1, 4)] {
            script.cluster.beat(new).await;
            script.replace(old, new, false).await.expect("the promoted one has everything");
        }
        script.whole().await;
        let there = script.cluster.blocks_of(2, script.volume, 0, 32).await;
        for node in [3, 4] {
            assert_eq!(script.cluster.blocks_of(node, script.volume, 0, 32).await, there, "node {node}");
        }
        script.lose([2, 4]);
        script.expect(&volume, 0..8, 1).await;
        script.expect(&volume, 8..24, 3).await;
        script.expect(&volume, 24..32, 1).await;
    });
}

/// Rule 11: the promoted state replaces what the others have, even where it is older.
#[test]
fn those_that_were_thought_lost_take_the_promoted_state_when_they_return() {
    script((3, 0), async |script| {
        only_a_stale_one_is_left(&script).await;
        promoted(&script, 2).await;
        let client = script.cluster.client("w1", false);
        let volume = script.attach(&client).await;
        write(&volume, 12, 2, 3).await;
        script.cluster.start_node(0).await;
        script.cluster.start_node(1).await;
        script.whole().await;
        script.cluster.assert_identical(NAME, 0, 32).await;
        script.lose([1, 2]);
        script.expect(&volume, 0..12, 1).await;
        script.expect(&volume, 12..14, 3).await;
        script.expect(&volume, 14..32, 1).await;
    });
}

#[test]
fn nothing_is_promoted_while_a_replica_in_sync_is_up_or_the_volume_is_attached() {
    script((3, 0), async |script| {
        for node in 0..3 {
            script.cluster.beat(node).await;
        }
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write(&volume, 0, 4, 1).await;
        script.lose([2]);
        write(&volume, 0, 4, 2).await;
        script.lose([0, 1]);
        script.leases_end().await;
        script.cluster.start_node(2).await;
        script.cluster.beat(2).await;
        let since = script.promote(2, None).await.expect("to look is free").json["lost_since"].clone();
        let attached = script.promote(2, since.as_str()).await.unwrap_err().to_string();
        assert!(attached.contains("attached by w0"), "{attached}");
        script.world.kill(client.process);
        script.leases_end().await;
        // One of them is in sync: the client could do without one more and not without both.
        script.cluster.start_node(0).await;
        script.cluster.start_node(1).await;
        let up = script.promote(2, since.as_str()).await.unwrap_err().to_string();
        assert!(up.contains("whose node is up") && up.contains("--min-replicas"), "{up}");
    });
}

/// A node was replaced by force though nobody else had everything; it comes back whole.
#[test]
fn a_node_that_was_given_up_by_force_can_be_brought_back_and_promoted() {
    script((2, 1), async |script| {
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        write(&volume, 0, 16, 1).await;
        volume.flush().await.expect("all is well");
        script.lose([0]);
        write(&volume, 0, 8, 2).await;
        volume.flush().await.expect("one is enough");
        script.world.kill(client.process);
        script.lose([1]);
        script.leases_end().await;
        script.cluster.beat(2).await;
        let refused = script.replace(1, 2, false).await.unwrap_err().to_string();
        assert!(refused.contains("--force"), "{refused}");
        script.replace(1, 2, true).await.expect("by force");
        script.cluster.start_node(0).await;
        script.cluster.beat(0).await;
        let unattachable = script.cluster.client("w1", false).exports.attach(NAME).await.err();
        assert!(matches!(unattachable, Some(VolumeError::NotReady { .. })), "{unattachable:?}");
        script.lose([2]);
        script.leases_end().await;
        script.cluster.start_node(1).await;
        script.cluster.beat(1).await;
        script.replace(2, 1, true).await.expect("by force");
        let unattachable = script.cluster.client("w2", false).exports.attach(NAME).await.err();
        assert!(matches!(unattachable, Some(VolumeError::NotReady { .. })), "{unattachable:?}");
        let shown = script.promote(1, None).await.expect("it has everything");
        assert_eq!(shown.json["lost_since"], "0.0", "{:?}", shown.summary);
        script.promote(1, Some("0.0")).await.expect("it was said");
        let client = script.cluster.client("w3", false);
        let volume = script.attach(&client).await;
        script.expect(&volume, 0..8, 2).await;
        script.expect(&volume, 8..16, 1).await;
        script.whole().await;
        script.lose([1]);
        script.expect(&volume, 0..8, 2).await;
        script.expect(&volume, 8..16, 1).await;
    });
}

#[test]
fn the_minimum_is_changed_while_nobody_has_the_volume_attached() {
    script((3, 0), async |script| {
        let set = async |min_replicas| {
            let arguments = SetArguments { name: NAME.to_string(), min_replicas };
            volume_set::set(&script.operator.runtime, &arguments).await
        };
        let client = script.cluster.client("w0", false);
        let volume = script.attach(&client).await;
        assert!(set(2).await.unwrap_err().to_string().contains("attached by w0"));
        drop(volume);
        client.exports.release_all().await;
        assert!(set(4).await.unwrap_err().to_string().contains("expected 1 to 3"));
        set(3).await.expect("nobody has it");
        script.lose([1]);
        let refused = script.cluster.client("w1", false).exports.attach(NAME).await.err().expect("one is missing");
        assert!(refused.to_string().contains("at least 3"), "{refused}");
        set(2).await.expect("nobody has it");
        script.attach(&script.cluster.client("w2", false)).await;
    });
}
