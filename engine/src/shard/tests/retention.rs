//! What a writer said it needs is kept, also over restarts and cleaning; what it does not need goes; what it took back
//! never comes again.

use super::harness::*;
use crate::index::{AtTie, Found};
use crate::log::Geometry;
use crate::log::record::{Clear, Record};
use crate::shard::state::Contents;
use torus_rpc::message::{Answer, Operation, Refusal, Revoked, Run};
use torus_rpc::runtime::Disk;
use torus_rpc::runtime::simulated::World;
use torus_schema::ids::*;
use torus_schema::limits::BLOCK_BYTES;

async fn opened(world: &World) -> Client {
    let machine = Machine::new(world, 12, 64).await;
    let client = Client::create(&machine, 1).await;
    client.open().await.unwrap();
    client
}

/// Version of the block as of `pin`; checks its content.
async fn read_at(client: &Client, block: u64, pin: Version) -> (Version, bool) {
    let found = {
        let shard = client.machine.shard();
        let contents = &shard.state.borrow().contents;
        contents.find_at(contents.place_of(client.volume, BlockIndex(block)), pin)
    };
    if let Found::Data(entry) = found {
        let bytes = client.machine.disk.read(Geometry::offset(entry.position), BLOCK_BYTES as usize).await.unwrap();
        assert!(bytes[..] == content(BlockIndex(block), entry.version), "block {block} of {}", entry.version);
    }
    (found.version(), matches!(found, Found::Data(_)))
}

/// Enough for every segment to be cleaned or reused several times.
async fn churn(client: &Client, first: u64) {
    for round in 0..400u64 {
        client.write(first + round * 37 % 120, 4).await.unwrap();
        if round % 8 == 0 {
            client.flush().await.unwrap();
        }
    }
}

fn revoke(block: u64, version: Version) -> Operation {
    Operation::Revoke { revoked: vec![Revoked { block: BlockIndex(block), version }] }
}

fn live_blocks(client: &Client) -> u64 {
    client.machine.shard().statistics().live_bytes / BLOCK_BYTES
}

#[test]
fn before_a_writer_says_what_it_needs_nothing_is_freed() {
    simulate(1, |world| async move {
        let machine = Machine::new(&world, 12, 64).await;
        let client = Client::create(&machine, 1).await;
        client.open_silently(Epoch(1)).await.unwrap();
        for _ in 0..10 {
            client.write(0, 4).await.unwrap();
            client.flush().await.unwrap();
        }
        client.write(8, 1).await.unwrap();
        assert_eq!(live_blocks(&client), 41);
        client.retain(vec![], None).await.unwrap();
        assert_eq!(live_blocks(&client), 5);
    });
}

#[test]
fn what_a_pin_reads_is_kept_over_cleaning_and_restarts_until_the_pin_goes() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let never = 900;
        let first = client.write(500, 8).await.unwrap();
        let cleared = client.clear(502, 504).await.unwrap();
        let second = client.write(504, 2).await.unwrap();
        let pin = client.last_version();
        client.flush().await.unwrap();
        client.retain(vec![pin], None).await.unwrap();
        client.write(500, 8).await.unwrap();
        client.clear(506, 508).await.unwrap();
        client.flush().await.unwrap();
        let expected = [first, first, cleared, cleared, second, second, first, first];
        for round in 0..3 {
            churn(&client, 0).await;
            assert!(client.machine.shard().statistics().segments_cleaned > 3);
            for (block, version) in (500..).zip(expected) {
                let found = read_at(&client, block, pin).await;
                // A clear goes when nothing is left that it hid: then it reads as if nothing was ever written.
                let forgotten = version == cleared && found == (Version::ZERO, false);
                assert!(found == (version, version != cleared) || forgotten, "block {block}, round {round}: {found:?}");
            }
            assert_eq!(read_at(&client, never, pin).await, (Version::ZERO, false));
            client.machine.crash_and_start().await;
            client.open_silently(Epoch(round + 2)).await.unwrap();
            client.retain(vec![pin], None).await.unwrap();
        }
        let before = live_blocks(&client);
        client.retain(vec![], None).await.unwrap();
        assert!(live_blocks(&client) <= before - 6, "{} of {before}", live_blocks(&client));
    });
}

