//! What a start makes of what it finds, row by row of the tables in `log::recovery`. Damage is put where it is wanted by
//! looking for headers on the disk.

use super::harness::*;
use crate::log::batch::{BatchHeader, UncheckedHeader};
use crate::log::footer::Trailer;
use crate::log::record::Record;
use crate::log::{BLOCK, Geometry};
use crate::shard::ShardError;
use torus_rpc::message::Refusal;
use torus_rpc::runtime::Disk;
use torus_schema::ids::*;

/// Every block of the machine's disk with its offset.
pub fn blocks(machine: &Machine) -> Vec<(u64, Vec<u8>)> {
    let count = machine.disk.size_bytes() / BLOCK as u64;
    (0..count).map(|block| block * BLOCK as u64).map(|offset| (offset, machine.disk.peek(offset, BLOCK))).collect()
}

/// Of the batch that holds `version`: its header's offset, and that of its first payload block.
pub fn batch_of(machine: &Machine, version: Version) -> (u64, u64) {
    let holds = |header: &BatchHeader| {
        header.records.iter().find_map(|record| match record {
            Record::Data(data) if data.version == version => Some(Geometry::offset(data.position)),
            _ => None,
        })
    };
    blocks(machine)
        .into_iter()
        .find_map(|(offset, block)| {
            let header = UncheckedHeader::decode(&block).ok()?.finalize(&block).ok()?;
            holds(&header).map(|payload| (offset, payload))
        })
        .unwrap()
}

pub async fn opened(world: &torus_rpc::runtime::simulated::World) -> (Machine, Client) {
    let machine = Machine::new(world, 8, 64).await;
    let client = Client::create(&machine, 1).await;
    client.open().await.unwrap();
    (machine, client)
}

/// kill -9, damage, start, attach.
pub async fn restart_with(machine: &Machine, client: &Client, damage: impl FnOnce()) -> Vec<SliceId> {
    machine.kill();
    damage();
    machine.start().await.unwrap();
    client.open().await.unwrap().missing
}

#[test]
fn a_hole_left_by_a_lost_batch_hides_nothing_behind_it() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let lost = client.write(1, 3).await.unwrap();
        let kept = client.write(9, 2).await.unwrap();
        let (header, _) = batch_of(&machine, lost);
        let missing = restart_with(&machine, &client, || machine.disk.flip(header + 20, 1)).await;
        assert_eq!(missing, vec![]);
        assert_eq!(client.read(1, 3).await.unwrap(), vec![(Version::ZERO, false); 3]);
        assert_eq!(client.read(9, 2).await.unwrap(), vec![(kept, true); 2]);
    });
}

#[test]
fn a_header_that_was_durable_and_is_gone_makes_every_instance_missing_for_good() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let lost = client.write(1, 3).await.unwrap();
        client.flush().await.unwrap();
        // Its header says that what came before is durable.
        client.write(9, 2).await.unwrap();
        let (header, _) = batch_of(&machine, lost);
        let missing = restart_with(&machine, &client, || machine.disk.flip(header + 20, 1)).await;
        assert_eq!(missing, placement(client.volume).slices());
        assert!(matches!(client.read(1, 3).await, Err(Refusal::NotOwner { .. })));
        assert!(machine.shard().statistics().lost);
        let missing = restart_with(&machine, &client, || {}).await;
        assert_eq!(missing, placement(client.volume).slices(), "the next start knows it too");
        // Given anew, the instances start from nothing known, and are held.
        client.call(client.creation()).await.unwrap();
        assert_eq!(client.open().await.unwrap().missing, vec![]);
    });
}

#[test]
fn damage_below_what_was_durable_is_answered_as_damaged_and_never_as_what_was_there_before() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let before = client.write(1, 3).await.unwrap();
        let newer = client.write(2, 1).await.unwrap();
        client.flush().await.unwrap();
        client.write(9, 2).await.unwrap();
        let (_, payload) = batch_of(&machine, newer);
        assert_eq!(restart_with(&machine, &client, || machine.disk.flip(payload + 777, 4)).await, vec![]);
        assert_eq!(client.read(1, 3).await, Err(Refusal::Damaged { block: BlockIndex(2) }));
        assert_eq!(client.read(1, 1).await.unwrap(), vec![(before, true)]);
        assert_eq!(restart_with(&machine, &client, || {}).await, vec![]);
        assert_eq!(client.read(2, 1).await, Err(Refusal::Damaged { block: BlockIndex(2) }), "after a second start too");
        // Repaired from a peer, under the same version.
        let (operation, bytes) = Client::write_operation(2, 1, newer, true);
        client.call_with(operation, bytes).await.unwrap();
        assert_eq!(client.read(1, 3).await.unwrap(), vec![(before, true), (newer, true), (before, true)]);
    });
}

