//! What is refused, and with what.

use super::harness::*;
use bytes::Bytes;
use futures::future::join_all;
use std::rc::Rc;
use torus_rpc::message::{Answer, Envelope, Operation, Refusal, Token};
use torus_rpc::runtime::simulated::World;
use torus_schema::ids::*;

async fn opened(world: &World) -> Client {
    let machine = Machine::new(world, 8, 64).await;
    let client = Client::create(&machine, 1).await;
    client.open().await.unwrap();
    client
}

fn open_as(client: &Client, epoch: u32, owner: &str) -> Operation {
    let token = key().sign(client.volume, Epoch(epoch), owner);
    Operation::Open { token, owner: owner.to_string(), slices: vec![] }
}

#[test]
fn a_stranger_can_neither_create_nor_open() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let slices = placement(client.volume).slices().to_vec();
        let create = Operation::CreateInstances {
            token: Token([0; 32]),
            placement: client.volume,
            width: WIDTH,
            ring_slices: RING_SLICES,
            slices,
        };
        assert_eq!(client.call(create).await, Err(Refusal::BadToken));
        client.envelope.set(Envelope { epoch: Epoch(u32::MAX), ..client.envelope.get() });
        let open = Operation::Open { token: Token([0; 32]), owner: "writer".to_string(), slices: vec![] };
        assert_eq!(client.call(open).await, Err(Refusal::BadToken));
        let of_another_epoch = open_as(&client, 7, "writer");
        assert_eq!(client.call(of_another_epoch).await, Err(Refusal::BadToken));
    });
}

#[test]
fn a_later_epoch_fences_the_earlier_for_good() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        client.write(1, 1).await.unwrap();
        let old = client.envelope.get();
        assert!(client.open().await.unwrap().open_in_previous_epoch);
        let new = client.envelope.get();
        client.envelope.set(old);
        let stale = Refusal::StaleEpoch { replica: Epoch(2) };
        assert_eq!(client.write(1, 1).await, Err(stale.clone()));
        assert_eq!(client.read(1, 1).await, Err(stale.clone()));
        assert_eq!(client.flush().await, Err(stale.clone()));
        assert_eq!(client.call(open_as(&client, 1, "writer")).await, Err(stale.clone()));
        client.machine.crash_and_start().await;
        assert_eq!(client.read(1, 1).await, Err(stale), "the epoch is durable");
        client.envelope.set(new);
        assert_eq!(client.read(1, 1).await, Err(Refusal::OtherIncarnation));
    });
}

#[test]
fn an_open_is_answered_again_to_the_same_writer_and_to_no_other_of_that_epoch() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        client.open().await.unwrap();
        let again = client.open_in(Epoch(2)).await.unwrap();
        assert!(again.open_in_previous_epoch);
        let other = client.call(open_as(&client, 2, "other")).await;
        assert_eq!(other, Err(Refusal::StaleEpoch { replica: Epoch(2) }));
        client.machine.crash_and_start().await;
        let other = client.call(open_as(&client, 2, "other")).await;
        assert_eq!(other, Err(Refusal::StaleEpoch { replica: Epoch(2) }));
        assert!(!client.open_in(Epoch(2)).await.unwrap().open_in_previous_epoch, "another incarnation");
    });
}

/// What its writer was replaying to it when it died may be missing.
#[test]
fn who_restarted_within_an_epoch_has_not_been_open_in_it_for_the_next() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        client.open_in(Epoch(2)).await.unwrap();
        client.machine.crash_and_start().await;
        client.open_in(Epoch(2)).await.unwrap();
        client.open_in(Epoch(2)).await.unwrap();
        assert!(!client.open_in(Epoch(3)).await.unwrap().open_in_previous_epoch);
        assert!(client.open_in(Epoch(4)).await.unwrap().open_in_previous_epoch, "it was up all through epoch 3");
    });
}

