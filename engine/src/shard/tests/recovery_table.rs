//! The rest of the tables in `log::recovery`, one test per row: openings, footers, and what stands in the wrong place.

use super::harness::*;
use super::recovery::{batch_of, blocks, opened, restart_with};
use crate::log::batch::UncheckedHeader;
use crate::log::footer::Trailer;
use crate::log::segment::Opening;
use crate::log::superblock::decode_either;
use crate::log::{BLOCK, Geometry, SEGMENTS_START_BLOCK, SegmentIndex};
use torus_rpc::message::Refusal;
use torus_rpc::runtime::Disk;
use torus_schema::ids::*;

const GEOMETRY: Geometry = Geometry { segments: 8, blocks: 64 };

fn first_block(segment: u32) -> u64 {
    Geometry::offset(GEOMETRY.first(SegmentIndex(segment)))
}

fn last_block(segment: u32) -> u64 {
    first_block(segment + 1) - BLOCK as u64
}

/// The newest opening that says it is of the segment it stands in.
fn opening_of(machine: &Machine, segment: u32) -> Opening {
    let opening = Opening::decode(&machine.disk.peek(first_block(segment), BLOCK)).unwrap();
    assert_eq!(opening.identity.segment, SegmentIndex(segment));
    opening
}

async fn write_block(machine: &Machine, offset: u64, bytes: &[u8]) {
    let mut buffer = machine.disk.allocate(BLOCK);
    buffer.copy_from_slice(bytes);
    machine.disk.write(offset, buffer).await.unwrap();
    machine.disk.sync().await.unwrap();
}

/// Writes 30 blocks, durable, into segment 0, which has a footer or has none yet.
async fn written(machine: &Machine, client: &Client, sealed: bool) -> Version {
    let version = client.write(1, 30).await.unwrap();
    client.flush().await.unwrap();
    client.write(100, 1).await.unwrap();
    client.flush().await.unwrap();
    if sealed {
        machine.shard().close().await;
    }
    version
}

#[test]
fn a_damaged_opening_is_made_up_for_by_the_header_or_the_trailer_that_names_the_same_use() {
    for (sealed, unreadable) in [(true, false), (false, false), (true, true), (false, true)] {
        simulate(1, move |world| async move {
            let (machine, client) = opened(&world).await;
            let version = written(&machine, &client, sealed).await;
            let damage = || match unreadable {
                true => machine.disk.make_bad(first_block(0), BLOCK),
                false => machine.disk.flip(first_block(0) + 17, 1),
            };
            assert_eq!(restart_with(&machine, &client, damage).await, vec![]);
            assert_eq!(client.read(1, 30).await.unwrap(), vec![(version, true); 30]);
            assert!(!machine.shard().statistics().lost);
        });
    }
}

#[test]
fn a_footer_that_only_the_trailer_names_is_believed_unless_a_header_of_a_later_use_is_there() {
    for later in [false, true] {
        simulate(1, move |world| async move {
            let (machine, client) = opened(&world).await;
            let version = written(&machine, &client, true).await;
            machine.kill();
            machine.disk.flip(first_block(0) + 17, 1);
            machine.disk.flip(first_block(0) + BLOCK as u64 + 17, 1);
            if later {
                let block = UncheckedHeader::decode(&machine.disk.peek(batch_of(&machine, version).0, BLOCK)).unwrap();
                let position = GEOMETRY.first(SegmentIndex(0)).0 + 60;
                let identity = crate::log::SegmentIdentity { sequence: block.identity.sequence + 9, ..block.identity };
                let position = crate::log::Position(position);
                let (number, durable, first_batch) = (block.number, block.durable, block.first_batch);
                let records = vec![];
                let header =
                    crate::log::batch::BatchHeader { identity, number, durable, first_batch, position, records };
                write_block(&machine, Geometry::offset(position), &header.encode()).await;
            }
            machine.start().await.unwrap();
            assert_eq!(machine.shard().statistics().lost, later);
            if !later {
                client.open().await.unwrap();
                assert_eq!(client.read(1, 30).await.unwrap(), vec![(version, true); 30]);
            }
        });
    }
}

