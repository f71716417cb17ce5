//! What an operator does when something broke, in the simulated world: status, replacing a node, promotion.

use super::facts::{self, Told};
use super::output::Format;
use super::peer::{self, PeerCommand, Selection};
use super::peer_replace::{ReplaceArguments, Replaced, replace};
use super::snapshot::Cluster;
use super::status::assess;
use super::tests::{DEADLINE, Scene, confirm, node_id, scene, volume};
use super::volume_create::create;
use super::volume_delete::{Wait, delete, wait_no_longer};
use super::{AdminError, Report};
use std::collections::BTreeSet;
use torus_rpc::control::{HeldSlices, HeldVolume, ShardInstances};
use torus_rpc::metadata::{Metadata, Transaction, Write};
use torus_rpc::runtime::{Clock, Random, Runtime};
use torus_schema::ids::{NodeId, NodeNumber, RingGeneration, ShardIndex, SliceId, Version, VolumeId};
use torus_schema::records::{
    OwnerRecord, ResyncRecord, ResyncingNode, StaleReplica, StatusRecord, VersionRecord, VolumeRecord, encode, keys,
};

const NOW_S: u64 = 1_000_000;

impl Scene {
    async fn status(&self, told: Told) -> Report {
        assess(&facts::read(self.runtime.metadata(), told, BTreeSet::new()).await.unwrap(), NOW_S)
    }

    async fn stop(&self, number: u8) {
        let writes = vec![Write::Delete { key: keys::heartbeat(node_id(number)) }];
        self.runtime.metadata().transact(Transaction { writes, ..Transaction::default() }).await.unwrap();
    }

    async fn ring(&self) -> Cluster {
        Cluster::read(self.runtime.metadata()).await.unwrap()
    }

    async fn number(&self, node: u8) -> NodeNumber {
        self.ring().await.ring.node_by_id(node_id(node)).unwrap().number
    }

    /// All its slices on the node.
    async fn set_stale(&self, volume: &VolumeRecord, nodes: &[u8]) {
        let mut stale = Vec::new();
        let (cluster, none) = (self.ring().await, StatusRecord::default());
        for node in nodes {
            let number = self.number(*node).await;
            let placed = super::standing::slices_of(&cluster, volume, &none);
            let held = placed.iter().filter(|slice| slice.is_in_sync_on(number)).map(|slice| slice.slice);
            let slices = held.collect();
            stale.push(StaleReplica { node: number, since: VersionRecord::default(), stale_s: NOW_S - 90, slices });
        }
        self.put(keys::status(volume.id), encode(&StatusRecord { changes: 1, stale })).await;
    }

    async fn replace(&self, old: u8, new: u8, force: bool) -> Result<Replaced, AdminError> {
        let (old, new) = (node_id(old).to_string(), node_id(new).to_string());
        replace(self.runtime.metadata(), &ReplaceArguments { old, new, force, no_wait: true }).await
    }
}

fn owner(repair: bool) -> OwnerRecord {
    let (host, process) = ("client-7".to_string(), "torusblk serve".to_string());
    let epoch = torus_schema::ids::Epoch(3);
    OwnerRecord {
        host,
        process,
        pid: 7,
        epoch,
        lease: "1".into(),
        lease_ttl_ms: 10_000,
        clock_drift_ms: 500,
        attached_s: NOW_S,
        repair,
    }
}

#[test]
fn the_first_line_of_the_status_says_how_the_cluster_is() {
    scene(1).block_on(async |scene| {
        scene.cluster(4, false).await;
        let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
        let first = |report: &Report| report.render(Format::Table).lines().next().unwrap().to_string();
        assert_eq!(first(&scene.status(Told::default()).await), "HEALTHY");
        scene.stop(2).await;
        let one_down = scene.status(Told::default()).await;
        assert_eq!(first(&one_down), "DEGRADED: 1 nodes are down");
        assert!(one_down.summary[0].contains("node-2:control") && one_down.summary[0].contains("peer replace"));
        scene.set_stale(&made, &[2]).await;
        let stale = scene.status(Told::default()).await;
        assert!(first(&stale).starts_with("DEGRADED: 1 volumes have stale replicas"), "{}", first(&stale));
        let line = &stale.summary[0];
        assert!(line.contains("db") && line.contains("for 1 minute") && line.contains("its node is down"), "{line}");
        // A second of three is away: what they share is below the minimum of 2.
        scene.stop(3).await;
        let two_down = scene.status(Told::default()).await;
        assert!(first(&two_down).starts_with("UNAVAILABLE: 1 volumes cannot be written"), "{}", first(&two_down));
        assert_eq!(two_down.json["health"], "UNAVAILABLE");
    });
}

