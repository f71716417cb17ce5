//! Passes over everything, with damage, under traffic, stopped and gone on with.

use super::harness::*;
use super::repair::Pair;
use crate::shard::{ScrubPass, ScrubReport};
use std::time::Duration;
use torus_schema::ids::*;
use torus_schema::limits::{BLOCK_BYTES, MIB};

/// Fast enough that a pass over the small disk takes a second or two of virtual time.
const RATE: u64 = 4 * MIB;

fn pass(started_s: u64) -> ScrubPass {
    ScrubPass { started_s, ..ScrubPass::default() }
}

async fn finished(client: &Client) -> ScrubPass {
    let shard = client.machine.shard();
    loop {
        if let ScrubReport { running: None, finished: Some(pass) } = shard.scrub_report() {
            return pass;
        }
        client.machine.world.sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn a_pass_reads_every_needed_block_finds_the_damaged_ones_and_has_them_repaired() {
    for seed in 0..10 {
        simulate(seed, move |world| async move {
            let pair = Pair::new(&world).await;
            pair.link();
            let mut last = Version::ZERO;
            for first in (0..150).step_by(5) {
                last = pair.write(first, 5).await;
            }
            // Some of it superseded: that is not read, unless it may be taken back.
            pair.write(0, 5).await;
            pair.here.flush().await.unwrap();
            pair.write(200, 1).await;
            let rotten = [3, 77, 147];
            rotten.iter().for_each(|block| pair.here.rot(*block));
            let shard = pair.here.machine.shard();
            shard.start_scrub(pass(100), RATE);
            let result = finished(&pair.here).await;
            assert_eq!((result.started_s, result.damaged, result.conflicts), (100, 3, 0), "seed {seed}");
            assert!((151..=156).contains(&result.blocks_read), "seed {seed}: {result:?}");
            assert_eq!(result.blocks_compared, 151);
            pair.here.healed().await;
            assert_eq!(shard.statistics().repaired, 3);
            assert_eq!(pair.here.read(145, 5).await.unwrap(), vec![(last, true); 5]);
            shard.start_scrub(pass(200), RATE);
            let again = finished(&pair.here).await;
            assert_eq!((again.started_s, again.damaged), (200, 0));
        });
    }
}

#[test]
fn two_whole_different_copies_of_one_version_are_told_once_and_left_alone() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        pair.link();
        pair.write(3, 2).await;
        let version = pair.write_two_things(4).await;
        for started_s in [100, 200] {
            pair.here.machine.shard().start_scrub(pass(started_s), RATE);
            assert_eq!(finished(&pair.here).await.conflicts, 1);
        }
        let statistics = pair.here.machine.shard().statistics();
        assert_eq!((statistics.conflicts, statistics.damaged), (1, 0));
        assert_eq!(pair.here.read(4, 1).await.unwrap(), vec![(version, true)]);
        assert_eq!(pair.here.machine.shard().damage(9).conflicts.len(), 1);
        // Written anew, and the superseded version let go of: settled.
        pair.write(4, 1).await;
        pair.here.flush().await.unwrap();
        pair.here.write(9, 1).await.unwrap();
        pair.here.machine.shard().start_scrub(pass(300), RATE);
        assert_eq!(finished(&pair.here).await.conflicts, 0);
        assert_eq!(pair.here.machine.shard().damage(9).conflicts.len(), 0);
    });
}