#[test]
fn what_a_fenced_writer_had_got_in_is_there_when_the_open_of_the_next_is_answered() {
    for seed in 0..40 {
        simulate(seed, |world| async move {
            let client = opened(&world).await;
            let old = Client { envelope: Rc::new(client.envelope.get().into()), ..client.clone() };
            let epoch = old.envelope.get().epoch;
            let mut versions = Vec::new();
            for sequence in 1..30u64 {
                let (client, version) = (old.clone(), Version::new(epoch, sequence));
                versions.push(version);
                world.spawn(client.machine.process.get(), async move {
                    client.machine.world.sleep(std::time::Duration::from_micros(sequence * 40)).await;
                    let (operation, payload) = Client::write_operation(sequence, 1, version, false);
                    let _ = client.call_with(operation, payload).await;
                });
            }
            world.sleep(std::time::Duration::from_micros(world.random_below(1500))).await;
            client.open().await.unwrap();
            let first = client.describe(Version::ZERO).await.unwrap();
            world.sleep(std::time::Duration::from_millis(50)).await;
            assert_eq!(client.describe(Version::ZERO).await.unwrap(), first, "seed {}", world.seed());
        });
    }
}

#[test]
fn slices_not_held_are_missing_and_never_zeros() {
    simulate(1, |world| async move {
        let machine = Machine::new(&world, 8, 64).await;
        let client = Client::create(&machine, 1).await;
        let opened = client.open().await.unwrap();
        assert_eq!(opened.missing, vec![]);
        client.envelope.set(Envelope { generation: RingGeneration(8), ..client.envelope.get() });
        assert!(matches!(client.read(1, 1).await, Err(Refusal::NotOwner { .. })));
        assert_eq!(client.open().await.unwrap().missing, placement(client.volume).slices());
        assert!(matches!(client.read(1, 1).await, Err(Refusal::NotOwner { .. })));
        let envelope = Envelope { volume: volume(9), generation: GENERATION, ..Envelope::NONE };
        let stranger = Client { volume: volume(9), envelope: Rc::new(envelope.into()), ..client.clone() };
        assert_eq!(stranger.open().await.unwrap().missing, placement(volume(9)).slices());
        assert_eq!(stranger.read(1, 1).await, Err(Refusal::NotOpen));
    });
}

#[test]
fn malformed_requests_are_refused_and_change_nothing() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let epoch = client.envelope.get().epoch;
        let version = Version::new(epoch, 5);
        let write = |first, count, version| Client::write_operation(first, count, version, false);
        let slice = placement(client.volume).slices()[0];
        let clear = |count| Operation::Clear { first: BlockIndex(9), count, slice, version, durable: false };
        let cases = vec![
            write(1020, 5, version),
            write(u64::MAX - 3, 2, version),
            write(1, 257, version),
            write(1, 1, Version::ZERO),
            write(1, 1, Version::new(Epoch(epoch.0 + 1), 1)),
            (write(1, 2, version).0, Bytes::from_static(&[0; 4096])),
            (Operation::Read { first: BlockIndex(0), count: 0 }, Bytes::new()),
            (Operation::Read { first: BlockIndex(1023), count: 2 }, Bytes::new()),
            (clear(0), Bytes::new()),
            (clear(u64::MAX), Bytes::new()),
            (Operation::Ping, Bytes::new()),
        ];
        for (operation, payload) in cases {
            let refused = client.call_with(operation.clone(), payload).await;
            assert!(matches!(refused, Err(Refusal::Malformed { .. })), "{operation:?}: {refused:?}");
        }
        let (operation, payload) = write(1, 2, version);
        let mut bytes = payload.to_vec();
        bytes[5000] ^= 1;
        let refused = client.call_with(operation, bytes.into()).await;
        assert!(matches!(refused, Err(Refusal::Corrupt { block: BlockIndex(2), .. })), "{refused:?}");
        assert_eq!(client.describe(Version::ZERO).await.unwrap(), vec![]);
    });
}