#[test]
fn the_status_tells_how_far_a_resync_is_and_who_does_it() {
    scene(1).block_on(async |scene| {
        scene.cluster(3, false).await;
        let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
        scene.set_stale(&made, &[2]).await;
        let said = async |scene: &Scene| scene.status(Told::default()).await.summary[0].clone();
        assert!(said(&scene).await.contains("a storage node repairs it soon"));
        scene.put(keys::owner(made.id), encode(&owner(true))).await;
        assert!(said(&scene).await.contains("client-7 is about to repair it"));
        let told = ResyncingNode {
            node: scene.number(2).await,
            started_s: NOW_S - 10,
            slices_done: 3,
            slices: 64,
            pulled_bytes: 5 << 20,
            rate_bytes_s: 1 << 20,
            left_s: Some(180),
        };
        let record = ResyncRecord { updated_s: NOW_S, nodes: vec![told] };
        scene.put(keys::resync(made.id), encode(&record)).await;
        let line = said(&scene).await;
        for part in ["3 of 64 slices", "5 MiB copied", "1 MiB/s", "3 minutes left"] {
            assert!(line.contains(part), "{line}");
        }
    });
}

fn holding(volume: VolumeId, generation: RingGeneration, slices: Vec<SliceId>) -> Vec<ShardInstances> {
    let (epoch, flush_point) = (Default::default(), Version::ZERO);
    let slices = vec![HeldSlices { generation, valid: true, slices }];
    let held = HeldVolume { volume, epoch, flush_point, blocks: 256, status_changes: 0, slices };
    vec![ShardInstances { index: ShardIndex(0), failed: None, volumes: vec![held] }]
}

/// Protocol rule 17: what nothing accounts for is listed, and stays.
#[test]
fn data_without_a_record_is_listed_as_an_orphan_and_a_place_that_was_lost_as_left_over() {
    scene(1).block_on(async |scene| {
        scene.cluster(4, false).await;
        let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
        let cluster = scene.ring().await;
        let shard = *super::volume_create::slices_by_shard(&cluster.ring, &made).keys().next().unwrap();
        let id = cluster.ring.node(shard.node).unwrap().id;
        let in_place = super::volume_create::slices_by_shard(&cluster.ring, &made)[&shard].clone();
        let told = |volume, generation, slices: &[SliceId]| {
            let mut instances = holding(volume, generation, slices.to_vec());
            instances[0].index = shard.shard;
            Told { instances: [(id, instances)].into(), ..Told::default() }
        };
        let status = async |told| {
            let report = scene.status(told).await;
            (report.title.clone(), report.summary.join("\n"))
        };
        let sound = status(told(made.id, made.generation, &in_place)).await;
        assert_eq!(sound, ("HEALTHY".to_string(), String::new()));
        let stranger = VolumeId::from_bytes([9; 16]);
        let (title, lines) = status(told(stranger, made.generation, &in_place)).await;
        assert!(title == "HEALTHY" && lines.contains("orphan") && lines.contains("1 MiB"), "{title} {lines}");
        let (_, lines) = status(told(made.id, RingGeneration(0), &in_place[..1])).await;
        assert!(lines.contains("left over") && lines.contains("1 slices of db"), "{lines}");
    });
}

#[test]
fn a_node_is_replaced_only_by_one_that_can_take_its_places() {
    scene(1).block_on(async |scene| {
        scene.cluster(4, false).await;
        scene.join(5, true).await;
        let refused = async |old, new| scene.replace(old, new, false).await.unwrap_err().to_string();
        assert!(refused(2, 5).await.contains("stop it first"));
        scene.stop(2).await;
        assert!(refused(2, 3).await.contains("in the ring already"));
        assert!(refused(5, 2).await.contains("is not in the ring"));
        scene.stop(5).await;
        assert!(refused(2, 5).await.contains("start it first"));
        let generation = scene.ring().await.ring.generation();
        scene.join(5, true).await;
        let number = scene.number(2).await;
        let replaced = scene.replace(2, 5, false).await.unwrap();
        assert_eq!((replaced.number, replaced.new, replaced.warnings.len()), (number, node_id(5), 0));
        let cluster = scene.ring().await;
        let node = cluster.ring.node(number).unwrap();
        assert_eq!((node.id, node.given), (node_id(5), RingGeneration(generation.0 + 1)));
        // Said again, as after an answer that was lost, it changes nothing.
        assert_eq!(scene.replace(2, 5, false).await.unwrap().number, number);
        assert_eq!(scene.ring().await.ring.generation(), cluster.ring.generation());
    });
}