#[test]
fn a_segment_none_of_whose_ends_can_be_read_is_lost_once_and_then_empty() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        written(&machine, &client, false).await;
        machine.kill();
        machine.disk.flip(first_block(0) + 17, 1);
        machine.disk.flip(first_block(0) + BLOCK as u64 + 17, 1);
        machine.start().await.unwrap();
        assert!(machine.shard().statistics().lost);
        // Given anew, instances are not lost again by the same damage.
        let client = Client::create(&machine, 2).await;
        client.open().await.unwrap();
        let version = client.write(1, 3).await.unwrap();
        client.flush().await.unwrap();
        assert_eq!(restart_with(&machine, &client, || {}).await, vec![]);
        assert_eq!(client.read(1, 3).await.unwrap(), vec![(version, true); 3]);
    });
}

#[test]
fn an_opening_that_stands_in_a_segment_never_used_was_misdirected_and_nothing_is_lost() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let version = written(&machine, &client, false).await;
        machine.kill();
        let opening = opening_of(&machine, 0);
        write_block(&machine, first_block(5), &opening.encode()).await;
        machine.start().await.unwrap();
        client.open().await.unwrap();
        assert_eq!(client.read(1, 30).await.unwrap(), vec![(version, true); 30]);
        assert!(!machine.shard().statistics().lost);
    });
}

#[test]
fn a_footer_that_stands_at_the_end_of_another_segment_is_not_its_footer() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let version = written(&machine, &client, true).await;
        machine.kill();
        assert!(Trailer::decode_last(&machine.disk.peek(last_block(0), BLOCK)).is_ok());
        let trailer = machine.disk.peek(last_block(0), BLOCK);
        machine.start().await.unwrap();
        client.open().await.unwrap();
        let newer = client.write(5, 2).await.unwrap();
        client.flush().await.unwrap();
        let (header, _) = batch_of(&machine, newer);
        let segment = (header / BLOCK as u64 - SEGMENTS_START_BLOCK) as u32 / GEOMETRY.blocks;
        assert_ne!(segment, 0);
        machine.kill();
        write_block(&machine, last_block(segment), &trailer).await;
        machine.start().await.unwrap();
        client.open().await.unwrap();
        assert_eq!(client.read(4, 2).await.unwrap(), vec![(version, true), (newer, true)]);
        assert!(!machine.shard().statistics().lost);
    });
}

#[test]
fn any_block_of_a_footer_may_be_damaged_or_unreadable() {
    for (place, unreadable) in (0..4).flat_map(|place| [(place, false), (place, true)]) {
        simulate(1, move |world| async move {
            let (machine, client) = opened(&world).await;
            let mut versions = Vec::new();
            for block in 0..12 {
                versions.push((client.write(block, 1).await.unwrap(), true));
            }
            client.flush().await.unwrap();
            machine.shard().close().await;
            let end = last_block(0) + BLOCK as u64;
            // Trailer, notes, data, and the trailer's copy.
            let offset = [end - 30, end - 150, end - 900, last_block(0) + 20][place];
            let damage = || match unreadable {
                true => machine.disk.make_bad(last_block(0), BLOCK),
                false => machine.disk.flip(offset, 1),
            };
            assert_eq!(restart_with(&machine, &client, damage).await, vec![]);
            assert_eq!(client.read(0, 12).await.unwrap(), versions);
            assert!(!machine.shard().statistics().lost);
        });
    }
}

#[test]
fn an_old_segment_without_its_last_block_is_bounded_by_the_copy_of_its_trailer() {
    simulate(1, |world| async move {
        let machine = Machine::new(&world, 20, 64).await;
        let client = Client::create(&machine, 1).await;
        client.open().await.unwrap();
        let mut versions = Vec::new();
        // Many single blocks: the footer is longer than the block that goes bad.
        for block in 0..200 {
            versions.push((client.write(block, 1).await.unwrap(), true));
            client.flush().await.unwrap();
        }
        // The segments behind segment 0 are emptied, and used again.
        for _ in 0..40 {
            for (block, newest) in (30..).zip(&mut versions[30..]) {
                *newest = (client.write(block, 1).await.unwrap(), true);
            }
            client.flush().await.unwrap();
        }
        machine.shard().close().await;
        let damage = || machine.disk.flip(last_block(0) + BLOCK as u64 - 5, 1);
        assert_eq!(restart_with(&machine, &client, damage).await, vec![]);
        assert_eq!(client.read(0, 200).await.unwrap(), versions);
    });
}

