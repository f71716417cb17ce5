//! Damage on one replica, and what its peers do for it.

use super::harness::*;
use crate::log::{Geometry, Position};
use crate::shard::{PeerTable, damage::FoundBy};
use std::sync::Arc;
use std::time::Duration;
use torus_rpc::message::{Envelope, Operation, Refusal, Token};
use torus_rpc::runtime::Peer;
use torus_rpc::runtime::simulated::World;
use torus_schema::ids::*;
use torus_schema::limits::{BLOCK_BYTES, REPAIR_PAUSE_MAX};

/// Two replicas of one volume, linked, and a writer of both.
#[derive(Clone)]
pub struct Pair {
    pub here: Client,
    pub there: Client,
}

impl Pair {
    /// Under one version, which comes back, something else here than there.
    pub async fn write_two_things(&self, block: u64) -> Version {
        let version = self.here.next_version();
        self.there.next_version();
        let (operation, payload) = Client::write_operation(block, 1, version, false);
        self.here.call_with(operation, payload).await.unwrap();
        let other: bytes::Bytes = vec![9; BLOCK_BYTES as usize].into();
        let checksums = vec![crc32c::crc32c(&other)].into();
        let operation = Operation::Write { first: BlockIndex(block), version, durable: false, checksums };
        self.there.call_with(operation, other).await.unwrap();
        version
    }

    pub async fn new(world: &World) -> Self {
        let mut clients = Vec::new();
        for node in [2, 3] {
            let machine = Machine::of(world, identity_of(node), 8, 64).await;
            let client = Client::create(&machine, 1).await;
            client.open().await.unwrap();
            clients.push(client);
        }
        let there = clients.pop().unwrap();
        let here = clients.pop().unwrap();
        Self { here, there }
    }

    pub fn table() -> Arc<PeerTable> {
        let peer = |node: u8| {
            let identity = identity_of(node);
            let (cluster, node, shard) = (identity.cluster, identity.node, identity.shard);
            Peer { cluster, node, shard, address: node.to_string() }
        };
        Arc::new(PeerTable::new(vec![peer(2), peer(3)], vec![vec![0, 1]; RING_SLICES as usize]))
    }

    /// From now on each can ask the other.
    pub fn link(&self) {
        for (client, node) in [(&self.here, 2), (&self.there, 3)] {
            client.machine.shard().set_peers(Self::table());
            client.machine.listen_as(node);
        }
    }

    /// Under the same version on both.
    pub async fn write(&self, first: u64, count: u64) -> Version {
        let version = self.here.write(first, count).await.unwrap();
        assert_eq!(self.there.write(first, count).await.unwrap(), version);
        version
    }
}

impl Client {
    /// Where the block lies.
    pub fn position(&self, block: u64) -> Position {
        let shard = self.machine.shard();
        let state = shard.state.borrow();
        let block = BlockIndex(block);
        let slice = placement(self.volume).slice_of(block.extent());
        match state.contents.index.find(crate::index::Place { volume: self.volume, slice, block }) {
            crate::index::Found::Data(entry) => entry.position,
            other => panic!("{other:?}"),
        }
    }

    /// Inverts a bit of the block on the disk.
    pub fn rot(&self, block: u64) {
        self.machine.disk.flip(Geometry::offset(self.position(block)) + BLOCK_BYTES / 2, 1);
    }

    /// Until nothing more is listed as damaged.
    pub async fn healed(&self) {
        let shard = self.machine.shard();
        shard.changed.until(|| (shard.statistics().damaged == 0).then_some(())).await;
    }
}

#[test]
fn a_damaged_block_is_answered_as_damaged_and_heals_from_the_peer() {
    for seed in 0..20 {
        simulate(seed, move |world| async move {
            let pair = Pair::new(&world).await;
            pair.link();
            let version = pair.write(3, 4).await;
            pair.here.rot(4);
            pair.here.rot(6);
            assert_eq!(pair.here.read(3, 4).await, Err(Refusal::Damaged { block: BlockIndex(4) }));
            pair.here.healed().await;
            assert_eq!(pair.here.read(3, 4).await.unwrap(), vec![(version, true); 4], "seed {seed}");
            let statistics = pair.here.machine.shard().statistics();
            assert_eq!((statistics.repaired, statistics.conflicts), (2, 0));
            pair.here.flush().await.unwrap();
            pair.here.machine.crash_and_start().await;
            pair.here.open().await.unwrap();
            assert_eq!(pair.here.read(3, 4).await.unwrap(), vec![(version, true); 4], "it is durable like all else");
        });
    }
}

#[test]
fn a_block_that_nobody_has_stays_damaged_until_somebody_can_be_asked() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        let version = pair.write(3, 1).await;
        pair.here.rot(3);
        assert!(pair.here.read(3, 1).await.is_err());
        world.sleep(REPAIR_PAUSE_MAX * 3).await;
        let statistics = pair.here.machine.shard().statistics();
        assert_eq!((statistics.damaged, statistics.repaired), (1, 0));
        pair.link();
        pair.here.healed().await;
        assert_eq!(pair.here.read(3, 1).await.unwrap(), vec![(version, true)]);
    });
}