#[test]
fn a_node_whose_loss_leaves_volumes_below_their_minimum_is_replaced_only_by_force() {
    scene(1).block_on(async |scene| {
        scene.cluster(3, false).await;
        scene.join(5, true).await;
        let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
        scene.set_stale(&made, &[1]).await;
        scene.stop(2).await;
        let refused = scene.replace(2, 5, false).await.unwrap_err().to_string();
        assert!(refused.contains("db (64 of 64 slices)") && refused.contains("--force"), "{refused}");
        let forced = scene.replace(2, 5, true).await.unwrap();
        assert!(forced.warnings[0].contains("db (64 of 64 slices)"), "{:?}", forced.warnings);
        // The one that is stale may go: the others have everything.
        let back = node_id(1);
        assert_eq!(scene.ring().await.ring.node_by_id(back).map(|node| node.id), Some(back));
    });
}

#[test]
fn a_stale_node_is_replaced_without_force() {
    scene(1).block_on(async |scene| {
        scene.cluster(3, false).await;
        scene.join(5, true).await;
        let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
        scene.set_stale(&made, &[1]).await;
        scene.stop(1).await;
        let replaced = scene.replace(1, 5, false).await.unwrap();
        let is = |id: NodeId| id == node_id(5);
        assert!(is(replaced.new) && replaced.warnings.is_empty(), "{replaced:?}");
    });
}

/// Rule 17: the record goes with the last confirmation, and one of a node that left for good does not come.
#[test]
fn a_deletion_does_not_wait_for_a_node_whose_place_another_has_or_that_was_removed() {
    for removed in [false, true] {
        scene(1).block_on(async move |scene| {
            scene.cluster(4, false).await;
            scene.join(5, true).await;
            let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
            scene.stop(2).await;
            let deleted = delete(&scene.runtime, "db", Wait::No, |_| {}).await.unwrap();
            assert_eq!(deleted.awaited.len(), 4);
            confirm(&scene, made.id, &[node_id(1), node_id(3), node_id(4)]).await;
            let key = keys::deleting(made.id);
            wait_no_longer(scene.runtime.metadata()).await.unwrap();
            assert!(scene.is_there(key.clone()).await, "it is down, and may come back to its place");
            if removed {
                let selection = Selection { nodes: vec![node_id(2).to_string()], all_peers: false };
                peer::run(&scene.runtime, &PeerCommand::Remove(selection), |_| {}).await.unwrap();
            } else {
                scene.replace(2, 5, false).await.unwrap();
            }
            assert!(!scene.is_there(key).await, "removed: {removed}");
        });
    }
}

/// What was checked still holds when the ring changes.
#[test]
fn a_replica_that_goes_stale_while_another_is_replaced_is_noticed() {
    let (mut replaced, mut refused) = (0, 0);
    for seed in 0..200 {
        let outcome = scene(seed).block_on(async |scene| {
            scene.cluster(3, false).await;
            scene.join(5, true).await;
            let made = create(&scene.runtime, &volume("db"), DEADLINE).await.unwrap();
            scene.stop(2).await;
            let marking = async {
                let after_us = scene.runtime.random().u64() % 8_000;
                scene.runtime.clock().sleep(std::time::Duration::from_micros(after_us)).await;
                scene.set_stale(&made, &[1]).await;
            };
            let (outcome, ()) = futures::future::join(scene.replace(2, 5, false), marking).await;
            let status = scene.runtime.metadata().get(&keys::status(made.id)).await.unwrap().unwrap();
            let is_before = status.mod_revision < scene.ring().await.ring_entry.mod_revision;
            assert!(
                outcome.is_err() || !is_before,
                "seed {}: replaced though it was marked before",
                scene.world.seed()
            );
            outcome.is_ok()
        });
        *if outcome { &mut replaced } else { &mut refused } += 1;
    }
    assert!(replaced > 10 && refused > 10, "one of the two came first: {replaced}, {refused}");
}