#[test]
fn a_revoked_version_never_was_and_what_it_hid_shows_again() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let old = client.write(10, 4).await.unwrap();
        let cleared = client.clear(12, 2048).await.unwrap();
        client.flush().await.unwrap();
        let new = client.write(10, 4).await.unwrap();
        let newest = client.write(11, 1).await.unwrap();
        let clear = client.clear(0, 4096).await.unwrap();
        let revoked = |block| [new, clear].map(|version| Revoked { block: BlockIndex(block), version });
        let revoked: Vec<Revoked> = (10..13).flat_map(revoked).collect();
        let expected = vec![(old, true), (newest, true), (cleared, false), (clear, false)];
        assert_eq!(client.call(Operation::Revoke { revoked: revoked.clone() }).await, Ok(Answer::Revoked));
        assert_eq!(client.read(10, 4).await.unwrap(), expected);
        assert_eq!(client.call(Operation::Revoke { revoked }).await, Ok(Answer::Revoked), "once more");
        let (again, payload) = Client::write_operation(9, 3, new, false);
        assert!(matches!(client.call_with(again, payload).await, Err(Refusal::Malformed { .. })));
        assert_eq!(client.read(10, 4).await.unwrap(), expected);
        for round in 0..3u32 {
            client.machine.crash_and_start().await;
            client.open().await.unwrap();
            let found = client.read(10, 4).await.unwrap();
            assert_eq!(found[..2], expected[..2], "round {round}");
            assert!(found[2..].iter().all(|(_, data)| !data), "round {round}: {found:?}");
            churn(&client, 500).await;
        }
    });
}

#[test]
fn a_clear_of_whole_extents_revoked_under_something_newer_never_was_either() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let old = client.write(10, 4).await.unwrap();
        let clear = client.clear(0, 4096).await.unwrap();
        let new = client.write(10, 2).await.unwrap();
        client.call(revoke(10, clear)).await.unwrap();
        client.call(revoke(11, clear)).await.unwrap();
        let expected = vec![(new, true), (new, true), (clear, false), (clear, false)];
        assert_eq!(client.read(10, 4).await.unwrap(), expected);
        client.call(revoke(11, new)).await.unwrap();
        let expected = vec![(new, true), (old, true), (clear, false), (clear, false)];
        assert_eq!(client.read(10, 4).await.unwrap(), expected);
        let place = |contents: &Contents, block| contents.place_of(client.volume, BlockIndex(block));
        let again = |contents: &mut Contents| {
            let (slice, flush_point) = (place(contents, 10).slice, Version::ZERO);
            let (volume, first, count) = (client.volume, BlockIndex(0), 4096);
            contents.replay(
                &Record::Clear(Clear { volume, flush_point, slice, first, count, version: clear }),
                AtTie::NewcomerWins,
            );
        };
        again(&mut client.machine.shard().state.borrow_mut().contents);
        assert_eq!(client.read(10, 4).await.unwrap(), expected, "copied by the cleaner");
        client.call(revoke(10, new)).await.unwrap();
        assert_eq!(client.read(10, 1).await.unwrap(), vec![(old, true)]);
    });
}

#[test]
fn a_revocation_is_kept_as_long_as_the_clear_it_is_about() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let pinned = client.write(20, 1).await.unwrap();
        client.flush().await.unwrap();
        let old = client.write(10, 1).await.unwrap();
        let clear = client.clear(10, 21).await.unwrap();
        client.call(revoke(10, clear)).await.unwrap();
        client.flush().await.unwrap();
        client.retain(vec![pinned], None).await.unwrap();
        for _ in 0..3 {
            churn(&client, 500).await;
            client.machine.crash_and_start().await;
            client.open_silently(Epoch(client.envelope.get().epoch.0 + 1)).await.unwrap();
            assert_eq!(client.read(10, 1).await.unwrap(), vec![(old, true)]);
            assert_eq!(read_at(&client, 20, pinned).await, (pinned, true));
            client.retain(vec![pinned], None).await.unwrap();
        }
    });
}