#[test]
fn a_pass_takes_as_long_as_its_rate_says_and_stops_when_told() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        pair.write(0, 100).await;
        let shard = pair.here.machine.shard();
        let before = world.now();
        shard.start_scrub(pass(100), 10 * BLOCK_BYTES);
        assert_eq!(finished(&pair.here).await.blocks_read, 100);
        let seconds = world.now().since(before).as_secs();
        assert!((9..=11).contains(&seconds), "100 blocks at 10 a second took {seconds} s");
        shard.start_scrub(pass(200), 1);
        world.sleep(Duration::from_secs(1)).await;
        let stopped = shard.stop_scrub().unwrap();
        assert_eq!(stopped.started_s, 200);
        assert_eq!(shard.scrub_report().running, None);
        // Gone on with where it was.
        shard.start_scrub(ScrubPass { segment: 5, ..stopped }, RATE);
        assert_eq!(finished(&pair.here).await.blocks_read, stopped.blocks_read);
        shard.start_scrub(pass(300), 1);
        world.sleep(Duration::from_secs(1)).await;
        shard.close().await;
    });
}

#[test]
fn a_segment_whose_footer_is_damaged_is_told_and_what_its_headers_list_is_verified_all_the_same() {
    simulate(1, |world| async move {
        let pair = Pair::new(&world).await;
        pair.link();
        // The first of eight segments of 64 blocks is full, and sealed.
        let version = pair.write(0, 3).await;
        for first in (10..110).step_by(5) {
            pair.write(first, 5).await;
        }
        let here = &pair.here;
        let shard = here.machine.shard();
        let position = here.position(1);
        shard.close().await;
        here.machine.kill();
        here.machine.start().await.unwrap();
        here.open().await.unwrap();
        pair.link();
        here.rot(1);
        let segment = here.machine.shard().geometry.segment_of(position);
        let geometry = here.machine.shard().geometry;
        let last = crate::log::Position(geometry.first(segment).0 + geometry.blocks - 1);
        here.machine.disk.flip(crate::log::Geometry::offset(last) + BLOCK_BYTES - 10, 1);
        let shard = here.machine.shard();
        shard.start_scrub(pass(100), RATE);
        let result = finished(here).await;
        assert_eq!((result.segments_unread, result.damaged), (1, 1));
        // The one that was mended may be read once more where it went.
        assert!((103..=104).contains(&result.blocks_read), "{result:?}");
        here.healed().await;
        assert_eq!(here.read(0, 3).await.unwrap(), vec![(version, true); 3]);
    });
}

#[test]
fn a_pass_begun_while_the_one_that_was_stopped_still_waits_for_an_answer_reads_everything_itself() {
    for seed in 0..20 {
        simulate(seed, move |world| async move {
            let pair = Pair::new(&world).await;
            pair.link();
            pair.write(0, 100).await;
            let shard = pair.here.machine.shard();
            shard.start_scrub(pass(100), RATE);
            // At any point of it: while it reads, and while it compares.
            world.sleep(Duration::from_millis(seed * 6)).await;
            shard.stop_scrub();
            shard.start_scrub(pass(200), RATE);
            loop {
                let result = finished(&pair.here).await;
                if result.started_s == 200 {
                    assert_eq!(
                        (result.blocks_read, result.blocks_compared, result.segment),
                        (100, 100, 8),
                        "seed {seed}"
                    );
                    break;
                }
                world.sleep(Duration::from_millis(50)).await;
            }
        });
    }
}

#[test]
fn segments_are_cleaned_and_used_again_under_a_pass_and_nothing_is_taken_for_damaged() {
    for seed in 0..10 {
        simulate(seed, move |world| async move {
            let pair = Pair::new(&world).await;
            pair.link();
            let shard = pair.here.machine.shard();
            for round in 0..30 {
                shard.start_scrub(pass(round), MIB);
                for number in 0..60 {
                    let block = if number % 6 == 0 { 200 + (round * 10 + number / 6) % 100 } else { 3 };
                    pair.write(block, 1).await;
                    pair.here.flush().await.unwrap();
                    pair.there.flush().await.unwrap();
                }
            }
            let result = finished(&pair.here).await;
            let statistics = shard.statistics();
            assert!(statistics.segments_cleaned > 0 && result.blocks_read > 0, "seed {seed}: {statistics:?}");
            assert_eq!((statistics.damaged_found, statistics.conflicts), (0, 0), "seed {seed}");
        });
    }
}
