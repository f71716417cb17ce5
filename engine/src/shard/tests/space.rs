//! Space comes back: by overwriting, clearing and dropping, and a full shard says so early and stays usable.

use super::harness::*;
use torus_rpc::message::{Operation, Refusal};
use torus_schema::ids::*;

#[test]
fn a_shard_is_overwritten_for_many_times_its_size() {
    simulate(1, |world| async move {
        let machine = Machine::new(&world, 12, 64).await;
        let client = Client::create(&machine, 1).await;
        client.open().await.unwrap();
        let mut newest = vec![Version::ZERO; 200];
        for round in 0..1200u64 {
            let first = world.random_below(192);
            let version = client.write(first, 8).await.unwrap();
            newest[first as usize..first as usize + 8].fill(version);
            if round % 16 == 0 {
                client.flush().await.unwrap();
            }
        }
        let statistics = machine.shard().statistics();
        assert!(statistics.bytes_appended > 10 * 12 * 64 * 4096, "{statistics:?}");
        assert!(statistics.segments_cleaned > 5 && !statistics.full, "{statistics:?}");
        machine.shard().close().await;
        machine.kill();
        machine.start().await.unwrap();
        client.open().await.unwrap();
        let found: Vec<Version> = client.read(0, 200).await.unwrap().into_iter().map(|(version, _)| version).collect();
        assert_eq!(found, newest);
    });
}

#[test]
fn a_full_shard_says_so_before_it_refuses_and_clearing_brings_it_back() {
    simulate(1, |world| async move {
        let machine = Machine::new(&world, 12, 64).await;
        let client = Client::create(&machine, 1).await;
        client.open().await.unwrap();
        let (mut full_at, mut written) = (None, Vec::new());
        let refused = loop {
            let first = written.len() as u64 * 8;
            let version = client.next_version();
            let (operation, payload) = Client::write_operation(first, 8, version, true);
            let (reply, _) = machine.shard().handle(client.envelope.get(), operation, payload).await;
            if reply.full && full_at.is_none() {
                full_at = Some(written.len());
            }
            match reply.answer {
                torus_rpc::message::Answer::Refused(refusal) => break refusal,
                _ => written.push(version),
            }
            client.flush().await.unwrap();
        };
        assert_eq!(refused, Refusal::NoSpace);
        assert!(full_at.unwrap() + 4 < written.len(), "{full_at:?} of {}", written.len());
        for (number, version) in written.iter().enumerate() {
            assert_eq!(client.read(number as u64 * 8, 8).await.unwrap(), vec![(*version, true); 8]);
        }
        client.clear(0, 8 * written.len() as u64 / 2).await.unwrap();
        client.flush().await.unwrap();
        for block in 0..20 {
            client.write(block * 8, 8).await.unwrap();
            client.flush().await.unwrap();
        }
        assert!(!machine.shard().statistics().full);
    });
}

#[test]
fn a_dropped_volume_gives_all_its_space_back_and_stays_dropped() {
    simulate(1, |world| async move {
        let machine = Machine::new(&world, 12, 64).await;
        let client = Client::create(&machine, 1).await;
        client.open().await.unwrap();
        for number in 0..30 {
            client.write(number * 8, 8).await.unwrap();
        }
        assert_eq!(machine.shard().statistics().live_bytes, 240 * 4096);
        machine.shard().drop_volume(client.volume).await.unwrap();
        machine.shard().drop_volume(client.volume).await.unwrap();
        assert_eq!(machine.shard().statistics().live_bytes, 0);
        assert_eq!(client.read(0, 1).await, Err(Refusal::NotOpen));
        machine.crash_and_start().await;
        let statistics = machine.shard().statistics();
        assert_eq!((statistics.live_bytes, statistics.volumes), (0, 0));
        client.envelope.set(torus_rpc::message::Envelope { epoch: Epoch(0), ..client.envelope.get() });
        assert!(matches!(client.call(client.creation()).await, Err(Refusal::Malformed { .. })), "ids are never reused");
    });
}

#[test]
fn what_is_not_flushed_keeps_what_it_supersedes() {
    simulate(1, |world| async move {
        let machine = Machine::new(&world, 12, 64).await;
        let client = Client::create(&machine, 1).await;
        client.open().await.unwrap();
        for _ in 0..10 {
            client.write(0, 8).await.unwrap();
        }
        assert_eq!(machine.shard().statistics().live_bytes, 80 * 4096);
        client.flush().await.unwrap();
        // The next record carries F.
        client.write(100, 1).await.unwrap();
        assert_eq!(machine.shard().statistics().live_bytes, 9 * 4096);
    });
}

#[test]
fn clearing_a_pebibyte_costs_one_record_and_no_page() {
    simulate(1, |world| async move {
        let machine = Machine::new(&world, 12, 64).await;
        let client = Client::create(&machine, 1).await;
        client.open().await.unwrap();
        client.write(5, 3).await.unwrap();
        let before = machine.shard().statistics().bytes_appended;
        let cleared = client.clear(0, 1 << 38).await.unwrap();
        assert!(machine.shard().statistics().bytes_appended - before <= 2 * 4096);
        let last = (1 << 38) - 4;
        assert_eq!(client.read(last, 4).await.unwrap(), vec![(cleared, false); 4]);
        // A write that was sent before it and comes after it loses.
        let late = Version::new(cleared.epoch, cleared.sequence - 1);
        let (operation, payload) = Client::write_operation(5, 3, late, false);
        client.call_with(operation, payload).await.unwrap();
        machine.crash_and_start().await;
        client.open().await.unwrap();
        let found = client.read(5, 3).await.unwrap();
        assert!(found.iter().all(|found| *found == (cleared, false) || found.0 < late || found.1), "{found:?}");
        assert!(matches!(client.call(Operation::Flush).await, Ok(torus_rpc::message::Answer::Flushed)));
    });
}