#[test]
fn creating_again_is_no_error_and_another_placement_is() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        client.envelope.set(Envelope { epoch: Epoch(0), incarnation: Incarnation(0), ..client.envelope.get() });
        assert_eq!(client.call(client.creation()).await, Ok(Answer::Created));
        let Operation::CreateInstances { token, placement, slices, .. } = client.creation() else { unreachable!() };
        let other = Operation::CreateInstances { token, placement, width: 4, ring_slices: RING_SLICES, slices };
        assert!(matches!(client.call(other).await, Err(Refusal::Malformed { .. })));
    });
}

#[test]
fn writes_that_arrive_together_share_batches_and_flushes_share_syncs() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let before = client.machine.shard().statistics();
        join_all((0..40).map(|block| client.write(block, 1))).await.into_iter().for_each(|done| assert!(done.is_ok()));
        let written = client.machine.shard().statistics();
        assert!(written.batches - before.batches <= 5, "{}", written.batches - before.batches);
        join_all((0..40).map(|_| client.flush())).await.into_iter().for_each(|done| done.unwrap());
        assert!(client.machine.shard().statistics().syncs - written.syncs <= 2);
    });
}

#[test]
fn a_flush_does_not_join_a_sync_that_runs_already() {
    simulate(1, |world| async move {
        let client = opened(&world).await;
        let syncs = client.machine.shard().statistics().syncs;
        let process = client.machine.process.get();
        for wait in 0..3u64 {
            let client = client.clone();
            world.spawn(process, async move {
                client.machine.world.sleep(std::time::Duration::from_micros(wait)).await;
                client.call(Operation::Flush).await.unwrap();
            });
        }
        world.sleep(std::time::Duration::from_millis(20)).await;
        assert_eq!(client.machine.shard().statistics().syncs - syncs, 2, "one for the first, one for the other two");
    });
}

#[test]
fn a_durable_write_behind_what_is_durable_needs_no_sync_and_another_does() {
    for seed in 0..40 {
        simulate(seed, |world| async move {
            let client = opened(&world).await;
            let write = async |block, durable| {
                let version = client.next_version();
                let (operation, payload) = Client::write_operation(block, 1, version, durable);
                client.call_with(operation, payload).await.unwrap();
                version
            };
            client.flush().await.unwrap();
            let before = client.machine.shard().statistics().syncs;
            let first = [write(0, true).await, write(1, true).await, write(2, true).await];
            assert_eq!(client.machine.shard().statistics().syncs, before, "each was durable when it was written");
            let plain = write(3, false).await;
            let behind = write(4, true).await;
            assert!(client.machine.shard().statistics().syncs > before, "what is before it was not durable");
            client.machine.crash_and_start().await;
            client.open().await.unwrap();
            let versions = [first[0], first[1], first[2], plain, behind].map(|version| (version, true));
            assert_eq!(client.read(0, 5).await.unwrap(), versions, "seed {seed}");
        });
    }
}

#[test]
fn a_durable_write_is_not_answered_by_a_shard_whose_sync_beside_it_failed() {
    let mut refused = 0;
    for seed in 0..60 {
        let ended = Rc::new(std::cell::RefCell::new(Vec::new()));
        let told = ended.clone();
        simulate(seed, |world| async move {
            let client = opened(&world).await;
            client.flush().await.unwrap();
            let (operation, payload) = Client::write_operation(0, 1, client.next_version(), true);
            let write = async {
                let answer = client.call_with(operation, payload).await;
                told.borrow_mut().push(("write", answer.is_ok()));
            };
            let flush = async {
                // The write has been begun with.
                world.sleep(std::time::Duration::from_micros(20)).await;
                client.machine.disk.fail_syncs(1);
                let answer = client.call(Operation::Flush).await;
                told.borrow_mut().push(("flush", answer.is_ok()));
            };
            futures::join!(write, flush);
        });
        match ended.borrow()[..] {
            [("write", true), ("flush", _)] | [("flush", true), ("write", _)] => {}
            [("flush", false), ("write", false)] | [("write", false), ("flush", _)] => refused += 1,
            ref other => panic!("seed {seed}: {other:?}"),
        }
    }
    assert!(refused > 0, "the sync failed before the write was over in none of the seeds");
}