#[test]
fn a_peer_that_has_another_version_is_no_help_and_one_with_another_content_an_alarm() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        pair.link();
        pair.write(3, 2).await;
        // The other replica goes on with block 3, and was given something else as block 4.
        pair.there.write(3, 1).await.unwrap();
        pair.write_two_things(4).await;
        pair.here.rot(3);
        pair.here.rot(4);
        assert!(pair.here.read(3, 2).await.is_err());
        world.sleep(REPAIR_PAUSE_MAX * 3).await;
        let statistics = pair.here.machine.shard().statistics();
        assert_eq!((statistics.damaged, statistics.repaired, statistics.conflicts), (2, 0, 1));
        assert_eq!(pair.here.read(4, 1).await, Err(Refusal::Damaged { block: BlockIndex(4) }));
    });
}

#[test]
fn a_damaged_block_that_is_overwritten_or_cleared_needs_no_repair() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        pair.write(3, 2).await;
        pair.here.rot(3);
        pair.here.rot(4);
        assert!(pair.here.read(3, 2).await.is_err());
        pair.here.write(3, 1).await.unwrap();
        pair.here.clear(4, 5).await.unwrap();
        pair.here.flush().await.unwrap();
        // A further write carries F, which lets go what was superseded.
        pair.here.write(9, 1).await.unwrap();
        pair.here.healed().await;
        assert_eq!(pair.here.machine.shard().statistics().repaired, 0);
    });
}

#[test]
fn a_read_that_failed_for_the_moment_needs_no_repair_either() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        let version = pair.write(3, 1).await;
        pair.here.machine.disk.fail_reads(2);
        assert_eq!(pair.here.read(3, 1).await, Err(Refusal::Damaged { block: BlockIndex(3) }));
        pair.here.healed().await;
        assert_eq!(pair.here.read(3, 1).await.unwrap(), vec![(version, true)]);
        assert_eq!(pair.here.machine.shard().statistics().repaired, 0);
    });
}

#[test]
fn a_segment_with_a_damaged_block_is_cleaned_once_the_block_is_repaired() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        let version = pair.write(100, 3).await;
        pair.here.rot(101);
        // 8 segments of 64 blocks: some of each stays needed, so that none gets free without being cleaned.
        let overwrite = || async {
            let mut places = vec![pair.here.position(101)];
            for number in 0..600 {
                let block = if number % 6 == 0 { 200 + number / 6 } else { 3 };
                pair.here.write(block, 1).await.unwrap();
                pair.here.flush().await.unwrap();
                places.push(pair.here.position(101));
            }
            places.dedup();
            places
        };
        let places = overwrite().await;
        assert_eq!(places.len(), 1, "moved though it is damaged: {places:?}");
        let shard = pair.here.machine.shard();
        let listed: Vec<FoundBy> = shard.damage(9).blocks.iter().map(|listed| listed.by).collect();
        assert_eq!(listed, vec![FoundBy::Cleaner]);
        pair.link();
        pair.here.healed().await;
        assert_ne!(vec![pair.here.position(101)], places, "mended where it was");
        // It moves on, and may come back to where it was: segments are used in turn.
        let places = overwrite().await;
        assert!(places.len() > 1, "never cleaned: {places:?}");
        assert_eq!(pair.here.read(100, 3).await.unwrap(), vec![(version, true); 3]);
    });
}

#[test]
fn a_shard_that_is_closed_while_a_repair_waits_for_a_silent_peer_does_not_wait_for_it() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        pair.link();
        pair.write(3, 1).await;
        pair.here.rot(3);
        world.cut(pair.here.machine.process.get(), pair.there.machine.process.get());
        assert!(pair.here.read(3, 1).await.is_err());
        world.sleep(Duration::from_millis(100)).await;
        let before = world.now();
        pair.here.machine.shard().close().await;
        assert!(world.now().since(before) < Duration::from_millis(100));
    });
}

#[test]
fn only_a_shard_of_the_cluster_may_read_from_a_peer() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        pair.write(3, 1).await;
        let (first, count, data) = (BlockIndex(3), 1, true);
        pair.here.envelope.set(Envelope { volume: pair.here.volume, ..Envelope::NONE });
        let ask = |token| pair.here.call(Operation::PeerRead { token, first, count, data });
        assert_eq!(ask(Token([0; 32])).await, Err(Refusal::BadToken));
        assert_eq!(ask(key().sign(pair.here.volume, Epoch(0), "create")).await, Err(Refusal::BadToken));
        assert!(ask(key().sign(pair.here.volume, Epoch(0), "peer")).await.is_ok());
    });
}
