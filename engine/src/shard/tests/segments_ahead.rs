//! The next segment is opened while the one before it fills.

use super::harness::*;
use super::recovery::{blocks, restart_with};
use crate::log::segment::Opening;
use std::cell::Cell;
use std::rc::Rc;
use torus_schema::ids::*;

async fn opened(world: &torus_rpc::runtime::simulated::World, segments: u64) -> (Machine, Client) {
    let machine = Machine::new(world, segments, 64).await;
    let client = Client::create(&machine, 1).await;
    client.open().await.unwrap();
    (machine, client)
}

#[test]
fn appends_do_not_wait_at_a_segments_end_and_no_sync_is_made_for_the_next_one() {
    const SEEDS: u64 = 20;
    let (opened_all, waited_all) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    for seed in 0..SEEDS {
        let (opened_all, waited_all) = (opened_all.clone(), waited_all.clone());
        simulate(seed, |world| async move {
            let (machine, client) = opened(&world, 40).await;
            for block in 0..300 {
                client.write(block * 4, 4).await.unwrap();
                if block % 4 == 0 {
                    client.flush().await.unwrap();
                }
            }
            let statistics = machine.shard().statistics();
            assert!(statistics.segments_opened > 20, "{statistics:?}");
            // One for each flush, one for each footer and each opening that was waited for; instances and the open.
            let (opened, waited) = (statistics.segments_opened, statistics.segments_waited_for);
            assert!(statistics.syncs <= 75 + opened + waited + 2, "{statistics:?}");
            opened_all.set(opened_all.get() + opened);
            waited_all.set(waited_all.get() + waited);
        });
    }
    // The very first of each; else only where the disk took longer for an opening than for all until the last flush before
    // it was needed.
    let waited = waited_all.get() - SEEDS;
    println!("{waited} of {} were waited for", opened_all.get());
    assert!(waited * 25 <= opened_all.get(), "{waited} of {}", opened_all.get());
}

#[test]
fn without_any_flush_the_next_segment_is_made_durable_before_it_is_written_to() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world, 40).await;
        for block in 0..200 {
            client.write(block * 4, 4).await.unwrap();
        }
        machine.crash_and_start().await;
        client.open().await.unwrap();
        assert!(!machine.shard().statistics().lost);
    });
}

#[test]
fn a_segment_opened_ahead_and_never_written_to_is_free_again_after_a_crash() {
    for seed in 0..40 {
        simulate(seed, |world| async move {
            let (machine, client) = opened(&world, 12).await;
            let mut versions = vec![(Version::ZERO, false); 64];
            for round in 0..25u64 {
                // About half a segment, so that each start has one ahead, or on its way.
                for block in 0..4 + round % 6 {
                    let first = (round * 11 + block * 5) % 60;
                    let version = client.write(first, 4).await.unwrap();
                    versions[first as usize..first as usize + 4].fill((version, true));
                }
                client.flush().await.unwrap();
                assert_eq!(restart_with(&machine, &client, || {}).await, vec![]);
                assert_eq!(client.read(0, 64).await.unwrap(), versions, "round {round}");
            }
            client.flush().await.unwrap();
            assert!(machine.shard().statistics().segments_free >= 4, "{:?}", machine.shard().statistics());
        });
    }
}

#[test]
fn after_a_clean_stop_no_segment_is_searched() {
    simulate(1, |world| async move {
        let (machine, client) = opened(&world, 40).await;
        for block in 0..50 {
            client.write(block * 4, 4).await.unwrap();
        }
        machine.shard().close().await;
        machine.kill();
        let openings = blocks(&machine).iter().filter(|(_, block)| Opening::decode(block).is_ok()).count() as u64;
        let before = machine.disk.counts().bytes_read;
        machine.start().await.unwrap();
        let read = machine.disk.counts().bytes_read - before;
        // Superblock, three blocks at the ends of each, one for the data of each that has some.
        assert!(read <= (2 + 3 * 40 + openings) * 4096, "{read} bytes, {openings} openings");
    });
}