#[test]
fn after_a_revocation_an_older_version_may_be_written_and_counts() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let authoritative = client.next_version();
        let ghost = client.write(10, 1).await.unwrap();
        client.flush().await.unwrap();
        client.call(revoke(10, ghost)).await.unwrap();
        assert_eq!(client.read(10, 1).await.unwrap(), vec![(Version::ZERO, false)]);
        let (operation, payload) = Client::write_operation(10, 1, authoritative, true);
        client.call_with(operation, payload).await.unwrap();
        assert_eq!(client.read(10, 1).await.unwrap(), vec![(authoritative, true)]);
        client.machine.crash_and_start().await;
        client.open().await.unwrap();
        assert_eq!(client.read(10, 1).await.unwrap(), vec![(authoritative, true)]);
        assert_eq!(live_blocks(&client), 1);
    });
}

#[test]
fn notes_go_when_nothing_they_are_about_can_be_found_any_more() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let noted = || client.machine.shard().state.borrow().contents.ledger.lengths();
        let ghost = client.write(400, 1).await.unwrap();
        client.call(revoke(400, ghost)).await.unwrap();
        for block in 0..20 {
            client.write(500 + 2 * block, 1).await.unwrap();
            client.clear(500 + 2 * block, 501 + 2 * block).await.unwrap();
        }
        let other = Client::create(&client.machine, 2).await;
        client.machine.shard().drop_volume(other.volume).await.unwrap();
        client.flush().await.unwrap();
        // A replica may be stale just below the last five clears.
        let since = Version::new(Epoch(1), client.last_version().sequence - 10);
        client.retain(vec![], Some(since)).await.unwrap();
        let before = noted();
        assert_eq!((before.clears, before.revokes, before.drops), (40, 1, 1), "one of each clear for each slice");
        for _ in 0..6 {
            churn(&client, 0).await;
        }
        let after = noted();
        assert_eq!((after.clears, after.revokes, after.drops), (10, 0, 0));
        client.retain(vec![], None).await.unwrap();
        for _ in 0..6 {
            churn(&client, 0).await;
        }
        assert_eq!(noted().clears, 0);
        client.machine.crash_and_start().await;
        client.open().await.unwrap();
        for found in [client.read(400, 1).await.unwrap(), client.read(500, 40).await.unwrap()] {
            assert!(found.iter().all(|(_, data)| !data), "{found:?}");
        }
    });
}

#[test]
fn a_map_tells_where_there_is_data_and_retain_is_checked() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let version = client.write(3, 2).await.unwrap();
        let map = Operation::Map { first: BlockIndex(2), count: 4 };
        let run = |count, version, data| Run { count, version, data };
        let runs = vec![run(1, Version::ZERO, false), run(2, version, true), run(1, Version::ZERO, false)];
        assert_eq!(client.call(map).await, Ok(Answer::Mapped { runs: runs.into() }));
        let extent = |count| Operation::Map { first: BlockIndex(0), count };
        let whole = vec![run(3, Version::ZERO, false), run(2, version, true), run(1019, Version::ZERO, false)];
        assert_eq!(client.call(extent(1024)).await, Ok(Answer::Mapped { runs: whole.into() }));
        assert!(matches!(client.call(extent(1025)).await, Err(Refusal::Malformed { .. })));
        let late = Version::new(Epoch(9), 1);
        for (pins, stale_since) in [(vec![late], None), (vec![version, Version::ZERO], None), (vec![], Some(late))] {
            assert!(matches!(client.retain(pins, stale_since).await, Err(Refusal::Malformed { .. })));
        }
    });
}