#[test]
fn a_torn_tail_is_dropped_and_what_was_before_it_stays() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let before = client.write(1, 3).await.unwrap();
        client.flush().await.unwrap();
        let torn = client.write(2, 1).await.unwrap();
        let (_, payload) = batch_of(&machine, torn);
        assert_eq!(restart_with(&machine, &client, || machine.disk.flip(payload + 777, 4)).await, vec![]);
        assert_eq!(client.read(1, 3).await.unwrap(), vec![(before, true); 3]);
        // The decision lasts: later numbers are durable, and the tail is still no loss.
        client.write(20, 1).await.unwrap();
        client.flush().await.unwrap();
        client.write(21, 1).await.unwrap();
        assert_eq!(restart_with(&machine, &client, || {}).await, vec![]);
        assert_eq!(client.read(1, 3).await.unwrap(), vec![(before, true); 3]);
    });
}

#[test]
fn a_segment_whose_footer_is_damaged_is_read_batch_by_batch() {
    for at_trailer in [true, false] {
        simulate(1, move |world| async move {
            let (machine, client) = opened(&world).await;
            let written = client.write(1, 30).await.unwrap();
            machine.shard().close().await;
            let footers: Vec<u64> = blocks(&machine)
                .into_iter()
                .filter(|(_, block)| Trailer::decode_last(block).is_ok())
                .map(|(offset, _)| offset)
                .collect();
            assert_eq!(footers.len(), 2, "of the segment, and of the next, which is empty");
            let offset = footers[0] + if at_trailer { BLOCK as u64 - 30 } else { 100 };
            assert_eq!(restart_with(&machine, &client, || machine.disk.flip(offset, 1)).await, vec![]);
            assert_eq!(client.read(1, 30).await.unwrap(), vec![(written, true); 30]);
        });
    }
}

#[test]
fn a_forged_header_in_a_payload_is_data() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let first = client.write(1, 1).await.unwrap();
        let (header, _) = batch_of(&machine, first);
        // A guest writes what it once read from a header, nonce and all, but it lies elsewhere.
        let stolen = machine.disk.peek(header, BLOCK);
        let version = client.next_version();
        let checksums = vec![crc32c::crc32c(&stolen)].into();
        let write = torus_rpc::message::Operation::Write { first: BlockIndex(50), version, durable: false, checksums };
        client.call_with(write, stolen.into()).await.unwrap();
        let (holder, _) = batch_of(&machine, version);
        assert_eq!(restart_with(&machine, &client, || machine.disk.flip(holder + 20, 1)).await, vec![]);
        assert_eq!(client.read(1, 1).await.unwrap(), vec![(first, true)]);
        assert!(!machine.shard().statistics().lost);
    });
}

#[test]
fn a_disk_that_is_not_this_shards_is_refused_with_both_values() {
    simulate(1, |world| async move {
        let (machine, _) = opened(&world).await;
        let runtime = TestRuntime::new(&world, machine.process.get(), NoMetadata);
        let again = TestShard::format(&runtime, &machine.disk, identity(), 1 << 18).await;
        assert!(matches!(again, Err(ShardError::Formatted { .. })), "{again:?}");
        let other = crate::shard::ShardIdentity { shard: ShardIndex(5), ..identity() };
        let refused = TestShard::open(runtime.clone(), machine.disk.clone(), other, key()).await.err().unwrap();
        assert!(refused.to_string().contains("shard 0, expected 5"), "{refused}");
        machine.disk.flip(3, 1);
        machine.disk.flip(4096 + 3, 1);
        let refused = TestShard::open(runtime, machine.disk.clone(), identity(), key()).await.err().unwrap();
        assert!(matches!(refused, ShardError::Superblock(_)), "{refused}");
    });
}

#[test]
fn after_a_failed_sync_nothing_is_answered_until_the_shard_is_opened_anew() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let flushed = client.write(1, 3).await.unwrap();
        client.flush().await.unwrap();
        client.write(1, 3).await.unwrap();
        machine.disk.fail_syncs(1);
        assert!(matches!(client.flush().await, Err(Refusal::Disk { .. })));
        assert!(matches!(client.flush().await, Err(Refusal::Disk { .. })), "no second try");
        assert!(matches!(client.read(1, 3).await, Err(Refusal::Disk { .. })));
        assert!(matches!(client.write(1, 3).await, Err(Refusal::Disk { .. })));
        machine.crash_and_start().await;
        assert!(!client.open().await.unwrap().open_in_previous_epoch);
        assert!(client.read(1, 1).await.unwrap()[0].0 >= flushed);
    });
}

#[test]
fn a_failed_write_is_refused_and_ends_the_incarnation() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        machine.disk.fail_writes(1);
        assert!(matches!(client.write(1, 3).await, Err(Refusal::Disk { .. })));
        assert!(matches!(client.read(1, 3).await, Err(Refusal::Disk { .. })));
        machine.shard().close().await;
    });
}

#[test]
fn a_read_that_fails_once_is_tried_again_and_one_that_keeps_failing_is_damage() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let written = client.write(1, 2).await.unwrap();
        machine.disk.fail_reads(1);
        assert_eq!(client.read(1, 2).await.unwrap(), vec![(written, true); 2]);
        machine.disk.fail_reads(2);
        assert_eq!(client.read(1, 2).await, Err(Refusal::Damaged { block: BlockIndex(1) }));
        assert_eq!(machine.shard().statistics().checksum_errors, 1);
    });
}