#[test]
fn records_of_an_earlier_use_of_a_segment_are_not_its_records() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let mut versions = vec![(Version::ZERO, false); 40];
        for round in 0..250u64 {
            let first = round * 7 % 36;
            let version = client.write(first, 4).await.unwrap();
            versions[first as usize..first as usize + 4].fill((version, true));
            client.flush().await.unwrap();
        }
        // Headers with good checksums, in a segment that is open now under another nonce.
        let openings: Vec<Opening> = (0..8)
            .filter_map(|segment| Opening::decode(&machine.disk.peek(first_block(segment), BLOCK)).ok())
            .collect();
        let newest = openings.iter().max_by_key(|opening| opening.identity.sequence).unwrap();
        assert!(newest.identity.sequence > 8, "segments were used again");
        let old = blocks(&machine)
            .iter()
            .filter_map(|(_, block)| UncheckedHeader::decode(block).ok())
            .filter(|header| {
                openings.iter().any(|opening| {
                    opening.identity.segment == header.identity.segment
                        && opening.identity.nonce != header.identity.nonce
                })
            })
            .count();
        assert!(old > 0, "remainders of earlier uses are there");
        assert_eq!(restart_with(&machine, &client, || {}).await, vec![]);
        assert_eq!(client.read(0, 40).await.unwrap(), versions);
    });
}

#[test]
fn a_block_that_cannot_be_read_in_an_open_segment_is_a_hole_or_damage_and_not_the_end() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let first = client.write(1, 3).await.unwrap();
        let second = client.write(9, 2).await.unwrap();
        client.flush().await.unwrap();
        // Its header says that what came before is durable.
        client.write(30, 1).await.unwrap();
        let (_, payload) = batch_of(&machine, first);
        let last = client.write(20, 1).await.unwrap();
        let (header, _) = batch_of(&machine, last);
        let damage = || {
            machine.disk.make_bad(payload + BLOCK as u64, BLOCK);
            machine.disk.make_bad(header, BLOCK);
        };
        assert_eq!(restart_with(&machine, &client, damage).await, vec![]);
        let statistics = machine.shard().statistics();
        assert_eq!((statistics.damaged, statistics.damaged_found), (1, 1), "known from the start, for repair");
        assert_eq!(client.read(1, 3).await, Err(Refusal::Damaged { block: BlockIndex(2) }));
        assert_eq!(client.read(9, 2).await.unwrap(), vec![(second, true); 2]);
        assert_eq!(client.read(20, 1).await.unwrap(), vec![(Version::ZERO, false)], "it was never flushed");
    });
}

#[test]
fn a_read_error_that_passes_changes_nothing_and_one_of_everything_is_the_disk() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world).await;
        let version = written(&machine, &client, false).await;
        for failing in [1, 2, 3] {
            let missing = restart_with(&machine, &client, || machine.disk.fail_reads(failing)).await;
            assert_eq!(missing, vec![], "{failing} reads failed");
            assert_eq!(client.read(1, 30).await.unwrap(), vec![(version, true); 30]);
        }
        machine.kill();
        machine.disk.make_bad(first_block(0), 8 * 64 * BLOCK);
        let refused = machine.start().await.err().unwrap();
        assert!(matches!(refused, crate::shard::ShardError::Disk(_)), "{refused}");
    });
}

#[test]
fn a_damaged_copy_of_the_superblock_is_written_anew_from_the_other() {
    for (copy, unreadable) in [(0u64, false), (1, false), (0, true), (1, true)] {
        simulate(1, move |world| async move {
            let (machine, client) = opened(&world).await;
            let version = written(&machine, &client, true).await;
            let offset = copy * BLOCK as u64;
            let damage = || match unreadable {
                true => machine.disk.make_bad(offset, BLOCK),
                false => machine.disk.flip(offset + 70, 4),
            };
            restart_with(&machine, &client, damage).await;
            assert_eq!(client.read(1, 30).await.unwrap(), vec![(version, true); 30]);
            let both = machine.disk.peek(0, 2 * BLOCK);
            assert!(decode_either(&both).is_ok() && both[..BLOCK] == both[BLOCK..]);
        });
    }
}
